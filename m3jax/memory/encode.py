"""Encodes references to memories for the bank, in batches of one fixed shape."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, UInt64
from ml_collections import ConfigDict

from m3jax.config import largest_count
from m3jax.errors import BankError
from m3jax.memory.binding import writer_params
from m3jax.memory.codec import Codec
from m3jax.memory.document_context import Row, identities, in_order, packed_rows, window_references
from m3jax.memory.sparsify import sparsifier
from m3jax.mesh import (
    ACTIVATIONS,
    BATCH_AXES,
    batch_sharding,
    compiler_options,
    on_devices,
    parameter_shardings,
)
from m3jax.model.parameters import Params
from m3jax.model.transformer import Model


@runtime_checkable
class ReferenceTokens(Protocol):
    """Interface of a set of tokenized references that can be encoded."""

    @property
    def lengths(self) -> Int[np.ndarray, " R"]:
        """Returns the number of tokens of each reference."""

    def documents(self) -> Int[np.ndarray, " R"]:
        """Returns the document number of each reference; equal numbers are consecutive."""

    def __len__(self) -> int: ...

    def tokens(self, ids: Int[np.ndarray, " n"]) -> Int[np.ndarray, "n W"]:
        """Returns the tokens of references, 0-padded, without the prefix."""


@runtime_checkable
class ReferenceSet(ReferenceTokens, Protocol):
    """Interface of a reference set that a bank can be written for; `References` implements it."""

    @property
    def fingerprint(self) -> str:
        """Returns a hash of the whole set."""

    @property
    def tokenizer_fingerprint(self) -> str:
        """Returns the fingerprint of the tokenizer that made the tokens."""

    @property
    def record_hashes(self) -> UInt64[np.ndarray, " R"]:
        """Returns a hash of each reference's tokens."""


def encode_program(config: ConfigDict, model: Model, codec: Codec) -> Any:
    """Returns the jitted function that encodes a batch of references.

    `(writer_params, tokens (R, W)) → stored (R, 2, L, K, P, width), length (R,), finite (R,)` (or
    `(R, 2, 1, 1, S, width)`, `SlotLayout`), in the stored form of `codec.quantize`; `finite` is
    False for a memory with NaN or infinity. With
    document context `(writer_params, tokens (B, slots, W), first (B, slots)) → …`, with R = B ·
    slots; `first` is the argument `windows` of `Model.encode`.
    """
    keep, dtype = sparsifier(config.memory), jnp.dtype(config.memory.dtype)

    def encode(
        params: Params, tokens: jax.Array, first: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        memory = model.encode(params, tokens.reshape(-1, tokens.shape[-1]), keep, first)
        memories = jnp.stack([jnp.moveaxis(x, 0, 1) for x in memory[:2]], axis=1).astype(dtype)
        finite = jnp.isfinite(memories).all(axis=range(1, memories.ndim))
        if model.mesh is not None:  # each device has a part of the heads
            finite = model.parallel.sum(1 - finite.astype(jnp.int32), "tensor") == 0
        return codec.quantize(memories), memory.length, finite

    def program(params: Params, *inputs: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        specs = model.specs()
        rows = ACTIVATIONS.spec(("batch",))
        memories = ACTIVATIONS.spec(("batch", None, None, "kv_heads"))
        parameters = {name: specs[name] for name in params}
        results = (memories, rows, rows)
        arguments = (parameters, *(rows for _ in inputs))
        return on_devices(model.mesh, encode, arguments, results)(params, *inputs)

    options = None if model.mesh is None else compiler_options(model.mesh)
    return jax.jit(program, compiler_options=options)


def input_shapes(config: ConfigDict) -> list[tuple[int, ...]]:
    """Returns the shapes of the inputs of `encode_program` other than the parameters."""
    batch, width = config.writer.batch_references, config.memory.reference_length
    slots = window_references(config)
    if slots == 1:
        return [(batch, width)]
    rows = max(1, batch // slots)
    return [(rows, slots, width), (rows, slots)]


class _Batch(NamedTuple):
    """Holds the inputs of one call of the encode program, and the ids whose memories it makes."""

    ids: np.ndarray  # references whose memories are yielded
    places: slice | np.ndarray  # rows of their memories in the result
    inputs: list[np.ndarray]


class Encoder:
    """Encodes references in batches of one fixed shape, with a program compiled by the constructor.

    The constructor raises `BankError` if the batch cannot be split over the devices.

    Attributes:
      seconds: time spent in calls of the compiled program and in waiting for their results.
    """

    def __init__(
        self,
        config: ConfigDict,
        model: Model,
        params: Params,
        references: ReferenceTokens,
        codec: Codec,
    ):
        self.references, self.seconds = references, 0.0
        shapes = input_shapes(config)
        self.slots, self.rows, self.width = window_references(config), shapes[0][0], shapes[0][-1]
        self.kept = model.slots.largest
        self.params, self.sharding = writer_params(params), None
        if model.mesh is not None:
            self.sharding = batch_sharding(model.mesh)
            ways = math.prod(model.mesh.shape[axis] for axis in BATCH_AXES)
            if self.rows % ways:
                whole = f", in rows of {self.slots} references," if self.slots > 1 else ""
                raise BankError(
                    f"config.writer.batch_references = {config.writer.batch_references}{whole}"
                    f" cannot be split over the {ways} devices of mesh.slice × mesh.data ×"
                    f" mesh.fsdp; use a multiple of {ways * self.slots}"
                )
            shardings = parameter_shardings(model.mesh, model.abstract()[1])
            self.params = jax.device_put(
                self.params, {name: shardings[name] for name in self.params}
            )
        inputs = [jax.ShapeDtypeStruct(s, jnp.int32, sharding=self.sharding) for s in shapes]
        self.params = jax.device_put(self.params)
        self.encode = encode_program(config, model, codec).lower(self.params, *inputs).compile()

    def batches(self, ids: Int[np.ndarray, " n"]) -> Iterator[np.ndarray]:
        """Yields batches of memories in stored form for ascending `ids`; encodes a batch ahead."""
        if self.slots == 1:
            return (memories for _, memories in self._encoded(self._alone(ids)))
        return in_order(ids, self._encoded(self._in_windows(ids)))

    def _encoded(self, batches: Iterator[_Batch]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        waiting: tuple[_Batch, Any] | None = None
        for batch in batches:
            placed = [jax.device_put(array, self.sharding) for array in batch.inputs]
            encoding = batch, self._timed(self.encode, self.params, *placed)
            if waiting is not None:
                yield self.collect(*waiting)
            waiting = encoding
        if waiting is not None:
            yield self.collect(*waiting)

    def _timed(self, call: Callable[..., Any], *arguments: Any) -> Any:
        begin = time.perf_counter()
        result = call(*arguments)
        self.seconds += time.perf_counter() - begin
        return result

    def _tokens(self, ids: np.ndarray, places: slice | np.ndarray, size: int) -> np.ndarray:
        tokens = np.zeros((size, self.width), np.int32)
        rows = self.references.tokens(ids)
        tokens[places, : rows.shape[1]] = rows
        return tokens

    def _alone(self, ids: np.ndarray) -> Iterator[_Batch]:
        for start in range(0, len(ids), self.rows):
            part = ids[start : start + self.rows]
            places = slice(len(part))
            yield _Batch(part, places, [self._tokens(part, places, self.rows)])

    def _in_windows(self, ids: np.ndarray) -> Iterator[_Batch]:
        selected = np.zeros(len(self.references), bool)
        selected[ids] = True
        rows = packed_rows(self.references.documents(), self.slots, selected)
        while part := list(itertools.islice(rows, self.rows)):
            filled = Row(*(np.concatenate(x) for x in zip(*part, strict=True)))
            used, own = np.flatnonzero(filled.ids >= 0), np.flatnonzero(filled.own)
            tokens = self._tokens(filled.ids[used], used, self.rows * self.slots)
            first = np.tile(np.arange(self.slots, dtype=np.int32), (self.rows, 1))
            first[: len(part)] = filled.first.reshape(-1, self.slots)
            inputs = [tokens.reshape(self.rows, self.slots, -1), first]
            yield _Batch(filled.ids[own], own, inputs)

    def collect(self, batch: _Batch, result: Any) -> tuple[np.ndarray, np.ndarray]:
        """Waits for a batch and returns ids and memories.

        Raises `BankError` if a memory is not finite or has another length than the bank records.
        """
        waited = self._timed(jax.block_until_ready, result)
        ids = batch.ids
        memories, length, finite = (np.asarray(x)[batch.places] for x in waited)
        broken = np.flatnonzero(~finite)
        if broken.size:
            raise BankError(
                f"the memory of reference {ids[broken[0]]} holds NaN or infinity: the writer's"
                " weights have diverged; use an earlier checkpoint (--checkpoint)"
            )
        expected = np.minimum(self.references.lengths[ids], self.kept)
        wrong = np.flatnonzero(length != expected)
        if wrong.size:
            raise BankError(
                f"reference {ids[wrong[0]]} has tokens that are 0, the padding; make the references"
                " again with launch/prepare.py"
            )
        return ids, memories


def memory_hashes(config: ConfigDict, references: ReferenceSet) -> UInt64[np.ndarray, " R"]:
    """Hashes all tokens that each memory depends on: the reference's and its document context."""
    slots = window_references(config)
    if slots == 1:
        return references.record_hashes
    return identities(references.documents(), references.record_hashes, slots)


def memory_lengths(config: ConfigDict, references: ReferenceTokens) -> np.ndarray:
    """Returns the number of used slots of each memory, (R,).

    Raises `BankError` if there are no references, none has tokens, or one is too long.
    """
    if not len(references):
        raise BankError("the reference set is empty: there is nothing to write; add documents")
    tokens = np.asarray(references.lengths)
    if not tokens.any():
        raise BankError(
            f"none of the {len(references)} references has usable tokens; give references with text"
        )
    if tokens.max() > config.memory.reference_length:
        raise BankError(
            f"reference {int(tokens.argmax())} has {tokens.max()} tokens, more than"
            f" config.memory.reference_length = {config.memory.reference_length}; raise it, or cut"
            " the references again with launch/prepare.py"
        )
    kept = largest_count(config.model, config.memory)
    return np.minimum(tokens, kept).astype(np.uint16 if kept < 2**16 else np.int32)
