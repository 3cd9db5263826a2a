"""Chooses which tokens of a downloaded model become `<pad> <s> <reference> </s>`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

# Tokens that stand at the start of every text the model was trained on, in order of preference.
_BEGIN = ("<|begin_of_text|>", "<s>", "<bos>", "<|startoftext|>")
# Tokens that end a text, for a model whose files do not name one.
_END = ("<|end_of_text|>", "</s>", "<eos>", "<|endoftext|>")
# Tokens that no text of a language model has: kept free, or for repositories, notebooks and images.
_RESERVED = re.compile(
    r"reserved_special|unused|\[control_|jupyter|issue_|empty_output|object_ref|box_|quad_|vision_"
)
_PAD = ("<pad>", "<|pad|>", "[PAD]", "<|finetune_right_pad_id|>", "<unk>")


class Special(NamedTuple):
    """Tokens of a model that become our special tokens.

    Attributes:
      names: texts of the tokens, in the order of ours; None for one that must be added.
      neutral: whether the model must read the token as meaning nothing: its weights are replaced.
    """

    names: tuple[str | None, ...]
    neutral: tuple[bool, ...]


def choose_special(names: Sequence[str], end: str | None = None) -> Special:
    """Chooses tokens for padding, start of a text, mark of a reference and end of a text.

    The start is the token that the model has seen at the start of its texts. Qwen2 and SmolLM2 have
    none: they separate texts by a token behind which they forget what stands before, and so would
    not read memories. Their start is neutral, as is every mark.

    Args:
      names: the tokenizer's special tokens, in the order of their ids.
      end: the token that ends a text or an answer, if the model's files name one.
    """
    reserved = [name for name in names if _RESERVED.search(name)][::-1]
    taken: list[str] = []

    def choose(candidates: Sequence[str | None]) -> str | None:
        free = [name for name in candidates if name and name in names and name not in taken]
        taken.extend(free[:1])
        return free[0] if free else None

    last = choose([end, *_END])
    begin = choose([*_BEGIN, *reserved])
    mark = choose(reserved)
    pad = choose([*_PAD, *reserved])
    return Special((pad, begin, mark, last), (pad is None, begin not in _BEGIN, True, last is None))
