"""Tokenizers of other models, renumbered so that ids 0, 1, … are our special tokens.

The tokens that become our special tokens swap ids with the model's first tokens; all others keep
theirs. A special token for which the model has none is added.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import numpy as np
import tokenizers
from jaxtyping import Int

from m3jax.errors import TextError
from m3jax.files import json_text
from m3jax.text.byte_fallback import LINE_FEED, adapt_byte_fallback, is_byte_fallback
from m3jax.text.special_tokens import choose_special
from m3jax.text.tokenizer import Tokenizer

# Texts with runs of white space, digits, code, accents, other scripts and an emoji.
_PROBES = (
    "Kelo's cat\n\n  sat on 12345 mats;\tno?\r\n",
    "for (i = 0; i < 10; i++) { x[i] += 0.5e-3; }      # \u00e9 na\u00efve",
    "\u0416\u0438\u0437\u043d\u044c \u6c34\u3068\u706b \u0639\u0631\u0628 \U0001f642\u200d\u2642",
)


class Adopted(NamedTuple):
    """Tokenizer of another model with our special tokens.

    Attributes:
      text: content of its `tokenizer.json`.
      order: the model's id of each of our n tokens; −1 for a token that the model must read as
        meaning nothing, see `m3jax.model.hf.read_params`.
      line_feed: the model's id of the token of a line feed; None if it has none.
    """

    text: str
    order: Int[np.ndarray, " n"]
    line_feed: int | None = None


_LINE_FEED = "\u010a"  # as byte-level BPE writes it
_PLAIN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}


def adopt_tokenizer(
    text: str, named: Sequence[str] | None, special: Sequence[str], end: str | None = None
) -> Adopted:
    """Renumbers a byte-level BPE tokenizer, or a BPE with byte fallback, of another model.

    Removes NFC normalization, the template of special tokens, and the space that byte fallback puts
    in front of texts, so that decoding returns texts exactly, except for what `Tokenizer.lost`
    counts.

    Args:
      text: content of the model's `tokenizer.json`.
      named: texts of the model's special tokens that become `special`, in this order; None: those
        that `choose_special` chooses, unless it begins with `special` already.
      special: our special tokens, which get the ids 0, 1, ….
      end: the token that ends the model's texts, for `choose_special`.

    Raises:
      TextError: the file is damaged or its ids have gaps; it is another kind of tokenizer, or
        changes texts; `named` is not as many different special tokens of it, or leaves
        out a token that has the text of one of ours.
    """
    try:
        content = json.loads(text)
        model, added = content["model"], content.get("added_tokens") or []
        ids = dict(model["vocab"]) | {token["content"]: token["id"] for token in added}
        theirs = sorted(ids, key=lambda name: ids[name])
        if [ids[name] for name in theirs] != list(range(len(ids))):
            raise ValueError("its ids have gaps")
    except (ValueError, KeyError, TypeError) as error:
        raise TextError(
            f"tokenizer.json is damaged or no BPE tokenizer ({error!r}); choose another model"
        ) from error
    if tuple(theirs[: len(special)]) == tuple(special) and named in (None, list(special)):
        return Adopted(text, np.arange(len(ids)))
    if is_byte_fallback(content):
        lead, line_feed = adapt_byte_fallback(content, ids), ids[LINE_FEED]
    else:
        _check_byte_level(content, ids)
        content["normalizer"], lead, line_feed = None, "", ids.get(_LINE_FEED)
    names = [token["content"] for token in added]
    if named is None:
        chosen, neutral = choose_special([name for name in theirs if name in names], end)
    else:
        _check_named(named, special, names)
        chosen, neutral = tuple(named), (False,) * len(named)
    renamed: dict[str, str] = {}
    for name, ours in zip(chosen, special, strict=True):
        if ours in ids and ours not in chosen:
            raise TextError(f"the tokenizer has a token {ours} besides {name}; name {ours} itself")
        if name is None:
            ids[ours] = len(theirs)
            theirs.append(ours)
            added.append({"content": ours, **_PLAIN})
        renamed[name or ours] = ours
    order = _exchanged(len(ids), (ids[name] for name in renamed))
    places = {renamed.get(theirs[old], theirs[old]): new for new, old in enumerate(order)}
    for token in added:
        if token["content"] in renamed:
            token.update(content=renamed[token["content"]], special=True)
        token["id"] = places[token["content"]]
    model.update(vocab=places, unk_token=None, dropout=None)
    added.sort(key=lambda token: token["id"])
    content.update(added_tokens=added)
    content.update(post_processor=None, truncation=None, padding=None)
    result = json_text(content, ensure_ascii=False)
    _check_adopted(text, result, order, lead)
    order[: len(special)] = [-1 if new else old for new, old in zip(neutral, order, strict=False)]
    return Adopted(result, np.array(order), line_feed)


def _exchanged(size: int, ids: Iterable[int]) -> list[int]:
    """Returns 0 … size − 1 with `ids` swapped into the first positions, in order."""
    order = list(range(size))
    for place, id_ in enumerate(ids):
        old = order.index(id_)
        order[place], order[old] = order[old], order[place]
    return order


def _check_named(named: Sequence[str], special: Sequence[str], added: list[str]) -> None:
    shown = ", ".join(added[:40]) or "none"
    if len(set(named)) != len(special) or len(named) != len(special):
        raise TextError(
            f"name {len(special)} different special tokens that are to be {', '.join(special)}, in"
            f" this order (for {special[2]} one that the model has not been trained on). The"
            f" tokenizer has: {shown}"
        )
    for name in named:
        if name not in added:
            raise TextError(f"{name!r} is not a special token of the tokenizer: {shown}")


def _letters() -> set[str]:
    """Returns the characters by which byte-level BPE writes the printable ASCII characters."""
    return set(map(chr, range(33, 127))) | {"\u0120", "\u010a"}  # space and line feed


def _check_byte_level(content: dict[str, Any], ids: Mapping[str, int]) -> None:
    """Raises `TextError` for a tokenizer that changes texts other than by leaving out bytes that it
    has no tokens for."""

    def refuse(what: str) -> NoReturn:
        raise TextError(
            f"tokenizer.json: {what}; only BPE of bytes (as of GPT-2, Llama 3, Qwen2) or with byte"
            " fallback (Llama 2) gives texts back exactly. Choose another model"
        )

    if content["model"].get("type", "BPE") != "BPE":
        refuse(f"its model is {content['model']['type']}")
    if (content.get("normalizer") or {"type": "NFC"}).get("type") != "NFC":
        refuse(f"it changes texts ({content['normalizer']['type']})")
    splitter = content.get("pre_tokenizer") or {}
    steps = splitter.get("pretokenizers", [splitter])
    levels = [step for step in steps if step.get("type") == "ByteLevel"]
    if len(levels) != 1:
        refuse("it does not split texts into bytes")
    missing = _letters() - ids.keys()
    if missing:
        refuse(f"it has no tokens for {len(missing)} bytes of letters, digits and punctuation")
    if levels[0].get("add_prefix_space"):
        refuse("it adds a space to texts")
    for token in content.get("added_tokens") or []:
        if not token.get("special") and (token.get("lstrip") or token.get("rstrip")):
            refuse(f"its token {token['content']!r} takes the spaces around it")


def _check_adopted(theirs: str, ours: str, order: list[int], lead: str) -> None:
    """Raises `TextError` unless `ours` encodes the probes, behind `lead`, as `theirs` does and
    decodes them."""
    try:
        before, after = tokenizers.Tokenizer.from_str(theirs), Tokenizer(ours)
    except Exception as error:  # the tokenizers library raises plain Exception
        raise TextError(f"tokenizer.json is damaged ({error}); download it again") from error
    before.encode_special_tokens = True
    for text in _PROBES:
        probe = "".join(character for character in text if not after.lost(character))
        expected = before.encode(probe, add_special_tokens=False).ids
        renumbered = after.encode(lead + probe)
        same = [order[i] for i in renumbered] == expected
        if not same or after.decode(renumbered) != lead + probe:
            raise TextError(
                f"tokenizer.json: {probe!r} does not come back from the renumbered tokenizer; only"
                " byte-level BPE, and BPE with byte fallback, can be taken. Choose another model"
            )
