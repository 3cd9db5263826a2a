"""What is made from something is bound to its content: every artifact with every folder exchanged.

The folders of a workdir are found by walking it. Each is exchanged with that of another workdir of
the same tokenizer, at the same path, one by one and with all that depend on it, and every artifact
is used or made again. It must be refused, or made anew, or not need the folder at all.
"""

import contextlib
import itertools
import random
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import pytest
from data.data_workdir import WORLD, make_workdir, tiny_config
from ml_collections import ConfigDict

from m3jax.checkpoint import read_meta, reads
from m3jax.errors import UserError, VersionError
from m3jax.inference.session import Session
from m3jax.knowledge.edit import edit
from m3jax.knowledge.memory_writer import MemoryWriter
from m3jax.knowledge.versions import open_version
from m3jax.memory.bank import Bank
from m3jax.quickstart import people
from m3jax.retrieval.build import build_index
from m3jax.retrieval.embed import make_embedder
from m3jax.retrieval.index import Index
from m3jax.selection import heads
from m3jax.text.chat.corpus import prepare_chats
from m3jax.text.documents import Document
from m3jax.text.prepare import prepare_text
from m3jax.text.references import References
from m3jax.text.tokenizer import Tokenizer
from m3jax.train import checkpoints, loop
from m3jax.train.refresh import rewrite
from m3jax.train.stage import train_stage
from m3jax.workdir import INPUTS

ROOT = Path(__file__).parents[2]
STAGES = {"continual": "warmup", "online": "warmup", "sft": "continual", "dpo": "sft"}
SETTINGS: dict[str, dict[str, Any]] = {
    "warmup": {"memory__source": "none"},
    "continual": {},
    "online": {"memory__source": "online"},
    "sft": {"data__packing": "chats", "retrieval__ids": "stored"},
    "dpo": {"data__packing": "pairs", "retrieval__ids": "stored"},
}
TOGETHER = [
    ("references", "index"),
    ("references", "index", "bank"),
    ("corpus", "references", "index", "bank", "chats", "pairs"),
]


def config_of(stage: str) -> ConfigDict:
    chat = {"chat__user": "\nQ", "chat__assistant": "\nA"}
    return tiny_config(stage=stage, mesh__fsdp=1, **chat, **SETTINGS[stage])


class Ended(Exception):
    """A run has ended before its first step; says how it began."""


@contextlib.contextmanager
def without_steps() -> Iterator[None]:
    """A new run saves its first parameters as step 2 and ends; a resumed one ends at once."""

    def steps(self: loop.Loop, state: Any, first: int) -> None:
        if first:
            raise Ended("went on")
        # As if trained on the text of the workdir.
        scale = 1 + sum(self.run.folder.parent.name.encode()) % 100 / 1000
        state = state._replace(params=jax.tree.map(lambda x: x * scale, state.params))
        self.run.checkpoints.save(state, 2)
        self.run.checkpoints.wait()
        raise Ended("began anew")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Loop, "_steps", steps)
        yield


def make(folder: Path, seed: int, tokenizer: Path | None = None) -> Path:
    """A workdir with everything that stages read; `tokenizer` is taken from another workdir."""
    folder.mkdir()
    world = people.make_world(3 + seed, names=12, people=60, unseen=20, values=4, facts=2)
    source = folder.parent / f"text of {folder.name}"
    source.mkdir()
    documents = [
        *people.fact_documents(WORLD, seed, 60, chunks=6),
        *people.echo_documents(WORLD, seed, 60, words=59),
    ]
    people.write_jsonl(source / "documents.jsonl", documents)
    people.write_jsonl(source / "knowledge.jsonl", people.knowledge((*world.people, *world.unseen)))
    if tokenizer is not None:
        shutil.copytree(tokenizer, folder / "tokenizer")
        (folder / "tokenizer" / INPUTS).write_text('{"taken_from": "the other"}')
    texts = str(source / "documents.jsonl"), str(source / "knowledge.jsonl")
    make_workdir(folder, config_of("continual"), texts)
    people.write_jsonl(source / "chats.jsonl", people.chats(WORLD, seed, 40))
    people.write_jsonl(source / "pairs.jsonl", people.preferences(WORLD, seed, 60))
    for stage in ("sft", "dpo"):
        name = config_of(stage).data.packing
        prepare_chats(config_of(stage), folder, str(source / f"{name}.jsonl"))
    shutil.rmtree(folder / "bank")
    return folder


def train(workdir: Path, stage: str, **options: Any) -> str:
    """How a stage begins."""
    before = {**STAGES, "warmup": None}[stage]
    init_from = None if before is None else workdir / before
    with without_steps(), pytest.raises(Ended) as ended:
        train_stage(config_of(stage), workdir, init_from=init_from, **options)
    return str(ended.value)


@pytest.fixture(scope="module")
def workdirs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two workdirs of one tokenizer and equal settings; all text is other text."""
    folder = tmp_path_factory.mktemp("ingredients")
    first = make(folder / "first", 0)
    second = make(folder / "second", 1, first / "tokenizer")
    for workdir in (first, second):
        train(workdir, "warmup")
        write_bank(workdir)
        for stage in STAGES:
            train(workdir, stage)
    shutil.rmtree(second / "tokenizer")
    texts = [path.read_text() for path in (ROOT / "docs").glob("*.md")]
    Tokenizer.train(texts, vocabulary=700, min_frequency=2).save(second / "tokenizer")
    return first, second


# -- artifacts: what is used or made again, and what can be seen of it
# ------------------------------
def resumed(stage: str) -> Callable[[Path], str]:
    return lambda workdir: train(workdir, stage)


def write_bank(workdir: Path) -> str:
    write = MemoryWriter(config_of("continual"), workdir)
    report = write(References(workdir / "references"), workdir / "bank")
    return f"{report['kept']} kept, {report['encoded']} encoded"


def index(workdir: Path) -> str:
    references, config = References(workdir / "references"), config_of("continual")
    build_index(references, make_embedder(config), workdir / "index", config)
    return "anew, " + Index.open(workdir / "index", references).fingerprint


def prepared(workdir: Path) -> str:
    source = workdir.parent / "text of first"
    texts = str(source / "documents.jsonl"), str(source / "knowledge.jsonl")
    said: list[str] = []
    prepare_text(config_of("continual"), workdir, *texts, say=said.append)
    return str(said)


def prepared_chats(workdir: Path) -> str:
    source = workdir.parent / "text of first" / "chats.jsonl"
    return str(prepare_chats(config_of("sft"), workdir, str(source))[1])


def session(workdir: Path) -> str:
    opened = Session(config_of("continual"), workdir, checkpoint=workdir / "continual")
    return f"{opened.bank.size} memories, {opened.retriever.index.fingerprint}"


def base_logprobs(workdir: Path) -> str:
    """A DPO run that was killed after its log-probabilities were computed."""
    shutil.rmtree(workdir / "dpo" / "checkpoints", ignore_errors=True)
    return resumed("dpo")(workdir)


ARTIFACTS: dict[str, Callable[[Path], str]] = {
    **{f"checkpoint of {stage}": resumed(stage) for stage in ("warmup", *STAGES)},
    **{"log-probabilities": base_logprobs, "bank": write_bank, "index": index},
    **{"documents": prepared, "chats": prepared_chats, "answers": session},
}


_NUMBERS = itertools.count()
Cell = tuple[str, tuple[str, ...]]


def attempt(use: Callable[[Path], str], workdir: Path) -> tuple[str, str]:
    """How an artifact is used: what is seen of it, and the refusal if it is refused."""
    try:
        return use(workdir), ""
    except (UserError, OSError) as error:
        return "refused", str(error)


@contextlib.contextmanager
def exchanged(workdir: Path, names: tuple[str, ...], other: Path | None) -> Iterator[None]:
    """Folders of a workdir replaced by those of another, None: removed; all is put back."""
    aside = workdir.parent / f"aside {next(_NUMBERS)}"
    shutil.copytree(workdir, aside)
    try:
        for name in names:
            shutil.rmtree(workdir / name)
            if other is not None:
                shutil.copytree(other / name, workdir / name)
        yield
    finally:
        shutil.rmtree(workdir)
        aside.rename(workdir)


def folders(workdir: Path) -> list[str]:
    """Every folder that can be exchanged: of a stage, or with a manifest of its own."""
    manifests = {path.parent.relative_to(workdir) for path in workdir.rglob("manifest.json")}
    checkpoints = {path.relative_to(workdir) for path in workdir.glob("*/checkpoints")}
    top = {Path(path.parts[0]) for path in (*manifests, *checkpoints)}
    return sorted(str(path) for path in manifests | checkpoints | top)


def wrong_cell(
    artifact: str, names: tuple[str, ...], workdirs: tuple[Path, Path], seen: str
) -> tuple[str, str]:
    """What became of an artifact when folders were exchanged, and what is wrong with that."""
    (first, second), use = workdirs, ARTIFACTS[artifact]
    with exchanged(first, names, second):
        outcome, refusal = attempt(use, first)
    if refusal:
        words = [word for name in names for word in re.split("[/_]", name)]
        words += ["base model"] * ("sft" in words) + ["weights"] * ("warmup" in words)
        named = any(word in refusal for word in words)
        return "refused", "" if named else f"refused without a name: {refusal}"
    if outcome != seen:
        return "anew", "" if "anew" in outcome else outcome
    with exchanged(first, names, None):
        outcome, refusal = attempt(use, first)
    return "not needed", "" if outcome == seen else f"another one is accepted ({refusal})"


def check(workdirs: tuple[Path, Path], chosen: Callable[[list[Cell]], list[Cell]]) -> Counter:
    """Checks chosen cells of the table of artifacts and exchanged folders; counts the outcomes."""
    first, _ = workdirs
    sets = [*((name,) for name in folders(first)), *TOGETHER]
    assert {("corpus/train",), ("dpo/base_logprobs/train",), ("sft",), ("index",)} <= {*sets}
    cells = chosen(list(itertools.product(ARTIFACTS, sets)))
    seen = {}
    for artifact in dict.fromkeys(artifact for artifact, _ in cells):
        with exchanged(first, (), None):
            seen[artifact], refusal = attempt(ARTIFACTS[artifact], first)
        assert not refusal, (artifact, refusal)
    wrong, counts = [], Counter[str]()
    for artifact, names in cells:
        outcome, why = wrong_cell(artifact, names, workdirs, seen[artifact])
        counts[outcome] += 1
        print(f"{artifact}, {names}: {outcome} {why}", flush=True)
        wrong += [f"{artifact}, {names}: {why}"] * bool(why)
    assert not wrong, "\n".join(wrong)
    return counts


@pytest.mark.slow
def test_a_sample_of_artifacts_is_bound_to_the_content_of_folders(
    workdirs: tuple[Path, Path],
) -> None:
    always = [
        ("checkpoint of continual", ("corpus/train",)),
        ("checkpoint of continual", ("references", "index", "bank")),
        ("checkpoint of dpo", ("dpo/base_logprobs/train",)),
        ("log-probabilities", ("sft",)),
        ("bank", ("references", "index")),
    ]
    draw = random.Random(20)
    assert check(workdirs, lambda cells: always + draw.sample(cells, 4))["refused"] >= len(always)


@pytest.mark.every
def test_every_artifact_is_bound_to_the_content_of_every_folder(
    workdirs: tuple[Path, Path],
) -> None:
    counts = check(workdirs, lambda cells: cells)
    assert counts["refused"] > 90 and counts["anew"] and counts["not needed"], counts


@pytest.mark.slow
def test_a_moved_workdir_is_used_as_before(workdirs: tuple[Path, Path]) -> None:
    """Also one whose memories the continual stage has written itself, and one at an old place."""
    first, _ = workdirs
    with exchanged(first, (), None):
        rewrite(config_of("continual"), first, first / "continual")
        seen = {name: attempt(use, first) for name, use in ARTIFACTS.items()}
    with exchanged(first, (), None):
        rewrite(config_of("continual"), first, first / "continual")
        moved = first.rename(first.parent / "moved")
        try:
            for name, use in ARTIFACTS.items():
                outcome, refusal = attempt(use, moved)
                at_first = refusal.replace(str(moved), str(first))
                assert (outcome, at_first) == seen[name], name
        finally:
            moved.rename(first)


@pytest.mark.slow
def test_memories_of_another_run_are_refused_at_the_same_path(
    workdirs: tuple[Path, Path],
) -> None:
    """Both runs have refreshed their banks, and the path of the writers is the same."""
    first, second = workdirs
    config, aside = config_of("continual"), first.parent / "first aside"
    with exchanged(first, (), None), exchanged(second, ("tokenizer",), first):
        rewrite(config, first, first / "continual")
        first.rename(aside)
        second.rename(first)
        rewrite(config, first, first / "continual")
        first.rename(second)
        aside.rename(first)
        bank = Path("versions/000001/banks/0")
        shutil.rmtree(first / bank)
        shutil.copytree(second / bank, first / bank)
        meta = read_meta(first / "continual" / "checkpoints" / "2")
        theirs = Bank.open(first / bank).writer
        assert theirs["path"] == str(first / "continual")
        assert not reads(meta, first / "continual", theirs)
        assert reads(meta, second, {**theirs, "run": meta["run"]})  # wherever it lies
        outcome, refusal = attempt(session, first)
        assert outcome == "refused" and "bank" in refusal


@pytest.mark.slow
def test_a_run_reads_another_version_if_it_is_told_to(workdirs: tuple[Path, Path]) -> None:
    """Edits between two sessions: the run goes on with its version, or with the named one."""
    first, _ = workdirs
    with exchanged(first, (), None):
        write = MemoryWriter(config_of("continual"), first, like_base=True)
        new = Document("Zork", "Zork otter", "Zork", "made up")
        number = edit(config_of("continual"), first, documents=[new], write=write).number
        assert resumed("continual")(first) == "went on"
        assert train(first, "continual", version=number) == "went on"
        # The number alone is not enough: version 0 must be what it was.
        with exchanged(first, ("references", "index", "bank"), workdirs[1]):
            outcome, refusal = attempt(resumed("online"), first)
            assert outcome == "refused" and "another references" in refusal
            with pytest.raises(VersionError, match="was made from other references"):
                open_version(first, number)


@pytest.mark.slow
def test_a_checkpoint_without_ingredients_goes_on(
    workdirs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """One of an earlier version of m3jax; it is said."""
    first, second = workdirs
    read = checkpoints.read_meta

    def of_before(folder: Path) -> dict[str, Any]:
        return {k: v for k, v in read(folder).items() if k not in ("ingredients", "run")}

    with exchanged(first, ("corpus",), second), pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "read_meta", of_before)
        assert resumed("continual")(first) == "went on"
    assert "records nothing of what it was trained on" in capsys.readouterr().out


@pytest.mark.slow
def test_log_probabilities_of_another_base_model_are_refused(workdirs: tuple[Path, Path]) -> None:
    """They were deleted, and computed again with another model than the run began with."""
    first, second = workdirs
    with exchanged(first, ("dpo/base_logprobs",), None):
        assert train(first, "dpo") == "went on"
    with exchanged(first, ("dpo/base_logprobs",), None), exchanged(first, ("sft",), second):
        outcome, refusal = attempt(resumed("dpo"), first)
    assert outcome == "refused" and "was trained on another base model of " in refusal


@pytest.mark.slow
def test_measurements_are_bound_to_weights_and_data(workdirs: tuple[Path, Path]) -> None:
    """The losses that a ranking of heads keeps, by the name of their file."""
    first, second = workdirs

    def name_of(workdir: Path = first) -> str:
        texts: list[str] = []

        def stop(folder: Path) -> Any:
            raise Ended

        def noted(text: str) -> str:
            texts.append(text)
            return "0"

        with pytest.MonkeyPatch.context() as patch, pytest.raises(Ended):
            patch.setattr(heads, "only_writer", stop)
            patch.setattr(heads, "digest", noted)
            heads.score_heads(config_of("warmup"), workdir, window=9)
        return texts[-1]

    before = name_of()
    for name in ("corpus/validation", "warmup"):
        with exchanged(first, (name,), second):
            assert name_of() != before, name
    moved = first.rename(first.parent / "moved")
    after = name_of(moved)
    moved.rename(first)
    assert after == before
