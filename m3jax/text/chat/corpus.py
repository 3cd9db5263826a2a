"""Chats and preference pairs as token corpora of a workdir, with a report of what was left out."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from m3jax.config import ConfigDict
from m3jax.errors import TextError
from m3jax.files import digest, json_text, read_sealed, write_sealed
from m3jax.text.chat.chats import REMEDIES, Chat, ChatError, Pair, read_chats, read_pairs
from m3jax.text.chat.template import EncodedChat, Template, chunk_references
from m3jax.text.corpus import CorpusWriter, TokenDocument
from m3jax.text.documents import Document, is_validation
from m3jax.text.listing import inputs_of, list_files
from m3jax.text.prepare import progress
from m3jax.text.tokenizer import Tokenizer
from m3jax.workdir import make_part, remedy

SAMPLES = 5  # lines of each reason that the report quotes
REPORT = "report.json"
SCRIPT = "launch/prepare.py chats"
_INPUTS = "inputs"  # key of the file of the report: digest of what it is made from
_TOGETHER = 256  # lines whose chats are tokenized at once
_Line = list[tuple[Chat, EncodedChat]]  # one chat, or the two chats of a pair


def prepare_chats(
    config: ConfigDict, workdir: str | os.PathLike[str], spec: str
) -> tuple[dict[str, Any], bool]:
    """Writes the part `chats/` or `pairs/` of a workdir, as `config.data.packing` says.

    Its `train` and `validation` are corpora (a pair is two documents, the chosen chat first), and
    `report.json` counts and quotes the lines that were left out, by reason. A chat that is too long
    for a row loses its last rounds; it is left out if its first answer does not fit. A finished
    part with the same inputs is kept. `spec` names files of rows (`list_files`). Returns the
    report, and True if the part was finished before.

    Raises:
      TextError: `config.data.packing` is neither `chats` nor `pairs`; the workdir has no tokenizer;
        as `read_chats`; there are no chats; the fraction of unusable lines exceeds
        `chat.bad_share`; a split is empty; a finished part was made from other inputs.
    """
    kind = config.data.packing
    if kind not in ("chats", "pairs"):
        raise TextError(
            f"config.data.packing = {kind!r}: chats are prepared for a stage with 'chats' (SFT) or"
            " 'pairs' (DPO)"
        )
    workdir = Path(workdir)
    tokenizer = Tokenizer.load(workdir / "tokenizer")
    inputs = {
        kind: inputs_of(spec),
        "tokenizer": tokenizer.fingerprint,
        "chat": config.chat.to_dict(),
        "text.shards": config.text.shards,
        "text.validation_share": config.text.validation_share,
        "data.sequence_length": config.data.sequence_length,
        "memory.chunk_length": config.memory.chunk_length,
    }
    folder, made_from = workdir / kind, digest(json_text(inputs, sort_keys=True))

    def make(folder: Path) -> None:
        report = _Writing(config, tokenizer).run(folder, spec)
        write_sealed(folder / REPORT, {**report, _INPUTS: made_from})

    kept = make_part(folder, inputs, make)
    path = folder / REPORT
    report = read_sealed(path, "read", unsealed=True) if path.is_file() else None
    if report is None or report.pop(_INPUTS, made_from) != made_from:
        raise TextError(f"{path} is damaged or missing; {remedy(folder, SCRIPT)}")
    return report, kept


class _Writing:
    def __init__(self, config: ConfigDict, tokenizer: Tokenizer) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.kind: str = config.data.packing
        self.template = Template(config.chat, tokenizer)
        self.read = self.shortened = 0
        self.left_out: Counter[str] = Counter()  # lines, by reason
        self.unread = Counter[str]()  # blank lines, fields
        self.files = ""  # files of folders that are not read, with the reasons
        self.samples: defaultdict[str, list[ChatError]] = defaultdict(list)
        self.counts: Counter[str] = Counter()
        self.rounds: Counter[int] = Counter()

    def run(self, folder: Path, spec: str) -> dict[str, Any]:
        """Writes the corpora of all splits; returns the report."""
        config, share = self.config, self.config.text.validation_share
        read = read_pairs if self.kind == "pairs" else read_chats
        lines = progress(read(spec, config.chat.most_rounds, self.unread), self.kind)
        self.files = list_files(spec, rows_only=True).describe()
        with contextlib.ExitStack() as stack:
            writers: dict[str, CorpusWriter] = {}
            for name in ["train"] + ["validation"] * (share > 0):
                writer = CorpusWriter(folder / name, self.tokenizer, config.text.shards)
                writers[name] = stack.enter_context(writer)
            for line in self._encoded(lines):
                # A hash of this text decides between training and validation.
                text = json_text([[(t.role, t.text) for t in chat.turns] for chat, _ in line])
                held_out = is_validation(Document(line[0][0].id, text), share)
                split = "validation" if held_out else "train"
                self._write(line, writers[split], split)
            self._check(spec)
            for name, writer in writers.items():
                if not self.counts[f"{name}/{self.kind}"]:
                    raise TextError(
                        f"text.validation_share = {share} leaves nothing for {name}, of"
                        f" {self.read} {self.kind}; give more of them or change it"
                    )
                writer.commit()
        return self._report()

    def _encoded(self, lines: Iterator[Chat | Pair | ChatError]) -> Iterator[_Line]:
        """Tokenizes lines and yields each that fits a row; counts the lines that are left out."""
        while batch := list(itertools.islice(lines, _TOGETHER)):
            self.read += len(batch)
            groups: list[tuple[Chat, ...]] = []
            for item in batch:
                if isinstance(item, ChatError):
                    self._leave_out(item)
                else:
                    groups.append(item if isinstance(item, Pair) else (item,))
            flat = [chat for group in groups for chat in group]
            encoded = iter(self.template.encode(flat, last_answer=self.kind == "pairs"))
            for group in groups:
                try:
                    yield self._fitted([(chat, next(encoded)) for chat in group])
                except ChatError as error:
                    self._leave_out(error)

    def _fitted(self, line: _Line) -> _Line:
        """Returns a line that fits a row, shortened if need be, or raises `ChatError`."""
        room, size = self.config.data.sequence_length, sum(len(e.tokens) - 1 for _, e in line)
        if size <= room:
            return line
        what, (chat, coded) = "the two answers with their prompts have", line[0]
        if self.kind == "chats":
            ends = zip(itertools.count(1), chat.turns, coded.ends)
            answers = [(turns, end) for turns, turn, end in ends if turn.role == "assistant"]
            # Ends of answers after which the chat may be cut; the first answer must be in.
            fitting = [(turns, end) for turns, end in answers if end - 1 <= room]
            if fitting:
                turns, end = fitting[-1]
                self.shortened += 1
                cut = EncodedChat(coded.tokens[:end], coded.weights[:end], coded.ends[:turns])
                return [(dataclasses.replace(chat, turns=chat.turns[:turns]), cut)]
            what, size = "the first answer ends after", answers[0][1] - 1
        what = f"{what} {size} tokens, more than a row of {room}"
        raise ChatError("length", chat.where, what)

    def _leave_out(self, error: ChatError) -> None:
        self.left_out[error.reason] += 1
        if self.left_out[error.reason] <= SAMPLES:
            self.samples[error.reason].append(error)

    def _write(self, line: _Line, writer: CorpusWriter, split: str) -> None:
        self.counts[f"{split}/{self.kind}"] += 1
        self.rounds[line[0][0].rounds] += 1
        for chat, coded in line:
            inputs, length = len(coded.tokens) - 1, self.config.memory.chunk_length
            references = chunk_references(chat.turns, coded.ends, inputs, length)
            document = TokenDocument(coded.tokens, coded.weights, references, chat.id)
            text = "\n".join(turn.text for turn in chat.turns)
            writer.append(document.encoded(text, self.tokenizer))
            self.counts[f"{split}/tokens"] += len(coded.tokens)
            self.counts[f"{split}/answer tokens"] += int(coded.weights.sum())

    def _check(self, spec: str) -> None:
        """Raises `TextError` if no line was read or too many lines are unusable."""
        kind, share = self.kind, self.config.chat.bad_share
        bad = self.left_out.total()
        if not self.read:
            raise TextError(f"no {kind} in {spec!r}: every file is empty")
        if bad <= share * self.read:
            return
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(self.left_out.items()))
        first = "\n".join(f"  {errors[0]}" for _, errors in sorted(self.samples.items()))
        raise TextError(
            f"{bad} of {self.read} {kind} cannot be used ({reasons}), more than"
            f" config.chat.bad_share = {share}. Correct them, or raise it to leave them out."
            f" The first of each kind:\n{first}"
        )

    def _report(self) -> dict[str, Any]:
        return {
            "read": self.read,
            **dict(sorted(self.counts.items())),
            "shortened": self.shortened,
            "not read": dict(sorted(self.unread.items())),
            "files not read": self.files,
            "rounds": {str(n): count for n, count in sorted(self.rounds.items())},
            "left out": {
                reason: {
                    "count": self.left_out[reason],
                    "remedy": REMEDIES[reason],
                    "samples": [f"{error.where}: {error.what}" for error in errors],
                }
                for reason, errors in sorted(self.samples.items())
            },
        }


def describe(report: dict[str, Any]) -> str:
    """Formats the report of `prepare_chats` as readable lines."""
    lines = [f"{name}: {value}" for name, value in report.items() if isinstance(value, int)]
    unread = [f"{what} ({count})" for what, count in report.get("not read", {}).items()]
    unread += [report["files not read"]] if report.get("files not read") else []
    if unread:
        lines.append(f"not read: {'; '.join(unread)}")
    for reason, entry in report["left out"].items():
        lines.append(f"left out ({reason}): {entry['count']}, for example {entry['samples'][0]}")
    return "\n".join(lines)
