"""Synthetic inputs of benchmarks: configs, prepared workdirs, banks of random numbers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from m3jax import config as config_lib
from m3jax.config import PREFIX_TOKENS, largest_count
from m3jax.memory import codec as codecs
from m3jax.memory import storage
from m3jax.memory.bank import Bank
from m3jax.memory.binding import Binding, layout_of
from m3jax.memory.codec import Codec
from m3jax.memory.quantizer import Codebook
from m3jax.memory.write import finish, prepare_folder
from m3jax.retrieval.build import build_index
from m3jax.retrieval.embed import make_embedder
from m3jax.text.prepare import prepare_text
from m3jax.text.references import References


def section(name: str, **values: Any) -> dict[str, Any]:
    """Prefixes fields with the name of their config section, for `configured`."""
    return {f"{name}.{field}": value for field, value in values.items()}


def configured(*fields: Mapping[str, Any]) -> ConfigDict:
    """Returns the validated default config with these fields; later mappings override earlier."""
    config = config_lib.default()
    for part in fields:
        config.update_from_flattened_dict(dict(part))
    config.text.vocabulary = config.model.vocabulary
    return config_lib.validate(config)


def prepare(
    config: ConfigDict, workdir: Path, documents: Path, knowledge: Path | None = None
) -> References:
    """Prepares text, references and index of a workdir without output; returns the references."""
    second = None if knowledge is None else str(knowledge)
    prepare_text(config, workdir, str(documents), second, say=lambda line: None)
    references = References(workdir / "references")
    build_index(references, make_embedder(config), workdir / "index", config)
    return references


def random_codec(config: ConfigDict) -> Codec:
    """Makes the codec of `writer.compression`; a vector quantizer gets random tables, since times
    do not depend on their values."""
    head_dim, dtype = config.model.head_dim, config.memory.dtype
    if config.writer.compression != codecs.VECTOR:
        return Codec(config.writer.compression, head_dim, dtype)
    random = np.random.default_rng(0)

    def table(*shape: int) -> jax.Array:
        return jnp.asarray(random.normal(size=shape), jnp.float32)

    rotation = jnp.linalg.qr(table(head_dim, head_dim))[0]
    coarse, fine = (2, 2**14, head_dim // 2), (8, 2**10, head_dim // 8)
    keys, values = (Codebook(rotation, table(*coarse), table(*fine)) for _ in range(2))
    return Codec(codecs.VECTOR, head_dim, dtype, (keys, values))


def made_bank(folder: Path, config: ConfigDict, memories: int) -> Bank:
    """Writes a bank of random numbers or codes to a new folder, with equal shards, and opens it."""
    codec = random_codec(config)
    binding = Binding("made", "made", "made", layout_of(config, PREFIX_TOKENS))
    info = {"writer_step": 0, "writer_path": ""}
    lengths = np.full(memories, largest_count(config.model, config.memory), np.uint16)
    hashes = np.arange(memories, dtype=np.uint64)
    manifest, _ = prepare_folder(folder, config, binding, info, codec, lengths, hashes)
    random, shard = np.random.default_rng(1), manifest["shard_memories"]
    size = (shard, *manifest["shape"][1:])
    if codec.plain:
        block = random.standard_normal(size, np.float32).astype(jnp.dtype(codec.stored_dtype))
    else:
        block = random.integers(0, 256, size, dtype=np.uint8)
    array = storage.open_array(folder, manifest)
    for low in range(0, memories, shard):
        part = block[: memories - low]
        storage.write_shard_checksums(folder, low // shard, part)
        array[low : low + len(part)].write(part).result()
    finish(folder, manifest)
    return Bank.open(folder)
