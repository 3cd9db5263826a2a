"""Batches for training and evaluation: rows with their retrieved references and memories.

The batch of step s is a function of (seed, s) alone, so that a resumed run reads the same batches,
on any number of hosts. `Pipeline.batch(s)` computes it, each host only its own rows;
`Pipeline.batches` does so in threads, ahead of training. With `data.shares` the rows at a place of
the batch always come from the same shards of the corpus, and a host fetches no others from a
bucket.
"""

from __future__ import annotations

import functools
import itertools
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
from jaxtyping import Bool, Int
from ml_collections import ConfigDict

from m3jax.config import PACKED
from m3jax.data.batch import Batch
from m3jax.data.distractors import draw_distractors
from m3jax.data.rows import PackedRows, Row, Rows
from m3jax.errors import TextError
from m3jax.knowledge.versions import (
    Version,
    check_bank,
    open_bank,
    open_references,
    open_retriever,
    open_version,
)
from m3jax.memory.bank import Bank
from m3jax.memory.reader import Dequantize
from m3jax.mirror import Mirror
from m3jax.retrieval.retriever import Retriever
from m3jax.text.corpus import Corpus
from m3jax.text.records import is_side_file
from m3jax.text.references import References
from m3jax.text.tokenizer import Tokenizer
from m3jax.workdir import INPUTS

_READS = 1000  # last reads of a bank whose times are kept


class Pipeline:
    """Computes the batch of any step: its rows, their retrieved references, their memories.

    Args:
      config: a validated config; `memory.source` decides if batches carry memories (`precomputed`),
        reference tokens, or neither (`none`).
      rows: the rows of a split.
      tokenizer: decodes chunks into query texts.
      references: the knowledge base; None in stages without memory.
      retriever: retrieves references for chunks; None if there is no memory, or the documents name
        their references (`retrieval.ids = stored`) and there are no distractors.
      bank: memories of the references; None unless the source is `precomputed`.
      shift: 0: the query of a chunk is its own text; 1: the text of the previous chunk.
      batch_size: rows of a batch over all hosts.
      dropout: share of chunks, drawn anew for every step, whose memories are hidden.
      distractors: number of the memories of a chunk that are distractors, drawn anew for every
        step; needs a retriever.

    Attributes:
      base_logprobs: DPO's base log-probabilities of the answers of every row, `(rows, slots)`
        float32, nats; None (batches then hold 0) until `m3jax.train.dpo_base` sets them.
      base_model: what identifies the model of `base_logprobs`; "" while these are None.
      version: version of the knowledge base; None without memory.
    """

    def __init__(
        self,
        config: ConfigDict,
        rows: Rows | PackedRows,
        tokenizer: Tokenizer,
        references: References | None = None,
        retriever: Retriever | None = None,
        bank: Bank | None = None,
        *,
        shift: int,
        batch_size: int,
        dropout: float = 0.0,
        distractors: int = 0,
    ):
        self.config, self.rows, self.tokenizer = config, rows, tokenizer
        self.references, self.retriever, self.bank = references, retriever, bank
        self.shift, self.batch_size, self.dropout = shift, batch_size, dropout
        self.distractors = distractors
        self._live = references.live if references is not None and distractors else None
        # Every epoch has its own order of the rows of a share; a batch may span two epochs.
        self._orders = [
            grain.MapDataset.range(low, high).seed(_share_seed(config.seed, i)).shuffle().repeat()
            for i, (low, high) in enumerate(itertools.pairwise(rows.shares.tolist()))
        ]
        self.version: Version | None = None
        self.base_logprobs: np.ndarray | None = None
        self.base_model = ""
        self._counts = Counter(chunks=0, chunks_without_reference=0)
        self._reads = deque[float](maxlen=_READS)  # seconds
        self._lock = threading.Lock()

    def batch(self, step: int, rows: np.ndarray | slice | None = None) -> Batch:
        """Returns the batch of a step, or only its rows at the positions `rows` (one host's)."""
        selected = np.arange(self.batch_size)[slice(None) if rows is None else rows]
        ids = self.drawn(step, selected)
        draws = None
        if self.distractors:
            seeds = [[self.config.seed, 0x6D34, step, place] for place in selected.tolist()]
            draws = [np.random.default_rng(seed) for seed in seeds]
        return self.read(ids, self._hidden(step)[selected], draws)

    def drawn(
        self, step: int, places: Int[np.ndarray, " n"] | None = None
    ) -> Int[np.ndarray, " n"]:
        """Returns the rows at places of the batch of a step, or all; makes their shares present."""
        places = np.arange(self.batch_size) if places is None else places
        each = self.batch_size // len(self._orders)  # rows of a share in a batch
        shares, within = np.divmod(places, each)
        self.rows.fetch(np.unique(shares).tolist())
        drawn = zip(shares.tolist(), (step * each + within).tolist(), strict=True)
        return np.array([self._orders[share][place] for share, place in drawn])

    def read(
        self,
        ids: Int[np.ndarray, " n"],
        hidden: Bool[np.ndarray, "n C"] | None = None,
        draws: Sequence[np.random.Generator] | None = None,
    ) -> Batch:
        """Returns a batch of the rows `ids`, without memories for the chunks marked in `hidden`.

        `draws` has a generator for the distractors of each row; None = no distractors.
        """
        items = [self.rows[int(row)] for row in ids]

        def stacked(name: str, dtype: Any) -> Any:
            return np.stack([getattr(item, name) for item in items]).astype(dtype, copy=False)

        batch = Batch(
            tokens=stacked("inputs", np.int32),
            targets=stacked("targets", np.int32),
            weights=stacked("weights", np.float32),
        )
        packings = [item.packing for item in items if item.packing is not None]
        if packings:
            batch = batch._replace(packing=jax.tree.map(lambda *x: np.stack(x), *packings))
        if self.rows.slots:
            logprobs = self.base_logprobs
            if logprobs is None:
                logprobs = np.zeros((len(self.rows), self.rows.slots), np.float32)
            answers = stacked("answers", np.int32)
            batch = batch._replace(answers=answers, base_logprobs=logprobs[ids])
        source = self.config.memory.source
        if source == "none":
            return batch
        reference_ids: Any = self._reference_ids(items, draws)
        if hidden is not None:
            reference_ids = np.where(hidden[..., None], -1, reference_ids)
        batch = batch._replace(reference_ids=reference_ids.astype(np.int32))
        chunks = len(items) * self.rows.chunks
        if packings:  # rows are padded to the chunks of the fullest; count real chunks
            chunks = sum(len(item.references) for item in items)
        without = chunks - int((reference_ids >= 0).any(axis=2).sum())
        with self._lock:
            self._counts.update(chunks=chunks, chunks_without_reference=without)
        if source == "precomputed":
            assert self.bank is not None
            begun = time.monotonic()
            memory = self.bank.read_stored(reference_ids)
            with self._lock:
                self._reads.append(time.monotonic() - begun)
                self._counts.update(bank_bytes=memory.keys.nbytes + memory.values.nbytes)
            return batch._replace(memory=memory)
        return batch._replace(reference_tokens=self._reference_tokens(reference_ids))

    def retrieved(self, ids: Int[np.ndarray, " n"]) -> Int[np.ndarray, "n C M"]:
        """Returns the ids of the references of the rows `ids`, −1 = none; reads no memories."""
        return self._reference_ids([self.rows[int(row)] for row in ids])

    def batches(
        self, first_step: int = 0, rows: np.ndarray | slice | None = None
    ) -> Iterator[Batch]:
        """Yields the batches of the steps from `first_step` on, loaded ahead in threads."""
        data = self.config.data
        steps = grain.MapDataset.range(first_step, 2**40).map(lambda step: self.batch(step, rows))
        options = grain.ReadOptions(num_threads=data.threads, prefetch_buffer_size=data.prefetch)
        return iter(steps.to_iter_dataset(options))

    @property
    def ingredients(self) -> dict[str, str]:
        """Returns the fingerprint of everything that batches are made from, by its name."""
        corpus = self.rows.corpus
        parts = {f"{corpus.folder.parent.name}/{corpus.folder.name}": corpus.fingerprint}
        if self.references is not None:
            parts["references"] = self.references.fingerprint
        if self.retriever is not None:
            parts["index"] = self.retriever.index.fingerprint
        if self.bank is not None:
            parts["bank"] = self.bank.fingerprint
        if self.base_model:
            parts[f"base model of {corpus.folder.name}"] = self.base_model
        return parts

    @property
    def dequantize(self) -> Dequantize | None:
        """Function that dequantizes a batch's memories; None if they are plain keys and values."""
        return None if self.bank is None else self.bank.dequantize

    def report(self) -> dict[str, float]:
        """Returns counters since the pipeline was opened: of chunks, the retriever and the bank.

        `bank_read_p99` is the time in seconds that 99 % of the last reads of a batch's memories
        took at most.
        """
        with self._lock:
            counts: dict[str, float] = dict(self._counts)
            if self._reads:
                counts["bank_read_p99"] = float(np.quantile(self._reads, 0.99))
        if self.retriever is not None:
            counts.update(self.retriever.report())
        if self.bank is not None:
            counts.update(self.bank.report())
        return counts

    def _reference_ids(
        self, items: Sequence[Row], draws: Sequence[np.random.Generator] | None = None
    ) -> np.ndarray:
        """Looks up or retrieves the reference ids `(B, C, M)` of every chunk, −1 = none.

        With `draws`, the last `distractors` of the M are drawn; if memories have positions of their
        own, all M are in random order.
        """
        stored, M = self.config.retrieval.ids == "stored", self.config.memory.per_chunk
        if draws is None:
            return self._stored(items) if stored else self._found(items, self.shift, M)
        assert self.retriever is not None
        # Stored references are right whatever is found, so a chunk may search with its own text.
        shift, most = 0 if stored else self.shift, self.retriever.candidates
        neighbours = self._found(items, shift, most, without_loss=stored)
        right = (self._stored(items) if stored else neighbours)[..., : M - self.distractors]
        rows = [
            self._distractors(*row) for row in zip(items, right, neighbours, draws, strict=True)
        ]
        ids = np.concatenate([right, np.stack(rows)], axis=2)
        if self.config.memory.spacing:  # or the model would learn that the nearest one is right
            ids = np.stack([g.permuted(row, axis=1) for g, row in zip(draws, ids, strict=True)])
        return ids

    def _stored(self, items: Sequence[Row]) -> np.ndarray:
        """Looks up the ids `(B, C, M)` that the documents name: the first of each chunk."""
        assert self.references is not None
        C, M = self.rows.chunks, self.config.memory.per_chunk
        ids = np.full((len(items), C, M), -1, np.int64)
        for row, item in enumerate(items):
            for chunk, key in enumerate(item.references[:C]):
                if key:
                    ids[row, chunk, 0] = self.references.find_named(key)
        return ids

    def _found(
        self, items: Sequence[Row], shift: int, k: int, without_loss: bool = False
    ) -> np.ndarray:
        """Retrieves the ids `(B, C, k)` for the chunks, best first, by `Row.queries`."""
        assert self.retriever is not None
        ids = np.full((len(items), self.rows.chunks, k), -1, np.int64)
        queries, against, places = [], [], []
        for row, item in enumerate(items):
            for chunk, query, text in item.queries(shift, without_loss):
                queries.append(self.tokenizer.decode(query))
                against.append(text)
                places.append((row, chunk))
        if places:
            ids[tuple(np.array(places).T)] = self.retriever.retrieve(queries, against, k)
        return ids

    def _distractors(
        self, item: Row, right: np.ndarray, neighbours: np.ndarray, random: np.random.Generator
    ) -> np.ndarray:
        """Draws the distractors `(C, distractors)` of a row."""
        retriever = self.retriever
        assert retriever is not None and self._live is not None

        def overlapping(ids: np.ndarray) -> np.ndarray:
            return np.any([retriever.overlapping(ids, text) for text, _ in item.texts], axis=0)

        share = self.config.memory.hard_distractors
        hard = random.random((len(right), self.distractors)) < share
        return draw_distractors(right, neighbours, self._live, hard, overlapping, random)

    def _hidden(self, step: int) -> np.ndarray:
        """Draws the mask `(B, C)` of chunks of the global batch whose memories a step hides."""
        generator = np.random.default_rng([self.config.seed, 0x6D33, step])
        return generator.random((self.batch_size, self.rows.chunks)) < self.dropout

    def _reference_tokens(self, ids: np.ndarray) -> Any:
        assert self.references is not None
        W = self.config.memory.reference_length
        tokens = np.zeros((ids.size, W), np.int32)
        real = ids.ravel() >= 0
        if real.any():
            read = self.references.tokens(ids.ravel()[real])
            tokens[real, : read.shape[1]] = read
        return tokens.reshape(*ids.shape, W)


def open_pipeline(
    config: ConfigDict,
    workdir: str | Path,
    *,
    split: str = "train",
    bank: str | Path | None = None,
    version: int | Version | None = None,
) -> Pipeline:
    """Opens the pipeline of a workdir made by `launch/prepare.py` and `launch/write_bank.py`.

    Args:
      config: a validated config.
      workdir: folder with `tokenizer`, `corpus`, `references`, `index` and, for precomputed
        memories, `bank`; or the mirror of a bucket, from which they are fetched.
      split: `train`, or `validation`, which uses `evaluation.batch_size`, `evaluation.shift` and
        `retrieval.overlap_evaluation`, and neither memory dropout nor distractors.
      bank: folder or URL of the bank; default the bank of the version.
      version: version of the knowledge base (`m3jax.knowledge.versions`), as a number or opened;
        default the current version. Compaction does not delete it while the pipeline is in use.

    Raises:
      TextError, RetrievalError, BankError, VersionError: a part of the workdir is missing, is
        damaged, or does not fit the other parts.
    """
    workdir = Path(workdir)
    train = split == "train"
    Mirror.of(workdir).fetch("tokenizer")
    tokenizer = Tokenizer.load(workdir / "tokenizer")
    rows = open_rows(config, workdir, split, tokenizer)
    options = {
        "shift": config.retrieval.shift if train else config.evaluation.shift,
        "batch_size": config.data.batch_size if train else config.evaluation.batch_size,
        "dropout": config.memory.dropout if train else 0.0,
    }
    if config.memory.source == "none":
        return Pipeline(config, rows, tokenizer, **options)
    options["distractors"] = config.memory.distractors if train else 0
    opened = version if isinstance(version, Version) else open_version(workdir, version)
    references = open_references(config, opened, tokenizer)
    memories = None
    if config.memory.source == "precomputed":
        cache = config.memory.cache_bytes
        memories = (
            Bank.open(bank, cache_bytes=cache) if bank else open_bank(opened, references, cache)
        )
        check_bank(config, memories, references, tokenizer)
    retriever = None
    if config.retrieval.ids == "search" or options["distractors"]:
        limit = config.retrieval.overlap_train if train else config.retrieval.overlap_evaluation
        retriever = open_retriever(config, opened, references, limit, bank=memories)
    pipeline = Pipeline(config, rows, tokenizer, references, retriever, memories, **options)
    pipeline.version = opened
    return pipeline


def open_rows(
    config: ConfigDict, workdir: Path, split: str, tokenizer: Tokenizer
) -> Rows | PackedRows:
    """Opens the rows of a split, `train` or `validation`, of a prepared workdir.

    Raises:
      TextError: the rows are missing, were made with another tokenizer, or do not fit the length.
    """
    data = config.data
    packed = data.packing in PACKED
    folder = workdir / (data.packing if packed else "corpus") / split
    shares = data.shares if split == "train" else 1
    mirror, part = Mirror.of(workdir), data.packing if packed else f"corpus/{split}"
    mirror.fetch(part, only=is_side_file if shares > 1 else None)
    script = "launch/prepare.py chats" if packed else "launch/prepare.py"
    if packed and not (folder.parent / INPUTS).is_file():
        raise TextError(
            f"no finished {data.packing} in {folder.parent}; run {script} with this config"
        )
    fetch = functools.partial(_fetch_shards, mirror, part) if shares > 1 else None
    corpus = Corpus(folder, fetch)
    if corpus.tokenizer_fingerprint != tokenizer.fingerprint:
        raise TextError(
            f"{folder} was made with another tokenizer than {workdir / 'tokenizer'}; run {script}"
            " again"
        )
    options = corpus, data.sequence_length, config.memory.chunk_length, data.packing
    return PackedRows(*options) if packed else Rows(*options, shares)


def _share_seed(seed: int, share: int) -> int:
    """Returns the seed of the order of a share's rows; that of the first is the config's own."""
    if share == 0:
        return seed
    return int(np.random.SeedSequence([seed, share]).generate_state(1, np.uint64)[0])


def _fetch_shards(mirror: Mirror, part: str, names: Sequence[str]) -> None:
    mirror.fetch(part, only={*names}.__contains__)
