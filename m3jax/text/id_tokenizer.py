"""Tokenizer for a model whose own is not at hand: every token is written as its id.

A text is then a line of words like `t403 t17 t261`, in the model's own ids. Documents and
references can be cut, searched, stored and generated as any other text; nobody can read them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import tokenizers
from jaxtyping import Int
from tokenizers import models, pre_tokenizers

from m3jax.errors import TextError


def numbered_tokenizer(
    size: int, named: Sequence[str] | None, special: Sequence[str]
) -> tuple[str, Int[np.ndarray, " n"]]:
    """Makes a tokenizer whose texts are ids of tokens.

    Args:
      size: tokens of the model.
      named: ids of the tokens that take the places of `special`, with which they are exchanged.
      special: our special tokens, whose places are 0, 1, ….

    Returns:
      Content of a `tokenizer.json`, and the model's id of each token, as
        `m3jax.model.hf.read_params` takes it. A text has the model's ids, not the places.

    Raises:
      TextError: not as many different ids of tokens.
    """
    numbers = [int(name) for name in named or () if name.isdecimal()]
    if len(set(numbers)) != len(special) or len(named or ()) != len(special):
        raise TextError(
            f"texts of numbers need the numbers of {len(special)} different tokens, which become"
            f" {', '.join(special)} (for {special[2]} one that the model has never seen); given:"
            f" {', '.join(named or ()) or 'none'}"
        )
    if max(numbers) >= size:
        raise TextError(f"the model has no token {max(numbers)}; its tokens are 0 … {size - 1}")
    order = list(range(size))
    for place, number in enumerate(numbers):
        there = order.index(number)
        order[place], order[there] = order[there], order[place]
    words = [*special, *(f"t{number}" for number in order[len(special) :])]
    tokenizer = tokenizers.Tokenizer(
        models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="")
    )
    # `<s>` in a text is three words, none of which there is; a number is one.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()]
    )
    tokenizer.add_special_tokens(list(special))
    return tokenizer.to_str(), np.array(order)
