"""Counts of a block of documents: what came in, what each step took out, and samples of it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from m3jax.files import digest
from m3jax.text.documents import Document

SAMPLES = 8  # documents shown of each step
SHOWN = 400  # characters shown of each


@dataclass
class Tally:
    """Holds counts that add up over blocks, in any order.

    Attributes:
      counts: `<step>/documents` and `<step>/characters`; the step `read` is what came in.
      samples: step → documents taken out by it, those with the smallest hashes.
      languages: documents read, by language.
      lengths: documents read, by the power of two below their number of words (0 = no word).
    """

    counts: Counter[str] = field(default_factory=Counter)
    samples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    languages: Counter[str] = field(default_factory=Counter)
    lengths: Counter[str] = field(default_factory=Counter)

    def count(self, step: str, characters: int) -> None:
        """Counts one document."""
        self.counts[f"{step}/documents"] += 1
        self.counts[f"{step}/characters"] += characters

    def take_out(self, step: str, document: Document, value: str) -> None:
        """Counts a document that a step removed, and keeps it as a sample where it is one."""
        self.count(step, len(document.text))
        shown = document.text[:SHOWN]
        self.show(step, {"id": document.id, "source": document.source, "value": value}, shown)

    def show(self, step: str, names: dict[str, Any], text: str) -> None:
        """Keeps a sample if its hash is among the smallest, so that the choice knows no order."""
        order = digest(step, *(str(value) for value in names.values()), text)
        kept = [*self.samples.get(step, []), {"order": order, **names, "text": text}]
        self.samples[step] = sorted(kept, key=lambda sample: sample["order"])[:SAMPLES]

    def add(self, other: Tally) -> None:
        """Adds the counts of another tally."""
        self.counts.update(other.counts)
        self.languages.update(other.languages)
        self.lengths.update(other.lengths)
        for step, samples in other.samples.items():
            together = [*self.samples.get(step, []), *samples]
            self.samples[step] = sorted(together, key=lambda s: s["order"])[:SAMPLES]

    def to_json(self) -> dict[str, Any]:
        """Returns plain values for JSON."""
        return {name: dict(value) for name, value in vars(self).items()}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Tally:
        """Restores a tally from what `to_json` returned."""
        samples = content.pop("samples")
        return cls(samples=samples, **{name: Counter(value) for name, value in content.items()})
