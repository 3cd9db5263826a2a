"""Benchmark `inference`: speed of generation with memories, without, with RAG, and of Hugging Face.

The speed test of Memory³ §9 at a size for a CPU: as many generated tokens as prompt tokens, three
retrievals of five memories per row, no cache of memories. Weights, words and memories are random,
since the cost of a token does not depend on them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import http.server
import itertools
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from m3jax import flops
from m3jax.bench.hf_llama import llama_generate
from m3jax.bench.made import configured, made_bank, prepare, section
from m3jax.bench.rounds import Rounds, import_peer, quotients, timed
from m3jax.config import PREFIX_TOKENS
from m3jax.evaluation.plots import speed_bars
from m3jax.inference.cold_start import ColdMemories
from m3jax.inference.generate import Generator
from m3jax.inference.memory_retrieval import MemoryRetriever
from m3jax.inference.rag import HEADER, rag_prompts
from m3jax.inference.sampling import Sampling
from m3jax.make_model import make_model
from m3jax.memory.bank import Bank
from m3jax.quickstart.people import write_jsonl
from m3jax.retrieval.index import Index
from m3jax.retrieval.retriever import Retriever
from m3jax.text.tokenizer import BOS, Tokenizer

_ROUND_TRIP = 0.02  # seconds until a remote bank answers a request
_CLOSE = ("none", "explicit", "compressed")  # modes whose speeds differ by less than a run's noise
_CLOSE_TURNS = 4  # runs of each of these modes in a round
_RATES = ("explicit_over_none", "compressed_over_none", "cold_over_none", "explicit_over_rag")
_REPORTED = ("explicit", "compressed", "cold", "remote_1")  # modes whose retrieval is reported
# Config fields of a model of 50M parameters without the embedding; `FULL` has 100M.
_SHAPE = (
    section("model", layers=8, query_heads=12, kv_heads=4, head_dim=64, hidden=768, mlp_width=2048)
    | section("model", vocabulary=8192, tied_embeddings=True, prefix="always")
    | section("memory", source="precomputed", layers=4, dtype="float32")
    | {"stage": "continual", "text.validation_share": 0.0, "data.sequence_length": 2048}
    | {"writer.batch_references": 16}
)
FULL = {"batch": 16, "tokens": 128, "shape": {"model.layers": 16, "memory.layers": 8}}
SMALLEST = {
    "batch": 2,
    "references": 64,
    "words": 200,
    "shape": {"memory.layers": 1, "model.vocabulary": 1024}
    | section("model", layers=1, query_heads=2, kv_heads=1, head_dim=16, hidden=32, mlp_width=64),
}


def inference(
    batch: int = 8,
    tokens: int = 64,
    references: int = 2048,
    words: int = 4000,
    shape: Mapping[str, Any] = {},
) -> Rounds:
    """Measures tokens per second of every mode of generation.

    A round generates once in each mode, and four times in the modes with similar speeds.

    Args:
      batch: number of rows generated together.
      tokens: number of tokens of a prompt, and of generated tokens.
      references, words: number of references, and of distinct words in their texts.
      shape: config fields that replace those of a model of 50M parameters.

    Yields:
      `ratios` of tokens per second between modes. Modes: `none` (no memories), `explicit` (a bank),
      `compressed` (a bank by the vector quantizer), `cold` (memories are written when retrieved),
      `remote` (a bank on an HTTP server that answers after 20 ms), `rag` (five references as text,
      retrieval included), `hf` (Hugging Face, if the extra `parity` is installed); `…_1` generates
      one row alone. Also `ttft_rag_over_explicit`, the ratio of times to the first token.
      `tokens_per_second`, `first_token_seconds` and `state_MB` (keys and values on the device) by
      mode. `explicit`, `compressed`, `cold` and `remote_1`: the costs of retrieval in that mode.
      `counted`: FLOP and bytes that memories add to decoding a token, as fractions of those without
      memories, counted and not measured.
    """
    config = configured(_SHAPE, shape)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        retriever, tokenizer = _knowledge(config, folder, _words(words), references)
        prompts = _texts(_words(words), batch, tokens - 1, seed=1)
        rows = np.array([[BOS, *row] for row in tokenizer.encode_batch(prompts)])
        assert rows.shape == (batch, tokens)
        modes = _modes(config, folder, retriever, tokenizer, prompts, tokens, stack)
        calls: dict[str, Callable[[], Any]] = {k: v for k, v in modes.items() if k not in _CLOSE}
        peer = import_peer("none_over_hf", "torch", "transformers")
        if peer is not None:
            calls["hf"] = llama_generate(peer, config, rows, tokens)
        close = {mode: modes[mode] for mode in _CLOSE}
        extra = _counted(config, batch, tokens + tokens // 2)
        for number in itertools.count():
            seconds = timed(close, _CLOSE_TURNS if number else 1) | timed(calls)
            speed = {
                mode: (1 if mode.endswith("_1") else batch) * tokens / value
                for mode, value in seconds.items()
            }
            first = {mode: run.first_token for mode, run in modes.items()}
            ratios = quotients(speed, *_RATES, "none_over_hf")
            for mode in ("explicit", "remote"):
                ratios[f"{mode}_over_none_1"] = speed[f"{mode}_1"] / speed["none_1"]
            ratios["ttft_rag_over_explicit"] = first["rag"] / first["explicit"]
            yield {
                "ratios": ratios,
                "tokens_per_second": speed,
                "first_token_seconds": first,
                "state_MB": {mode: run.state_bytes / 1e6 for mode, run in modes.items()},
                **{mode: run.retrieval for mode, run in modes.items() if mode in _REPORTED},
                "counted": extra,
            }


def draw_speeds(path: Path, result: Mapping[str, Any]) -> None:
    """Plots the speeds that `inference` measured, without the modes of one row (`…_1`)."""
    speeds = {k: v for k, v in result["tokens_per_second"].items() if not k.endswith("_1")}
    speed_bars(path, speeds, result["first_token_seconds"], "generation, three retrievals a row")


def _counted(config: ConfigDict, batch: int, context: int) -> dict[str, float]:
    """Counts the FLOP and bytes that memories add to decoding a token after `context` tokens, as
    fractions of those without memories."""
    counts = {"flops": flops.decode_step, "bytes": flops.decode_bytes}
    return {
        name: count(config, batch, context) / count(config, batch, context, 0) - 1
        for name, count in counts.items()
    }


@dataclasses.dataclass
class Mode:
    """Mode of generation: generates once when called, and keeps the figures of that call.

    Attributes:
      generator: generates.
      prompts: makes the prompts; its time counts.
      tokens: number of tokens to generate per prompt.
      first_token: seconds until all rows have their first token.
      state_bytes: bytes of keys and values on the device.
      retrieval: costs of retrieval.
    """

    generator: Generator
    prompts: Callable[[], list[str]]
    tokens: int
    first_token: float = 0.0
    state_bytes: int = 0
    retrieval: dict[str, float] = dataclasses.field(default_factory=dict)

    def __call__(self) -> None:
        memories = self.generator.memory_retriever
        before = {} if memories is None else dict(memories.costs)
        begin = time.perf_counter()
        prompts = self.prompts()
        prepared = time.perf_counter() - begin
        rows = self.generator.generate(prompts, self.tokens)
        seconds = time.perf_counter() - begin
        self.first_token = prepared + self.generator.first_token
        self.state_bytes = self.generator.state_bytes
        if memories is not None:
            costs = {name: cost - before[name] for name, cost in memories.costs.items()}
            ids = np.concatenate([chunk.ids for row in rows for chunk in row.chunks])
            self.retrieval = {
                "search_share": costs["search_seconds"] / seconds,
                "read_share": costs["read_seconds"] / seconds,
                "read_MB": costs["bytes"] / 1e6,
                "memories": costs["memories"],
                "different_references": len(np.unique(ids[ids >= 0])),
            }


def _modes(
    config: ConfigDict,
    folder: Path,
    retriever: Retriever,
    tokenizer: Tokenizer,
    prompts: list[str],
    tokens: int,
    stack: contextlib.ExitStack,
) -> dict[str, Mode]:
    """Makes all modes but `hf`, with random weights and banks; `stack` closes the bank's server."""
    model = make_model(config, PREFIX_TOKENS)
    params = jax.jit(model.init)(jax.random.key(0))
    references, count = retriever.references, config.memory.per_prompt_chunk
    longest = config.data.sequence_length

    def generator(memories: Any = None) -> Generator:
        reads = memories and MemoryRetriever(retriever, memories, tokenizer, count)
        # Sampled: greedy generation with random weights would repeat one word.
        drawn = Sampling(temperature=1.0, seed=1)
        return Generator(model, params, tokenizer, reads, sampling=drawn, stop=(), longest=longest)

    def with_text() -> list[str]:
        return rag_prompts(retriever, prompts, count)[0]

    vector = config.copy_and_resolve_references()
    vector.writer.compression = "vector"
    explicit = generator(made_bank(folder / "explicit", config, len(references)))
    compressed = generator(made_bank(folder / "compressed", vector, len(references)))
    cold = generator(ColdMemories(config, model, params, references, limit=0))
    remote = generator(Bank.open(stack.enter_context(_serving(folder / "explicit"))))
    none = generator()
    together = {"none": none, "explicit": explicit, "compressed": compressed, "cold": cold}
    alone = {"none_1": none, "explicit_1": explicit, "remote_1": remote}
    return {
        **{name: Mode(mode, lambda: prompts, tokens) for name, mode in together.items()},
        **{name: Mode(mode, lambda: prompts[:1], tokens) for name, mode in alone.items()},
        "rag": Mode(none, with_text, tokens),
    }


@contextlib.contextmanager
def _serving(folder: Path) -> Iterator[str]:
    """Serves the files of a folder by HTTP, byte ranges included, with a delay of `_ROUND_TRIP` per
    request; yields the URL."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            time.sleep(_ROUND_TRIP)
            file = folder / self.path.lstrip("/").partition("?")[0]
            if not file.is_file():
                return self.send_error(404)
            size, span = file.stat().st_size, self.headers.get("Range", "")
            first, _, last = span.removeprefix("bytes=").partition("-")
            start = int(first) if first else max(size - int(last), 0) if last else 0
            end = min(int(last) + 1, size) if first and last else size
            self.send_response(206 if span else 200)
            self.send_header("Content-Length", str(end - start))
            if span:
                self.send_header("Content-Range", f"bytes {start}-{end - 1}/{size}")
            self.end_headers()
            with file.open("rb") as content:
                self.wfile.write(os.pread(content.fileno(), end - start, start))

        def log_message(self, *arguments: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


def _words(count: int) -> list[str]:
    """Makes up to 6400 distinct words of two syllables, in random order."""
    syllables = [a + b for a in "bdfghjklmnprstvz" for b in "aeiou"]
    pairs = [a + b for a in syllables for b in syllables]
    return np.random.default_rng(0).permutation(pairs)[:count].tolist()


def _texts(words: list[str], count: int, length: int, seed: int) -> list[str]:
    """Draws `count` texts of `length` random words, each of which is one token."""
    random = np.random.default_rng(seed)
    return [" " + " ".join(random.choice(words, length)) for _ in range(count)]


def _knowledge(
    config: ConfigDict, folder: Path, words: list[str], count: int
) -> tuple[Retriever, Tokenizer]:
    """Prepares references of random words, of nearly the maximal length, and opens a retriever and
    the tokenizer."""
    length = config.memory.reference_length - 2  # the first word of a text has two tokens
    texts = _texts(words, count, length, seed=2)
    texts += [f" {HEADER}" + " ".join(words) for _ in range(3)]  # makes every word a token
    documents = folder / "documents.jsonl"
    write_jsonl(documents, ({"id": str(i), "text": text} for i, text in enumerate(texts)))
    references = prepare(config, folder, documents)
    index = Index.open(folder / "index", references)
    retriever = Retriever(index, references, config.retrieval.candidates, 1.0)
    return retriever, Tokenizer.load(folder / "tokenizer")
