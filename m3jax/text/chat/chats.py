"""Chats and preference pairs from JSON lines in the usual forms; unusable lines give errors.

Chats (other fields are ignored):

    {"messages": [{"role": "user", "content": …}, {"role": "assistant", "content": …}, …]}
    {"conversations": [{"from": "human", "value": …}, {"from": "gpt", "value": …}, …]}   (ShareGPT)
    {"prompt": …, "response": …}

A preference pair has a prompt (`prompt`: a text or turns; or turns in `messages` or
`conversations`) and the answers `chosen` and `rejected`: each a text, a turn, or turns. Without a
prompt both answers are whole chats that differ in the last turn only; with a prompt they may be
whole chats, too, which then begin with the prompt.

A turn's field `reference` may hold the key of the reference that its chunks read (with
retrieval.ids = "stored"); an answer without the field uses its question's reference.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from m3jax.errors import TextError
from m3jax.text.documents import find_files
from m3jax.text.jsonl import json_lines, json_object

ROLES = {role: role for role in ("system", "user", "assistant")}
ROLES |= {"human": "user", **dict.fromkeys(("gpt", "model", "bot"), "assistant")}

_Item = TypeVar("_Item")

# Reasons for which a line is unusable, and what the user can do about each.
REMEDIES = {
    "json": "write one JSON object a line, in UTF-8",
    "form": "give messages, conversations, or prompt and response; pairs also chosen and rejected",
    "role": f"use the roles {', '.join(ROLES)}",
    "empty": "give every turn some text, or leave the chat out",
    "order": "after an optional system turn users and assistants take turns, the user first, and an"
    " answer ends the chat",
    "rounds": "split the chat, or raise config.chat.most_rounds",
    "length": "shorten it, or raise config.data.sequence_length",
    "equal": "give two different answers, or leave the pair out",
}


@dataclass(frozen=True)
class Turn:
    """Holds one turn of a chat."""

    role: str  # `system`, `user` or `assistant`
    text: str  # without white space at its ends
    reference: str = ""  # key of the reference that its chunks read


@dataclass(frozen=True)
class Chat:
    """Holds the turns of a chat, whole or up to a question; `where` is its `file:line`."""

    turns: tuple[Turn, ...]
    id: str = ""
    where: str = ""

    @property
    def rounds(self) -> int:
        """Returns the number of questions (user turns)."""
        return sum(turn.role == "user" for turn in self.turns)


class Pair(NamedTuple):
    """Holds two chats that differ in the last answer only; `chosen` is preferred."""

    chosen: Chat
    rejected: Chat


def read_chats(spec: str, most_rounds: int) -> Iterator[Chat | ChatError]:
    """Yields the chats of JSON-lines files, and a `ChatError` for each unusable line.

    `spec` names the files (`find_files`); a chat may have at most `most_rounds` questions. Raises
    `TextError` as `find_files`, or for a file that is damaged or has another ending.
    """
    return _parsed(spec, most_rounds, _chat)


def read_pairs(spec: str, most_rounds: int) -> Iterator[Pair | ChatError]:
    """Yields preference pairs; arguments and errors are as in `read_chats`."""
    return _parsed(spec, most_rounds, _pair)


def _parsed(
    spec: str, most_rounds: int, parse: Callable[[dict[str, Any], str, str, int], _Item]
) -> Iterator[_Item | ChatError]:
    for line, name, where in _records(spec):
        try:
            yield parse(_object(line, where), name, where, most_rounds)
        except ChatError as error:
            yield error


def read_questions(spec: str, most_rounds: int) -> list[Chat]:
    """Reads chats that end with a question, for example lines `{"prompt": …}`.

    Raises `ChatError` for an unusable line, `TextError` as `read_chats`.
    """
    chats = []
    for line, name, where in _records(spec):
        turns = _prompt(_object(line, where), where)
        chats.append(Chat(_checked(turns, where, most_rounds, asks=True), name, where))
    return chats


def question(text: str) -> Chat:
    """Makes a chat of a single question; raises `ChatError` if `text` is empty."""
    return Chat(_checked((Turn("user", text.strip()),), "the prompt", 1, asks=True))


def _records(spec: str) -> Iterator[tuple[bytes, str, str]]:
    """Yields (line, default id, `file:line`) for every line that is not blank."""
    for part in find_files(spec):
        if not part.endswith((".jsonl", ".jsonl.gz")):
            raise TextError(f"{part} is not JSON lines; give .jsonl or .jsonl.gz")
        stem = Path(part).name.removesuffix(".gz").removesuffix(".jsonl")
        for number, line in enumerate(json_lines(part), 1):
            if line.strip():
                yield line, f"{stem}:{number}", f"{part}:{number}"


def _object(line: bytes, where: str) -> dict[str, Any]:
    try:
        return json_object(line)
    except ValueError as error:
        raise ChatError("json", where, str(error)) from error


def _chat(fields: dict[str, Any], name: str, where: str, most_rounds: int) -> Chat:
    turns = _prompt(fields, where)
    if fields.get("response") is not None:
        turns = (*turns, *_turns(fields["response"], "assistant", where))
    return Chat(_checked(turns, where, most_rounds), _name(fields, name), where)


def _pair(fields: dict[str, Any], name: str, where: str, most_rounds: int) -> Pair:
    for key in ("chosen", "rejected"):
        if key not in fields:
            raise ChatError("form", where, f"no field {key!r}; it has: {', '.join(fields)}")
    shared: tuple[Turn, ...] = ()
    if any(fields.get(key) is not None for key in ("prompt", "messages", "conversations")):
        shared = _prompt(fields, where)
    name = _name(fields, name)
    sides = []
    for key in ("chosen", "rejected"):
        turns = _turns(fields[key], "assistant", where)
        if not _begins_with(turns, shared):
            turns = (*shared, *turns)
        sides.append(Chat(_checked(turns, where, most_rounds), f"{name}/{key}", where))
    chosen, rejected = sides
    if chosen.turns[:-1] != rejected.turns[:-1]:
        raise ChatError("form", where, "the answers follow different prompts")
    if chosen.turns[-1].text == rejected.turns[-1].text:
        raise ChatError("equal", where, "the chosen and the rejected answer are equal")
    return Pair(chosen, rejected)


def _begins_with(turns: tuple[Turn, ...], prompt: tuple[Turn, ...]) -> bool:
    """Returns True if the turns begin with the prompt's turns and go on after them."""
    pairs = zip(turns, prompt, strict=False)
    same = all((a.role, a.text) == (b.role, b.text) for a, b in pairs)
    return len(turns) > len(prompt) and same


def _prompt(fields: dict[str, Any], where: str) -> tuple[Turn, ...]:
    keys = (k for k in ("messages", "conversations", "prompt") if fields.get(k) is not None)
    key = next(keys, None)
    if key is None:
        raise ChatError("form", where, f"no chat in the fields {', '.join(fields) or '(none)'}")
    if key != "prompt" and not isinstance(fields[key], list):
        raise ChatError("form", where, f"{key!r} is {type(fields[key]).__name__}, not turns")
    return _turns(fields[key], "user", where)


def _turns(value: Any, role: str, where: str) -> tuple[Turn, ...]:
    """Parses a list of turns, a single turn, or a text, which becomes a turn of `role`."""
    if isinstance(value, str):
        value = {"role": role, "content": value}
    if not isinstance(value, dict | list):
        raise ChatError("form", where, f"turns are {type(value).__name__}, not text or turns")
    return tuple(_turn(turn, where) for turn in (value if isinstance(value, list) else [value]))


def _turn(turn: Any, where: str) -> Turn:
    if not isinstance(turn, dict):
        raise ChatError("form", where, f"a turn is {type(turn).__name__}, not an object")
    role = turn.get("role", turn.get("from"))
    text = turn.get("content", turn.get("value"))
    reference = turn.get("reference") or ""
    if not isinstance(role, str) or role.lower() not in ROLES:
        raise ChatError("role", where, f"a turn of the unknown role {role!r}")
    if text is None:
        raise ChatError("empty", where, f"a turn of {role!r} without text")
    if not isinstance(text, str) or not isinstance(reference, str):
        raise ChatError("form", where, f"a turn of {role!r} whose text or reference is no string")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ChatError("form", where, f"lone surrogate at character {error.start}") from error
    return Turn(ROLES[role.lower()], text.strip(), reference)


def _name(fields: dict[str, Any], usual: str) -> str:
    name = fields.get("id")
    return str(name) if isinstance(name, str | int) and not isinstance(name, bool) else usual


def _checked(
    turns: tuple[Turn, ...], where: str, most_rounds: int, asks: bool = False
) -> tuple[Turn, ...]:
    """Returns the turns, or raises `ChatError` if they are empty, out of order or too many.

    The last turn must be a question if `asks`, else an answer.
    """
    for number, turn in enumerate(turns, 1):
        if not turn.text:
            raise ChatError("empty", where, f"turn {number} ({turn.role}) is empty")
    spoken = turns[1:] if turns and turns[0].role == "system" else turns
    for turn, speaker in zip(spoken, itertools.cycle(("user", "assistant"))):
        if turn.role != speaker:
            raise ChatError("order", where, f"a turn of {turn.role} where {speaker} is to speak")
    if len(spoken) % 2 != asks or not spoken:
        ends = spoken[-1].role if spoken else "nobody"
        raise ChatError("order", where, f"the last turn is of {ends}")
    rounds = (len(spoken) + 1) // 2
    if rounds > most_rounds:
        raise ChatError("rounds", where, f"{rounds} rounds, more than {most_rounds}")
    return turns


class ChatError(TextError):
    """Reports a line that is not a usable chat or pair; `reason` is a key of `REMEDIES`."""

    def __init__(self, reason: str, where: str, what: str) -> None:
        super().__init__(f"{where}: {what}; {REMEDIES[reason]}")
        self.reason, self.where, self.what = reason, where, what
