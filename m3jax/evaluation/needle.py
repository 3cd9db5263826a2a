"""Tests the retrieval of a fact from a text much longer than the model's context (needle test).

A text of references, one of which is the needle, ends with a question about it. The model reads the
last `window` tokens as they are; what is older is a memory that it may retrieve, or is forgotten.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from m3jax.errors import TextError
from m3jax.inference.long_context import LongContextGenerator
from m3jax.inference.session import Session
from m3jax.text.jsonl import read_records
from m3jax.text.references import References
from m3jax.text.tokenizer import Tokenizer

_TRIES = 64  # references drawn for a place before those left are said to be too few


class Needle(NamedTuple):
    """`answer` should follow `prompt` where the text in front of it holds `text`."""

    text: str
    prompt: str
    answer: str


def read_needles(path: str | Path) -> list[Needle]:
    """Needles from JSON lines with `needle`, `prompt` and `answer`.

    Raises:
      TextError: no such file, none in it, or a line that is no needle.
    """

    def parse(record: Any) -> Needle:
        fields = [record[name] for name in ("needle", "prompt", "answer")]
        if not all(isinstance(field, str) and field.strip() for field in fields):
            raise TypeError("an empty field, or one that is no text")
        return Needle(*fields)

    form = "{'needle': text, 'prompt': text, 'answer': text}"
    return read_records(path, parse, "needles", form)


class Haystack(NamedTuple):
    """Text that holds a needle, with the question at its end."""

    prompt: str
    answer: str  # that should follow
    behind: int  # tokens from the needle's end to the end of the prompt


def make_haystack(
    needle: Needle,
    references: References,
    tokenizer: Tokenizer,
    length: int,
    depth: float,
    random: np.random.Generator,
) -> Haystack:
    """Joins random references, a line end between them, with the needle among them.

    Args:
      needle: the hidden fact; references that hold it or the question are not drawn.
      references: surround the needle.
      tokenizer: of the model.
      length: tokens of the whole, about; never more.
      depth: where the needle is: 0 = at the begin, 1 = in front of the question.
      random: draws.

    Raises:
      TextError: references that hold too little without the needle.
    """
    size = len(tokenizer.encode(f"{needle.text}\n{needle.prompt}"))
    texts: list[str] = []
    sizes = np.asarray(references.lengths) + 1  # and the line end
    for _ in range(_TRIES * max(1, length // max(int(sizes.min()), 1))):
        i = int(random.integers(len(sizes)))
        if size + sizes[i] > length:
            break
        text = references.texts([i])[0]
        if needle.text not in text and needle.prompt not in text:
            texts.append(text)
            size += int(sizes[i])
    else:
        raise TextError(
            f"the references hold the needle {needle.text!r} or its question nearly everywhere;"
            " give other ones (--haystack)"
        )
    place = round(depth * len(texts))
    behind = "\n".join([*texts[place:], needle.prompt])
    prompt = "\n".join([*texts[:place], needle.text, behind])
    return Haystack(prompt, needle.answer, len(tokenizer.encode(behind)))


def needle_test(
    session: Session,
    needles: Sequence[Needle],
    references: References,
    lengths: Sequence[int],
    *,
    count: int = 64,
    window: int | None = None,
    cut: int | None = None,
    batch: int = 16,
    seed: int = 0,
) -> dict[str, Any]:
    """Measures the share of needles whose answer the model gives, by length of the text.

    Args:
      session: checkpoint, tokenizer and embedder.
      needles: in turn.
      references: surround the needles.
      lengths: tokens of the texts.
      count: texts of each length; the needle's depth goes from begin to end in even steps.
      window: see `LongContextGenerator`.
      cut: most tokens of a memory; default `memory.reference_length`.
      batch: texts generated together.
      seed: of the draws.

    Returns:
      `lengths`, and for each `memory` (older text is retrieved), `window` (it is forgotten),
      `beyond` (share of needles that end before the window), and the shares by
      quarters of the depth, from begin to end: `memory_by_depth` and `window_by_depth`.
    """
    new = max(len(session.tokenizer.encode(needle.answer)) for needle in needles)
    readers = {
        "memory": LongContextGenerator(session.generator("long_context", length=cut), window),
        "window": LongContextGenerator(session.generator("none"), window),
    }
    report: dict[str, Any] = {"lengths": list(lengths), "count": count, "beyond": []}
    report["window_tokens"] = readers["memory"].window
    report["context_tokens"] = readers["memory"].generator.longest
    depths = np.linspace(0, 1, count)
    quarters = np.minimum((4 * depths).astype(int), 3)
    reach = readers["memory"].window + readers["memory"].length
    bar = tqdm(total=2 * count * len(lengths), desc="needles", unit="text")
    for length in lengths:
        random = np.random.default_rng([seed, length])
        haystacks = [
            make_haystack(
                needles[i % len(needles)], references, session.tokenizer, length, depth, random
            )
            for i, depth in enumerate(depths.tolist())
        ]
        beyond = [haystack.behind >= reach for haystack in haystacks]
        report["beyond"].append(float(np.mean(beyond)))
        for name, reader in readers.items():
            right: list[bool] = []
            for low in range(0, count, batch):
                part = haystacks[low : low + batch]
                generations = reader.generate([haystack.prompt for haystack in part], new)
                right += [
                    generation.text.strip().startswith(haystack.answer.strip())
                    for haystack, generation in zip(part, generations, strict=True)
                ]
                bar.update(len(part))
            by_depth = [np.array(right)[quarters == q] for q in range(4) if q in quarters]
            report.setdefault(name, []).append(float(np.mean(right)))
            shares = [float(quarter.mean()) for quarter in by_depth]
            report.setdefault(f"{name}_by_depth", []).append(shares)
    bar.close()
    return report


def needle_table(report: dict[str, Any]) -> str:
    """Returns the report as a Markdown table."""
    lines = [
        "| tokens | needle beyond the window | older text retrieved | older text forgotten |",
        "|---|---|---|---|",
    ]
    rows = zip(*(report[name] for name in ("lengths", "beyond", "memory", "window")), strict=True)
    for length, beyond, memory, window in rows:
        lines.append(f"| {length} | {beyond:.0%} | {memory:.3f} | {window:.3f} |")
    return "\n".join(lines)
