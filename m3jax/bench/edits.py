"""Benchmark `edits`: what the n-th edit of one document costs, and opening what it leaves."""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from m3jax.bench.made import configured, prepare, section
from m3jax.bench.rounds import Rounds
from m3jax.config import PREFIX_TOKENS
from m3jax.files import json_text
from m3jax.knowledge.edit import WriteMemories, edit
from m3jax.knowledge.versions import open_bank, open_references, open_retriever, open_version
from m3jax.make_model import make_model
from m3jax.memory.bank import Bank
from m3jax.memory.write import write_bank
from m3jax.text.documents import Document
from m3jax.text.references import References
from m3jax.text.tokenizer import Tokenizer

_MODEL = section("model", layers=2, hidden=32, mlp_width=64, query_heads=2, kv_heads=1, head_dim=16)
_SIZES = section("memory", layers=1, reference_length=32, chunk_length=32, kept_tokens=8)
_WORDS = 1000
_KEPT = 10  # edits at each end whose medians are compared
_SHOWN = (1, 10, 50, 100, 200)


def edits(edits: int = 200, documents: int = 200) -> Rounds:
    """Adds one document at a time to a workdir with `documents` documents, in one process.

    After every edit, the new version is opened as generation opens it and one memory is retrieved
    and read. A round begins with the workdir as it was prepared.

    Yields:
      `ratios` of the median of the last ten edits over that of the first ten: `edit_time` and
      `open_time`. Of the n-th edit, n = 1, 10, 50, 100, 200: `seconds` of the `edit` and the
      `open`; `kB` that it adds to the disk; `open_MB`, the resident memory of the opened version;
      `open_files`, its descriptors.
    """
    config = configured(
        _MODEL | section("model", vocabulary=1024, prefix="always"),
        _SIZES | section("writer", batch_references=8, shard_memories=256),
        section("data", sequence_length=64, batch_size=2) | section("text", validation_share=0.1),
    )
    model = make_model(config, PREFIX_TOKENS)
    params = jax.jit(model.init)(jax.random.key(0))
    random = np.random.default_rng(0)

    def write(references: References, folder: Path | str, base: Bank | None) -> None:
        write_bank(config, model, params, references, folder, progress=False, base=base)

    with tempfile.TemporaryDirectory() as name:
        prepared, workdir, text = (Path(name) / part for part in ("prepared", "run", "text.jsonl"))
        lines = [{"id": f"d{i}", "text": _sentence(random)} for i in range(documents)]
        text.write_text("".join(f"{json_text(line)}\n" for line in lines))
        write(prepare(config, prepared, text), prepared / "bank", None)
        while True:
            shutil.rmtree(workdir, ignore_errors=True)
            shutil.copytree(prepared, workdir)
            costs = []
            for n in range(edits):
                costs.append(_edited(config, workdir, n, write, _sentence(random)))
            first, last = costs[:_KEPT], costs[-_KEPT:]
            shown = [n for n in _SHOWN if n <= edits]
            yield {
                "ratios": {
                    f"{part}_time": _median(last, part) / _median(first, part)
                    for part in ("edit", "open")
                },
                "seconds": {f"{k}_{n}": costs[n - 1][k] for k in ("edit", "open") for n in shown},
                **{
                    part: {str(n): costs[n - 1][part] for n in shown}
                    for part in ("kB", "open_MB", "open_files")
                },
            }


def _median(costs: list[dict[str, float]], part: str) -> float:
    return float(np.median([cost[part] for cost in costs]))


def _sentence(random: np.random.Generator) -> str:
    return " ".join(f"word{i}" for i in random.integers(_WORDS, size=12))


def _edited(
    config: ConfigDict, workdir: Path, n: int, write: WriteMemories, text: str
) -> dict[str, float]:
    """Adds a document and opens the version; returns what both cost."""
    size, begin = _bytes(workdir), time.perf_counter()
    edit(config, workdir, documents=[Document(f"new{n}", text)], write=write)
    edited = time.perf_counter() - begin
    gc.collect()
    memory, files, begin = _resident(), _open_files(), time.perf_counter()
    version = open_version(workdir)
    references = open_references(config, version, Tokenizer.load(workdir / "tokenizer"))
    bank = open_bank(version, references)
    retriever = open_retriever(config, version, references, 1.0)
    ids = retriever.retrieve([text], None, 1)[0]
    bank.read(ids)
    references.texts(ids[ids >= 0])
    opened = time.perf_counter() - begin
    return {
        "edit": edited,
        "open": opened,
        "kB": (_bytes(workdir) - size) / 1000,
        "open_MB": (_resident() - memory) / 1e6,
        "open_files": _open_files() - files,
    }


def _bytes(folder: Path) -> int:
    """Returns the size on disk of all files in a folder; a file with several names counts once."""
    stats = {stat.st_ino: stat for path in folder.rglob("*") if (stat := path.stat())}
    return sum(stat.st_blocks * 512 for stat in stats.values())


def _open_files() -> int:
    return len(os.listdir("/dev/fd"))


def _resident() -> int:
    """Returns the resident memory of this process in bytes, as Linux counts it."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
