"""Attributes a text to the references that it read, by their attention and their effect.

*Attention* is the weight that the queries of the generated tokens gave to a memory's slots, mean
over memory layers and heads. *Effect* is the drop of the text's log-probability when a reference is
taken away: log p(text) − log p(text without the reference), positive for a reference that made the
text likelier.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from m3jax.inference.generate import Generation, Generator
from m3jax.inference.long_context import LongContextReferences
from m3jax.printable import as_html, one_line
from m3jax.text.references import Reference, References
from m3jax.text.tokenizer import Tokenizer

_COLOURS = 8  # on the page; further references reuse them
_SHOWN = ("key", "title", "source", "start", "end", "text")  # fields of a reference in JSON
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
class AttributedReference:
    """Reference that a text read.

    Attributes:
      id: reference id in the version of the knowledge.
      reference: the reference.
      chunks: indices of the row's retrievals that returned it.
      attention: mean over the generated tokens, 0 for tokens that could not read it; None if not
        observed.
      effect: in nats; None if not measured.
    """

    id: int
    reference: Reference
    chunks: tuple[int, ...] = ()
    attention: float | None = None
    effect: float | None = None


def attribute(
    generation: Generation,
    references: References | LongContextReferences,
    effects: Mapping[int, float] | None = None,
) -> list[AttributedReference]:
    """Returns the references that a text read, by descending attention, else in order of retrieval.

    Args:
      generation: of `Generator.generate`.
      references: of the version that was read, or cut from the text's own older part.
      effects: of `effects_of`.
    """
    places: dict[int, list[int]] = {}
    for number, chunk in enumerate(generation.chunks):
        for i in chunk.ids[chunk.ids >= 0].tolist():
            places.setdefault(i, []).append(number)
    attention = _attention(generation)
    attributed = [
        AttributedReference(
            i,
            references[i],
            tuple(chunks),
            None if attention is None else attention.get(i, 0.0),
            None if effects is None else effects.get(i),
        )
        for i, chunks in places.items()
    ]
    return sorted(attributed, key=lambda source: -(source.attention or 0.0))


def _attention(generation: Generation) -> dict[int, float] | None:
    """Computes mean attention of the generated tokens on each reference; None if not observed."""
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
    """Returns for each generated token the index of the retrieval whose memories it read."""
    first = len(generation.prompt_tokens)
    spans = [chunk.retrieval.generates for chunk in generation.chunks]
    return [
        next(number for number, (low, high) in enumerate(spans) if low <= token < high)
        for token in range(first, first + len(generation.tokens))
    ]


def effects_of(generator: Generator, generation: Generation) -> dict[int, float]:
    """Measures the effect of each reference: nats by which it made the text likelier.

    The tokens of the text are scored again with all references, and without one reference at a
    time.
    """
    ids = [chunk.ids for chunk in generation.chunks]
    read = sorted({i for row in ids for i in row[row >= 0].tolist()})
    if not read:
        return {}
    without = [[np.where(row == i, -1, row) for row in ids] for i in read]
    again = generator.generate(
        [generation.prompt] * (1 + len(without)),
        len(generation.tokens),
        forced=[generation.tokens] * (1 + len(without)),
        references=[ids, *without],
    )
    logprobs = [float(np.sum(row.logprobs, dtype=np.float64)) for row in again]
    return {i: logprobs[0] - less for i, less in zip(read, logprobs[1:], strict=True)}


def as_dict(
    generation: Generation, sources: Sequence[AttributedReference], by_head: bool = False
) -> dict[str, Any]:
    """Returns a generation and its sources as JSON values.

    Args:
      generation: of `Generator.generate`.
      sources: of `attribute`.
      by_head: add each chunk's attention by layer, key-value head and query head of its group.
    """
    chunks = []
    for chunk in generation.chunks:
        record: dict[str, Any] = {
            "query": chunk.query,
            "query_tokens": list(chunk.retrieval.query),
            "read_by_tokens": list(chunk.retrieval.read_by),
            "generates_tokens": list(chunk.retrieval.generates),
            "references": chunk.ids.tolist(),
        }
        if chunk.reading is not None:
            record["attention"] = chunk.reading.mean((0, 1, 2))[:-1].tolist()
            if by_head:
                record["attention_by_layer_and_head"] = chunk.reading[..., :-1].tolist()
        chunks.append(record)
    return {
        "prompt": generation.prompt,
        "text": generation.text,
        "stopped": generation.stopped,
        "tokens": generation.tokens.tolist(),
        "logprob": float(np.sum(generation.logprobs, dtype=np.float64)),
        "chunks": chunks,
        "sources": [
            {
                "id": source.id,
                **{name: getattr(source.reference, name) for name in _SHOWN},
                "chunks": list(source.chunks),
                "attention": source.attention,
                "effect": source.effect,
            }
            for source in sources
        ],
    }


def as_text(sources: Sequence[AttributedReference]) -> str:
    """Returns sources as lines for a terminal."""
    lines = []
    for source in sources:
        figures = []
        if source.attention is not None:
            figures.append(f"attention {source.attention:.3f}")
        if source.effect is not None:
            figures.append(f"effect {source.effect:+.3f} nats")
        reference = source.reference
        name = f"[{reference.key}] {reference.title}".strip()
        where = f"{one_line(name)}, characters {reference.start}–{reference.end}"
        text = one_line(reference.text)
        lines.append(f"  {where}" + (f" ({', '.join(figures)})" if figures else ""))
        lines.append(f"    {text if len(text) <= 100 else text[:99] + '…'}")
    return "\n".join(lines) if lines else "  nothing was read"


def as_page(
    rows: Sequence[tuple[Generation, Sequence[AttributedReference]]], tokenizer: Tokenizer
) -> str:
    """Returns generations with their sources as an HTML page.

    Each token has the colour of the memory that it attended to most.
    """
    body = [
        "<h1>Where the text came from</h1>",
        '<p class="note">A token has the colour of the memory to which its query gave the most'
        " attention, stronger with more of it. Effect: nats by which a reference made the text"
        " likelier.</p>",
    ]
    for generation, sources in rows:
        colours = {source.id: n % _COLOURS for n, source in enumerate(sources)}
        text = _coloured(generation, colours, _pieces(generation.tokens, tokenizer))
        body.append(f'<h2>Prompt</h2><div class="prompt">{as_html(generation.prompt)}</div>')
        body.append(f'<h2>Text</h2><div class="text">{text}</div>')
        body.append(_sources_table(sources, colours))
    content = "\n".join(body)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>Sources</title><style>{_STYLE}</style></head>\n<body>{content}</body></html>\n"
    )


def _pieces(tokens: np.ndarray, tokenizer: Tokenizer) -> list[str]:
    """Returns the text that each token adds to the tokens before it."""
    texts = [tokenizer.decode(tokens[:end].tolist()) for end in range(len(tokens) + 1)]
    texts = [text.rstrip("\N{REPLACEMENT CHARACTER}") for text in texts[:-1]] + texts[-1:]
    return [after[len(before) :] for before, after in itertools.pairwise(texts)]


def _coloured(generation: Generation, colours: Mapping[int, int], pieces: Sequence[str]) -> str:
    """Returns the text as HTML, each token in the colour of the memory it attended to most."""
    spans = [as_html(piece) for piece in pieces]
    if generation.by_token is None or not generation.chunks:
        return "".join(spans)
    most = max(float(generation.by_token[:, :-1].max(initial=0)), 1e-6)
    for token, chunk in enumerate(_chunk_of_tokens(generation)):
        ids, weights = generation.chunks[chunk].ids, generation.by_token[token, :-1]
        best = int(np.argmax(np.where(ids >= 0, weights, -1.0)))
        if ids[best] >= 0:
            weight = float(weights[best])
            style = _background(colours[int(ids[best])], weight / most)
            title = f"{weight:.3f} of the attention"
            spans[token] = f'<span style="{style}" title="{title}">{spans[token]}</span>'
    return "".join(spans)


def _background(colour: int, strength: float) -> str:
    hue = round(360 * colour / _COLOURS)
    return f"background: hsla({hue}, 80%, 60%, {0.1 + 0.5 * min(max(strength, 0), 1):.2f})"


def _sources_table(sources: Sequence[AttributedReference], colours: Mapping[int, int]) -> str:
    if not sources:
        return '<p class="note">Nothing was read.</p>'
    names = ("reference", "characters", "attention", "effect", "text")
    lines = ["<table><tr>" + "".join(f"<th>{name}</th>" for name in names) + "</tr>"]
    for source in sources:
        reference = source.reference
        name = as_html(f"{reference.key} {reference.title}".strip())
        key = f'<span class="key" style="{_background(colours[source.id], 1)}">{name}</span>'
        if reference.source:
            key += f"<br>{as_html(reference.source)}"
        numbers = [
            f"{reference.start}–{reference.end}",
            "–" if source.attention is None else f"{source.attention:.3f}",
            "–" if source.effect is None else f"{source.effect:+.3f}",
        ]
        cells = "".join(f'<td class="number">{number}</td>' for number in numbers)
        lines.append(f"<tr><td>{key}</td>{cells}<td>{as_html(reference.text)}</td></tr>")
    return "\n".join([*lines, "</table>"])
