"""The index of a knowledge base: a folder that is written once and then searched.

Layout: `embedder/`, `embeddings-*.npy` (2¹⁴ rows each), `scann/` unless the search is exact,
`build.json` (what the files belong to, so that a killed build can go on), and `manifest.json`,
written last, with a checksum of every file: ScaNN itself loads flipped bytes without a word.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int64
from ml_collections import ConfigDict
from tqdm import tqdm

from m3jax.retrieval.embed import Embedder, load_embedder
from m3jax.retrieval.errors import RetrievalError
from m3jax.retrieval.search import (
    SHARD_ROWS,
    Searcher,
    build_scann,
    import_scann,
    scann_settings,
)
from m3jax.retrieval.spec import read_spec
from m3jax.text.files import (
    TEMPORARY,
    checksum,
    committing,
    digest,
    read_sealed,
    write_atomically,
    write_sealed,
)
from m3jax.text.references import References

__all__ = ["Index", "RetrievalError", "build_index"]

MANIFEST = "manifest.json"
_BUILD = "build.json"
_EMBEDDER, _SCANN = "embedder", "scann"
_FORMAT = 1
_BATCH = 1024  # references embedded at a time


def build_index(
    references: References, embedder: Embedder, folder: str | Path, config: ConfigDict
) -> None:
    """Embeds all references and writes a searchable index; replaces another index in `folder`.

    A build that was killed leaves no manifest; the next call keeps the embeddings it finished.
    Where `folder` holds the very index asked for, nothing is done; but if its embedder is now kept
    at another place, the index learns that place.

    Args:
      references: the knowledge base.
      embedder: fitted on the references first if it is not `fitted`.
      folder: where to write.
      config: `retrieval.exact_below` is read.

    Raises:
      RetrievalError: the knowledge base is empty.
      OSError: from the file system, for example when the disk is full.
    """
    folder, size = Path(folder), len(references)
    if not size:
        raise RetrievalError(
            "the knowledge base is empty: an index needs at least one reference; run"
            " launch/prepare.py with documents"
        )
    if not embedder.fitted:
        embedder.fit(_texts(references, "fit embedder"))
    scann = import_scann() if size > config.retrieval.exact_below else None
    settings = {} if scann is None else scann_settings(size)
    identity: dict[str, Any] = {
        "format": _FORMAT,
        "kind": "exact" if scann is None else "scann",
        "references": references.fingerprint,
        "count": size,
        "embedder": embedder.fingerprint,
        "dimension": embedder.dimension,
        "settings": settings,
    }
    if _holds(folder, identity):
        if read_spec(folder / _EMBEDDER) != embedder.spec:
            (folder / MANIFEST).unlink()  # a build killed now keeps the embeddings
            embedder.save(folder / _EMBEDDER)
            _write_manifest(folder, identity)
        return
    _clear(folder, identity)
    embedder.save(folder / _EMBEDDER)
    _embed(references, embedder, folder)
    if scann is not None:
        embeddings = np.concatenate([np.load(path) for path in _shards(folder, size)])
        build_scann(scann, embeddings, settings, folder / _SCANN)
    _write_manifest(folder, identity)


def _texts(references: References, description: str, start: int = 0) -> Iterator[str]:
    """Texts of all references from `start`, with a progress bar."""
    with tqdm(total=len(references), initial=start, desc=description, unit="ref") as bar:
        for first in range(start, len(references), _BATCH):
            ids = np.arange(first, min(first + _BATCH, len(references)))
            yield from references.texts(ids)
            bar.update(len(ids))


def _holds(folder: Path, identity: dict[str, Any]) -> bool:
    """Whether the folder has a whole index of this identity."""
    try:
        manifest = _read_manifest(folder)
        _verify(folder, manifest)
    except RetrievalError:
        return False
    return manifest["identity"] == identity


def _clear(folder: Path, identity: dict[str, Any]) -> None:
    """Makes room for a build; keeps embeddings of an unfinished build of the same identity."""
    folder.mkdir(parents=True, exist_ok=True)
    build = json.dumps(identity, indent=1, sort_keys=True).encode()
    path = folder / _BUILD
    finished = (folder / MANIFEST).exists()  # of another identity, or damaged
    (folder / MANIFEST).unlink(missing_ok=True)
    if finished or not path.exists() or path.read_bytes() != build:
        path.unlink(missing_ok=True)
        for old in folder.glob("embeddings-*"):
            old.unlink()
    for old in folder.glob("*" + TEMPORARY):
        old.unlink()
    shutil.rmtree(folder / _SCANN, ignore_errors=True)
    shutil.rmtree(folder / _EMBEDDER, ignore_errors=True)
    write_atomically(path, build)


def _shards(folder: Path, size: int) -> list[Path]:
    return [folder / f"embeddings-{i:05d}.npy" for i in range(-(-size // SHARD_ROWS))]


def _embed(references: References, embedder: Embedder, folder: Path) -> None:
    """Writes the shards of embeddings that are missing, each whole or not at all."""
    paths = _shards(folder, len(references))
    done = next((i for i, path in enumerate(paths) if not path.exists()), len(paths))
    texts = _texts(references, "embed references", min(done * SHARD_ROWS, len(references)))
    for i in range(done, len(paths)):
        rows = min(SHARD_ROWS, len(references) - i * SHARD_ROWS)
        embeddings = np.empty((rows, embedder.dimension), np.float32)
        for start in range(0, rows, _BATCH):
            part = embeddings[start : start + _BATCH]
            part[:] = embedder.embed([next(texts) for _ in range(len(part))])
        with committing(paths[i]) as temporary, temporary.open("wb") as file:
            np.save(file, embeddings)
    for _ in texts:  # ends the progress bar
        pass


def _write_manifest(folder: Path, identity: dict[str, Any]) -> None:
    """Commits the index: syncs every file, then writes their checksums."""
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            os.fsync(file.fileno())  # ScaNN does not
        files[path.relative_to(folder).as_posix()] = checksum(path)
    write_sealed(folder / MANIFEST, {"identity": identity, "files": files})


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        raise RetrievalError(
            f"no finished index: {path} is missing; run launch/prepare.py, which goes on where a"
            " stopped build ended"
        )
    manifest = read_sealed(path)
    if manifest is None:
        raise _damaged(path, "is damaged")
    found = manifest["identity"]["format"]
    if found != _FORMAT:
        raise _damaged(path, f"describes an index of format {found}; this version reads {_FORMAT}")
    return manifest


def _verify(folder: Path, manifest: dict[str, Any]) -> None:
    for name, expected in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise _damaged(path, "is missing")
        if checksum(path) != expected:
            raise _damaged(path, "is damaged (its checksum differs)")


def _damaged(path: Path, what: str) -> RetrievalError:
    return RetrievalError(f"{path} {what}; run launch/prepare.py again to rebuild the index")


class Index:
    """A searchable knowledge base. Safe to use from several threads; cannot be pickled.

    Attributes:
      size: number of references R; ids are 0 … R − 1, those of the `References` indexed.
      kind: `exact` or `scann`, as it was built.
      dimension: width E of the embeddings.
      fingerprint: hex digest of the references, the embedder and the way of searching.
      references_fingerprint: that of the `References` indexed.
      embedder: embeds queries as the references were embedded.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        """Loads a verified index; call `open` instead."""
        identity = manifest["identity"]
        self.size: int = identity["count"]
        self.kind: str = identity["kind"]
        self.dimension: int = identity["dimension"]
        self.fingerprint: str = digest(json.dumps(identity, sort_keys=True))
        self.references_fingerprint: str = identity["references"]
        self.embedder: Embedder = load_embedder(folder / _EMBEDDER)
        if self.embedder.dimension != self.dimension:
            raise _damaged(
                folder / _EMBEDDER,
                f"makes embeddings of width {self.embedder.dimension}, but the index has"
                f" {self.dimension}",
            )
        shards = [np.load(path, mmap_mode="r") for path in _shards(folder, self.size)]
        scann = import_scann() if self.kind == "scann" else None
        if self.kind == "scann" and scann is None:
            warnings.warn(
                f"{folder} was built with ScaNN, which cannot be imported here; searching exactly,"
                " which is slower on a large index (pip install scann where it has a wheel)",
                stacklevel=3,
            )
        searcher = None if scann is None else scann.load_searcher(str(folder / _SCANN))
        every_score = not identity["settings"].get("reordered")
        self._searcher = Searcher(shards, searcher, batched=every_score)

    @classmethod
    def open(cls, folder: str | Path, references: References | None = None) -> Index:
        """Opens what `build_index` wrote, after comparing every file with its checksum.

        Args:
          folder: the index.
          references: if given, the index must be of these.

        Raises:
          RetrievalError: an unfinished index, a missing or damaged file, or other references; the
            message names the file and the remedy.
        """
        folder = Path(folder)
        manifest = _read_manifest(folder)
        identity = manifest["identity"]
        if references is not None and identity["count"] > len(references):
            raise RetrievalError(
                f"the index {folder} has ids 0 … {identity['count'] - 1}, but there are only"
                f" {len(references)} references; run launch/prepare.py again to rebuild the index"
            )
        if references is not None and identity["references"] != references.fingerprint:
            raise RetrievalError(
                f"the index {folder} was built from other references (fingerprint"
                f" {identity['references']}; these have {references.fingerprint}); run"
                " launch/prepare.py again to rebuild the index, or open the right references"
            )
        _verify(folder, manifest)
        return cls(folder, manifest)

    def search(
        self, embeddings: Float32[np.ndarray, "n E"], k: int
    ) -> tuple[Int64[np.ndarray, "n k"], Float32[np.ndarray, "n k"]]:
        """Finds the references whose embeddings have the largest dot products with the queries'.

        What a query finds does not depend on the other queries of the call.

        Args:
          embeddings: (n, E) float32 queries, from `embedder`.
          k: references per query, at least 1.

        Returns:
          ids (n, k) int64 and scores (n, k) float32, best first, equal scores by lower id; −1 and
          −inf where fewer than k were found.

        Raises:
          RetrievalError: k below 1, or embeddings of another width or dtype.
        """
        if k < 1:
            raise RetrievalError(f"k = {k} references per query; ask for at least 1")
        if embeddings.ndim != 2 or embeddings.shape[1] != self.dimension:
            raise RetrievalError(
                f"queries have shape {embeddings.shape}; this index needs (n, {self.dimension}),"
                " as its own embedder makes them"
            )
        return self._searcher.search(np.ascontiguousarray(embeddings), k)
