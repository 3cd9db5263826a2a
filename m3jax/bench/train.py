"""Benchmarks `train` (step times with and without memories) and `writer` (writing the bank)."""

from __future__ import annotations

import itertools
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from m3jax.bench.hf_llama import llama_step
from m3jax.bench.made import configured, prepare, random_codec, section
from m3jax.bench.rounds import Rounds, import_peer, quotients, timed
from m3jax.config import PREFIX_TOKENS
from m3jax.data.batch import Batch
from m3jax.data.pipeline import open_pipeline
from m3jax.make_model import make_model
from m3jax.memory import codec as codecs
from m3jax.memory.bank import Bank
from m3jax.memory.storage import CODEBOOK
from m3jax.memory.write import write_bank
from m3jax.mesh import host_rows, make_mesh
from m3jax.quickstart import people
from m3jax.text.references import References
from m3jax.train.loss import place_batch
from m3jax.train.monitor import Monitor
from m3jax.train.state import Program
from m3jax.train.step import make_step, scale_on

# Config fields of a model that is small enough for a CPU, in the proportions of a real model;
# `FULL` has twice the rows.
_SHAPE = (
    section("model", layers=4, query_heads=8, kv_heads=2, head_dim=32, hidden=256, mlp_width=704)
    | section("model", vocabulary=2048, attention_block=128, prefix="always")
    | section("data", sequence_length=512, batch_size=2, threads=2, prefetch=4)
    | {"memory.layers": 2, "retrieval.shift": 1, "writer.batch_references": 64}
    | {"text.validation_share": 0.0}
)
SMALLEST = {
    "persons": 20,
    "shape": section("model", layers=2, hidden=32, mlp_width=64)
    | section("data", sequence_length=128, batch_size=8),
}
FULL = {"shape": {"data.batch_size": 4}, "guard_turns": 6}
# The stability guard with limits that nothing exceeds.
_GUARD = section("guard", on=True, loss_deviations=1e9, norm_deviations=1e9, rise_deviations=1e9)
_RATIOS = (
    "precomputed_over_warmup",
    "online_over_warmup",
    "pipeline_over_precomputed",
    "compressed_over_precomputed",
    "warmup_over_hf_llama",
    "guarded_over_plain",
    "monitor_over_plain",
)
_MONITOR_TURNS = 200  # updates of the guard's statistics per round


def train(persons: int = 2000, shape: Mapping[str, Any] = {}, *, guard_turns: int = 4) -> Rounds:
    """Measures the times of train steps with precomputed and online memories relative to warmup.

    Args:
      persons: number of invented persons in the knowledge base; four equal texts describe each
        group of five persons.
      shape: config fields that replace those of the benchmark's model.

    Yields:
      `ratios` of step times: `precomputed_over_warmup`, `online_over_warmup`;
      `pipeline_over_precomputed`, batches from the pipeline over repeating one batch;
      `compressed_over_precomputed`, vectors of 14 bytes dequantized in the step over plain ones;
      `warmup_over_hf_llama`, over Hugging Face's Llama in torch with the same shape, dtype and
      cores, if the extra `parity` is installed; `guarded_over_plain`, with the stability guard;
      `monitor_over_plain`, an update of the guard's statistics over a step. `seconds` of all.
    """
    plain = configured(_SHAPE, shape)
    with _workdir(plain, persons) as workdir:
        _write(plain, workdir, workdir / "bank")

        def stage(fields: Mapping[str, Any], bank: Path | None = None) -> _Stage:
            return _Stage(configured(_SHAPE, shape, fields), workdir, bank)

        warmup, guarded, online = stage({}), stage(_GUARD), stage({"memory.source": "online"})
        reading = {"memory.source": "precomputed"}
        precomputed, vector = stage(reading), reading | {"writer.compression": "vector"}
        compressed = stage(vector, _compress(configured(_SHAPE, shape, vector), workdir))
        calls: dict[str, Callable[[], Any]] = {
            "online": online.repeat,
            "warmup": warmup.repeat,
            "precomputed": precomputed.repeat,
            "pipeline": precomputed.from_pipeline,
            "compressed": compressed.repeat,
        }
        llama = import_peer("warmup_over_hf_llama", "torch", "transformers")
        if llama is not None:
            tokens = np.asarray(warmup.same.tokens)
            calls = {"hf_llama": llama_step(llama, plain, tokens), **calls}
        guard = {"guarded": guarded.repeat, "plain": warmup.repeat}
        for number in itertools.count():
            seconds = timed(calls) | timed(guard, guard_turns if number else 1)
            seconds |= timed({"monitor": guarded.watch}, _MONITOR_TURNS)
            yield {"ratios": quotients(seconds, *_RATIOS), "seconds": seconds}


def writer(persons: int = 2000, shape: Mapping[str, Any] = {}) -> Rounds:
    """Measures the fraction of its time that the bank writer waits for the jitted encode program.

    Yields:
      `ratios`: `encode_share`, that fraction; `rates`: `memories_per_second`; `seconds` to write
      the `bank`. Arguments are as in `train`.
    """
    config = configured(_SHAPE, shape)
    with _workdir(config, persons) as workdir:
        while True:
            report = _write(config, workdir, workdir / "bank")
            shutil.rmtree(workdir / "bank")
            yield {
                "ratios": {"encode_share": report["encode_share"]},
                "rates": {"memories_per_second": report["memories_per_second"]},
                "seconds": {"bank": report["seconds"]},
            }


@contextmanager
def _workdir(config: ConfigDict, persons: int) -> Iterator[Path]:
    """Prepares a temporary workdir with references about invented people; yields its folder."""
    with tempfile.TemporaryDirectory() as name:
        workdir = Path(name)
        world = people.make_world(0, names=400, people=persons, unseen=10, values=32, facts=4)
        files = workdir / "documents.jsonl", workdir / "knowledge.jsonl"
        people.write_jsonl(files[0], people.fact_documents(world, 0, 400, chunks=40))
        groups = [world.people[i : i + 5] for i in range(0, len(world.people), 5)]
        texts = ["\n".join(person.text for person in group) for group in groups * 4]
        records = ({"id": f"group-{i}", "text": text} for i, text in enumerate(texts))
        people.write_jsonl(files[1], records)
        prepare(config, workdir, *files)
        yield workdir


def _write(
    config: ConfigDict, workdir: Path, folder: Path, base: Bank | None = None
) -> dict[str, Any]:
    """Writes a bank with random weights; returns the writer's report."""
    model, references = make_model(config, PREFIX_TOKENS), References(workdir / "references")
    params = model.init(jax.random.key(0))
    return write_bank(config, model, params, references, folder, progress=False, base=base)


class _Stage:
    """Train step of a config, on batches of the pipeline or on one batch again and again."""

    def __init__(self, config: ConfigDict, workdir: Path, bank: Path | None = None):
        self.mesh = make_mesh(config)
        program = Program(config, self.mesh)
        self.state = program.init()
        pipeline = open_pipeline(config, workdir, bank=bank)
        self.step = make_step(program, pipeline.dequantize)
        self.batches, self.batch_size = pipeline.batches(0), pipeline.batch_size
        self.same = self._place(next(self.batches))
        self.scale = [scale_on(self.mesh, 1.0)] if config.guard.on else []
        self.monitor, self.steps = Monitor(config, {}), 0
        for value in np.random.default_rng(0).normal(3.0, 0.05, config.guard.window):
            self.watch(value, value)  # a full window, as in all steps but the first

    def repeat(self) -> None:
        """Takes a step with the first batch."""
        self._run(self.same)

    def from_pipeline(self) -> None:
        """Takes a step with the next batch of the pipeline."""
        self._run(self._place(next(self.batches)))

    def watch(self, loss: float = 3.0, norm: float = 3.0) -> None:
        """Updates the statistics of the stability guard with a step."""
        self.steps += 1
        assert self.monitor.observe(self.steps, loss, norm) is None

    def _place(self, batch: Batch) -> Batch:
        return place_batch(self.mesh, batch, host_rows(self.mesh, self.batch_size))

    def _run(self, batch: Batch) -> None:
        self.state, metrics = self.step(self.state, batch, *self.scale)
        values = jax.device_get(metrics)
        if self.scale:
            self.watch(float(values["loss"]), float(values["gradient_norm"]))


def _compress(config: ConfigDict, workdir: Path) -> Path:
    """Writes the workdir's bank once more, compressed with random tables; returns its folder."""
    base, folder = Bank.open(workdir / "bank"), workdir / "compressed"
    folder.mkdir()
    tables = codecs.to_bytes(random_codec(config), base.binding.owner)
    (folder / CODEBOOK).write_bytes(tables)  # so that the writer trains no tables
    _write(config, workdir, folder, base)
    return folder
