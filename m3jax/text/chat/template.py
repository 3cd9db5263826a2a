"""Chat template: encodes turns as tokens, identically in training and at inference.

    <s>\\nSystem: …</s>\\nUser: …</s>\\nAssistant: …</s>\\nUser: …</s>\\nAssistant: …</s>

Markers and texts are tokenized separately, each text with a leading space, so that the tokens of a
question do not depend on what follows it. Every turn ends with the token `</s>`, to which no text
is encoded: a text cannot end its turn by imitating a marker. The loss is on answers and their
`</s>`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int32
from ml_collections import ConfigDict

from m3jax.text.chat.chats import Chat, Turn
from m3jax.text.tokenizer import BOS, END, Tokenizer


@dataclass(frozen=True)
class EncodedChat:
    """Holds a tokenized chat: `<s>`, then the turns."""

    tokens: Int32[np.ndarray, " T"]
    weights: Float32[
        np.ndarray, " T"
    ]  # loss weights as targets: 1 for answers and their `</s>`, else 0
    ends: tuple[int, ...]  # number of tokens up to the end of every turn


class Template:
    """Encodes chats with the markers of a config's section `chat` and the model's tokenizer."""

    def __init__(self, chat: ConfigDict, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        roles = ("system", "user", "assistant")
        encoded = tokenizer.encode_batch([chat[role] for role in roles])
        self._markers = dict(zip(roles, encoded, strict=True))

    def encode(self, chats: Sequence[Chat], last_answer: bool = False) -> list[EncodedChat]:
        """Encodes whole chats; if `last_answer`, only the last turn has loss, as in pairs."""
        texts = [f" {turn.text}" for chat in chats for turn in chat.turns]
        bodies = iter(self.tokenizer.encode_batch(texts))
        encoded = []
        for chat in chats:
            parts, weights, ends = [np.array([BOS], np.int32)], [np.zeros(1)], []
            for number, turn in enumerate(chat.turns, 1):
                marker, body = self._markers[turn.role], np.append(next(bodies), np.int32(END))
                scored = turn.role == "assistant" and (number == len(chat.turns) or not last_answer)
                parts += [marker, body]
                weights += [np.zeros(len(marker)), np.full(len(body), float(scored))]
                ends.append(sum(map(len, parts)))
            tokens = np.concatenate(parts).astype(np.int32)
            encoded.append(
                EncodedChat(tokens, np.concatenate(weights).astype(np.float32), tuple(ends))
            )
        return encoded

    def prompts(self, chats: Sequence[Chat]) -> list[Int32[np.ndarray, " n"]]:
        """Encodes chats that end with a question, then the answer's marker; without `<s>`."""
        marker = self._markers["assistant"]
        return [np.concatenate([chat.tokens[1:], marker]) for chat in self.encode(chats)]


def chunk_references(
    turns: Sequence[Turn], ends: Sequence[int], inputs: int, chunk_length: int
) -> tuple[str, ...]:
    """Returns the key of the reference that each chunk reads, "" for none; () if no turn has one.

    Neighbouring turns with the same reference form a span. A chunk of Q = `chunk_length` tokens
    reads the reference of the first of its spans that was not chosen for an earlier chunk, else of
    its last span. `ends` is `EncodedChat.ends`, `inputs` the number of input tokens: all but the
    last token.
    """
    spans: list[list] = []  # start, end and key of each span
    key, start = "", 0
    for turn, end in zip(turns, ends, strict=True):
        key = turn.reference or (key if turn.role == "assistant" else "")
        if spans and spans[-1][2] == key:
            spans[-1][1] = end
        else:
            spans.append([start, end, key])
        start = end
    if not any(key for _, _, key in spans):
        return ()
    served: set[int] = set()
    keys = []
    for low in range(0, inputs, chunk_length):
        high = min(low + chunk_length, inputs)
        inside = [n for n, (a, b, key) in enumerate(spans) if a < high and b > low and key]
        chosen = next((n for n in inside if n not in served), inside[-1] if inside else -1)
        served.add(chosen)
        keys.append(spans[chosen][2] if inside else "")
    return tuple(keys)
