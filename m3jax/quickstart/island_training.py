"""Trains a pretrained Llama to answer from one of five memories, on questions about the island.

Every other article is trained on: a row is a question, all of whose chunks read the memory of the
article that answers it, among four wrong ones. The questions about the other articles test it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from m3jax.files import json_text, write_atomically
from m3jax.quickstart.island import Island, IslandQuestion
from m3jax.text.corpus import encode_documents, write_corpus
from m3jax.text.documents import read_documents
from m3jax.text.tokenizer import Tokenizer
from m3jax.train.stage import train_stage
from m3jax.workdir import make_part


def split_questions(island: Island) -> tuple[list[IslandQuestion], list[IslandQuestion]]:
    """Returns the questions to train on and those that test, which share no article."""
    trained = {article.id for article in island.articles[::2]}
    parts: tuple[list[IslandQuestion], list[IslandQuestion]] = ([], [])
    for question in island.questions:
        parts[question.reference not in trained].append(question)
    return parts


def train_on_questions(config: ConfigDict, workdir: Path, island: Island) -> Path:
    """Trains the stage of `config` from `workdir/warmup`, or continues it; returns its folder.

    It reads the memories of version 0 of the knowledge, the articles before any edit.
    """
    tokenizer = Tokenizer.load(workdir / "tokenizer")
    for split, questions in zip(("train", "validation"), split_questions(island), strict=True):
        _write_corpus(questions, tokenizer, workdir / "corpus" / split)
    train_stage(config, workdir, init_from=workdir / "warmup", version=0)
    return workdir / config.stage


def _write_corpus(questions: Sequence[IslandQuestion], tokenizer: Tokenizer, folder: Path) -> None:
    """Writes questions as documents to train on, with loss on the answers.

    An article is one reference.
    """
    lines = [
        json_text({"question": q.question, "answer": q.answers[0], "reference": f"{q.reference}#0"})
        for q in questions
    ]
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "questions.jsonl"

    def write(part: Path) -> None:
        write_corpus(encode_documents(read_documents(str(source)), tokenizer), tokenizer, part, 1)

    inputs = {"questions": lines, "tokenizer": tokenizer.fingerprint}
    write_atomically(source, "".join(f"{line}\n" for line in lines).encode())
    make_part(folder, inputs, write)
