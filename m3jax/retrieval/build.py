"""Builds an index: embeds the references, then trains and tunes a searcher for each part."""

from __future__ import annotations

import contextlib
import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from m3jax.errors import RetrievalError
from m3jax.files import TEMPORARY, json_text, write_array, write_atomically
from m3jax.retrieval import tune
from m3jax.retrieval.embedder import Embedder, read_spec
from m3jax.retrieval.index import (
    BUILD,
    EMBEDDER,
    FORMAT,
    MANIFEST,
    SCANN,
    embedding_files,
    part_folder,
    part_ranges,
    read_manifest,
    shards,
    verify,
    write_manifest,
)
from m3jax.retrieval.search import SHARD_ROWS, import_scann, scann_settings
from m3jax.text.references import References
from m3jax.workdir import only_writer

_BATCH = 1024  # references embedded at a time


def build_index(
    references: References, embedder: Embedder, folder: str | Path, config: ConfigDict
) -> None:
    """Embeds all references and writes a searchable index; replaces any other index in `folder`.

    Resumes a killed build with the embeddings that it finished. If `folder` holds the same index
    already, only the saved spec of the embedder is updated (such as the path of its encoder).
    Equal arguments give equal bytes. An unfitted embedder is fitted to the references first. Only
    the section `retrieval` of the config is read.

    Raises:
      RetrievalError: the knowledge base is empty or has fewer references than parts, the embedder
        cannot be fitted, or its vectors do not have its `dimension`.
      LockError: another process is writing the folder.
    """
    folder, size, parts = Path(folder), len(references), config.retrieval.index_parts
    if not size:
        raise RetrievalError(
            "the knowledge base is empty: an index needs at least one reference; run"
            " launch/prepare.py with documents"
        )
    if parts > size:
        raise RetrievalError(
            f"config.retrieval.index_parts = {parts}, but there are only {size} references; set it"
            f" to {size} or less"
        )
    if not embedder.fitted:
        embedder.fit(_texts(references, "fit embedder", range(size)))
    scann = import_scann() if size > config.retrieval.exact_below else None
    ranges = part_ranges(size, parts)
    identity: dict[str, Any] = {
        "format": FORMAT,
        "kind": "exact" if scann is None else "scann",
        "references": references.fingerprint,
        "count": size,
        "embedder": embedder.fingerprint,
        "dimension": embedder.dimension,
        "parts": parts,
        "keep_embeddings": scann is None or config.retrieval.keep_embeddings,
        "recall": None if scann is None else config.retrieval.recall,
        "settings": [{} if scann is None else scann_settings(len(ids)) for ids in ranges],
    }
    with only_writer(folder):
        if _holds(folder, identity):
            if read_spec(folder / EMBEDDER) != embedder.spec:
                tuned = read_manifest(folder)["parts"]
                (folder / MANIFEST).unlink()  # if killed now, the next build keeps the embeddings
                embedder.save(folder / EMBEDDER)
                write_manifest(folder, identity, tuned)
        else:
            _clear(folder, identity)
            embedder.save(folder / EMBEDDER)
            tuned = [
                _build_part(references, embedder, part_folder(folder, part), ids, scann, identity)
                for part, ids in enumerate(ranges)
            ]
            write_manifest(folder, identity, tuned)
        if not identity["keep_embeddings"]:
            for path in embedding_files(folder):  # only now, because a resumed build needs them
                path.unlink()


def _texts(references: References, description: str, ids: range) -> Iterator[str]:
    size = len(references)
    with tqdm(total=size, initial=ids.start, desc=description, unit="ref") as bar:
        for first in range(ids.start, ids.stop, _BATCH):
            block = np.arange(first, min(first + _BATCH, ids.stop))
            yield from references.texts(block)
            bar.update(len(block))


def _holds(folder: Path, identity: dict[str, Any]) -> bool:
    with contextlib.suppress(RetrievalError):
        manifest = read_manifest(folder)
        if manifest["identity"] == identity:
            verify(folder, manifest, range(identity["parts"]))
            return True
    return False


def _clear(folder: Path, identity: dict[str, Any]) -> None:
    """Empties the folder for a build; keeps embeddings of a killed build of the same index."""
    folder.mkdir(parents=True, exist_ok=True)
    build = json_text(identity, indent=1, sort_keys=True).encode()
    path = folder / BUILD
    finished = (folder / MANIFEST).exists()  # of another identity, or damaged
    (folder / MANIFEST).unlink(missing_ok=True)
    if finished or not path.exists() or path.read_bytes() != build:
        path.unlink(missing_ok=True)
        for old in embedding_files(folder):
            old.unlink()
    for old in folder.rglob("*" + TEMPORARY):
        old.unlink()
    parts = {part_folder(folder, part) for part in range(identity["parts"])}
    for old in {*folder.glob("part-*"), *folder.glob(SCANN)} - parts:
        shutil.rmtree(old)
    for part in parts:
        shutil.rmtree(part / SCANN, ignore_errors=True)
    shutil.rmtree(folder / EMBEDDER, ignore_errors=True)
    write_atomically(path, build)


def _build_part(
    references: References,
    embedder: Embedder,
    folder: Path,
    ids: range,
    scann: ModuleType | None,
    identity: dict[str, Any],
) -> dict[str, Any]:
    _embed(references, embedder, folder, ids)
    if scann is None:
        return {"settings": {}, "effort": {}, "recall": None}
    embeddings = np.concatenate([np.load(path) for path in shards(folder, len(ids))])
    queries = tune.sample_queries(references, embedder, tune.QUERIES, ids)
    settings, standalone = scann_settings(len(ids)), not identity["keep_embeddings"]
    target = identity["recall"]
    return tune.fit(scann, embeddings, queries, settings, folder / SCANN, target, standalone)


def _embed(references: References, embedder: Embedder, folder: Path, ids: range) -> None:
    """Embeds references and writes the missing embedding shards, each atomically."""
    paths = shards(folder, len(ids))
    done = next((i for i, path in enumerate(paths) if not path.exists()), len(paths))
    texts = _texts(references, "embed references", ids[done * SHARD_ROWS :])
    for path in paths[done:]:
        shard = list(itertools.islice(texts, SHARD_ROWS))
        parts = []
        for start in range(0, len(shard), _BATCH):
            batch = shard[start : start + _BATCH]
            parts.append(embedder.embed(batch))
            if parts[-1].shape != (len(batch), embedder.dimension):
                raise RetrievalError(
                    f"the embedder {embedder.name!r} has dimension {embedder.dimension}, but"
                    f" {len(batch)} texts became an array of shape {parts[-1].shape}; mend its"
                    " dimension"
                )
        write_array(path, np.concatenate(parts, dtype=np.float32))
    for _ in texts:  # ends the progress bar
        pass
