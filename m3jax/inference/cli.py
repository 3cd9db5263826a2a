"""Generates texts for `launch/generate.py`, written with their sources as text, JSON and HTML."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from m3jax.errors import InferenceError, TextError
from m3jax.files import json_text, write_atomically
from m3jax.inference.attribution import (
    AttributedReference,
    as_dict,
    as_page,
    as_text,
    attribute,
    effects_of,
)
from m3jax.inference.generate import Generation, Generator
from m3jax.inference.long_context import LongContextGenerator
from m3jax.inference.rag import rag_prompts
from m3jax.inference.sampling import Sampling
from m3jax.inference.session import Session
from m3jax.reading import ROWS, ending, read_records, text_lines
from m3jax.text.chat.chats import Chat, question, read_questions
from m3jax.text.chat.template import Template


@dataclasses.dataclass(frozen=True)
class Request:
    """Prompts and settings of a generation; the fields are the flags of `launch/generate.py`.

    With `chat`, a prompt is a question, or a chat that ends with a question.
    """

    prompts: Sequence[str | Chat]
    chat: bool = False
    mode: str = "memory"
    new_tokens: int = 64
    batch: int = 32
    groups: int = 1
    references: int = 5
    window: int | None = None
    cut: int | None = None
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    stream: bool = False
    sources: bool = True
    explain: bool = False
    by_head: bool = False
    json: str | Path | None = None
    html: str | Path | None = None


def read_prompts(path: str | Path, most_rounds: int | None = None) -> Sequence[str | Chat]:
    """Reads prompts from rows (`reading.rows`) with `prompt`, or from lines of text.

    Blank lines are left out. With `most_rounds`, rows are chats of at most this many rounds that
    end with a question.

    Raises:
      TextError: the file cannot be read, or a line is not a prompt; names file and line.
      ChatError: a line is not a chat that ends with a question.
    """
    if ending(path) not in ROWS:
        prompts = text_lines(path)
        if not prompts:
            raise TextError(f"{path} holds no prompts; give one a line")
        return prompts
    if most_rounds is not None:
        return read_questions(str(path), most_rounds)

    def parse(record: dict[str, Any]) -> str:
        if not isinstance(record["prompt"], str):
            raise TypeError(f"prompt is {type(record['prompt']).__name__}")
        return record["prompt"]

    return read_records(path, parse, "prompts", "{'prompt': text}")


def run(
    config: ConfigDict,
    workdir: Path,
    request: Request,
    *,
    checkpoint: str | Path | None = None,
    bank: str | Path | None = None,
    versions: Sequence[int | None] = (None,),
) -> list[dict[str, Any]]:
    """Generates texts, prints them and writes them to the files that the request names.

    Args:
      config: of the checkpoint's stage.
      workdir: prepared folder.
      request: prompts and settings.
      checkpoint, bank: see `Session`.
      versions: versions of the knowledge; the texts are generated with each of them.

    Returns:
      One record per version and prompt: that of `as_dict`, with `version` and `mode`.

    Raises:
      InferenceError: no prompts, a mode that does not fit `explain` or `chat`, or a prompt that is
        too long.
      CheckpointError, BankError, TextError, RetrievalError, VersionError: a part is missing or does
        not fit.
    """
    if not request.prompts:
        raise InferenceError("there are no prompts; give --prompt=TEXT or --prompts=FILE")
    if request.explain and request.mode not in ("memory", "cold"):
        raise InferenceError(
            f"--explain takes memories away, and --mode={request.mode} reads none; use"
            " --mode=memory or cold"
        )
    if request.chat and request.mode == "long_context":
        raise InferenceError(
            "--mode=long_context cuts the older part of one text; chats have the modes none,"
            " memory, cold and rag"
        )
    records: list[dict[str, Any]] = []
    shown: list[tuple[Generation, list[AttributedReference]]] = []
    try:
        for version in versions:
            session = Session(config, workdir, checkpoint=checkpoint, bank=bank, version=version)
            observe = request.sources or bool(request.html or request.json)
            generator = session.generator(
                request.mode, sampling=request.sampling, observe=observe, length=request.cut
            )
            if len(versions) > 1:
                print(f"== version {session.version.number} of the knowledge ==")
            for generation, read in _generated(session, generator, request):
                record = as_dict(generation, read, request.by_head)
                records.append({"version": version, "mode": request.mode, **record})
                shown.append((generation, read))
    finally:  # keep the finished texts when a later text fails
        if records and request.json:
            data = json_text(records, indent=1, ensure_ascii=False) + "\n"
            write_atomically(Path(request.json), data.encode())
        if shown and request.html:
            write_atomically(request.html, as_page(shown, session.tokenizer).encode())
    return records


def _generated(
    session: Session, generator: Generator, request: Request
) -> Iterator[tuple[Generation, list[AttributedReference]]]:
    """Yields each text with its sources, and prints it."""
    shown, prompts, ids = _prompts(session, request)
    generate: Any = generator.generate
    references: Any = None
    if request.mode == "long_context":
        long = LongContextGenerator(generator, request.window)
        generate, references = long.generate, long.references
    elif request.mode != "none":
        references = session.references
    streams: dict[str, Any] = {}
    if request.stream and len(prompts) == 1:
        streams = {"piece": 8, "listener": lambda _, text: print(text, end="", flush=True)}
        print(shown[0], end="", flush=True)
    for low in range(0, len(prompts), request.batch):
        part = prompts[low : low + request.batch]
        # A text of its own number, whatever the batch: `long_context` counts texts itself.
        rows = {} if request.mode == "long_context" else {"row_ids": range(low, low + len(part))}
        options = {"groups": request.groups, **streams, **rows}
        generations = generate(part, request.new_tokens, **options)
        for number, generation in enumerate(generations, low):
            print("" if streams else shown[number] + generation.text)
            read: list[AttributedReference] = []
            if generation.chunks:
                effects = effects_of(generator, generation) if request.explain else None
                read = attribute(generation, references, effects)
            elif ids is not None:
                in_prompt = ids[number][ids[number] >= 0].tolist()
                read = [AttributedReference(i, references[i]) for i in in_prompt]
            if request.sources and request.mode != "none":
                print(as_text(read))
            yield generation, read


def _prompts(
    session: Session, request: Request
) -> tuple[list[str], Sequence[str | np.ndarray], np.ndarray | None]:
    """Returns prompts as printed and as fed to the model, and the ids of the references in them.

    The ids are `(n, references)`; they are None in all modes but `rag`.
    """
    chats: list[Chat] = []
    if request.chat:
        chats = [p if isinstance(p, Chat) else question(p) for p in request.prompts]
        texts = [chat.turns[-1].text for chat in chats]
        shown = [f"{text}\n\N{RIGHTWARDS ARROW}" for text in texts]
    else:
        shown = texts = [str(prompt) for prompt in request.prompts]
    ids: np.ndarray | None = None
    if request.mode == "rag":
        texts, ids = rag_prompts(session.retriever, texts, request.references)
    if not request.chat:
        return shown, texts, ids
    chats = [
        dataclasses.replace(
            chat, turns=(*chat.turns[:-1], dataclasses.replace(chat.turns[-1], text=text))
        )
        for chat, text in zip(chats, texts, strict=True)
    ]
    return shown, Template(session.config.chat, session.tokenizer).prompts(chats), ids
