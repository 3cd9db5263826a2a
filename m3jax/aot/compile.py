"""Compiles programs of a config for TPU slices that are not attached; reports HBM, FLOP and bounds.

The compiler of libtpu runs on any x86-64 Linux host. The HBM that it reports is what a chip would
need; times are lower bounds from counted work and data sheets, not measurements.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from m3jax import flops
from m3jax.aot.collectives import by_kind, collectives
from m3jax.aot.jaxpr_flops import attention_blocks, chunks_of_row, executed_flops
from m3jax.config import IN_STEP, PACKED, PREFIX_TOKENS, validate
from m3jax.data.batch import Batch
from m3jax.errors import CompileError, ConfigError
from m3jax.hardware import Chip, chip_of_topology
from m3jax.inference.sampling import Sampling
from m3jax.make_model import make_model
from m3jax.memory.binding import writer_params
from m3jax.memory.codec import NONE, Codec
from m3jax.memory.encode import encode_program, input_shapes
from m3jax.mesh import AXES, batch_sharding, make_mesh, parameter_shardings, replicated, row_spec
from m3jax.model.attention_mask import ExplicitMemory, Packing
from m3jax.model.decode import Decoder, unstack
from m3jax.model.slots import SlotLayout
from m3jax.private_apis import needed_bytes
from m3jax.train.state import Program
from m3jax.train.step import make_step


@dataclasses.dataclass(frozen=True)
class CompiledProgram:
    """Program compiled for a slice.

    Attributes:
      jaxpr: the traced program.
      text: HLO text of the compiled program; empty if the compiler ran out of a chip's HBM.
      memory: bytes of HBM on one chip: `arguments`, `temporaries`, `code`, `peak`. If the compiler
        ran out, only `peak`, which is NaN if its error does not state it.
      seconds: time of lowering and compiling.
    """

    jaxpr: Any
    text: str
    memory: dict[str, float]
    seconds: float


def devices_of(topology: str) -> list[Any]:
    """Returns the devices of a TPU slice, for compiling only.

    Raises:
      ConfigError: the name of the topology is malformed or its chip unknown.
      CompileError: libtpu is not installed or knows no such slice.
    """
    chip, shape = chip_of_topology(topology)
    try:
        from jax.experimental import topologies

        slice_ = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    except Exception as error:  # libtpu documents no types of errors
        words = str(error).splitlines()[0] if str(error) else type(error).__name__
        try:
            import libtpu  # noqa: F401
        except ImportError:
            raise CompileError(
                "libtpu is not installed: pip install -c constraints.txt -e '.[tpu]' (Linux on"
                " x86-64; no TPU is needed)"
            ) from error
        raise CompileError(
            f"the TPU compiler knows no slice {topology} of {shape} chips: {words}. Slices that"
            f" exist are listed at cloud.google.com/tpu/docs/{chip.name}; names that work:"
            " v5e:4x4, v5e:8x8, v5e:16x16, v6e:4x4, v6e:16x16, v5p:2x2x2, v5p:4x4x4, v4:2x2x1"
        ) from error
    return list(slice_.devices)


def compile_train(config: ConfigDict, mesh: Mesh) -> CompiledProgram:
    """Compiles the train step for abstract arrays."""
    program = Program(config, mesh)
    arguments: list[Any] = [program.abstract, abstract_batch(config, mesh)]
    if config.guard.on:  # the step also takes a factor on the learning rate
        arguments.append(jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated(mesh)))
    return _compile(make_step(program), *arguments)


def compile_writer(config: ConfigDict, mesh: Mesh) -> CompiledProgram:
    """Compiles the memory writer's program that encodes a batch of references, for abstract
    arrays."""
    model = make_model(config, PREFIX_TOKENS, mesh)
    shapes, axes = model.abstract()
    shardings = parameter_shardings(mesh, axes)
    params = jax.tree.map(lambda x, sharding: x.update(sharding=sharding), shapes, shardings)
    sharding = batch_sharding(mesh)
    inputs = [jax.ShapeDtypeStruct(s, jnp.int32, sharding=sharding) for s in input_shapes(config)]
    stored = Codec(NONE, config.model.head_dim, config.memory.dtype)
    return _compile(encode_program(config, model, stored), writer_params(params), *inputs)


def compile_decode(config: ConfigDict, mesh: Mesh, context: int) -> CompiledProgram:
    """Compiles the generation of a chunk after prompts of `context` tokens, for abstract arrays."""
    model = make_model(config, PREFIX_TOKENS, mesh)
    decoder = Decoder(model, Sampling(), stop=(3,))
    B, M, Q = config.data.batch_size, config.memory.per_prompt_chunk, config.memory.chunk_length

    def numbers(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    params = jax.eval_shape(lambda p: unstack(model, p), model.abstract()[0])
    prompt = (numbers(B, context), numbers(B), numbers(B, 2), _memories(config, B, context // Q, M))
    state, _ = jax.eval_shape(
        lambda *inputs: decoder.prefill(*inputs, slots=Q), params, *prompt, numbers(B, 1)
    )
    arguments = (params, state, _memories(config, B, M), numbers(), numbers(B, Q))

    def place(spec: PartitionSpec, part: Any) -> Any:
        return jax.tree.map(lambda x: x.update(sharding=NamedSharding(mesh, spec)), part)

    return _compile(decoder.generate, *jax.tree.map(place, decoder.generate_specs, arguments))


def _memories(config: ConfigDict, *lead: int) -> ExplicitMemory:
    """Returns the shapes of memories `(L, *lead, K, P, H)` in `memory.dtype`."""
    memory, model = config.memory, config.model
    L, K, P = SlotLayout.of(model, memory).item_shape
    shape = (L, *lead, K, P, model.head_dim)
    values: Any = jax.ShapeDtypeStruct(shape, jnp.dtype(memory.dtype))
    length: Any = jax.ShapeDtypeStruct(lead, jnp.int32)
    return ExplicitMemory(values, values, length)


def abstract_batch(config: ConfigDict, mesh: Mesh) -> Batch:
    """Returns the batch of a train step as shapes with shardings.

    For preference pairs, a row has 2 · max(1, C // 4) slots for log-probabilities of answers, where
    C is the result of `chunks_of_row`.
    """
    memory, sharding = config.memory, batch_sharding(mesh)

    def array(*shape: int, dtype: Any = jnp.int32) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    B, T = config.data.batch_size, config.data.sequence_length
    C, M = chunks_of_row(config, T), memory.per_chunk
    batch = Batch(array(B, T), array(B, T), array(B, T, dtype=jnp.float32))
    if config.data.packing in PACKED:
        batch = batch._replace(packing=Packing(array(B, T), array(B, T)))
    if config.data.packing == "pairs":
        logprobs = array(B, 2 * max(1, C // 4), dtype=jnp.float32)
        batch = batch._replace(answers=array(B, T), base_logprobs=logprobs)
    if memory.source == "precomputed":
        stored: Any = _memories(config, B, C, M)
        by_rows = NamedSharding(mesh, row_spec(1))
        keys, values = (x.update(sharding=by_rows) for x in stored[:2])
        batch = batch._replace(memory=ExplicitMemory(keys, values, array(B, C, M)))
    if memory.source in IN_STEP:
        batch = batch._replace(reference_tokens=array(B, C, M, memory.reference_length))
    return batch


def _compile(function: Any, *arguments: Any) -> CompiledProgram:
    traced = function.trace(*arguments)
    start = time.perf_counter()
    try:
        compiled = traced.lower(lowering_platforms=("tpu",)).compile()
    except jax.errors.JaxRuntimeError as error:
        needed = needed_bytes(str(error))
        if needed is None:
            raise
        seconds = time.perf_counter() - start
        return CompiledProgram(traced.jaxpr, "", {"peak": needed}, seconds)
    seconds = time.perf_counter() - start
    stats = compiled.memory_analysis()
    # The compiler's peak of arguments and temporaries that are live together. Its sum of
    # temporaries adds buffers that are never live together (4.6 of 12 GB in one case).
    peak = stats.peak_memory_in_bytes + stats.generated_code_size_in_bytes
    memory = {
        "arguments": stats.argument_size_in_bytes,
        "temporaries": stats.peak_memory_in_bytes - stats.argument_size_in_bytes,
        "code": stats.generated_code_size_in_bytes,
        "peak": peak,
    }
    return CompiledProgram(traced.jaxpr, compiled.as_text(), memory, seconds)


def compile_report(
    config: ConfigDict, topology: str, program: str = "train", rows: int = 32, context: int = 128
) -> dict[str, Any]:
    """Compiles one program of a config for a slice.

    Args:
      config: a config, which is validated.
      topology: name of the slice, such as `v5e:16x16`.
      program: `train`, `writer` (encoding of a batch of references) or `decode` (generation of a
        chunk of tokens with memories; FLOP and bounds are those of one token per row, and devices
        of `mesh.fsdp` are used as `mesh.data`).
      rows, context: for `decode`: rows per device of `mesh.data`, and tokens of a prompt.

    Returns:
      HBM of a chip in bytes (`peak_bytes_per_chip`, its parts in `memory`), the sums of
      `collectives` by kind and a list of all (`exchanges`), `flops` of all chips, lower bounds of
      the time of a step in `seconds`, `mfu_ceiling`, `compile_seconds`, and the identity of the
      program (`name`, `program`, `source`, `topology`, `mesh`, …).

    Raises:
      ConfigError: the config is invalid or does not fit the slice, or the topology is unknown.
      CompileError: libtpu is not installed or knows no such slice.
    """
    validate(config)
    chip, _ = chip_of_topology(topology)
    devices = devices_of(topology)
    if program == "decode":
        config = _serving(config, rows, len(devices))
        rows = config.data.batch_size
    mesh = make_mesh(config, devices)
    if program == "train":
        compiled, useful = compile_train(config, mesh), flops.train_step(config)
    elif program == "writer":
        compiled = compile_writer(config, mesh)
        useful = flops.writer(config, config.writer.batch_references)
    else:
        compiled = compile_decode(config, mesh, context)
        useful = flops.decode_step(config, rows, context)
    online = program == "writer" or config.memory.source in IN_STEP
    blocks = attention_blocks(config, tokens=config.data.sequence_length, references=online)
    executed = executed_flops(compiled.jaxpr, blocks)
    exchanges = collectives(compiled.text) if compiled.text else []
    table = by_kind(exchanges)
    sent = sum(row["bytes"] for row in table.values())
    bounds = {
        "compute": executed / (mesh.size * chip.flops),
        "memory": _memory_bytes(config, compiled.memory, mesh, program, context)
        / chip.memory_bandwidth,
        "interconnect": sent / (chip.links * chip.link_bandwidth),
    }
    return {
        "name": config.name,
        "program": program,
        "source": config.memory.source,
        "topology": topology,
        "chips": mesh.size,
        "mesh": {axis: mesh.shape[axis] for axis in AXES},
        "microbatches": config.train.microbatches,
        "remat": config.model.remat,
        "peak_bytes_per_chip": compiled.memory["peak"],
        "memory": compiled.memory,
        "chip_bytes": chip.memory,
        "fits": bool(compiled.text) and compiled.memory["peak"] <= chip.memory,
        "collectives": table,
        "exchanges": [dataclasses.asdict(collective) for collective in exchanges],
        "flops": {
            "useful": useful,
            "executed": executed,
            "executed_over_useful": executed / useful,
        },
        "seconds": bounds,
        "mfu_ceiling": useful / (mesh.size * chip.flops * max(bounds.values())),
        "compile_seconds": compiled.seconds,
    }


def _serving(config: ConfigDict, rows: int, devices: int) -> ConfigDict:
    """Returns a copy of the config for decoding: a mesh with `fsdp` = 1, where only `tensor` splits
    weights, and `rows` rows on each device of `data`."""
    changed = config.copy_and_resolve_references()
    tensor = changed.mesh.tensor
    with changed.unlocked():
        changed.mesh.data, changed.mesh.fsdp = max(1, devices // (tensor * changed.mesh.slice)), 1
        changed.data.batch_size = changed.evaluation.batch_size = rows * max(1, devices // tensor)
        changed.train.microbatches = 1
    return changed


def _memory_bytes(
    config: ConfigDict, memory: dict[str, float], mesh: Mesh, program: str, context: int
) -> float:
    """Returns a lower bound of the bytes that a chip reads from and writes to its HBM in one run.

    Training reads and writes the state once, reads the gathered weights in each pass (forward,
    recomputation if any, backward) of every microbatch, and writes and reads the saved input of
    every layer. The writer reads its arguments and weights once; decoding a token reads weights,
    keys and values.
    """
    if program == "decode":
        rows = config.data.batch_size // (mesh.size // mesh.shape["tensor"])
        return flops.decode_bytes(config, rows, context) / mesh.shape["tensor"]
    width = jnp.dtype(config.model.compute_dtype).itemsize
    weights = flops.parameters(config).non_embedding * width / mesh.shape["tensor"]
    state = memory.get("arguments", 0.0)
    if program == "writer":
        layers = config.memory.first_layer + config.memory.layers
        return state + weights * layers / config.model.layers
    ways = mesh.size // mesh.shape["tensor"]
    rows = config.data.batch_size / ways
    saved = config.model.layers * rows * config.data.sequence_length * config.model.hidden * width
    passes = 3 if config.model.remat != "none" else 2
    return 2 * state + config.train.microbatches * passes * weights + 2 * saved


def on_path(config: ConfigDict, path: str) -> ConfigDict:
    """Returns a copy of the config whose train step gets its memories in another way.

    Args:
      config: a config of any stage.
      path: `warmup` (no memories), `precomputed` or `online`.
    """
    changed = config.copy_and_resolve_references()
    changed.memory.source = "none" if path == "warmup" else path
    changed.stage = "warmup" if path == "warmup" else "continual"
    return changed


def search_meshes(
    config: ConfigDict,
    topology: str,
    fsdp: Sequence[int] = (8, 16, 32),
    microbatches: Sequence[int] = (1, 2, 4),
    remat: Sequence[str] = ("full",),
) -> Iterator[dict[str, Any]]:
    """Compiles the train step for several meshes and remat policies, each with the numbers of
    microbatches in turn up to the first that fits; yields every report.

    Skips meshes that do not divide the config's heads, widths or rows, or the slice's chips.

    Raises:
      ConfigError: all meshes were skipped; the error is that of the last one.
      CompileError: libtpu is not installed or knows no such slice.
    """
    chips = len(devices_of(topology))
    refused: ConfigError | None = None
    some = False
    for size, policy in itertools.product(fsdp, remat):
        for parts in microbatches:
            tried = config.copy_and_resolve_references()
            others = size * tried.mesh.tensor * tried.mesh.slice
            tried.mesh.data, tried.mesh.fsdp = max(1, chips // others), size
            tried.train.microbatches, tried.model.remat = parts, policy
            try:
                if chips % others:
                    raise ConfigError(
                        f"{others} shards (mesh.fsdp × mesh.tensor × mesh.slice) do not divide the"
                        f" {chips} chips of {topology}; use a power of two"
                    )
                report = compile_report(tried, topology)
            except ConfigError as error:
                refused = error
                continue
            some = True
            yield report
            if report["fits"]:
                break
    if refused is not None and not some:
        raise refused


def best_report(reports: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Returns the report with the least sum of lower bounds among those that fit; None if none
    fits.

    The sum bounds the time of a step without overlap of compute, HBM and interconnect. Among meshes
    of equal work the one that sends less is the best; less recomputation is better unless the
    microbatches that it needs cost more than it saves.
    """
    fitting = [report for report in reports if report["fits"]]
    return min(fitting, key=lambda report: sum(report["seconds"].values()), default=None)


def remedy(report: dict[str, Any], chip: Chip) -> str:
    """Returns a message for a program that does not fit a chip, with advice."""
    over = report["peak_bytes_per_chip"] / chip.memory
    return (
        f"does not fit: {report['peak_bytes_per_chip'] / 1e9:.1f} GB of {chip.memory / 1e9:.0f} GB"
        f" ({over:.2f} of the chip). Double train.microbatches (now {report['microbatches']}),"
        f" raise"
        f" mesh.fsdp (now {report['mesh']['fsdp']}), set model.remat = 'full' (now"
        f" {report['remat']!r}), lower train.loss_block, or take a larger slice; --search tries"
        " meshes and microbatches"
    )
