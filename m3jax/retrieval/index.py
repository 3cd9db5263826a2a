"""Search index of a knowledge base: a folder that is written once; and indices with deltas.

An index has one or more parts, each with its own searcher over a range of references. So several
hosts can share an index: each opens some parts, and `merge` joins the results.

Its folder has `embedder/`; one `part-*/` per part, with `embeddings-*.npy` (2¹⁴ rows each) and,
unless the search is exact, `scann/`; `build.json`, the identity of the index, by which a killed
build resumes; and `manifest.json`, written last, with a checksum of every file, because ScaNN does
not detect damaged files.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from m3jax.errors import RetrievalError
from m3jax.files import checksum, digest, json_text, open_array, read_sealed, write_sealed
from m3jax.numbering import Numbering
from m3jax.retrieval.embed import load_embedder
from m3jax.retrieval.embedder import Embedder
from m3jax.retrieval.search import (
    SHARD_ROWS,
    Searcher,
    SearchIndex,
    SearchResult,
    import_scann,
    merge,
)
from m3jax.text.references import References
from m3jax.workdir import LOCK

FORMAT = 2
MANIFEST = "manifest.json"
BUILD = "build.json"
EMBEDDER, SCANN = "embedder", "scann"
_EMBEDDINGS = "embeddings-*"


class Index(SearchIndex):
    """Searches the embeddings of a knowledge base. Safe to use from several threads; not picklable.

    Attributes: those of `SearchIndex`, and
      kind: search for which it was built, `exact` or `scann`.
      dimension: width E of the embeddings.
      parts: numbers of the open parts; only their references are returned.
      recall: lowest recall@5 among the open parts, measured during the build; None if exact.
    """

    def __init__(
        self,
        folder: Path,
        manifest: dict[str, Any],
        parts: Sequence[int],
        embedder: Embedder | None = None,
    ) -> None:
        identity, self.parts = manifest["identity"], tuple(parts)
        self.size, self.kind = identity["count"], identity["kind"]
        self.dimension, self.references_fingerprint = identity["dimension"], identity["references"]
        self.fingerprint = _fingerprint(identity, manifest["parts"])
        self.embedder = embedder or load_embedder(folder / EMBEDDER)
        if self.embedder.dimension != self.dimension:
            raise damaged(
                folder / EMBEDDER,
                f"makes vectors of dimension {self.embedder.dimension}, the index has"
                f" {self.dimension}",
            )
        recalls = [manifest["parts"][part]["recall"] for part in parts]
        self.recall: float | None = min(recalls) if self.kind == "scann" else None
        scann = _scann(folder, identity["keep_embeddings"]) if self.kind == "scann" else None
        ranges = part_ranges(self.size, identity["parts"])
        self._searchers: list[tuple[int, Searcher]] = []
        for part in parts:
            place, ids = part_folder(folder, part), ranges[part]
            paths = shards(place, len(ids)) if identity["keep_embeddings"] else []
            embeddings = [open_array(path) for path in paths]
            searcher = None if scann is None else scann.load_searcher(str(place / SCANN))
            effort = manifest["parts"][part]["effort"]
            self._searchers.append((ids.start, Searcher(embeddings, searcher, effort)))

    @classmethod
    def open(
        cls,
        folder: str | Path,
        references: References | None = None,
        parts: Sequence[int] | None = None,
        embedder: Embedder | None = None,
    ) -> Index:
        """Opens an index that `build_index` wrote, after verifying the checksum of every file.

        Args:
          folder: folder of the index.
          references: if not None, the references that the index must be of.
          parts: numbers of the parts to open; default: all. Files of other parts may be missing.
          embedder: embedder of queries; default: the one that the index was built with.

        Raises:
          RetrievalError: the index is unfinished or of another format; a file is missing or
            damaged; it does not have these parts; it is of other references; its encoder is
            missing or has changed; or it keeps no embeddings and ScaNN is missing.
          HuggingFaceError: the folder of its encoder cannot be read.
        """
        folder = Path(folder)
        manifest = read_manifest(folder)
        identity, count = manifest["identity"], manifest["identity"]["parts"]
        parts = range(count) if parts is None else sorted(set(parts))
        if not parts or not 0 <= parts[0] <= parts[-1] < count:
            raise RetrievalError(
                f"the index {folder} has parts 0 … {count - 1}, not all of {list(parts)};"
                " open some of its own, or build it again with another config.retrieval.index_parts"
            )
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
        verify(folder, manifest, parts)
        return cls(folder, manifest, parts, embedder)

    def search(self, embeddings: Float32[np.ndarray, "n E"], k: int) -> SearchResult:
        self._check(embeddings, k)
        return self._merged([searcher for _, searcher in self._searchers], embeddings, k)

    def search_exactly(self, embeddings: Float32[np.ndarray, "n E"], k: int) -> SearchResult:
        """Compares queries with all embeddings, whatever the kind of the index.

        Errors as in `search`, and `RetrievalError` if the index keeps no embeddings.
        """
        self._check(embeddings, k)
        exact = [searcher.exact() for _, searcher in self._searchers]
        if not all(exact):
            raise RetrievalError(
                "this index keeps no embeddings to search exactly; its recall when it was built is"
                f" {self.recall:.3f}. Build it with config.retrieval.keep_embeddings = True to"
                " compare"
            )
        return self._merged([searcher for searcher in exact if searcher], embeddings, k)

    def _check(self, embeddings: np.ndarray, k: int) -> None:
        if k < 1:
            raise RetrievalError(f"k = {k} references per query; ask for at least 1")
        if embeddings.ndim != 2 or embeddings.shape[1] != self.dimension:
            raise RetrievalError(
                f"queries have shape {embeddings.shape}; this index needs (n, {self.dimension}),"
                " as its own embedder makes them"
            )

    def _merged(
        self, searchers: Sequence[Searcher], embeddings: np.ndarray, k: int
    ) -> SearchResult:
        queries, results = np.ascontiguousarray(embeddings), []
        for (start, _), searcher in zip(self._searchers, searchers, strict=True):
            ids, scores = searcher.search(queries, k)
            results.append((np.where(ids < 0, ids, ids + start), scores))
        return results[0] if len(results) == 1 else merge(results)


def _scann(folder: Path, keep_embeddings: bool) -> Any:
    """Imports ScaNN. If it is missing, warns of exact search, or raises without embeddings."""
    scann = import_scann()
    if scann is not None:
        return scann
    if not keep_embeddings:
        raise RetrievalError(
            f"{folder} was built with ScaNN and keeps no embeddings, and ScaNN cannot be imported"
            " here; pip install scann where it has a wheel, or build the index with"
            " config.retrieval.keep_embeddings = True"
        )
    warnings.warn(
        f"{folder} was built with ScaNN, which cannot be imported here; searching exactly,"
        " which is slower on a large index (pip install scann where it has a wheel)",
        stacklevel=4,
    )
    return None


class DeltaIndex(SearchIndex):
    """Searches the indices of a base and its deltas as one index, without tombstones."""

    def __init__(self, indices: Sequence[Index], tombstones: np.ndarray, references: str) -> None:
        """Joins a base and its deltas, which have one embedder that knows the words of all.

        `references` is the fingerprint of their `DeltaReferences`.
        """
        self.indices, self.embedder = list(indices), indices[-1].embedder
        self.numbering = Numbering([index.size for index in indices], tombstones)
        self.size = self.numbering.size
        self.references_fingerprint = references
        own = [index.fingerprint for index in indices]
        self.fingerprint = digest(*own, self.numbering.fingerprint)
        split = self.numbering.split(self.numbering.tombstones)
        self._tombstones_of = {part: len(rows) for part, _, rows in split}

    def search(self, embeddings: Float32[np.ndarray, "n E"], k: int) -> SearchResult:
        """Searches all parts as `SearchIndex.search` does; never returns a tombstone."""
        return merge([self._search_part(i, embeddings, k) for i in range(len(self.indices))])

    def _search_part(self, part: int, embeddings: np.ndarray, k: int) -> SearchResult:
        """Finds the k best references of a part that are no tombstones.

        While tombstones leave fewer than k results, it searches again for twice as many.
        """
        index, tombstones = self.indices[part], self._tombstones_of.get(part, 0)
        count = k
        while True:
            ids, scores = index.search(embeddings, count)
            ids = np.where(ids < 0, -1, ids + self.numbering.first(part))
            removed = (ids >= 0) & self.numbering.is_removed(ids)
            enough = count >= min(k + tombstones, index.size)
            if enough or ((count - removed.sum(axis=1)) >= k).all():
                break
            count = min(2 * count, k + tombstones, max(index.size, k))
        scores = np.where(removed, -np.inf, scores).astype(np.float32)
        ids = np.where(removed, -1, ids)
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        return np.take_along_axis(ids, order, axis=1), np.take_along_axis(scores, order, axis=1)


# -- the folder ------------------------------------------------------------------------------------
def part_folder(folder: Path, part: int) -> Path:
    """Returns the folder of a part."""
    return folder / f"part-{part:05d}"


def part_ranges(size: int, parts: int) -> list[range]:
    """Returns the id range of each part: contiguous, of nearly equal length."""
    cuts = [part * size // parts for part in range(parts + 1)]
    return [range(start, stop) for start, stop in zip(cuts, cuts[1:], strict=False)]


def shards(folder: Path, size: int) -> list[Path]:
    """Lists the embedding files of a part with `size` references."""
    return [folder / f"embeddings-{i:05d}.npy" for i in range(-(-size // SHARD_ROWS))]


def embedding_files(folder: Path) -> list[Path]:
    """Lists all embedding files in the folder of an index, including files of an older layout."""
    return [*folder.glob(_EMBEDDINGS), *folder.glob("part-*/" + _EMBEDDINGS)]


def write_manifest(folder: Path, identity: dict[str, Any], parts: list[dict[str, Any]]) -> None:
    """Completes an index: syncs every file, then writes the manifest with their checksums.

    Embeddings that the index will not keep are left out.
    """
    files = {}
    dropped = [folder / LOCK, *([] if identity["keep_embeddings"] else embedding_files(folder))]
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        if path not in dropped:
            with path.open("rb") as file:
                os.fsync(file.fileno())  # ScaNN does not sync its files
            files[path.relative_to(folder).as_posix()] = checksum(path)
    content = {"identity": identity, "parts": parts, "files": files}
    content["fingerprint"] = _fingerprint(identity, parts)
    write_sealed(folder / MANIFEST, content)


def _fingerprint(identity: dict[str, Any], parts: list[dict[str, Any]]) -> str:
    return digest(json_text([identity, parts], sort_keys=True))


def read_manifest(folder: Path) -> dict[str, Any]:
    """Reads the manifest of a finished index.

    Raises:
      RetrievalError: the manifest is missing, damaged or of another format.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise RetrievalError(
            f"no finished index: {path} is missing; run launch/prepare.py, which goes on where a"
            " stopped build ended"
        )
    manifest = read_sealed(path, "identity", "parts", "files")
    if manifest is None:
        raise damaged(path, "is damaged")
    stored = manifest["identity"]["format"]
    if stored != FORMAT:
        raise damaged(path, f"describes an index of format {stored}; this version reads {FORMAT}")
    return manifest


def verify(folder: Path, manifest: dict[str, Any], parts: Collection[int]) -> None:
    """Verifies the checksums of the files of these parts and of all files outside parts.

    Raises:
      RetrievalError: a part or file, which the message names, is missing, or a file is damaged.
    """
    opened = {part_folder(folder, part).name for part in parts}
    for part in sorted(opened):
        if not (folder / part).is_dir():
            raise damaged(
                folder / part, "is missing (copy it here, or open the index without this part)"
            )
    for name, expected in manifest["files"].items():
        path, first = folder / name, name.split("/")[0]
        if first.startswith("part-") and first not in opened:
            continue
        if not path.is_file():
            raise damaged(path, "is missing")
        if checksum(path) != expected:
            raise damaged(path, "is damaged (its checksum differs)")


def damaged(path: Path, what: str) -> RetrievalError:
    """Returns the error for a file or folder that only a rebuild can repair."""
    return RetrievalError(f"{path} {what}; run launch/prepare.py again to rebuild the index")
