"""Benchmarks whose results are ratios of two things timed in turn in one process (A B A B …)."""

from __future__ import annotations

import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

import m3jax
from m3jax import config as config_lib
from m3jax.bench.bank import bank, random_codec
from m3jax.bench.hf_llama import MissingLlama, llama_step
from m3jax.bench.inference import inference
from m3jax.bench.overlap import overlap
from m3jax.bench.quantizer import quantizer
from m3jax.bench.retrieval import retrieval
from m3jax.bench.timing import Figures, paired
from m3jax.config import PREFIX_TOKENS, prefix_tokens
from m3jax.data.batch import Batch
from m3jax.data.pipeline import Pipeline, open_pipeline
from m3jax.make_model import make_model
from m3jax.memory import codec as codecs
from m3jax.memory.bank import Bank
from m3jax.memory.storage import CODEBOOK
from m3jax.memory.write import write_bank
from m3jax.mesh import host_rows, make_mesh, to_global
from m3jax.quickstart import people
from m3jax.retrieval.build import build_index
from m3jax.retrieval.embed import make_embedder
from m3jax.text.prepare import prepare_text
from m3jax.text.references import References
from m3jax.text.tokenizer import Tokenizer
from m3jax.train.monitor import Monitor
from m3jax.train.optimizer import make_optimizer
from m3jax.train.state import abstract_state, init_state
from m3jax.train.step import make_step, scale_on


def environment() -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "m3jax": m3jax.__version__,
        "jax": jax.__version__,
        "python": platform.python_version(),
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
    }


def train(rounds: int = 12) -> dict[str, Figures]:
    """Step time of precomputed and online memories over warmup; of the pipeline over a repeat.

    Returns:
      `ratios`: `precomputed_over_warmup`, `online_over_warmup`, `pipeline_over_repeat`,
      `decoding_over_precomputed` (memories decoded in the step from 14 bytes each), and where
      the extra `parity` is installed `warmup_over_hf_llama`, against Hugging Face's Llama in torch
      at the same shape, dtype and cores; `guarded_over_plain`, a warmup step with the stability
      guard over one without, and `monitor_over_step`, what its statistics take of that step;
      `seconds`: the median step times behind them.
    """
    with _workdir(_shape("none")) as workdir:
        stages = {source: _Stage(_shape(source), workdir) for source in _SOURCES}
        seconds, ratios = {}, {}
        for name in ("precomputed", "online"):
            beside = f"warmup_beside_{name}"  # each pair has its own, as the machine drifts
            seconds[name], seconds[beside], ratios[f"{name}_over_warmup"] = paired(
                stages[name].repeat, stages["none"].repeat, rounds
            )
        guarded = _Guarded(_shape("none", guard=True), workdir)
        seconds["guarded"], seconds["plain"], ratios["guarded_over_plain"] = paired(
            guarded.repeat, stages["none"].repeat, 20 * rounds, turned=True
        )
        seconds["monitor"] = guarded.monitor_seconds()
        ratios["monitor_over_step"] = seconds["monitor"] / seconds["plain"]
        fed = stages["precomputed"]
        seconds["pipeline"], seconds["repeat"], ratios["pipeline_over_repeat"] = paired(
            fed.from_pipeline, fed.repeat, rounds
        )
        coded, base = _shape("precomputed", compression="vector"), Bank.open(workdir / "bank")
        codec = random_codec(coded.model.head_dim, coded.memory.dtype)
        (workdir / "coded").mkdir()
        tables = codecs.to_bytes(codec, base.binding.owner)
        (workdir / "coded" / CODEBOOK).write_bytes(tables)  # the writer trains none then
        _write(coded, workdir, workdir / "coded", base)
        decoding = _Stage(coded, workdir, workdir / "coded")
        (
            seconds["decoding"],
            seconds["precomputed_beside_decoding"],
            ratios["decoding_over_precomputed"],
        ) = paired(decoding.repeat, fed.repeat, rounds)
        tokens = np.asarray(stages["none"].same.tokens)
        try:
            llama = llama_step(_shape("none"), tokens)
        except MissingLlama as error:
            print(f"without warmup_over_hf_llama: {error}", file=sys.stderr)
        else:
            (
                seconds["warmup_beside_hf_llama"],
                seconds["hf_llama"],
                ratios["warmup_over_hf_llama"],
            ) = paired(stages["none"].repeat, llama, rounds)
    return {"ratios": ratios, "seconds": seconds}


def writer(rounds: int = 3) -> dict[str, Figures]:
    """Share of the bank writer's time that it waits for the jitted encode (median of runs)."""
    config = _shape("precomputed")
    with _workdir(config, bank=False) as workdir:
        reports = [_write(config, workdir, workdir / f"bank{i}") for i in range(rounds)]
    median = {
        name: statistics.median(report[name] for report in reports)
        for name in ("encode_share", "memories_per_second", "seconds")
    }
    return {"ratios": {"encode_share": median.pop("encode_share")}, "seconds": median}


BENCHMARKS: dict[str, Callable[..., dict[str, Figures]]] = {
    "train": train,
    "writer": writer,
    "overlap": overlap,
    "bank": bank,
    "quantizer": quantizer,
    "retrieval": retrieval,
    "inference": inference,
}
_SOURCES = ("none", "precomputed", "online")


def _shape(source: str, compression: str = "none", guard: bool = False) -> ConfigDict:
    """A shape small enough for a CPU whose proportions are those of a real one."""
    config = config_lib.default()
    config.guard.on = guard
    config.memory.source = source
    config.model.layers, config.memory.layers = 4, 2
    config.model.query_heads, config.model.kv_heads, config.model.head_dim = 8, 2, 32
    config.model.hidden, config.model.mlp_width = 256, 704
    config.model.vocabulary = config.text.vocabulary = 2048
    config.model.attention_block = 128
    config.model.prefix = "always"
    config.text.validation_share = 0.0
    config.data.sequence_length, config.data.batch_size = 512, 4
    config.data.threads, config.data.prefetch = 2, 4
    config.retrieval.shift = 1
    config.writer.batch_references, config.writer.compression = 64, compression
    return config_lib.validate(config)


@contextmanager
def _workdir(config: ConfigDict, bank: bool = True) -> Iterator[Path]:
    """A temporary prepared workdir with a bank of random weights."""
    with tempfile.TemporaryDirectory() as name:
        workdir = Path(name)
        world = people.make_world(0, names=400, people=2000, unseen=10, values=32, facts=4)
        documents = people.fact_documents(world, 0, 400, chunks=40)
        people.write_jsonl(workdir / "documents.jsonl", documents)
        groups = [world.people[i : i + 5] for i in range(0, len(world.people), 5)]
        people.write_jsonl(
            workdir / "knowledge.jsonl",
            (
                {"id": f"group-{i}", "text": "\n".join(person.text for person in group)}
                for i, group in enumerate(groups * 4)
            ),
        )
        sources = str(workdir / "documents.jsonl"), str(workdir / "knowledge.jsonl")
        prepare_text(config, workdir, *sources, say=lambda line: None)
        references = References.open(workdir / "references")
        build_index(references, make_embedder(config), workdir / "index", config)
        if bank:
            _write(config, workdir, workdir / "bank")
        yield workdir


def _write(
    config: ConfigDict, workdir: Path, folder: Path, base: Bank | None = None
) -> dict[str, Any]:
    model = make_model(config)
    return write_bank(
        config,
        model,
        model.init(jax.random.key(0)),
        References.open(workdir / "references"),
        folder,
        tokenizer_fingerprint=Tokenizer.load(workdir / "tokenizer").fingerprint,
        prefix_tokens=PREFIX_TOKENS,
        progress=False,
        base=base,
    )


class _Stage:
    """The train step of one memory source, fed by the pipeline or with the same batch again."""

    def __init__(self, config: ConfigDict, workdir: Path, bank: Path | None = None):
        self.mesh = make_mesh(config)
        model = make_model(config, prefix_tokens(config), self.mesh)
        optimizer = make_optimizer(config)
        abstract = abstract_state(model, optimizer, self.mesh)
        self.state = init_state(config, model, optimizer, abstract, None)
        self.pipeline: Pipeline = open_pipeline(config, workdir, bank=bank)
        decode = self.pipeline.decode
        self.step = make_step(config, model, self.mesh, optimizer, abstract, decode)
        self.batches = self.pipeline.batches(0)
        self.same = self._place(next(self.batches))

    def _place(self, batch: Batch) -> Batch:
        rows = host_rows(self.mesh, self.pipeline.batch_size)
        return to_global(self.mesh, batch.for_step(), rows)

    def _run(self, batch: Batch) -> None:
        self.state, metrics = self.step(self.state, batch)
        jax.device_get(metrics)

    def repeat(self) -> None:
        self._run(self.same)

    def from_pipeline(self) -> None:
        self._run(self._place(next(self.batches)))


class _Guarded(_Stage):
    """The same with what the loop does for the stability guard; no trouble ever comes."""

    def __init__(self, config: ConfigDict, workdir: Path):
        super().__init__(config, workdir)
        self.scale, self.steps = scale_on(self.mesh, 1.0), 0
        config = config.copy_and_resolve_references()
        config.guard.loss_deviations = config.guard.norm_deviations = 1e9
        config.guard.rise_deviations = 1e9
        self.monitor = Monitor(config, {})
        for value in np.random.default_rng(0).normal(3.0, 0.05, config.guard.window):
            self._watch(value, value)  # a full window, as in all steps but the first

    def _run(self, batch: Batch) -> None:
        self.state, metrics = self.step(self.state, batch, self.scale)
        values = jax.device_get(metrics)
        self._watch(float(values["loss"]), float(values["gradient_norm"]))

    def _watch(self, loss: float, norm: float) -> None:
        self.steps += 1
        assert self.monitor.observe(self.steps, loss, norm) is None

    def monitor_seconds(self, repeats: int = 200) -> float:
        """Median seconds of the statistics of one step."""
        times = []
        for _ in range(repeats):
            begin = time.perf_counter()
            self._watch(3.0, 3.0)
            times.append(time.perf_counter() - begin)
        return statistics.median(times)
