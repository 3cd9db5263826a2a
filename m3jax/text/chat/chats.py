"""Chats and preference pairs from JSON lines in the usual forms; unusable lines give errors.

Chats (other fields are not read, which the report of `prepare_chats` says):

    {"messages": [{"role": "user", "content": …}, {"role": "assistant", "content": …}, …]}
    {"conversations": [{"from": "human", "value": …}, {"from": "gpt", "value": …}, …]}   (ShareGPT)
    {"prompt": …, "response": …}

A field `system` (or `system_prompt`) beside the turns is the first turn, of the system. Of several
fields (`prompt` and `messages`) one must begin with the other.

A preference pair has a prompt (`prompt`: a text or turns; or turns in `messages` or
`conversations`) and the answers `chosen` and `rejected`: each a text, a turn, or turns. Without a
prompt both answers are whole chats that differ in the last turn only; with a prompt they may be
whole chats, too, which then begin with the prompt.

A turn's field `reference` may hold the key of the reference that its chunks read (with
retrieval.ids = "stored"); an answer without the field uses its question's reference.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from m3jax.errors import TextError
from m3jax.reading import Row, rows
from m3jax.text.listing import list_files

ROLES = {role: role for role in ("system", "user", "assistant")}
ROLES |= {"human": "user", **dict.fromkeys(("gpt", "model", "bot"), "assistant")}

_PROMPTS = {"messages", "conversations", "prompt"}
_WHOLE = {"messages", "conversations", "response"}  # fields with an answer
_FIELDS = _PROMPTS | _WHOLE | {"chosen", "rejected", "id", "system", "system_prompt"}
_TURN_FIELDS = {"role", "from", "content", "value", "reference"}
# Question and answer in forms of other libraries → how they are written for this one.
_FOREIGN = {
    ("prompt", "completion"): "a line of TRL; name the completion `response`",
    ("instruction", "output"): "a line of Alpaca; write instruction and input as `prompt`, the"
    " output as `response`",
    ("question", "answer"): "name them `prompt` and `response`",
    ("query", "answer"): "name them `prompt` and `response`",
}
_BLANK_LINES = re.compile(r"\A(?:[^\S\n]*\n)+")

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
    text: str  # without white space at its ends; an answer keeps its indentation
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


def read_chats(
    spec: str, most_rounds: int, unread: Counter[str] | None = None
) -> Iterator[Chat | ChatError]:
    """Yields the chats of files of rows, and a `ChatError` for each unusable row.

    Args:
      spec: names the files (`list_files`).
      most_rounds: most questions of a chat.
      unread: counts what was not read: `blank lines`, and fields by name.

    Raises:
      TextError: as `list_files`, or for a file that is damaged.
    """
    return _parsed(spec, most_rounds, _chat, unread)


def read_pairs(
    spec: str, most_rounds: int, unread: Counter[str] | None = None
) -> Iterator[Pair | ChatError]:
    """Yields preference pairs; arguments and errors are as in `read_chats`."""
    return _parsed(spec, most_rounds, _pair, unread)


def _parsed(
    spec: str,
    most_rounds: int,
    parse: Callable[[dict[str, Any], str, str, int], _Item],
    unread: Counter[str] | None,
) -> Iterator[_Item | ChatError]:
    unread = Counter() if unread is None else unread
    for row, name in _rows(spec, unread):
        try:
            fields = _fields(row)
            _count_unread(fields, unread)
            yield parse(fields, name, row.where, most_rounds)
        except ChatError as error:
            yield error


def read_questions(spec: str, most_rounds: int) -> list[Chat]:
    """Reads chats that end with a question, for example lines `{"prompt": …}`.

    Raises `ChatError` for an unusable line, `TextError` as `read_chats`.
    """
    chats = []
    for row, name in _rows(spec, Counter()):
        turns = _prompt(_fields(row), row.where)
        chats.append(Chat(_checked(turns, row.where, most_rounds, asks=True), name, row.where))
    if not chats:
        raise TextError(f"{spec} holds no chats; give lines of {{'prompt': text}}")
    return chats


def question(text: str) -> Chat:
    """Makes a chat of a single question; raises `ChatError` if `text` is empty."""
    return Chat(_checked((Turn("user", text.strip()),), "the prompt", 1, asks=True))


def _rows(spec: str, unread: Counter[str]) -> Iterator[tuple[Row, str]]:
    """Yields the rows of a spec with their default ids."""
    for part in list_files(spec, rows_only=True).parts:
        for row in rows(part.path, unread=unread):
            yield row, f"{part.stem}:{row.number}"


def _fields(row: Row) -> dict[str, Any]:
    try:
        return row.fields()
    except TextError as error:
        what = str(error).removeprefix(f"{row.where}: ")
        raise ChatError("json", row.where, what) from error


def _count_unread(fields: dict[str, Any], unread: Counter[str]) -> None:
    unread.update(f"field {name!r}" for name in fields.keys() - _FIELDS)
    for name in ("messages", "conversations"):
        turns = fields.get(name)
        for turn in turns if isinstance(turns, list) else ():
            names = turn.keys() - _TURN_FIELDS if isinstance(turn, dict) else ()
            unread.update(f"field {name!r} of a turn" for name in names)


def _chat(fields: dict[str, Any], name: str, where: str, most_rounds: int) -> Chat:
    for (asks, answers), remedy in _FOREIGN.items():
        if asks in fields and answers in fields and not fields.keys() & _WHOLE:
            raise ChatError("form", where, f"the fields {asks!r} and {answers!r}: {remedy}")
    turns = _prompt(fields, where)
    if "response" in fields:
        turns = (*turns, *_turns(fields["response"], "assistant", where))
    return Chat(_checked(turns, where, most_rounds), _name(fields, name), where)


def _pair(fields: dict[str, Any], name: str, where: str, most_rounds: int) -> Pair:
    for key in ("chosen", "rejected"):
        if key not in fields:
            raise ChatError("form", where, f"no field {key!r}; it has: {', '.join(fields)}")
    shared: tuple[Turn, ...] = ()
    if fields.keys() & _PROMPTS:
        shared = _prompt(fields, where, whole=False)
    name = _name(fields, name)
    sides = []
    for key in ("chosen", "rejected"):
        turns = _turns(fields[key], "assistant", where)
        if turns and turns[0].role != "assistant":
            turns = _led(fields, turns, where)
        if not _begins_with(_spoken(turns), _spoken(shared)):
            turns = (*shared, *turns)
        elif turns[0].role != "system" and len(shared) > len(_spoken(shared)):
            turns = (shared[0], *turns)
        sides.append(Chat(_checked(turns, where, most_rounds), f"{name}/{key}", where))
    chosen, rejected = sides
    if chosen.turns[:-1] != rejected.turns[:-1]:
        raise ChatError("form", where, "the answers follow different prompts")
    if chosen.turns[-1].text == rejected.turns[-1].text:
        raise ChatError("equal", where, "the chosen and the rejected answer are equal")
    return Pair(chosen, rejected)


def _prompt(fields: dict[str, Any], where: str, whole: bool = True) -> tuple[Turn, ...]:
    """Returns the turns of a chat or of its prompt, with the field `system` as the first.

    Of several fields the one with most turns, or with fewest if not `whole`; it must begin with the
    others, or they with it.
    """
    keys = [key for key in ("messages", "conversations", "prompt") if key in fields]
    if not keys:
        raise ChatError("form", where, f"no chat in the fields {', '.join(fields) or '(none)'}")
    chats = []
    for key in keys:
        if key != "prompt" and not isinstance(fields[key], list):
            raise ChatError("form", where, f"{key!r} is {type(fields[key]).__name__}, not turns")
        chats.append(_turns(fields[key], "user", where))
    shortest, *_, longest = sorted([chats[0], *chats], key=len)
    for key, chat in zip(keys, chats, strict=True):
        if not _begins_with((*_spoken(longest), Turn("", "")), _spoken(chat)):
            raise ChatError("form", where, f"{key!r} differs from {keys[0]!r}; leave one out")
    return _led(fields, longest if whole else shortest, where)


def _spoken(turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """Returns the turns without that of the system."""
    return turns[1:] if turns and turns[0].role == "system" else turns


def _led(fields: dict[str, Any], turns: tuple[Turn, ...], where: str) -> tuple[Turn, ...]:
    """Returns the turns with the text of the field `system` or `system_prompt` as the first."""
    texts = [fields[name] for name in ("system", "system_prompt") if name in fields]
    if not all(isinstance(text, str) for text in texts):
        raise ChatError("form", where, "the field 'system' is no text")
    told = {turn.text for turn in turns[:1] if turn.role == "system"}
    told |= {text.strip() for text in texts if text.strip()}
    if len(told) > 1:
        raise ChatError("form", where, "two different texts of the system; leave one out")
    return (*(Turn("system", text) for text in told), *_spoken(turns))


def _begins_with(turns: tuple[Turn, ...], prompt: tuple[Turn, ...]) -> bool:
    """Returns True if the turns begin with the prompt's turns and go on after them."""
    pairs = zip(turns, prompt, strict=False)
    same = all((a.role, a.text) == (b.role, b.text) for a, b in pairs)
    return len(turns) > len(prompt) and same


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
    for name, other in (("role", "from"), ("content", "value")):
        if name in turn and turn.get(other, turn[name]) != turn[name]:
            raise ChatError("form", where, f"a turn whose {name!r} differs from its {other!r}")
    role = turn.get("role", turn.get("from"))
    text = turn.get("content", turn.get("value"))
    reference = turn.get("reference") or ""
    if not isinstance(role, str) or role.lower() not in ROLES:
        raise ChatError("role", where, f"a turn of the unknown role {role!r}")
    role = ROLES[role.lower()]
    if text is None:
        raise ChatError("empty", where, f"a turn of {role!r} without text")
    if not isinstance(text, str) or not isinstance(reference, str):
        raise ChatError("form", where, f"a turn of {role!r} whose text or reference is no string")
    return Turn(role, _answer(text) if role == "assistant" else text.strip(), reference)


def _answer(text: str) -> str:
    """Returns an answer without blank lines and spaces around it, but with its indentation.

    A single space in front is no indentation: it parts prompt and answer in other formats.
    """
    text = _BLANK_LINES.sub("", text.rstrip())
    return text[1:] if re.match(r" \S", text) else text


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
