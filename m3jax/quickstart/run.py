"""Runs all stages on invented facts, and tests that the model takes the facts from the bank.

Every step is the same as in a real run; finished steps are skipped when the command is repeated.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from m3jax import config as config_lib
from m3jax.checkpoint import restore_params
from m3jax.config import PREFIX_TOKENS
from m3jax.evaluation.plots import Read, accuracy_bars, attention_map
from m3jax.evaluation.questions import Question
from m3jax.evaluation.scoring import Answerer
from m3jax.files import json_text, write_atomically
from m3jax.knowledge.memory_writer import MemoryWriter, restore_writer
from m3jax.make_model import make_model
from m3jax.memory.bank import Bank
from m3jax.memory.sparsify import sparsifier
from m3jax.model.parameters import Params
from m3jax.quickstart import people
from m3jax.retrieval.build import build_index
from m3jax.retrieval.embed import make_embedder
from m3jax.retrieval.index import Index
from m3jax.retrieval.retriever import Retriever
from m3jax.text.documents import read_documents
from m3jax.text.listing import inputs_of
from m3jax.text.prepare import prepare_text
from m3jax.text.references import References, write_references
from m3jax.text.tokenizer import Tokenizer
from m3jax.train.evaluator import evaluator
from m3jax.train.stage import train_stage
from m3jax.workdir import make_part

LABELS = {
    "memory": "memories found by the retriever",
    "distractors": "right memory among four of other people,\nsame relation",
    "edited": "facts edited in the bank",
    "in_context": "no memory, the facts in the prompt",
    "none": "no memory",
    "wrong": "memories of other people",
    "deleted": "memories deleted",
}


@dataclass(frozen=True)
class Demonstration:
    """Settings of a quickstart, which its steps share.

    Attributes:
      get_config: maps a text of options to a config, as in `configs/quickstart.py`.
      workdir: folder for everything.
      world: arguments of `people.make_world`.
      seed: seed of the world, the parameters and the data order.
    """

    get_config: Callable[[str], ConfigDict]
    workdir: Path
    world: dict[str, int]
    seed: int

    def config(self, stage: str) -> ConfigDict:
        config = self.get_config(f"stage={stage}")
        with config.unlocked():
            config.seed = self.seed
        return config_lib.validate(config)


def run(demonstration: Demonstration, *, compare_from_scratch: bool = False) -> dict[str, Any]:
    """Runs all steps and writes `report/`; returns the content of `report/summary.json`.

    `compare_from_scratch` also trains a model with memory from the start, at equal compute.
    """
    seconds: dict[str, float] = {}
    started = time.time()
    workdir = demonstration.workdir
    (workdir / "report").mkdir(parents=True, exist_ok=True)
    world = people.make_world(demonstration.seed, **demonstration.world)

    with step("1/7 invented people, tokenizer, corpus, references, index", seconds, "prepare"):
        prepare_people(demonstration.config("warmup"), workdir, world)
    with step("2/7 warmup: plain language modeling", seconds, "warmup"):
        train_stage(demonstration.config("warmup"), workdir)
    with step("3/7 bank: the warmup checkpoint writes every memory", seconds, "bank"):
        _write(demonstration, workdir, "warmup")
    with step("4/7 continual train: reading memories from the bank", seconds, "continual"):
        train_stage(demonstration.config("continual"), workdir, init_from=workdir / "warmup")
    with step("5/7 edited bank: other facts, nothing trained", seconds, "edit"):
        changed = people.edited(world, demonstration.seed)
        _rewrite(demonstration, workdir / "edited", changed.everyone)
    with step("6/7 deleted bank: the people of the questions are gone", seconds, "delete"):
        _rewrite(demonstration, workdir / "deleted", world.people)
    with step("7/7 questions", seconds, "questions"):
        accuracy = _ask(demonstration, world, changed)
    losses = {}
    if compare_from_scratch:
        with step("extra: memory from the start, at equal compute", seconds, "scratch"):
            losses = _compare_from_scratch(demonstration)
    summary = {
        "accuracy": accuracy,
        "chance": 1 / demonstration.world["values"],
        "questions": sum(len(person.facts) for person in world.unseen),
        "seconds": round(time.time() - started, 1),
        "seconds_by_step": seconds,
        "seed": demonstration.seed,
        **({"from_scratch": losses} if losses else {}),
    }
    _report(demonstration, summary)
    return summary


@contextmanager
def step(title: str, seconds: dict[str, float], name: str) -> Iterator[None]:
    """Prints the title of a step, and records its seconds under `name`."""
    print(f"[{title}]", flush=True)
    started = time.time()
    yield
    seconds[name] = round(time.time() - started, 1)


def prepare_people(config: ConfigDict, folder: Path, world: people.World) -> None:
    """Makes text, tokenizer, corpus, references and index of a world; keeps finished parts.

    Args:
      config: config of the warmup stage; its steps, rows and seed determine the text.
      folder: folder to make them in.
      world: the people.
    """
    chunks = config.data.sequence_length // config.memory.chunk_length
    facts = config.train.steps * config.data.batch_size // 2
    source = folder / "text"
    source.mkdir(parents=True, exist_ok=True)
    if not (source / "knowledge.jsonl").exists():
        documents = [
            *people.fact_documents(world, config.seed, facts, chunks=chunks),
            *people.echo_documents(
                world, config.seed, facts, words=config.data.sequence_length - 1
            ),
        ]
        people.write_jsonl(source / "documents.jsonl", documents)
        people.write_jsonl(source / "knowledge.jsonl", people.knowledge(world.everyone))
    prepare_text(
        config, folder, str(source / "documents.jsonl"), str(source / "knowledge.jsonl"), None
    )
    make_index(config, folder)


def make_index(config: ConfigDict, folder: Path) -> None:
    """Builds the index of the references in a folder."""
    references = References(folder / "references")
    build_index(references, make_embedder(config), folder / "index", config)


def _write(
    demonstration: Demonstration, folder: Path, stage: str, base: Bank | None = None
) -> None:
    """Writes the bank of a folder with the memory writer that a stage's checkpoint records."""
    workdir = demonstration.workdir
    write = MemoryWriter(demonstration.config("continual"), workdir, workdir / stage)
    write(References(folder / "references"), folder / "bank", base)


def _rewrite(demonstration: Demonstration, folder: Path, known: tuple[people.Person, ...]) -> None:
    """Makes references, index and bank of the people `known`; copies unchanged memories."""
    folder.mkdir(exist_ok=True)
    config = demonstration.config("continual")
    source = folder / "knowledge.jsonl"
    people.write_jsonl(source, people.knowledge(known))
    tokenizer = Tokenizer.load(demonstration.workdir / "tokenizer")
    documents, length = read_documents(str(source)), config.memory.reference_length
    make_part(
        folder / "references",
        {"knowledge": inputs_of(str(source)), "tokenizer": tokenizer.fingerprint},
        lambda part: write_references(documents, tokenizer, part, length),
    )
    make_index(config, folder)
    _write(demonstration, folder, "continual", base=Bank.open(demonstration.workdir / "bank"))


class _Knowledge:
    """Opens references, retriever and bank of one folder."""

    def __init__(self, folder: Path, config: ConfigDict):
        self.references = References(folder / "references")
        index = Index.open(folder / "index", self.references)
        retrieval = config.retrieval
        self.retriever = Retriever(
            index, self.references, retrieval.candidates, retrieval.overlap_evaluation
        )
        self.bank = Bank.open(folder / "bank")


def _ask(
    demonstration: Demonstration, world: people.World, changed: people.World
) -> dict[str, float]:
    workdir, config = demonstration.workdir, demonstration.config("continual")
    model, tokenizer = make_model(config, PREFIX_TOKENS), Tokenizer.load(workdir / "tokenizer")
    params, _ = restore_params(workdir / "continual", model)
    answerer = Answerer(model, params, tokenizer, config.data.sequence_length)
    questions = people.questions(world, demonstration.seed)
    people.write_questions(workdir / "text" / "questions.jsonl", questions)
    texts = {person.reference: person.text for person in world.unseen}
    needles = [
        {"needle": texts[q.person], "prompt": q.prompt, "answer": q.answer} for q in questions
    ]
    people.write_jsonl(workdir / "text" / "needles.jsonl", needles)
    new_facts = {person.reference: dict(person.facts) for person in changed.unseen}
    after_edit = [
        dataclasses.replace(q, answer=f" {new_facts[q.person][q.relation]}") for q in questions
    ]
    known = {name: _Knowledge(workdir / name, config) for name in (".", "edited", "deleted")}
    base, correct = known["."], answerer.correct
    wrong = [
        dataclasses.replace(q, references=tuple(key for key in q.references if key != q.person))
        for q in questions
    ]

    def by_retrieval(name: str, questions: Sequence[Question]) -> np.ndarray:
        knowledge = known[name]
        return correct(questions, answerer.search(questions, knowledge.retriever), knowledge.bank)

    stated = answerer.look_up(questions, base.references)
    right = {
        "memory": by_retrieval(".", questions),
        "distractors": correct(questions, stated, base.bank),
        "edited": by_retrieval("edited", after_edit),
        "in_context": correct(in_context(world, questions)),
        "none": correct(questions),
        "wrong": correct(questions, answerer.look_up(wrong, base.references), base.bank),
        "deleted": by_retrieval("deleted", questions),
    }
    _attention_picture(demonstration, answerer, questions[:4], stated[:4], base)
    return {name: float(np.mean(hits)) for name, hits in right.items()}


def in_context(world: people.World, questions: list[people.FactQuestion]) -> list[Question]:
    """Adds to every prompt the facts that the question's five references state, as text."""
    by_key = {person.reference: person for person in world.unseen}

    def stated(question: people.FactQuestion) -> Question:
        told, relation = [by_key[key] for key in question.references], question.relation
        lines = [people.statement(p.name, relation, dict(p.facts)[relation]) for p in told]
        return Question("\n".join([*lines, question.prompt]), question.answer)

    return list(map(stated, questions))


def _attention_picture(
    demonstration: Demonstration,
    answerer: Answerer,
    questions: Sequence[Question],
    ids: np.ndarray,
    knowledge: _Knowledge,
) -> None:
    """Plots the attention of each answer to stored tokens, with memory slots mapped to tokens."""
    tokenizer, model = answerer.tokenizer, answerer.model
    continual = demonstration.workdir / "continual"
    writer_params = restore_writer(continual, model, tokenizer.fingerprint).params
    read_ids = ids[:, 0]  # (n, M): every prompt is one chunk
    tokens = knowledge.references.tokens(read_ids.ravel())

    @jax.jit
    def kept_tokens(params: Params, tokens: jax.Array) -> jax.Array:
        written = model.on_references(params, tokens, sparsifier(model.memory))
        return model.slots.stack([None if part is None else part.indices for part in written])

    indices = np.moveaxis(np.asarray(kept_tokens(writer_params, tokens)), 0, 1)
    indices = indices.reshape(*read_ids.shape, *indices.shape[1:])  # (n, M, L, K, P)
    real = model.slots.in_counts((tokens != 0).sum(1)).reshape(indices.shape)
    predicted, attention = answerer.first_choices(questions, ids, knowledge.bank)
    layers, heads = attention.shape[1:3]
    # One entry per query head.
    indices, real = (np.repeat(x, heads // indices.shape[3], axis=3) for x in (indices, real))
    reads = []
    for n, question in enumerate(questions):
        names, mass, kept = [], [], []
        for m in range(read_ids.shape[1]):
            line = [int(token) for token in tokens[n * read_ids.shape[1] + m] if token]
            names.append([tokenizer.decode([token]) for token in line])
            total, count = np.zeros((2, len(line)))
            slots = indices[n, m][real[n, m]]
            np.add.at(total, slots, attention[n, :, :, m][real[n, m]])
            np.add.at(count, slots, 1)
            mass.append(total / (layers * heads))
            kept.append(count / (layers * heads))
        answer = question.answer.strip(), predicted[n].strip()
        reads.append(Read(question.prompt, *answer, names, mass, kept))
    picture = demonstration.workdir / "report" / "attention.png"
    attention_map(picture, reads, "Which stored token each answer attended to")


def _compare_from_scratch(demonstration: Demonstration) -> dict[str, float]:
    """Returns validation losses of training with memory from the start and after a warmup.

    Both use the same FLOP; the model with memory from the start is trained here.
    """
    from m3jax import flops

    stages = {name: demonstration.config(name) for name in ("warmup", "continual", "scratch")}
    budget = sum(
        flops.train_step(stages[name]) * stages[name].train.steps
        for name in ("warmup", "continual")
    )
    scratch = stages["scratch"]
    with scratch.unlocked():
        scratch.train.steps = int(budget / flops.train_step(scratch))
    config_lib.validate(scratch)
    train_stage(scratch, demonstration.workdir)
    losses = {}
    for name in ("continual", "scratch"):
        config = stages[name]
        params, _ = restore_params(demonstration.workdir / name, make_model(config, PREFIX_TOKENS))
        evaluated = evaluator(config, demonstration.workdir)(params)
        losses.update({f"{name}_{key}": value for key, value in evaluated.items()})
    return losses


def _report(demonstration: Demonstration, summary: dict[str, Any]) -> None:
    from m3jax.train.plots import plot_stages

    folder = demonstration.workdir / "report"
    write_atomically(folder / "summary.json", json_text(summary, indent=2).encode())
    accuracy, chance = summary["accuracy"], summary["chance"]
    title = "Facts about people never seen in training"
    accuracy_bars(folder / "accuracy.png", accuracy, LABELS, chance, title)
    stages = [demonstration.workdir / name for name in ("warmup", "continual")]
    plot_stages(stages, folder / "loss.png")
    rows = "\n".join(
        f"| {label.replace(chr(10), ' ')} | {accuracy[name]:.3f} |"
        for name, label in LABELS.items()
    )
    text = f"""# Quickstart report

{summary["questions"]} questions about people who occur in no fact of the training text. Guessing
among the values of a relation gives {chance:.3f}. Seed {summary["seed"]},
{summary["seconds"]:.0f} s.

| what the model reads | right answers |
|---|---|
{rows}

![accuracy](accuracy.png)

![which stored token each answer attended to](attention.png)

![losses](loss.png)
"""
    if "from_scratch" in summary:
        losses = summary["from_scratch"]
        text += f"""
At equal compute, memory from the start ends at a validation loss of
{losses["scratch_loss_memory"]:.3f} with memory, warmup and then memory at
{losses["continual_loss_memory"]:.3f} (nats a token).
"""
    write_atomically(folder / "README.md", text.encode())
