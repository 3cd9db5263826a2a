"""Settings of all tests: eight virtual CPU devices, strict ranks, annotations checked when run."""

import importlib
import os
from collections.abc import Callable, Iterator
from types import ModuleType

import processes
import pytest
from quick import xla_flags

# Before the first import of jax, which reads both only once.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = xla_flags(8)

import jax  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
install_import_hook("m3jax", "typechecking.check")


@pytest.fixture(scope="session", autouse=True)
def quick_compilation(tmp_path_factory: pytest.TempPathFactory) -> None:
    """One test's programs serve the others, and none is optimized for speed.

    So with the processes that tests start; their programs are kept apart, because a killed one may
    leave half a file. What a TPU would run is compiled with `JAX_DISABLE_MOST_OPTIMIZATIONS=0`.
    """
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.3,
        "jax_persistent_cache_min_entry_size_bytes": -1,
        "jax_disable_most_optimizations": True,
    }
    for name, value in settings.items():
        jax.config.update(name, value)
    settings["jax_compilation_cache_dir"] = str(tmp_path_factory.mktemp("compiled_by_processes"))
    os.environ.update({name.upper(): str(value) for name, value in settings.items()})


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    """What a test starts, and what that starts, ends with it, also when it fails."""
    yield
    processes.end_all()


@pytest.fixture(scope="session", autouse=True)
def no_fork_is_left() -> Iterator[None]:
    yield
    processes.end_forks()


@pytest.fixture(scope="session")
def require() -> Callable[[str], ModuleType]:
    """`require("torch")` imports a foreign implementation, or skips the test where it is missing.

    With M3JAX_PARITY=required, as in continuous integration, a missing one is a failure.
    """

    def load(name: str) -> ModuleType:
        try:
            return importlib.import_module(name)
        except ImportError as error:
            reason = f"{name} cannot be imported ({error}); pip install -e '.[parity]'"
        if os.environ.get("M3JAX_PARITY") == "required":
            pytest.fail(reason)
        pytest.skip(reason)

    return load
