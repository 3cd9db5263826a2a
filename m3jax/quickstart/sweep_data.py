"""The data of the quickstart's sweep: invented people, and the same people in documents of four."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from m3jax.config import ConfigDict
from m3jax.errors import TextError
from m3jax.quickstart import people
from m3jax.quickstart.run import in_context, make_index, prepare_people
from m3jax.reading import rows
from m3jax.text.corpus import encode_documents, write_corpus
from m3jax.text.documents import Document, is_validation, read_documents
from m3jax.text.reference_splitter import Piece
from m3jax.text.references import write_pieces
from m3jax.text.tokenizer import Tokenizer

QUESTIONS, IN_CONTEXT = "text/questions.jsonl", "text/in_context.jsonl"
IN_DOCUMENTS = "documents"  # name of the knowledge base with several people per document
TOGETHER = 4  # people per document in it


def prepare(
    config: ConfigDict, folder: Path, knowledge: str, world_options: Mapping[str, int]
) -> None:
    """Makes the quickstart's data, and its questions with and without the facts in the prompt.

    Args:
      config: config of the warmup stage.
      folder: folder to make them in.
      knowledge: "" makes every person a document of one reference; `documents` joins four people to
        a document of four references, with the same texts in the same order.
      world_options: arguments of `people.make_world`.

    Raises:
      TextError: `knowledge` is another name, or the world needs too many words.
    """
    if knowledge not in ("", IN_DOCUMENTS):
        raise TextError(f"knowledge = {knowledge!r}; there is {IN_DOCUMENTS!r}, and '' for none")
    world = people.make_world(config.seed, **world_options)
    prepare_people(config, folder, world)
    questions = people.questions(world, config.seed)
    keys = _keys(world) if knowledge else {}
    people.write_questions(folder / IN_CONTEXT, in_context(world, questions))
    people.write_questions(
        folder / QUESTIONS,
        [dataclasses.replace(q, references=_renamed(q.references, keys)) for q in questions],
    )
    if knowledge:
        _join(config, folder, world, keys)


def _keys(world: people.World) -> dict[str, str]:
    """Maps the key of every person's reference to its key in a document of several people."""
    return {
        person.reference: f"group-{i // TOGETHER}#{i % TOGETHER}"
        for i, person in enumerate(world.everyone)
    }


def _renamed(keys: Iterable[str], names: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(names.get(key, key) for key in keys)


def _join(config: ConfigDict, folder: Path, world: people.World, keys: Mapping[str, str]) -> None:
    """Makes references, index and corpus again, with several people per document."""
    tokenizer = Tokenizer.load(folder / "tokenizer")
    length = config.memory.reference_length
    write_pieces(_documents(world, tokenizer), tokenizer, folder / "references", length)
    shutil.rmtree(folder / "index")
    make_index(config, folder)
    source = folder / "text" / "documents.jsonl"
    records = [row.fields() for row in rows(source)]
    for record in records:
        if "references" in record:
            record["references"] = _renamed(record["references"], keys)
    people.write_jsonl(source, records)
    for name in ("validation", "train"):
        documents = read_documents(str(source))
        share, held_out = config.text.validation_share, name == "validation"
        chosen = (d for d in documents if is_validation(d, share) == held_out)
        encoded = encode_documents(chosen, tokenizer)
        write_corpus(encoded, tokenizer, folder / "corpus" / name, shards=config.text.shards)


def _documents(world: people.World, tokenizer: Tokenizer) -> Iterator[tuple[Document, list[Piece]]]:
    for low in range(0, len(world.everyone), TOGETHER):
        members, pieces, start = world.everyone[low : low + TOGETHER], [], 0
        for person in members:
            text = person.text
            pieces.append(Piece(start, start + len(text), text, tokenizer.encode(text)))
            start += len(text) + 1
        text = "\n".join(person.text for person in members)
        yield Document(id=f"group-{low // TOGETHER}", text=text), pieces
