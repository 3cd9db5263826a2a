"""A tiny workdir with everything that a run makes, ways to damage its files, and all its readers.

Nothing here lists files: what a workdir consists of is found by walking it.
"""

import hashlib
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from data.data_workdir import make_workdir, tiny_config
from ml_collections import ConfigDict

from m3jax.config import PREFIX_TOKENS
from m3jax.data.pipeline import open_pipeline
from m3jax.errors import UserError
from m3jax.files import write_sealed
from m3jax.knowledge.edit import edit
from m3jax.knowledge.maintain import verify
from m3jax.knowledge.versions import (
    open_bank,
    open_index,
    open_references,
    open_version,
    versions,
)
from m3jax.make_model import make_model
from m3jax.memory.bank import Bank
from m3jax.memory.write import write_bank
from m3jax.mesh import make_mesh
from m3jax.quickstart import people
from m3jax.text.chat.corpus import prepare_chats
from m3jax.text.corpus import Corpus
from m3jax.text.documents import Document
from m3jax.text.prepare import prepare_text
from m3jax.text.references import References
from m3jax.text.tokenizer import Tokenizer
from m3jax.train import dpo_base
from m3jax.train.checkpoints import Checkpoints, check_owner, claim
from m3jax.train.guard import FILE as GUARD
from m3jax.train.guard import Guard
from m3jax.train.hooks import known_lines
from m3jax.train.metrics import META, Metrics, read_metrics
from m3jax.train.run import Run
from m3jax.train.state import Program

STAGE = "continual"
SETTINGS = {"memory__reference_length": 20, "mesh__fsdp": 1, "train__keep_last": 5}
CONFIG = tiny_config(stage=STAGE, guard__on=True, train__checkpoint_every=2, **SETTINGS)
PAIRS = {"stage": "dpo", "data__packing": "pairs", "retrieval__ids": "stored"}
DPO = tiny_config(**SETTINGS, **PAIRS, chat__user="\nQ", chat__assistant="\nA")
VECTORS = {"compression": "vector", "coarse_bits": 4, "fine_bits": 3, "codebook_vectors": 400}
_PARAMS: dict[str, Any] = {}  # of the writer, as in `make_workdir`


class Told(Exception):
    """A reader goes on, and has said what is lost."""


def _vector_config() -> ConfigDict:
    config = CONFIG.copy_and_resolve_references()
    with config.unlocked():
        config.writer.update(VECTORS)
    return config


def write(references: References, folder: Path, base: Any, config: ConfigDict = CONFIG) -> None:
    model = make_model(config, PREFIX_TOKENS)
    if "writer" not in _PARAMS:
        _PARAMS["writer"] = jax.jit(model.init)(jax.random.key(0))
    write_bank(config, model, _PARAMS["writer"], references, folder, progress=False, base=base)


def _keep(self: Any, config: ConfigDict, pipeline: Any, model: Any) -> None:
    """In place of `RowLogprobs.__init__`, which compiles."""
    self.pipeline = pipeline


def _random_logprobs(self: Any, params: Any, first: int, last: int) -> Iterator[np.ndarray]:
    """In place of `RowLogprobs.__call__`."""
    random = np.random.default_rng(first)
    for low in range(first, last, self.pipeline.batch_size):
        rows = min(self.pipeline.batch_size, last - low)
        yield random.normal(size=(rows, self.pipeline.rows.slots)).astype(np.float32)


class _Listening(Run):
    """A run of which only these parts are used: `checkpoints`, `folder`, `say`."""

    def __init__(self, checkpoints: Checkpoints, folder: Path) -> None:
        vars(self).update(checkpoints=checkpoints, folder=folder)

    def say(self, text: str) -> None:
        raise Told(text)


def build(folder: Path, inputs: Path, seed: int = 0) -> Path:
    """Makes the workdir; documents and pairs are files in `inputs`. Seed 0 has a vector bank."""
    world = people.make_world(3 + seed, names=12, people=40, unseen=8, values=4, facts=2)
    documents = people.fact_documents(world, seed, 24, chunks=6)
    people.write_jsonl(inputs / "documents.jsonl", documents)
    people.write_jsonl(inputs / "knowledge.jsonl", people.knowledge(world.people))
    people.write_jsonl(inputs / "pairs.jsonl", people.preferences(world, seed, 24))
    texts = str(inputs / "documents.jsonl"), str(inputs / "knowledge.jsonl")
    make_workdir(folder, CONFIG, texts)
    if not seed:  # codebooks take seconds
        write(References(folder / "references"), folder / "vectors", None, _vector_config())
    prepare_chats(DPO, folder, str(inputs / "pairs.jsonl"))
    _save_checkpoints(folder, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dpo_base.RowLogprobs, "__init__", _keep)
        patch.setattr(dpo_base.RowLogprobs, "__call__", _random_logprobs)
        hold(folder, folder / STAGE)
    added = [Document(f"new{seed}", "Zork lives near the river.", "Zork")]
    edit(CONFIG, folder, documents=added, write=write)
    there = open_references(CONFIG, open_version(folder), Tokenizer.load(folder / "tokenizer"))
    edit(CONFIG, folder, delete=there.live_keys()[:1], write=write)
    return folder


def _save_checkpoints(folder: Path, seed: int) -> None:
    """Two checkpoints of a guarded stage that went back once, and what it has logged."""
    stage, program = folder / STAGE, Program(CONFIG, make_mesh(CONFIG, jax.devices()[:1]))
    claim(stage, CONFIG)
    write_sealed(stage / GUARD, {"rollbacks": [{"to": 2, "skipped": [2, 3], "losses": [[3, 9.5]]}]})
    metrics = Metrics(stage, 0)
    tokenizer = Tokenizer.load(folder / "tokenizer").fingerprint
    checkpoints = Checkpoints(stage, CONFIG, tokenizer)
    for step in (2, 4):
        metrics.write({"step": step, "loss": 3.5 - step / 10 + seed, "accuracy": 0.25})
        shapes = program.abstract
        random = np.random.default_rng(step + seed)
        state = jax.tree.map(
            lambda x, r=random: jax.device_put(
                np.asarray(9 * r.normal(size=x.shape)).astype(x.dtype), x.sharding
            ),
            shapes,
        )
        guard = {"rollbacks": int(step > 2), "monitor": {}}
        checkpoints.save(state, step, {META: metrics.checksum, "guard": guard})
    checkpoints.close()
    metrics.write({"step": 4, "time": {"step": 1.5}})
    metrics.close()


def hold(workdir: Path, init_from: Path | None) -> np.ndarray:
    """Computes or reads the log-probabilities of DPO's base model."""
    pipelines = {"train": open_pipeline(DPO, workdir, version=0)}
    mesh = make_mesh(DPO, jax.devices()[:1])
    if init_from is None:
        (workdir / "dpo" / "checkpoints" / "1").mkdir(parents=True, exist_ok=True)
    dpo_base.hold_base_logprobs(DPO, workdir / "dpo", pipelines, init_from, mesh)
    return pipelines["train"].base_logprobs


# -- readers -----------------------------------------------------------------------------------
def _rows(workdir: Path) -> Any:
    """What training and evaluation read: rows, retrieved ids, memories."""
    for split in ("train", "validation"):
        pipeline = open_pipeline(CONFIG, workdir, split=split)
        yield pipeline.read(np.arange(len(pipeline.rows)))


def _knowledge(workdir: Path) -> Any:
    """Everything that every version holds."""
    tokenizer = Tokenizer.load(workdir / "tokenizer")
    yield open_version(workdir).number
    for number in versions(workdir):
        version = open_version(workdir, number)
        references = open_references(CONFIG, version, tokenizer)
        bank, live = open_bank(version, references), references.live
        yield version.note, version.parent, references.texts(live), references.tokens(live)
        yield references.documents(), references.record_hashes, bank.record_hashes
        yield bank.read(live), bank.writer, bank.binding.layout
        index = open_index(version, references)
        queries = index.embedder.embed_queries(references.texts(live[:4]))
        yield index.search(queries, 5)


def _vectors(workdir: Path) -> Any:
    bank = Bank.open(workdir / "vectors")
    yield bank.read(np.arange(bank.size)), bank.record_hashes, bank.writer


def _chats(workdir: Path) -> Any:
    for split in ("train", "validation"):
        for document in Corpus(workdir / "pairs" / split):
            yield document.id, document.tokens, document.weights, document.references
    yield hold(workdir, None)


def _resume(workdir: Path) -> Any:
    """What a resumed stage reads: owner, rollbacks, metrics, the newest state, and an older one."""
    stage, program = workdir / STAGE, Program(CONFIG, make_mesh(CONFIG, jax.devices()[:1]))
    check_owner(stage, CONFIG)
    tokenizer = Tokenizer.load(workdir / "tokenizer").fingerprint
    checkpoints = Checkpoints(stage, CONFIG, tokenizer)
    try:
        guard = Guard.of(CONFIG, stage)
        yield guard.resume(checkpoints), guard.rollbacks
        yield checkpoints.restore(program.abstract)
        known_lines(_Listening(checkpoints, stage), 4)
        yield read_metrics(stage)
        checkpoints.delete([4])
        yield checkpoints.restore(program.abstract)
    finally:
        checkpoints.close()


def _prepare(workdir: Path, inputs: Path) -> Any:
    """The same preparation once more; it keeps what is whole, and makes what is not finished."""
    texts = str(inputs / "documents.jsonl"), str(inputs / "knowledge.jsonl")
    prepare_text(CONFIG, workdir, *texts, say=lambda line: None)
    yield prepare_chats(DPO, workdir, str(inputs / "pairs.jsonl"))[0]
    yield Tokenizer.load(workdir / "tokenizer").fingerprint
    yield [Corpus(workdir / "corpus" / split).fingerprint for split in ("train", "validation")]
    yield [Corpus(workdir / "pairs" / split).fingerprint for split in ("train", "validation")]
    yield References(workdir / "references").fingerprint


def _verify(workdir: Path) -> Any:
    problems = verify(CONFIG, workdir)
    if problems:
        raise UserError(problems[0])
    yield problems


def readers(inputs: Path) -> dict[str, Callable[[Path], Any]]:
    """All readers by name; the last ones change the workdir."""
    return {
        "knowledge": _knowledge,
        "rows": _rows,
        "vectors": _vectors,
        "verify": _verify,
        "chats": _chats,
        "resume": _resume,
        "prepare": lambda workdir: _prepare(workdir, inputs),
    }


def outcome(read: Callable[[Path], Any], workdir: Path) -> str | UserError | Told:
    """A digest of all that a reader reads, or its error; anything else is raised."""
    total = hashlib.sha256()

    def add(value: Any) -> None:
        for leaf in jax.tree.leaves(value):
            is_array = isinstance(leaf, (np.ndarray, jax.Array))
            total.update(np.asarray(leaf).tobytes() if is_array else repr(leaf).encode())

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "checkpoint .* is read unverified")
            for value in read(workdir):
                add(value)
    except (UserError, Told) as error:
        return error
    return total.hexdigest()


# -- damage ------------------------------------------------------------------------------------
def files(workdir: Path) -> dict[str, bytes]:
    """The content of every file by its path."""
    paths = sorted(path for path in workdir.rglob("*") if path.is_file())
    return {path.relative_to(workdir).as_posix(): path.read_bytes() for path in paths}


def restore(workdir: Path, whole: dict[str, bytes]) -> None:
    """Undoes all changes of a workdir."""
    there = files(workdir)
    for name in there.keys() - whole.keys():
        (workdir / name).unlink()
    for name, data in whole.items():
        if there.get(name) != data:
            (workdir / name).parent.mkdir(parents=True, exist_ok=True)
            (workdir / name).write_bytes(data)


def damages(
    name: str, whole: dict[str, bytes], other: dict[str, bytes], seed: int, flips: int = 3
) -> dict[str, dict[str, bytes | None]]:
    """Ways to damage a file: new contents by path, None = removed.

    Flipped bits at seeded places; cut to half and by a byte; emptied; removed; exchanged with the
    file of the same place in another workdir, and with files of the same kind in this one.
    """
    data = whole[name]
    random = np.random.default_rng([seed, *name.encode()])
    ways: dict[str, dict[str, bytes | None]] = {"removed": {name: None}}
    if data:
        for place in random.integers(0, 8 * len(data), flips).tolist():
            flipped = bytearray(data)
            flipped[place // 8] ^= 1 << place % 8
            ways[f"bit {place} flipped"] = {name: bytes(flipped)}
        ways |= {"emptied": {name: b""}, "cut": {name: data[: len(data) // 2]}}
        ways["last byte cut"] = {name: data[:-1]}
    if other.get(name, data) != data:
        ways["that of another workdir"] = {name: other[name]}
    kind = re.sub(r"\d+", "#", name.rpartition("/")[2])
    alike = [
        path
        for path in whole
        if re.sub(r"\d+", "#", path.rpartition("/")[2]) == kind and whole[path] != data
    ]
    alike.sort(key=lambda path: (abs(len(whole[path]) - len(data)), path))
    for path in alike[:2]:
        ways[f"exchanged with {path}"] = {name: whole[path], path: data}
    return ways
