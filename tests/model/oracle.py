"""The method in plain NumPy loops and float64: writing and reading explicit memories.

Slow and literal on purpose: one sequence at a time, padding cut off instead of masked, the keys
that a query sees put in a list. Shares no code with the package.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from m3jax.config import PREFIX_TOKENS, default, validate
from m3jax.make_model import make_model

PREFIX = (1, 2)


def oracle_config(**changes: Any) -> ConfigDict:
    """A tiny config with grouped queries; `memory__layers=1` changes a field."""
    values = {
        "model__layers": 3,
        "model__hidden": 12,
        "model__head_dim": 4,
        "model__query_heads": 4,
        "model__kv_heads": 2,
        "model__mlp_width": 10,
        "model__vocabulary": 260,
        "model__attention": "naive",
        "model__rope_base": 100.0,
        "text__vocabulary": 260,
        "memory__first_layer": 0,
        "memory__layers": 2,
        "memory__reference_length": 7,
        "memory__kept_tokens": 3,
        "memory__chunk_length": 3,
        "memory__window": 2,
        "memory__dtype": "float32",
        "data__sequence_length": 9,
        **changes,
    }
    config = default()
    for path, value in values.items():
        section, field = path.split("__")
        config[section][field] = value
    return validate(config)


def random_params(config: ConfigDict, seed: int = 0) -> Any:
    """Random weights, norms and biases, float32, from NumPy."""
    random = np.random.default_rng(seed)
    shapes, _ = make_model(config, PREFIX_TOKENS).abstract()

    def values(path: Any, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        name, noise = jax.tree_util.keystr(path), random.normal(size=leaf.shape).astype(np.float32)
        if "norm" in name:
            return 1 + np.float32(0.2) * noise
        return np.float32(1.0 if "embedding" in name else 0.4) * noise

    return jax.tree_util.tree_map_with_path(values, shapes)


def random_tokens(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, 260, shape).astype(np.int32)


def random_references(seed: int, lengths: np.ndarray, width: int = 7) -> np.ndarray:
    """References of these lengths, 0-padded to the width."""
    tokens = random_tokens(seed, *lengths.shape, width)
    return np.where(np.arange(width) < lengths[..., None], tokens, 0).astype(np.int32)


class Oracle:
    """Writes and reads with one set of parameters."""

    def __init__(self, config: ConfigDict, params: Any, prefix: tuple[int, ...] = PREFIX):
        self.config, self.prefix = config, prefix
        self.params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
        self.turned = True  # whether the layer at hand has RoPE
        self.attention: list[np.ndarray] = []  # weights (K, G, keys) of every token in every layer
        self.layers = []
        for segment in ("lower", "memory", "upper"):
            stack = self.params.get(segment, {})
            count = len(next(iter(stack.values()))) if stack else 0
            self.layers += [{k: v[i] for k, v in stack.items()} for i in range(count)]
        first = config.memory.first_layer
        self.memory_layers = range(first, first + config.memory.layers)

    # -- pieces
    def embed(self, token: int) -> np.ndarray:
        return self.params["embedding"][token] * self.config.model.embedding_scale

    def norm(self, x: np.ndarray, scale: np.ndarray) -> np.ndarray:
        return x / np.sqrt(np.mean(x**2) + self.config.model.norm_epsilon) * scale

    def enter(self, number: int) -> None:
        """Says which layer the next vectors are those of."""
        every = self.config.model.no_rope_every
        self.turned = every == 0 or (number + 1) % every > 0

    def rope(self, x: np.ndarray, position: int) -> np.ndarray:
        if not self.turned:
            return x
        half, result = len(x) // 2, np.empty(len(x))
        for i in range(half):
            angle = position * self.config.model.rope_base ** (-2 * i / len(x))
            result[i] = x[i] * np.cos(angle) - x[i + half] * np.sin(angle)
            result[i + half] = x[i + half] * np.cos(angle) + x[i] * np.sin(angle)
        return result

    def project(self, layer: dict, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Queries (K, G, H), keys and values (K, H) of one token, before RoPE."""
        x = self.norm(x, layer["attention_norm"])
        q, k, v = (np.tensordot(x, layer[name], 1) for name in ("query", "key", "value"))
        if self.config.model.attention_bias:
            q, k, v = q + layer["query_bias"], k + layer["key_bias"], v + layer["value_bias"]
        if self.config.model.qk_norm:
            k = np.stack([self.norm(head, layer["key_norm"]) for head in k])
            q = np.stack([[self.norm(h, layer["query_norm"]) for h in group] for group in q])
        return q, k, v

    def mlp(self, layer: dict, x: np.ndarray) -> np.ndarray:
        normed = self.norm(x, layer["mlp_norm"])
        gate = normed @ layer["gate"]
        return x + (gate / (1 + np.exp(-gate)) * (normed @ layer["up"])) @ layer["down"]

    def attend_one(self, layer: dict, x: np.ndarray, q: np.ndarray, seen: list) -> np.ndarray:
        """One token after attention to the (keys, values) it sees, each (K, H), and the MLP.

        A head does not have what is NaN there.
        """
        K, G, H = q.shape
        out, attention = np.zeros((K, G, H)), np.zeros((K, G, len(seen)))
        for k in range(K):
            own = [i for i, (key, _) in enumerate(seen) if not np.isnan(key[k]).any()]
            for g in range(G):
                scores = np.array([q[k, g] @ seen[i][0][k] / np.sqrt(H) for i in own])
                weights = np.exp(scores - scores.max())
                attention[k, g, own] = weights / weights.sum()
                for i in own:
                    out[k, g] += attention[k, g, i] * seen[i][1][k]
        self.attention.append(attention)
        return self.mlp(layer, x + np.einsum("kgh,kghd->d", out, layer["output"]))

    # -- writing
    def counts(self) -> list[list[int]]:
        """Number of tokens that every memory layer (outer) and key-value head keeps."""
        memory, K = self.config.memory, self.config.model.kv_heads
        text = memory.counts or memory.heads
        if not text:
            return [[memory.kept_tokens] * K for _ in self.memory_layers]
        rows = {layer: [0] * K for layer in self.memory_layers}
        for part in text.split(","):
            layer, _, numbers = part.partition(":")
            row = [int(number) for number in numbers.split("+") if number]
            if memory.heads:
                named = row if numbers else range(K)
                row = [memory.kept_tokens * (head in named) for head in range(K)]
            rows[int(layer)] = row
        return list(rows.values())

    def weights(self, queries: np.ndarray, keys: np.ndarray, exact: bool = True) -> np.ndarray:
        """w (K, n) of Memory³ §3.3 for one reference: no mask, no positions, prefix excluded."""
        n, K, G, H = queries.shape
        total = np.zeros((K, n))
        for k in range(K):
            for g in range(G):
                for i in range(n):
                    scores = np.exp([queries[i, k, g] @ keys[j, k] / np.sqrt(H) for j in range(n)])
                    total[k] += scores / scores.sum() if exact else scores
        return total

    def received(self, projected: list, rotated: list, n: int) -> np.ndarray:
        """Attention (K, n) of the n tokens' queries, as if they stood where a context begins, to
        the reference alone, times the size of the values."""
        p, behind = len(self.prefix), len(self.prefix) + self.config.memory.reference_length
        queries = [
            [[self.rope(head, behind + i) for head in group] for group in q]
            for i, (q, _, _) in enumerate(projected[p : p + n])
        ]
        attention = self.weights(np.array(queries), np.array(rotated[p : p + n]))
        values = np.array([v for _, _, v in projected[p : p + n]])
        return attention * np.sqrt(np.sum(values**2, axis=-1)).T

    def reconstruction(self, projected: list, rotated: list, n: int) -> np.ndarray:
        """Largest attention (K, n) that a token of the copy, which follows the n tokens, pays."""
        p, (K, G, H) = len(self.prefix), projected[0][0].shape
        best = np.zeros((K, n))
        for i in range(p + n, p + 2 * n):
            for k in range(K):
                for g in range(G):
                    query = self.rope(projected[i][0][k, g], i)
                    scores = np.exp([query @ rotated[j][k] / np.sqrt(H) for j in range(i + 1)])
                    attention = scores / scores.sum()
                    best[k] = np.maximum(best[k], attention[p : p + n])
        return best

    def rule(self, name: str, projected: list, rotated: list, n: int) -> np.ndarray:
        """Weights (K, n) by `memory.selection` for one layer of [prefix ; reference (; copy)]."""
        if name in ("received", "reconstruction"):
            return getattr(self, name)(projected, rotated, n)
        own = projected[len(self.prefix) : len(self.prefix) + n]
        queries, keys = np.stack([q for q, _, _ in own]), np.stack([k for _, k, _ in own])
        return self.weights(queries, keys, name == "exact")

    def kept(self, projected: list, rotated: list, n: int, counts: list[int]) -> list[list[int]]:
        """Tokens that each head keeps in one layer, ascending."""
        memory, chosen = self.config.memory, []
        w = self.rule(memory.selection, projected, rotated, n)
        first = self.received(projected, rotated, n) if memory.each else w
        for head, count in enumerate(counts):
            seed = sorted(range(n), key=lambda j: -first[head, j])[: min(count, memory.each)]  # noqa: B023
            others = sorted((j for j in range(n) if j not in seed), key=lambda j: -w[head, j])  # noqa: B023
            chosen.append(sorted(seed + others[: count - len(seed)]))
        return chosen

    def write(self, reference: np.ndarray) -> tuple[np.ndarray, np.ndarray, int, np.ndarray]:
        """Keys and values (L, K, P, H), length and kept positions (L, K, P) of one reference.

        P is the largest count of a head; what a head does not keep is zero.
        """
        memory, counts = self.config.memory, self.counts()
        usable = [int(token) for token in reference if token != 0]
        p, P = len(self.prefix), max(map(max, counts))
        shape = (memory.layers, self.config.model.kv_heads, P, self.config.model.head_dim)
        keys, values, kept = np.zeros(shape), np.zeros(shape), np.zeros(shape[:3], int)
        text = usable * 2 if memory.selection == "reconstruction" else usable
        for number, projected, rotated in self.passed([*self.prefix, *text]):
            if number in self.memory_layers and usable:
                row = number - memory.first_layer
                chosen = self.kept(projected, rotated, len(usable), counts[row])
                for head, tokens in enumerate(chosen):
                    for slot, j in enumerate(tokens):
                        kept[row, head, slot] = j
                        keys[row, head, slot] = rotated[p + j][head]
                        values[row, head, slot] = projected[p + j][2][head]
        return keys, values, min(P, len(usable)), kept

    def passed(self, tokens: list[int]) -> Any:
        """Number, projections and rotated keys of every layer up to the last memory layer, over a
        text without memories."""
        stream = [self.embed(token) for token in tokens]
        for number, layer in enumerate(self.layers[: self.memory_layers.stop]):
            self.enter(number)
            projected = [self.project(layer, x) for x in stream]
            rotated = [
                np.stack([self.rope(head, i) for head in k])
                for i, (_, k, _) in enumerate(projected)
            ]
            yield number, projected, rotated
            stream = self._causal(layer, stream, projected, rotated, lambda i: [])

    def _causal(self, layer, stream, projected, rotated, extra):
        """All tokens after one layer; token i sees `extra(i)` and the tokens up to itself."""
        result = []
        for i, x in enumerate(stream):
            q = projected[i][0]
            q = np.stack([np.stack([self.rope(h, self.position(i)) for h in group]) for group in q])
            seen = extra(i) + [(rotated[j], projected[j][2]) for j in range(i + 1)]
            result.append(self.attend_one(layer, x, q, seen))
        return result

    def position(self, i: int) -> int:
        """Position of token i of the sequence [prefix ; reference]."""
        return i

    # -- reading
    def read(self, tokens: np.ndarray, chunks: list) -> np.ndarray:
        """Logits (T, V) of one row.

        Args:
          tokens: (T,).
          chunks: for each chunk its memories: (keys, values, length) as of `write`; or [].
        """
        return Reader(self.config, self.params, self.prefix).logits(tokens, chunks)


class Reader(Oracle):
    """The same over [prefix ; context], context positions behind the references' interval."""

    def position(self, i: int) -> int:
        return i if i < len(self.prefix) else i + self.config.memory.reference_length

    def logits(self, tokens: np.ndarray, chunks: list) -> np.ndarray:
        memory, p, counts = self.config.memory, len(self.prefix), self.counts()
        stream = [self.embed(int(token)) for token in (*self.prefix, *tokens)]
        for number, layer in enumerate(self.layers):
            self.enter(number)
            projected = [self.project(layer, x) for x in stream]
            rotated = [
                np.stack([self.rope(head, self.position(i)) for head in k])
                for i, (_, k, _) in enumerate(projected)
            ]

            def slots(i: int, number: int = number) -> list:
                if i < p or number not in self.memory_layers or not chunks:
                    return []
                own = (i - p) // memory.chunk_length
                seen = []
                for chunk in range(max(0, own - memory.window + 1), own + 1):
                    for rank, (keys, values, length) in enumerate(chunks[chunk]):
                        row = number - memory.first_layer
                        has = np.array(counts[row])[:, None]
                        for s in range(length):
                            own_keys = [
                                self.rope(key, -memory.spacing * rank) for key in keys[row, :, s]
                            ]
                            seen.append((np.where(s < has, own_keys, np.nan), values[row, :, s]))
                return seen

            stream = self._causal(layer, stream, projected, rotated, slots)
        table = self.params["embedding" if self.config.model.tied_embeddings else "head"]
        normed = [self.norm(x, self.params["final_norm"]) for x in stream[p:]]
        return np.stack([table @ x for x in normed])
