"""Tokenizers of GGUF files as the content of a `tokenizer.json`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from m3jax.errors import TextError
from m3jax.text.byte_fallback import SPACE

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4  # values of tokenizer.ggml.token_type
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
_OTHERS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


class _Splitter(NamedTuple):
    """Returns how a text is cut into words before bytes are merged.

    Attributes:
      digits: each digit is a word.
      pattern: regular expression of a word; empty for that of GPT-2.
      whole: a word that is a token is not split by merges.
    """

    digits: bool = False
    pattern: str = ""
    whole: bool = False


# By the value of `tokenizer.ggml.pre`.
_SPLITTERS = {
    "gpt-2": _Splitter(),
    "smollm": _Splitter(digits=True),
    "llama-bpe": _Splitter(pattern=rf"{_CONTRACTIONS}{_WORDS}\p{{N}}{{1,3}}{_OTHERS}", whole=True),
    "qwen2": _Splitter(pattern=rf"{_CONTRACTIONS}{_WORDS}\p{{N}}{_OTHERS}"),
}


def gguf_tokenizer(metadata: Mapping[str, Any]) -> str:
    """Builds the `tokenizer.json` of a GGUF file's tokenizer, with its ids.

    Args:
      metadata: the file's metadata, whose keys `tokenizer.ggml.…` are read.

    Raises:
      TextError: the file has no tokenizer, one that is neither a byte-level BPE nor a BPE with byte
        fallback, or one that cuts texts into words in a way that is not known here.
    """
    kind, pre = (metadata.get(f"tokenizer.ggml.{key}") for key in ("model", "pre"))
    if kind not in ("gpt2", "llama"):
        raise TextError(
            f"tokenizer.ggml.model = {kind!r} is not supported, only byte-level BPE (gpt2) and BPE"
            " with byte fallback (llama); give the folder of the model's tokenizer.json"
            " (--tokenizer)"
        )
    if kind == "llama":
        pre = "llama"
    elif pre not in _SPLITTERS:
        raise TextError(
            f"tokenizer.ggml.pre = {pre!r} is not supported, only {', '.join(_SPLITTERS)}; give the"
            " folder of the model's tokenizer.json (--tokenizer)"
        )
    try:
        tokens, kinds, ranks = (
            list(metadata[f"tokenizer.ggml.{key}"])
            for key in ("tokens", "token_type", "scores" if kind == "llama" else "merges")
        )
        if kind == "llama":
            tokenizer = _with_byte_fallback(
                tokens, ranks, metadata.get("tokenizer.ggml.add_space_prefix", True)
            )
        else:
            tokenizer = _of_bytes(tokens, ranks, _SPLITTERS[pre])
    except Exception as error:  # the tokenizers library raises plain Exception
        raise TextError(f"the tokenizer of the GGUF file is damaged ({error!r})") from error
    for token, type_ in zip(tokens, kinds, strict=True):  # in the order of their ids
        if type_ in (_UNKNOWN, _CONTROL):
            tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        elif type_ == _USER_DEFINED:
            tokenizer.add_tokens([AddedToken(token, normalized=False)])
    return tokenizer.to_str()


def _of_bytes(tokens: list[str], merges: list[str], splitter: _Splitter) -> tokenizers.Tokenizer:
    vocabulary = {token: place for place, token in enumerate(tokens)}
    pairs = [(pair.split(" ", 1)[0], pair.split(" ", 1)[1]) for pair in merges]
    model = models.BPE(vocabulary, pairs, ignore_merges=splitter.whole)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = _pre_tokenizer(splitter)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _with_byte_fallback(
    tokens: list[str], scores: list[float], begins: bool
) -> tokenizers.Tokenizer:
    """Makes a BPE whose merges are all pairs of tokens that are a token together, by its score."""
    vocabulary = {token: place for place, token in enumerate(tokens)}
    pairs = [
        (-scores[place], len(token) - cut, vocabulary[token[:cut]], token[:cut], token[cut:])
        for token, place in vocabulary.items()
        for cut in range(1, len(token))
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    ]
    merges = [(left, right) for *_, left, right in sorted(pairs)]
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True))
    steps = [normalizers.Prepend(SPACE)] if begins else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    return tokenizer


def _pre_tokenizer(splitter: _Splitter) -> pre_tokenizers.PreTokenizer:
    steps: list[pre_tokenizers.PreTokenizer] = []
    if splitter.digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if splitter.pattern:
        steps.append(pre_tokenizers.Split(Regex(splitter.pattern), "isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not splitter.pattern))
    return pre_tokenizers.Sequence(steps)
