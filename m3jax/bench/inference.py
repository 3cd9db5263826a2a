"""Benchmark `inference`: generation with memories over none, text retrieval, and Hugging Face.

The speed test of Memory³ §9 at a size for a CPU: 128 tokens in and 128 out, three retrievals a
row of five memories each, no cache of memories. Weights, words and memories are random: what a
token costs does not depend on them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import http.server
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from m3jax import config as config_lib
from m3jax import flops
from m3jax.bench.bank import made_bank, random_codec
from m3jax.bench.hf_llama import MissingLlama, llama_generate
from m3jax.bench.timing import Figures
from m3jax.config import PREFIX_TOKENS
from m3jax.evaluation.plots import speed_bars
from m3jax.inference.cold_start import ColdMemories
from m3jax.inference.generate import Generator
from m3jax.inference.memory_retrieval import MemoryRetriever
from m3jax.inference.rag import HEADER, with_references
from m3jax.inference.sampling import Sampling
from m3jax.make_model import make_model
from m3jax.memory import codec as codecs
from m3jax.memory.bank import Bank
from m3jax.quickstart.people import write_jsonl
from m3jax.retrieval.build import build_index
from m3jax.retrieval.embed import make_embedder
from m3jax.retrieval.index import Index
from m3jax.retrieval.retriever import Retriever
from m3jax.text.prepare import prepare_text
from m3jax.text.references import References
from m3jax.text.tokenizer import Tokenizer

_TOKENS, _NEW, _REFERENCES = 128, 128, 2048  # of a prompt, generated, in the knowledge base
_ROUND_TRIP = 0.02  # seconds until a remote bank answers
_CLOSE = ("none", "explicit", "compressed")  # modes whose speeds differ by less than one round says
_MORE = 4  # times as many rounds of them
_SYLLABLES = [a + b for a in "bdfghjklmnprstvz" for b in "aeiou"]


def inference(
    rounds: int = 3, batch: int = 16, picture: str | Path | None = None
) -> dict[str, Figures]:
    """Tokens a second of every mode, timed in turn.

    A round generates once in each mode, one after the other; the first round is not counted. The
    modes that lie close together take turns for three times as many rounds again.

    Args:
      rounds: of all modes that are counted.
      batch: rows generated together.
      picture: PNG to write.

    Returns:
      `ratios`: of tokens a second, medians over rounds: `explicit_over_none`,
      `compressed_over_none`, `cold_over_none`, `explicit_over_rag` (end to end: search, loading,
      prompt, text), `none_over_hf` where the extra `parity` is installed; of one row alone
      `explicit_over_none_1` and `remote_over_none_1`, with the bank on an HTTP server that answers
      after 20 ms; and `ttft_rag_over_explicit`, of the time to the first token.
      `tokens_per_second`, `first_token_seconds`, `state_MB` (keys and values on the device):
      medians by mode. `explicit`, `compressed`, `cold`, `remote_1`: of one run, the share of time
      of search and of reading, MB read, different references. `counted`: extra work of a decoded
      token by own count.
    """
    config = _shape()
    with contextlib.ExitStack() as stack:
        name = stack.enter_context(tempfile.TemporaryDirectory())
        modes = _modes(config, Path(name), batch, stack)
        times: dict[str, list[tuple[float, float]]] = {mode: [] for mode in modes}
        held: Figures = {}
        turns = [*modes] * (rounds + 1) + [*_CLOSE] * ((_MORE - 1) * rounds)
        with tqdm(turns, desc="inference", unit="run") as bar:
            for mode in bar:
                bar.set_postfix_str(mode)
                run = modes[mode]
                times[mode].append(run())
                if isinstance(run, _Run):
                    held[mode] = run.generator.timing.state_bytes / 1e6
        last = {mode: run.last for mode, run in modes.items() if isinstance(run, _Run)}
    seconds = {mode: [one[0] for one in found[1:]] for mode, found in times.items()}
    first = {mode: [one[1] for one in found[1:]] for mode, found in times.items()}

    def ratio(found: dict[str, list[float]], one: str, other: str) -> float:
        # Runs of the same round; only close modes have more of them.
        return statistics.median(b / a for a, b in zip(found[one], found[other], strict=False))

    ratios = {
        f"{mode}_over_none": ratio(seconds, mode, "none")
        for mode in ("explicit", "compressed", "cold")
    }
    for mode in ("explicit", "remote"):
        ratios[f"{mode}_over_none_1"] = ratio(seconds, f"{mode}_1", "none_1")
    ratios["explicit_over_rag"] = ratio(seconds, "explicit", "rag")
    ratios["ttft_rag_over_explicit"] = ratio(first, "explicit", "rag")
    if "hf" in seconds:
        ratios["none_over_hf"] = ratio(seconds, "none", "hf")
    speed = {
        mode: (1 if mode.endswith("_1") else batch) * _NEW / statistics.median(found)
        for mode, found in seconds.items()
    }
    waited = {mode: statistics.median(found) for mode, found in first.items() if mode != "hf"}
    if picture is not None:
        title = f"{_TOKENS} tokens in, {_NEW} out, {batch} rows, three retrievals a row"
        together = {mode: figure for mode, figure in speed.items() if not mode.endswith("_1")}
        speed_bars(Path(picture), together, waited, title)
    return {
        "ratios": ratios,
        "tokens_per_second": speed,
        "first_token_seconds": waited,
        "state_MB": held,
        **{mode: last[mode] for mode in ("explicit", "compressed", "cold", "remote_1")},
        "counted": counted(config, batch, _TOKENS + _NEW // 2),
    }


def counted(config: ConfigDict, batch: int, context: int) -> Figures:
    """Extra work of decoding one token a row with memories, by own count.

    Args:
      config: shape and dtypes.
      batch: rows that share a pass over the weights.
      context: tokens in front of the token.

    Returns:
      `flops` and `bytes`: what memories add over what is done without.
    """
    counts = flops.decode_step, flops.decode_bytes
    with_memory = [count(config, batch, context) for count in counts]
    without = [count(config, batch, context, 0) for count in counts]
    return {
        name: a / b - 1 for name, a, b in zip(("flops", "bytes"), with_memory, without, strict=True)
    }


def _shape() -> ConfigDict:
    """100M parameters without the embedding."""
    config = config_lib.default()
    config.stage = "continual"
    config.memory.source = "precomputed"
    model, memory = config.model, config.memory
    model.layers, memory.first_layer, memory.layers = 16, 0, 8
    model.query_heads, model.kv_heads, model.head_dim = 12, 4, 64
    model.hidden, model.mlp_width = 768, 2048
    model.vocabulary = config.text.vocabulary = 8192
    model.tied_embeddings, model.prefix = True, "always"
    memory.dtype = "float32"
    config.text.validation_share = 0.0
    config.data.sequence_length = 2048
    config.writer.batch_references = 16
    return config_lib.validate(config)


@dataclasses.dataclass
class _Run:
    """A mode: generates once and says how long it took."""

    generator: Generator
    prompts: list[str]
    before: Callable[[], list[str]] | None = None  # makes the prompts, in the time
    last: dict[str, float] = dataclasses.field(default_factory=dict)

    def __call__(self) -> tuple[float, float]:
        """Seconds, and those to the first token of every row."""
        memory_retriever = self.generator.memory_retriever
        start = None if memory_retriever is None else dataclasses.replace(memory_retriever.costs)
        begin = time.perf_counter()
        prompts = self.prompts if self.before is None else self.before()
        spent = time.perf_counter() - begin
        found = self.generator.generate(prompts, _NEW)
        seconds = time.perf_counter() - begin
        if memory_retriever is not None and start is not None:
            now = memory_retriever.costs
            ids = np.concatenate([chunk.ids for row in found for chunk in row.chunks])
            self.last = {
                "search_share": (now.search_seconds - start.search_seconds) / seconds,
                "read_share": (now.read_seconds - start.read_seconds) / seconds,
                "read_MB": (now.bytes - start.bytes) / 1e6,
                "memories": now.memories - start.memories,
                "different_references": len(np.unique(ids[ids >= 0])),
            }
        return seconds, spent + self.generator.timing.first_token


def _modes(
    config: ConfigDict, folder: Path, batch: int, stack: contextlib.ExitStack
) -> dict[str, Callable[[], tuple[float, float]]]:
    words = _words()
    references, tokenizer, retriever = _knowledge(config, folder, words)
    model = make_model(config, PREFIX_TOKENS)
    params = jax.jit(model.init)(jax.random.key(0))
    prompts = _texts(words, batch, _TOKENS - 1, seed=1)
    encoded = tokenizer.encode_batch(prompts)
    assert {len(tokens) for tokens in encoded} == {_TOKENS - 1}
    count = config.memory.per_prompt_chunk
    shape = {
        "layers": config.memory.layers,
        "kv_heads": config.model.kv_heads,
        "kept_tokens": config.memory.kept_tokens,
        "head_dim": config.model.head_dim,
    }

    def generator(memories: Any = None) -> Generator:
        memory_retriever = memories and MemoryRetriever(retriever, memories, tokenizer, count)
        # Draws, so that random weights do not say the same word again and again.
        drawn = Sampling(temperature=1.0, seed=1)
        return Generator(
            model,
            params,
            tokenizer,
            memory_retriever,
            sampling=drawn,
            stop=(),
            longest=config.data.sequence_length,
        )

    head_dim, dtype = config.model.head_dim, config.memory.dtype
    banks = {
        "explicit": codecs.plain(head_dim, dtype),
        "compressed": random_codec(head_dim, dtype),
    }
    none = generator()
    modes: dict[str, Callable[[], tuple[float, float]]] = {"none": _Run(none, prompts)}
    for name, codec in banks.items():
        made_bank(folder / name, codec, len(references), shape)
        modes[name] = _Run(generator(Bank.open(folder / name)), prompts)
    served = Bank.open(stack.enter_context(_serving(folder / "explicit")))
    alone = {"none": none, "explicit": generator(Bank.open(folder / "explicit"))}
    for name, one in {**alone, "remote": generator(served)}.items():
        modes[f"{name}_1"] = _Run(one, prompts[:1])
    cold = ColdMemories(config, model, params, references, limit=0)
    modes["cold"] = _Run(generator(cold), prompts)

    def with_text() -> list[str]:
        return with_references(prompts, retriever.retrieve(list(prompts), None, count), references)

    modes["rag"] = _Run(generator(), prompts, with_text)
    try:
        tokens = np.stack([np.concatenate([[1], row]) for row in encoded])
        theirs = llama_generate(config, tokens, _NEW)
    except MissingLlama as error:
        print(f"without none_over_hf: {error}", file=sys.stderr)
    else:

        def hf() -> tuple[float, float]:
            begin = time.perf_counter()
            assert theirs().shape == (batch, _NEW)
            return time.perf_counter() - begin, 0.0

        modes["hf"] = hf
    return modes


@contextlib.contextmanager
def _serving(folder: Path) -> Iterator[str]:
    """URL of a server of the folder, in a process of its own."""
    here, there = multiprocessing.get_context("spawn").Pipe()
    serve = functools.partial(_serve, str(folder), _ROUND_TRIP)
    process = multiprocessing.get_context("spawn").Process(target=serve, args=(there,), daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{here.recv()}"
    finally:
        process.terminate()
        process.join()


def _serve(folder: str, delay: float, ready: Any) -> None:
    """Serves ranges of bytes until it is killed; sends its port."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            time.sleep(delay)
            file = Path(folder) / self.path.lstrip("/").partition("?")[0]
            if not file.is_file():
                self.send_error(404)
                return
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
                content.seek(start)
                self.wfile.write(content.read(end - start))

        def log_message(self, *arguments: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    ready.send(server.server_port)
    server.serve_forever()


def _words() -> list[str]:
    random = np.random.default_rng(0)
    pairs = [a + b for a in _SYLLABLES for b in _SYLLABLES]
    return random.permutation(pairs)[:4000].tolist()


def _texts(words: list[str], count: int, length: int, seed: int) -> list[str]:
    """Texts of random words, each a token."""
    random = np.random.default_rng(seed)
    return [" " + " ".join(random.choice(words, length)) for _ in range(count)]


def _knowledge(
    config: ConfigDict, folder: Path, words: list[str]
) -> tuple[References, Tokenizer, Retriever]:
    """References of random words, as long as can be, and the search over them."""
    length = config.memory.reference_length - 2  # the first word of a text is of two tokens
    texts = _texts(words, _REFERENCES, length, seed=2)
    texts += [f" {HEADER}" + " ".join(words) for _ in range(3)]  # so that every word is a token
    documents = folder / "documents.jsonl"
    write_jsonl(documents, ({"id": str(i), "text": text} for i, text in enumerate(texts)))
    prepare_text(config, folder, str(documents), say=lambda line: None)
    references = References.open(folder / "references")
    build_index(references, make_embedder(config), folder / "index", config)
    index = Index.open(folder / "index", references)
    retriever = Retriever(index, references, config.retrieval.candidates, 1.0)
    return references, Tokenizer.load(folder / "tokenizer"), retriever
