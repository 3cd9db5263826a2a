"""Chat template: the one way from turns to tokens, in training and at inference.

    <s>\\nSystem: …</s>\\nUser: …</s>\\nAssistant: …</s>\\nUser: …</s>\\nAssistant: …</s>

Markers and texts are tokenized apart, a text with a space in front, so that the tokens of a
question are the same whatever follows. Every turn ends with `</s>`, which no text can contain: text
that looks like a marker is only text. Loss is on answers and the `</s>` behind them.
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
    """Holds a chat as tokens: `<s>` and the turns."""

    tokens: Int32[np.ndarray, " T"]
    weights: Float32[np.ndarray, " T"]  # as targets: 1 for answers and their `</s>`, else 0
    ends: tuple[int, ...]  # number of tokens up to the end of every turn


class Template:
    """Encodes chats with the markers of a config's section `chat` and the model's tokenizer."""

    def __init__(self, chat: ConfigDict, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        roles = ("system", "user", "assistant")
        encoded = tokenizer.encode_batch([chat[role] for role in roles])
        self._markers = dict(zip(roles, encoded, strict=True))

    def encode(self, chats: Sequence[Chat], last_answer: bool = False) -> list[EncodedChat]:
        """Encodes whole chats; `last_answer`: only the last turn bears loss, as in pairs."""
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
        """Encodes chats that end with a question, up to where the answer begins; without `<s>`."""
        marker = self._markers["assistant"]
        return [np.concatenate([chat.tokens[1:], marker]) for chat in self.encode(chats)]


def chunk_references(
    turns: Sequence[Turn], ends: Sequence[int], inputs: int, chunk_length: int
) -> tuple[str, ...]:
    """Returns the key of the reference that each chunk reads, "" for none; () if no turn has one.

    A chunk of Q = `chunk_length` tokens reads the reference of the first of its turns that no
    earlier chunk stood for, else that of its last turn. `ends` are `EncodedChat.ends`, `inputs` the
    number of tokens that are fed to the model: all but the last.
    """
    spans: list[list] = []  # start, end, key; neighbours of one key are one span
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
