"""Counts of the documents that were read and that each step removed, with samples."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from m3jax.files import digest, json_text, write_atomically
from m3jax.text.documents import Document

SAMPLES = 8  # samples kept per step
SHOWN = 400  # characters shown per sample


@dataclass
class Tally:
    """Holds counts that can be summed over blocks in any order.

    `counts` has the keys `<step>/documents` and `<step>/characters`; the step `read` counts the
    input. `samples` lists, for each step, the removed documents with the smallest hashes.
    `languages` and `lengths` count the input documents by language and by the bit length of their
    number of words ("0" = no words, "3" = 4 to 7).
    """

    counts: Counter[str] = field(default_factory=Counter)
    samples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    languages: Counter[str] = field(default_factory=Counter)
    lengths: Counter[str] = field(default_factory=Counter)

    def count(self, step: str, characters: int) -> None:
        """Counts a document of a step."""
        self.counts[f"{step}/documents"] += 1
        self.counts[f"{step}/characters"] += characters

    def take_out(self, step: str, document: Document, value: str) -> None:
        """Counts a document that a step removed, and offers it as a sample (`show`)."""
        self.count(step, len(document.text))
        self.show(step, value, document.text[:SHOWN], document)

    def show(self, step: str, value: str, text: str, document: Document | None = None) -> None:
        """Keeps a sample if its hash is among the step's smallest, whatever the order of calls."""
        named = {} if document is None else {"id": document.id, "source": document.source}
        named["value"] = value
        sample = {"order": digest(step, *named.values(), text), **named, "text": text}
        self._keep(step, [sample])

    def _keep(self, step: str, samples: list[dict[str, Any]]) -> None:
        together = [*self.samples.get(step, []), *samples]
        self.samples[step] = sorted(together, key=lambda sample: sample["order"])[:SAMPLES]

    def documents(self) -> dict[str, int]:
        """Returns the number of documents by step."""
        counted = {name.partition("/"): n for name, n in sorted(self.counts.items())}
        return {step: n for (step, _, what), n in counted.items() if what == "documents"}

    def write(self, path: Path) -> None:
        """Writes the counts as JSON."""
        content = {name: dict(value) for name, value in vars(self).items()}
        write_atomically(path, json_text(content, sort_keys=True).encode(), shared=True)

    @classmethod
    def read(cls, folder: Path) -> Tally:
        """Sums the counts of all files that `write` wrote to a folder."""
        total = cls()
        for path in sorted(folder.glob("*.json")):
            content = json.loads(path.read_bytes())
            for step, samples in content.pop("samples").items():
                total._keep(step, samples)
            for name, counts in content.items():
                getattr(total, name).update(counts)
        return total
