"""Tests the retrieval of a fact from a text much longer than the model's context (needle test).

The text consists of references with a short fact, the needle, among them; it ends with a question
about the fact. The model reads the last `window` tokens as text; older text becomes memories that
it may retrieve, or is dropped.
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
from m3jax.reading import read_records
from m3jax.text.open_question import answer_text
from m3jax.text.references import References
from m3jax.text.tokenizer import Tokenizer

_TRIES = 64  # draws per reference of the shortest length, before the draw is given up


class Needle(NamedTuple):
    """Fact to hide; `answer` should follow `prompt` if the text in front of it contains `text`."""

    text: str
    prompt: str
    answer: str


def read_needles(path: str | Path) -> list[Needle]:
    """Reads needles from JSON lines with `needle`, `prompt` and `answer`.

    Raises:
      TextError: the file cannot be read or has no needle, or a line is not a needle.
    """

    def parse(record: dict[str, Any]) -> Needle:
        text, prompt = record["needle"], record["prompt"]
        if not all(isinstance(field, str) and field.strip() for field in (text, prompt)):
            raise TypeError("an empty field, or one that is no text")
        return Needle(text, prompt, answer_text(record["answer"]))

    form = "{'needle': text, 'prompt': text, 'answer': text}"
    return read_records(path, parse, "needles", form)


class Haystack(NamedTuple):
    """Text that contains a needle and ends with its question."""

    prompt: str
    answer: str  # right continuation of the prompt
    behind: int  # tokens from the end of the needle to the end of the prompt


def make_haystack(
    needle: Needle,
    references: References,
    tokenizer: Tokenizer,
    length: int,
    depth: float,
    random: np.random.Generator,
) -> Haystack:
    """Joins random references by line ends, with the needle among them.

    Args:
      needle: fact to hide; references that contain it or its question are not drawn.
      references: texts around the needle.
      tokenizer: of the model.
      length: tokens of the whole text, approximately; never more.
      depth: place of the needle: 0 = at the beginning, 1 = directly in front of the question.
      random: generator of the draws.

    Raises:
      TextError: too many references contain the needle or its question.
    """
    size = len(tokenizer.encode(f"{needle.text}\n{needle.prompt}"))
    texts: list[str] = []
    sizes = np.asarray(references.lengths) + 1  # with the line end
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
      needles: used in turn.
      references: texts around the needles.
      lengths: tokens of the texts.
      count: number of texts of each length; the needle's depth rises from 0 to 1 in even steps.
      window: see `LongContextGenerator`.
      cut: most tokens of a reference cut from the older text; default `memory.reference_length`.
      batch: number of texts generated together.
      seed: of the random references.

    Returns:
      `lengths` and, for each length, the share of right answers when older text is retrieved
      (`memory`) and when it is dropped (`window`), the share of needles that end before the window
      (`beyond`), and the shares of right answers by quarter of the depth, beginning first
      (`memory_by_depth`, `window_by_depth`); also `count`, `window_tokens` and `context_tokens`.
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
    """Returns the report of `needle_test` as a Markdown table."""
    lines = [
        "| tokens | needle beyond the window | older text retrieved | older text forgotten |",
        "|---|---|---|---|",
    ]
    rows = zip(*(report[name] for name in ("lengths", "beyond", "memory", "window")), strict=True)
    for length, beyond, memory, window in rows:
        lines.append(f"| {length} | {beyond:.0%} | {memory:.3f} | {window:.3f} |")
    return "\n".join(lines)
