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

    def rope(self, x: np.ndarray, position: int) -> np.ndarray:
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
        out = np.zeros((K, G, H))
        for k in range(K):
            own = [(key[k], value[k]) for key, value in seen if not np.isnan(key[k]).any()]
            for g in range(G):
                scores = np.array([q[k, g] @ key / np.sqrt(H) for key, _ in own])
                weights = np.exp(scores - scores.max())
                weights /= weights.sum()
                for weight, (_, value) in zip(weights, own, strict=True):
                    out[k, g] += weight * value
        return self.mlp(layer, x + np.einsum("kgh,kghd->d", out, layer["output"]))

    # -- writing
    def weights(self, queries: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """w (K, n) of Memory³ §3.3 for one reference: no mask, no positions, prefix excluded."""
        n, K, G, H = queries.shape
        total = np.zeros((K, n))
        for k in range(K):
            for g in range(G):
                for i in range(n):
                    scores = np.exp([queries[i, k, g] @ keys[j, k] / np.sqrt(H) for j in range(n)])
                    exact = self.config.memory.selection == "exact"
                    total[k] += scores / scores.sum() if exact else scores
        return total

    def write(self, reference: np.ndarray) -> tuple[np.ndarray, np.ndarray, int, np.ndarray]:
        """Keys and values (L, K, P, H), length and kept positions (L, K, P) of one reference."""
        memory = self.config.memory
        usable = [int(token) for token in reference if token != 0]
        p, P = len(self.prefix), memory.kept_tokens
        shape = (memory.layers, self.config.model.kv_heads, P, self.config.model.head_dim)
        keys, values, kept = np.zeros(shape), np.zeros(shape), np.zeros(shape[:3], int)
        length = min(P, len(usable))
        stream = [self.embed(token) for token in (*self.prefix, *usable)]
        for number, layer in enumerate(self.layers):
            projected = [self.project(layer, x) for x in stream]
            rotated = [
                np.stack([self.rope(head, i) for head in k])
                for i, (_, k, _) in enumerate(projected)
            ]
            if number in self.memory_layers and usable:
                row = number - memory.first_layer
                own = projected[p:]
                w = self.weights(np.stack([q for q, _, _ in own]), np.stack([k for _, k, _ in own]))
                for head in range(shape[1]):
                    best = sorted(sorted(range(len(usable)), key=lambda j: -w[head, j])[:length])  # noqa: B023
                    for slot, j in enumerate(best):
                        kept[row, head, slot] = j
                        keys[row, head, slot] = rotated[p + j][head]
                        values[row, head, slot] = own[j][2][head]
            stream = self._causal(layer, stream, projected, rotated, lambda i: [])
        return keys, values, length, kept

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
        reader = _Reader(self.config, self.params, self.prefix)
        return reader.logits(tokens, chunks)


class _Reader(Oracle):
    """The same over [prefix ; context], context positions behind the references' interval."""

    def position(self, i: int) -> int:
        return i if i < len(self.prefix) else i + self.config.memory.reference_length

    def logits(self, tokens: np.ndarray, chunks: list) -> np.ndarray:
        memory, p = self.config.memory, len(self.prefix)
        stream = [self.embed(int(token)) for token in (*self.prefix, *tokens)]
        for number, layer in enumerate(self.layers):
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
                    for keys, values, length in chunks[chunk]:
                        row = number - memory.first_layer
                        seen += [(keys[row, :, s], values[row, :, s]) for s in range(length)]
                return seen

            stream = self._causal(layer, stream, projected, rotated, slots)
        table = self.params["embedding" if self.config.model.tied_embeddings else "head"]
        normed = [self.norm(x, self.params["final_norm"]) for x in stream[p:]]
        return np.stack([table @ x for x in normed])
