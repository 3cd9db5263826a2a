"""Chats and preference pairs as token corpora of a workdir, with a report of what was left out."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from m3jax.config import ConfigDict
from m3jax.errors import TextError
from m3jax.files import write_atomically
from m3jax.text.chat.chats import REMEDIES, Chat, ChatError, Pair, read_chats, read_pairs
from m3jax.text.chat.template import EncodedChat, Template, chunk_references
from m3jax.text.corpus import CorpusWriter, TokenDocument
from m3jax.text.documents import Document, inputs_of, is_validation
from m3jax.text.prepare import progress
from m3jax.text.tokenizer import Tokenizer
from m3jax.workdir import make_part

SAMPLES = 5  # of each reason, in the report
REPORT = "report.json"
_TOGETHER = 256  # chats that are tokenized at once


def prepare_chats(
    config: ConfigDict, workdir: str | os.PathLike[str], spec: str
) -> tuple[dict[str, Any], bool]:
    """Writes `chats/` or `pairs/` of a workdir, as `config.data.packing` says.

    Its `train` and `validation` are corpora (a pair is two documents, the chosen one first), and
    `report.json` says what was left out and why. A chat too long for a row loses its last rounds,
    unless its first does not fit. A finished part of the same inputs is kept. The sections `chat`,
    `text` and `data` of the config are used, and the workdir's tokenizer; `spec` as of
    `find_files`.

    Returns:
      The report, and whether the part was there before.

    Raises:
      TextError: no chats; more unusable ones than `chat.bad_share`, named by file and line; a
        finished part of other inputs; a split that is empty.
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
    folder = workdir / kind
    kept = make_part(folder, inputs, lambda folder: _Writing(config, tokenizer).run(folder, spec))
    return json.loads((folder / REPORT).read_bytes()), kept


@dataclasses.dataclass(frozen=True)
class _Encoded:
    chats: tuple[Chat, ...]
    tokens: list[EncodedChat]

    @property
    def inputs(self) -> int:
        """Counts the tokens that they take in a row."""
        return sum(len(chat.tokens) - 1 for chat in self.tokens)


class _Writing:
    def __init__(self, config: ConfigDict, tokenizer: Tokenizer) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.template = Template(config.chat, tokenizer)
        self.read = self.shortened = 0
        self.left_out: dict[str, list[ChatError]] = {}
        self.counts: Counter[str] = Counter()
        self.rounds: Counter[int] = Counter()

    def run(self, folder: Path, spec: str) -> None:
        config = self.config
        pairs = config.data.packing == "pairs"
        share, shards = config.text.validation_share, config.text.shards
        lines: Any = (read_pairs if pairs else read_chats)(spec, config.chat.most_rounds)
        splits = ["train"] + ["validation"] * (share > 0)
        with contextlib.ExitStack() as stack:
            writers = {
                name: stack.enter_context(CorpusWriter(folder / name, self.tokenizer, shards))
                for name in splits
            }
            for encoded in self._encoded(progress(lines, config.data.packing), pairs):
                document = Document(encoded.chats[0].id, _canonical(encoded.chats))
                split = "validation" if is_validation(document, share) else "train"
                self._write(encoded, writers[split], split)
            self._check(spec)
            for name, writer in writers.items():
                if not self.counts[f"{name}/{config.data.packing}"]:
                    raise TextError(
                        f"text.validation_share = {share} leaves nothing for {name}, of"
                        f" {self.read} {config.data.packing}; give more of them or change it"
                    )
                writer.finish()
        text = json.dumps(self._report(), indent=1, ensure_ascii=False)
        write_atomically(folder / REPORT, text.encode())

    def _encoded(self, lines: Iterator[Any], pairs: bool) -> Iterator[_Encoded]:
        while batch := list(itertools.islice(lines, _TOGETHER)):
            self.read += len(batch)
            groups: list[tuple[Chat, ...]] = []
            for item in batch:
                if isinstance(item, ChatError):
                    self._leave_out(item)
                else:
                    pair = isinstance(item, Pair)
                    groups.append((item.chosen, item.rejected) if pair else (item,))
            flat = [chat for group in groups for chat in group]
            tokens = iter(self.template.encode(flat, last_answer=pairs))
            for group in groups:
                fitted = self._fitted(_Encoded(group, [next(tokens) for _ in group]), pairs)
                if fitted is not None:
                    yield fitted

    def _fitted(self, line: _Encoded, pair: bool) -> _Encoded | None:
        """Returns what fits a row, without its last rounds where need be; None if nothing does."""
        room = self.config.data.sequence_length
        if line.inputs <= room:
            return line
        if not pair:
            chat, encoded = line.chats[0], line.tokens[0]
            # Ends of answers after which the chat may be cut; the first answer must be in.
            ends = [
                (n, end)
                for n, (turn, end) in enumerate(zip(chat.turns, encoded.ends, strict=True), 1)
                if turn.role == "assistant" and end - 1 <= room
            ]
            if ends:
                turns, end = ends[-1]
                self.shortened += 1
                cut = EncodedChat(encoded.tokens[:end], encoded.weights[:end], encoded.ends[:turns])
                return _Encoded((dataclasses.replace(chat, turns=chat.turns[:turns]),), [cut])
        what = "the two answers with their prompts have" if pair else "the first answer ends after"
        size = line.inputs if pair else line.tokens[0].ends[_first_answer(line.chats[0])] - 1
        error = ChatError(
            "length", line.chats[0].where, f"{what} {size} tokens, more than a row of {room}"
        )
        self._leave_out(error)
        return None

    def _leave_out(self, error: ChatError) -> None:
        samples = self.left_out.setdefault(error.reason, [])
        self.counts[f"left out/{error.reason}"] += 1
        if len(samples) < SAMPLES:
            samples.append(error)

    def _write(self, line: _Encoded, writer: CorpusWriter, split: str) -> None:
        self.counts[f"{split}/{self.config.data.packing}"] += 1
        self.rounds[line.chats[0].rounds] += 1
        for chat, encoded in zip(line.chats, line.tokens, strict=True):
            references = chunk_references(
                *(chat.turns, encoded.ends, len(encoded.tokens) - 1),
                self.config.memory.chunk_length,
            )
            text = "\n".join(turn.text for turn in chat.turns)
            document = TokenDocument(encoded.tokens, encoded.weights, references, chat.id)
            writer.write(document, text)
            self.counts[f"{split}/tokens"] += len(encoded.tokens)
            self.counts[f"{split}/answer tokens"] += int(encoded.weights.sum())

    def _check(self, spec: str) -> None:
        """Refuses too many unusable lines, and no usable one."""
        kind, share = self.config.data.packing, self.config.chat.bad_share
        bad = sum(n for name, n in self.counts.items() if name.startswith("left out/"))
        if not self.read:
            raise TextError(f"no {kind} in {spec!r}: every file is empty")
        if bad <= share * self.read:
            return
        reasons = ", ".join(f"{self.counts[f'left out/{r}']} {r}" for r in sorted(self.left_out))
        first = "\n".join(f"  {errors[0]}" for _, errors in sorted(self.left_out.items()))
        raise TextError(
            f"{bad} of {self.read} {kind} cannot be used ({reasons}), more than"
            f" config.chat.bad_share = {share}. Correct them, or raise it to leave them out."
            f" The first of each kind:\n"
            f"{first}"
        )

    def _report(self) -> dict[str, Any]:
        counts = {name: self.counts[name] for name in sorted(self.counts) if "left" not in name}
        return {
            "read": self.read,
            **counts,
            "shortened": self.shortened,
            "rounds": {str(n): self.rounds[n] for n in sorted(self.rounds)},
            "left out": {
                reason: {
                    "count": self.counts[f"left out/{reason}"],
                    "remedy": REMEDIES[reason],
                    "samples": [f"{error.where}: {error.what}" for error in errors],
                }
                for reason, errors in sorted(self.left_out.items())
            },
        }


def describe(report: dict[str, Any]) -> str:
    """Formats the report as lines for people."""
    lines = [f"{name}: {value}" for name, value in report.items() if isinstance(value, int)]
    for reason, entry in report["left out"].items():
        lines.append(f"left out ({reason}): {entry['count']}, for example {entry['samples'][0]}")
    return "\n".join(lines)


def _first_answer(chat: Chat) -> int:
    return next(n for n, turn in enumerate(chat.turns) if turn.role == "assistant")


def _canonical(chats: tuple[Chat, ...]) -> str:
    """Returns the text whose hash decides the split."""
    return json.dumps([[(t.role, t.text) for t in chat.turns] for chat in chats])
