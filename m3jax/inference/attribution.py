"""Where a text came from: the references that were read, how much, and what they changed.

*Attention* is the weight that the queries of the generated tokens gave to a memory's slots, mean
over memory layers and heads. *Effect* is the change of the text's log-probability when a reference
is taken away: log p(text) − log p(text without it), so that a reference that helped has a positive
one.
"""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from m3jax.inference.generate import Generator
from m3jax.inference.long_context import ContextReferences
from m3jax.inference.results import Generation
from m3jax.text.references import ReferenceReader

_COLOURS = 8  # of the page; further references begin anew
_STYLE = """
body { font: 16px/1.6 system-ui, sans-serif; max-width: 52rem; margin: 2rem auto; padding: 0 1rem; }
h2 { font-size: 1rem; margin: 2rem 0 .3rem; }
.prompt { color: #555; white-space: pre-wrap; } .text { white-space: pre-wrap; }
table { border-collapse: collapse; margin-top: 1rem; font-size: .85rem; width: 100%; }
td, th { text-align: left; vertical-align: top; padding: .25rem .6rem; border-top: 1px solid #ddd; }
td.number { text-align: right; white-space: nowrap; }
.key { padding: 0 .3rem; border-radius: .2rem; }
.note { color: #777; font-size: .85rem; }
"""


@dataclasses.dataclass(frozen=True)
class Source:
    """One reference that was read.

    Attributes:
      id: of the version of the knowledge.
      key, title, source, start, end, text: of the reference; see `text.references.Reference`.
      chunks: numbers of the row's recalls that read it.
      attention: mean over the generated tokens, 0 where it was not there; None if not observed.
      effect: nats; None if not measured.
    """

    id: int
    key: str
    title: str
    source: str
    start: int
    end: int
    text: str
    chunks: tuple[int, ...]
    attention: float | None = None
    effect: float | None = None


def sources(
    generation: Generation,
    references: ReferenceReader | ContextReferences,
    effects: Mapping[int, float] | None = None,
) -> list[Source]:
    """The references that a row read, those of the most attention first, else in order.

    Args:
      generation: of `Generator.generate`.
      references: of the version that was read, or of the text's own older part.
      effects: of `effects_of`.
    """
    places: dict[int, list[int]] = {}
    for number, chunk in enumerate(generation.chunks):
        for i in chunk.ids[chunk.ids >= 0].tolist():
            places.setdefault(i, []).append(number)
    attention = _attention(generation)
    found = []
    for i, chunks in places.items():
        one = references[i]
        found.append(
            Source(
                *(i, one.key, one.title, one.source, one.start, one.end, one.text, tuple(chunks)),
                None if attention is None else attention.get(i, 0.0),
                None if effects is None else effects.get(i),
            )
        )
    return sorted(found, key=lambda source: -(source.attention or 0.0))


def _attention(generation: Generation) -> dict[int, float] | None:
    """Mean attention of the generated tokens on each reference."""
    if generation.by_token is None:
        return None
    total: dict[int, float] = {}
    for token, chunk in enumerate(_chunk_of_tokens(generation)):
        ids = generation.chunks[chunk].ids
        for i, weight in zip(ids.tolist(), generation.by_token[token], strict=False):
            if i >= 0:
                total[i] = total.get(i, 0.0) + float(weight) / len(generation.tokens)
    return total


def _chunk_of_tokens(generation: Generation) -> list[int]:
    """Number of the recall whose memories were read when each token was generated."""
    found, first = [], len(generation.prompt_tokens)
    for token in range(first, first + len(generation.tokens)):
        found.append(
            next(
                number
                for number, chunk in enumerate(generation.chunks)
                if chunk.recall.generates[0] <= token < chunk.recall.generates[1]
            )
        )
    return found


def effects_of(generator: Generator, generation: Generation) -> dict[int, float]:
    """What each reference did for the text: nats by which it made it likelier.

    The text is generated again, token for token, without one reference at a time, and with all.
    """
    ids = [chunk.ids for chunk in generation.chunks]
    read = sorted({i for row in ids for i in row[row >= 0].tolist()})
    if not read:
        return {}
    recalled = [ids, *([np.where(row == i, -1, row) for row in ids] for i in read)]
    again = generator.generate(
        [generation.prompt] * len(recalled),
        len(generation.tokens),
        forced=[generation.tokens] * len(recalled),
        recalled=recalled,
    )
    logprobs = [float(np.sum(one.logprobs, dtype=np.float64)) for one in again]
    return {i: logprobs[0] - without for i, without in zip(read, logprobs[1:], strict=True)}


def as_dict(
    generation: Generation, found: Sequence[Source], by_head: bool = False
) -> dict[str, Any]:
    """A row and its sources as plain JSON values.

    Args:
      generation: of `Generator.generate`.
      found: its `sources`.
      by_head: also each chunk's attention by layer, key-value head and query head of the group.
    """
    chunks = []
    for chunk in generation.chunks:
        one: dict[str, Any] = {
            "query": chunk.query,
            "query_tokens": list(chunk.recall.query),
            "read_by_tokens": list(chunk.recall.read_by),
            "generates_tokens": list(chunk.recall.generates),
            "references": chunk.ids.tolist(),
        }
        if chunk.reading is not None:
            one["attention"] = chunk.reading.mean((0, 1, 2))[:-1].tolist()
            if by_head:
                one["attention_by_layer_and_head"] = chunk.reading[..., :-1].tolist()
        chunks.append(one)
    return {
        "prompt": generation.prompt,
        "text": generation.text,
        "stopped": generation.stopped,
        "tokens": generation.tokens.tolist(),
        "logprob": float(np.sum(generation.logprobs, dtype=np.float64)),
        "chunks": chunks,
        "sources": [dataclasses.asdict(source) for source in found],
    }


def as_text(found: Sequence[Source]) -> str:
    """Sources as lines to read in a terminal."""
    lines = []
    for source in found:
        figures = []
        if source.attention is not None:
            figures.append(f"attention {source.attention:.3f}")
        if source.effect is not None:
            figures.append(f"effect {source.effect:+.3f} nats")
        title = f" {source.title}" if source.title else ""
        where = f"[{source.key}]{title}, characters {source.start}–{source.end}"
        text = " ".join(source.text.split())
        shown = text if len(text) <= 100 else text[:99] + "…"
        lines.append(f"  {where}" + (f" ({', '.join(figures)})" if figures else ""))
        lines.append(f"    {shown}")
    return "\n".join(lines) if lines else "  nothing was read"


def as_page(rows: Sequence[tuple[Generation, Sequence[Source]]], pieces: Any) -> str:
    """A self-contained HTML page: each token in the colour of the memory it attended to most.

    Args:
      rows: generations with their sources.
      pieces: `pieces(tokens)` gives each token's text.
    """
    body = ["<h1>Where the text came from</h1>"]
    body.append(
        '<p class="note">A token has the colour of the memory to which its query gave the most'
        " attention, stronger with more of it. Effect: nats by which a reference made the text"
        " likelier.</p>"
    )
    for generation, found in rows:
        colour = {source.id: n % _COLOURS for n, source in enumerate(found)}
        body.append(f'<h2>Prompt</h2><div class="prompt">{html.escape(generation.prompt)}</div>')
        body.append(f'<h2>Text</h2><div class="text">{_coloured(generation, colour, pieces)}</div>')
        body.append(_table(found, colour))
    content = "\n".join(body)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>Sources</title><style>{_STYLE}</style></head>\n<body>{content}</body></html>\n"
    )


def _coloured(generation: Generation, colour: Mapping[int, int], pieces: Any) -> str:
    shown = [html.escape(piece) for piece in pieces(generation.tokens)]
    if generation.by_token is None or not generation.chunks:
        return "".join(shown)
    most = max(float(generation.by_token[:, :-1].max(initial=0)), 1e-6)
    found = []
    for token, chunk in enumerate(_chunk_of_tokens(generation)):
        weights = generation.by_token[token, :-1]
        ids = generation.chunks[chunk].ids
        best = int(np.argmax(np.where(ids >= 0, weights, -1.0)))
        if ids[best] < 0:
            found.append(shown[token])
            continue
        style = _background(colour[int(ids[best])], float(weights[best]) / most)
        title = f"{float(weights[best]):.3f} of the attention"
        found.append(f'<span style="{style}" title="{title}">{shown[token]}</span>')
    return "".join(found)


def _background(colour: int, strength: float) -> str:
    hue = round(360 * colour / _COLOURS)
    return f"background: hsla({hue}, 80%, 60%, {0.1 + 0.5 * min(max(strength, 0), 1):.2f})"


def _table(found: Sequence[Source], colour: Mapping[int, int]) -> str:
    if not found:
        return '<p class="note">Nothing was read.</p>'
    lines = [
        "<table><tr><th>reference</th><th>characters</th><th>attention</th><th>effect</th>"
        "<th>text</th></tr>"
    ]
    for source in found:
        name = html.escape(f"{source.key} {source.title}".strip())
        key = f'<span class="key" style="{_background(colour[source.id], 1)}">{name}</span>'
        if source.source:
            key += f"<br>{html.escape(source.source)}"
        attention = "–" if source.attention is None else f"{source.attention:.3f}"
        effect = "–" if source.effect is None else f"{source.effect:+.3f}"
        lines.append(
            f'<tr><td>{key}</td><td class="number">{source.start}–{source.end}</td>'
            f'<td class="number">{attention}</td><td class="number">{effect}</td>'
            f"<td>{html.escape(source.text)}</td></tr>"
        )
    return "\n".join([*lines, "</table>"])
