"""Memories with and without their document's context, where a fact's reference does not say whose.

A document about a person begins with the name; each fact is a reference of its own, `pet of otter`.
Encoded alone, such references of different people differ in their values only. The quickstart's
warmup checkpoint writes them both ways, and the same continual stage reads either bank.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from m3jax import config as config_lib
from m3jax.data.pipeline import open_pipeline
from m3jax.evaluation.losses import evaluator
from m3jax.evaluation.questions import Answerer, Question
from m3jax.memory.bank import Bank
from m3jax.memory.write import write_bank
from m3jax.model.transformer import Model
from m3jax.text import people
from m3jax.text.corpus import write_corpus
from m3jax.text.documents import Document, is_validation
from m3jax.text.references import References, write_references
from m3jax.text.tokenizer import Tokenizer
from m3jax.train.checkpoints import restore_params
from m3jax.train.loop import train
from m3jax.train.writer import restore_writer

_CUT = 4  # tokens of a reference: a name, or a fact, but not both
_CHUNK = 5  # tokens of `pet of Tavo otter` with the line's end
_CHUNKS = 6  # of a row
_SHARE = 1 / 5  # of a question's references, the one that states the answer


def compare_context(
    config: ConfigDict, workdir: Path, world_arguments: dict[str, int]
) -> dict[str, float]:
    """Trains two readers from the quickstart's warmup checkpoint, one a bank; about 7 minutes.

    Args:
      config: the quickstart's continual stage.
      workdir: with finished `tokenizer/` and `warmup/`; everything made goes to `context/`.
      world_arguments: of `people.make_world`, but people have one fact.

    Returns:
      For each value m of `writer.context`: `<m>_accuracy`, right answers about unseen people, whose
      fact is read among four of other people with the same relation; `<m>_loss_memory` and
      `<m>_loss_none`, of the validation text (nats a token); and `chance`: one of those five.
    """
    world = people.make_world(config.seed, **{**world_arguments, "facts": 1})
    found = {"chance": _SHARE}
    for context in ("reference", "document"):
        own = _config(config, context)
        folder = workdir / "context"
        _prepare(own, world, workdir / "tokenizer", folder)
        scores = _read(own, folder, folder / f"bank_{context}", workdir / "warmup", world)
        found.update({f"{context}_{name}": value for name, value in scores.items()})
    return found


def table(found: dict[str, float]) -> str:
    """What `compare_context` returns as a part of the report."""
    rows = "\n".join(
        f"| {words} | {found[f'{name}_accuracy']:.3f} | {found[f'{name}_loss_memory']:.3f} |"
        for name, words in (
            ("reference", "each reference encoded alone"),
            ("document", "encoded behind the name, in its document"),
        )
    )
    return f"""
Memories of facts that do not name their person, read among four of other people ({_SHARE:.2f} is
guessing among the five):

| memories | right answers | validation loss |
|---|---|---|
{rows}
"""


def _config(continual: ConfigDict, context: str) -> ConfigDict:
    """The continual stage with one fact a chunk."""
    config = continual.copy_and_resolve_references()
    with config.unlocked():
        tokens = config.data.batch_rows * config.data.row_length
        config.memory.chunk_length, config.data.row_length = _CHUNK, _CHUNK * _CHUNKS
        config.data.batch_rows = tokens // config.data.row_length
        config.writer.context = context
        config.writer.context_tokens = 2 * config.memory.reference_length
        config.stage = context
    return config_lib.validate(config)


def _prepare(config: ConfigDict, world: people.World, tokenizer: Path, folder: Path) -> None:
    """Corpus and references, once, by the tokenizer of the warmup checkpoint."""
    if (folder / "references" / "manifest.json").exists():
        return
    loaded = Tokenizer.load(tokenizer)
    loaded.save(folder / "tokenizer")
    count = config.train.steps * config.data.batch_rows // 2
    records = [
        *people.fact_documents(world, config.seed, count, chunks=_CHUNKS),
        *people.echo_documents(world, config.seed, count, words=config.data.row_length - 1),
    ]
    documents, share = list(_documents(records)), config.text.validation_share
    for name in ("train", "validation"):
        chosen = (d for d in documents if is_validation(d, share) == (name == "validation"))
        write_corpus(chosen, loaded, folder / "corpus" / name, shards=1)
    everyone = (*world.people, *world.unseen)
    told = (Document(person.key, _told(person), person.name) for person in everyone)
    write_references(told, loaded, folder / "references", _CUT)


def _documents(records: Iterable[dict[str, Any]]) -> Iterable[Document]:
    for record in records:
        keys = tuple(_fact(key) for key in record.get("references", ()))
        spans = tuple((low, high) for low, high in record.get("no_loss", ()))
        yield Document(record["id"], record["text"], no_loss=spans, references=keys)


def _told(person: people.Person) -> str:
    """A person's document: the name, and then facts that do not repeat it."""
    facts = (f"{relation} of {value}" for relation, value in person.facts)
    return "\n".join([person.name, *facts])


def _fact(key: str) -> str:
    """The reference with the person's only fact, behind that with the name."""
    return key.removesuffix("#0") + "#1"


def _read(
    config: ConfigDict, folder: Path, bank_folder: Path, writer: Path, world: people.World
) -> dict[str, float]:
    """Writes a bank, trains its reader and asks it."""
    model, references = Model(config), References.open(folder / "references")
    tokenizer = Tokenizer.load(folder / "tokenizer")
    params, path, step = restore_writer(writer, model, tokenizer.fingerprint)
    write_bank(
        config,
        model,
        params,
        references,
        bank_folder,
        tokenizer_fingerprint=tokenizer.fingerprint,
        prefix_tokens=model.prefix_tokens,
        writer_path=str(path),
        writer_step=step,
    )
    bank, evaluate = Bank.open(bank_folder), evaluator(config, folder, bank=bank_folder)
    train(
        config,
        folder,
        pipeline=open_pipeline(config, folder, bank=bank_folder),
        init_from=writer,
        evaluate=evaluate,
        tokenizer_fingerprint=tokenizer.fingerprint,
        writer=bank.writer,
    )
    params, _ = restore_params(folder / config.stage, model)
    answerer = Answerer(model, params, tokenizer)
    asked = [
        Question(q.prompt, q.answer, tuple(map(_fact, q.references)))
        for q in people.questions(world, config.seed)
    ]
    right = answerer.correct(asked, answerer.given(asked, references), bank)
    losses = evaluate(params)
    return {
        "accuracy": float(np.mean(right)),
        "loss_memory": losses["loss_memory"],
        "loss_none": losses["loss_none"],
    }
