"""Encoding references for the bank: one jitted call at a fixed shape, batch after batch."""

from __future__ import annotations

import collections
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, UInt64
from ml_collections import ConfigDict

from m3jax.memory.bank import writer_params
from m3jax.memory.codec import Codec
from m3jax.memory.sparsify import sparsifier
from m3jax.memory.storage import BankError
from m3jax.mesh import (
    ACTIVATIONS,
    BATCH_AXES,
    batch_sharding,
    compiler_options,
    on_devices,
    parameter_shardings,
)
from m3jax.model.transformer import Model, Params


@runtime_checkable
class ReferenceSet(Protocol):
    """What the writer asks of a set of references; `text.references.References` is one."""

    @property
    def fingerprint(self) -> str:
        """Hash of the whole set."""

    @property
    def lengths(self) -> Int[np.ndarray, " R"]:
        """Tokens of every reference."""

    @property
    def record_hashes(self) -> UInt64[np.ndarray, " R"]:
        """Hash of every reference's tokens."""

    def __len__(self) -> int: ...

    def tokens(self, ids: Int[np.ndarray, " n"]) -> Int[np.ndarray, "n W"]:
        """Tokens, 0-padded, no prefix."""


class Clock:
    """Wall time since the start, and the part of it spent in the jitted encode."""

    def __init__(self) -> None:
        self.start, self.encode = time.perf_counter(), 0.0

    def seconds(self) -> float:
        return time.perf_counter() - self.start

    def timed(self, call: Callable[..., Any], *arguments: Any) -> Any:
        """Calls and counts the time as encoding."""
        begin = time.perf_counter()
        result = call(*arguments)
        self.encode += time.perf_counter() - begin
        return result


def encode_program(config: ConfigDict, model: Model, codec: Codec) -> Any:
    """The jitted writer.

    `(writer_params, tokens (R, W)) → stored (R, 2, L, K, P, width), length (R,), finite (R,)`.
    """
    keep, dtype = sparsifier(config), jnp.dtype(config.memory.dtype)

    def encode(params: Params, tokens: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        memory, _ = model.encode(params, tokens, keep)
        memories = jnp.stack([memory.keys, memory.values], axis=1).astype(dtype)
        finite = jnp.isfinite(memories).all(axis=range(1, memories.ndim))
        if model.mesh is not None:  # a device has a part of the heads
            finite = model.parallel.sum(1 - finite.astype(jnp.int32), "tensor") == 0
        return codec.encode(memories), memory.length, finite

    def program(params: Params, tokens: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        specs = model.specs()
        rows = ACTIVATIONS.spec(("batch",))
        memories = ACTIVATIONS.spec(("batch", None, None, "kv_heads"))
        parameters = {name: specs[name] for name in params}
        results = (memories, rows, rows)
        return on_devices(model.mesh, encode, (parameters, rows), results)(params, tokens)

    options = None if model.mesh is None else compiler_options(model.mesh)
    return jax.jit(program, compiler_options=options)


class Encoder:
    """The jitted encode at one fixed shape, compiled once."""

    def __init__(
        self,
        config: ConfigDict,
        model: Model,
        params: Params,
        references: ReferenceSet,
        codec: Codec,
    ):
        self.references = references
        self.batch, self.width = config.writer.batch_references, config.memory.reference_length
        self.kept = config.memory.kept_tokens
        self.params, self.sharding = writer_params(params), None
        if model.mesh is not None:
            self.sharding = batch_sharding(model.mesh)
            ways = math.prod(model.mesh.shape[axis] for axis in BATCH_AXES)
            if self.batch % ways:
                raise BankError(
                    f"config.writer.batch_references = {self.batch} cannot be split over the"
                    f" {ways} devices of mesh.slice × mesh.data × mesh.fsdp; use a multiple of"
                    f" {ways}"
                )
            shapes, axes = model.abstract()
            shardings = parameter_shardings(model.mesh, axes, shapes)
            self.params = jax.device_put(
                self.params, {name: shardings[name] for name in self.params}
            )
        shape = jax.ShapeDtypeStruct((self.batch, self.width), jnp.int32, sharding=self.sharding)
        self.params = jax.device_put(self.params)
        self.encode = encode_program(config, model, codec).lower(self.params, shape).compile()

    def batches(self, ids: Int[np.ndarray, " n"], clock: Clock) -> Iterator[np.ndarray]:
        """Memories as they are stored, a batch at a time; the next is already being encoded."""
        waiting: collections.deque[tuple[np.ndarray, Any]] = collections.deque()
        for start in range(0, len(ids), self.batch):
            part = ids[start : start + self.batch]
            tokens = np.zeros((self.batch, self.width), np.int32)
            found = self.references.tokens(part)
            tokens[: len(part), : found.shape[1]] = found
            placed = jax.device_put(tokens, self.sharding)
            waiting.append((part, clock.timed(self.encode, self.params, placed)))
            if len(waiting) > 1:
                yield self.collect(*waiting.popleft(), clock)
        while waiting:
            yield self.collect(*waiting.popleft(), clock)

    def collect(self, ids: np.ndarray, result: Any, clock: Clock) -> np.ndarray:
        """Waits for a batch; checks that its memories are finite and as long as the bank states."""
        waited = clock.timed(jax.block_until_ready, result)
        memories, length, finite = (np.asarray(x) for x in waited)
        broken = np.flatnonzero(~finite[: len(ids)])
        if broken.size:
            raise BankError(
                f"the memory of reference {ids[broken[0]]} holds NaN or infinity: the writer's"
                " weights have diverged; use an earlier checkpoint (--checkpoint)"
            )
        expected = np.minimum(self.references.lengths[ids], self.kept)
        wrong = np.flatnonzero(length[: len(ids)] != expected)
        if wrong.size:
            raise BankError(
                f"reference {ids[wrong[0]]} has tokens that are 0, the padding; make the references"
                " again with launch/prepare.py"
            )
        return memories[: len(ids)]


def memory_lengths(config: ConfigDict, references: ReferenceSet) -> np.ndarray:
    """Lengths of the memories; raises where there is nothing to write or too much."""
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
    kept = config.memory.kept_tokens
    return np.minimum(tokens, kept).astype(np.uint16 if kept < 2**16 else np.int32)
