"""Tokenizers in the style of SentencePiece: BPE of whole texts, with tokens for single bytes.

Llama 1 and 2, TinyLlama and Mistral have them. A space is written as U+2581, a character without a
token as its bytes. They put a space in front of each text, so that parts of a text have other
tokens than the text: here they do not, and `encode(" " + text)` gives the tokens that theirs give
`text`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from m3jax.errors import TextError

SPACE = "\u2581"
LINE_FEED = "<0x0A>"


def is_byte_fallback(content: Mapping[str, Any]) -> bool:
    """Returns whether the content of a `tokenizer.json` is such a tokenizer."""
    return bool(content["model"].get("byte_fallback"))


def adapt_byte_fallback(content: dict[str, Any], ids: Mapping[str, int]) -> str:
    """Changes the content of a `tokenizer.json` so that all parts of texts come back exactly.

    Returns what the original puts in front of a text: a space, or nothing.

    Raises:
      TextError: it changes texts in another way than by writing spaces as U+2581 and putting one in
        front, or it lacks the token of a byte.
    """

    def refuse(what: str) -> NoReturn:
        raise TextError(f"tokenizer.json: {what}, so texts do not come back; choose another model")

    missing = [byte for byte in range(256) if f"<0x{byte:02X}>" not in ids]
    if missing:
        refuse(f"it has no tokens for {len(missing)} of the 256 bytes")
    steps = _steps(content.get("normalizer"), "normalizers")
    splits = _steps(content.get("pre_tokenizer"), "pretokenizers")
    for step in steps:
        replaces = step.get("pattern") == {"String": " "} and step.get("content") == SPACE
        prepends = step["type"] == "Prepend" and step.get("prepend") == SPACE
        if not prepends and not (step["type"] == "Replace" and replaces):
            refuse(f"it changes texts ({step['type']})")
    if len(splits) > 1 or any(step["type"] != "Metaspace" for step in splits):
        refuse(f"it splits texts by {', '.join(step['type'] for step in splits)}")
    if not splits and "Replace" not in [step["type"] for step in steps]:
        refuse("it does not write spaces as U+2581")
    begins = any(step["type"] == "Prepend" for step in steps)
    for step in splits:
        begins |= step.get("prepend_scheme", "always") != "never"
        step["prepend_scheme"] = "never"
    if not splits:
        replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
        content["normalizer"] = replace
    else:
        content["normalizer"] = None
    back = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    content["decoder"] = {
        "type": "Sequence",
        "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}],
    }
    return " " if begins else ""


def _steps(part: dict[str, Any] | None, name: str) -> list[dict[str, Any]]:
    if part is None:
        return []
    return list(part[name]) if part["type"] == "Sequence" else [part]
