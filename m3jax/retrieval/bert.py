"""BERT encoder (Devlin et al., arXiv 1810.04805) as a pure function of a parameter pytree.

RoBERTa (arXiv 1907.11692) differs in its position ids, which start at the padding token's id + 1.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32

from m3jax.retrieval.pooling import mean_of, unit, usable

Params = dict[str, Any]
Pooling = Literal["mean", "cls"]

QUERY_BLOCK = 256  # queries per block of scores, in rows of more than twice as many tokens


@dataclasses.dataclass(frozen=True)
class Architecture:
    """Holds the sizes of an encoder.

    Attributes:
      layers, heads, hidden, mlp_width, vocabulary: L, N, D, F, V.
      padding: None: position ids count from 0 (BERT). Otherwise the padding token's id; position
        ids of the other tokens count from it + 1 (RoBERTa).
    """

    layers: int
    heads: int
    hidden: int
    mlp_width: int
    vocabulary: int
    positions: int  # rows of the position table
    types: int  # rows of the token-type table; only the first is used
    padding: int | None
    norm_epsilon: float  # of LayerNorm

    @property
    def longest(self) -> int:
        """Returns the longest row, in tokens, for which the position table suffices."""
        return self.positions - (0 if self.padding is None else self.padding + 1)


def encode(
    architecture: Architecture,
    pooling: Pooling,
    params: Params,
    tokens: Int32[Array, "B T"],
    lengths: Int32[Array, " B"],
) -> Float32[Array, "B D"]:
    """Embeds rows of tokens as unit vectors.

    Args:
      architecture: sizes of the encoder.
      pooling: `mean` = mean of a row's hidden states; `cls` = hidden state of its first token.
      params: a pytree. `embedding`: `words` (V, D), `positions`, `types`, `norm_scale` and
        `norm_bias` (D,). `layers`, with a leading axis L: `qkv` (D, 3·D), `output` (D, D), `up`
        (D, F), `down` (F, D), their `…_bias`, and scale and bias of `attention_norm` and
        `mlp_norm`. Matrix products use their dtype; norms, softmax and pooling use float32.
      tokens: rows padded on the right, with the token `architecture.padding` if it is not None.
      lengths: number of real tokens in each row; the embedding of a row of length 0 is undefined.
    """
    real_BT, table = usable(tokens, lengths), params["embedding"]
    h_BTD = table["words"][tokens] + table["types"][:1, None]
    h_BTD = h_BTD + table["positions"][_positions(architecture, tokens)]
    h_BTD = _norm(architecture, h_BTD, table["norm_scale"], table["norm_bias"])

    def block(h_BTD: jax.Array, layer: Params) -> tuple[jax.Array, None]:
        attended = _attention(architecture, layer, h_BTD, real_BT)
        attended = _dense(attended, layer["output"], layer["output_bias"])
        scale, bias = layer["attention_norm_scale"], layer["attention_norm_bias"]
        h_BTD = _norm(architecture, h_BTD + attended, scale, bias)
        up_BTF = _dense(h_BTD, layer["up"], layer["up_bias"])
        up_BTF = jax.nn.gelu(up_BTF, approximate=False)
        down_BTD = _dense(up_BTF, layer["down"], layer["down_bias"])
        scale, bias = layer["mlp_norm_scale"], layer["mlp_norm_bias"]
        return _norm(architecture, h_BTD + down_BTD, scale, bias), None

    # By default, accelerators round the float32 inputs of products to fewer bits.
    with jax.default_matmul_precision("highest" if h_BTD.dtype == jnp.float32 else "default"):
        h_BTD, _ = jax.lax.scan(block, h_BTD, params["layers"])
    h_BTD = h_BTD.astype(jnp.float32)
    return unit(h_BTD[:, 0] if pooling == "cls" else mean_of(h_BTD, real_BT))


def _positions(architecture: Architecture, tokens: jax.Array) -> jax.Array:
    """Returns the position ids, (1, T) or (B, T)."""
    if architecture.padding is None:
        # Padding may exceed the position table.
        return jnp.minimum(jnp.arange(tokens.shape[1]), architecture.positions - 1)[None, :]
    counted = tokens != architecture.padding
    return jnp.where(counted, jnp.cumsum(counted, axis=1), 0) + architecture.padding


def _dense(x: jax.Array, weight: jax.Array, bias: jax.Array) -> jax.Array:
    return jnp.matmul(x, weight) + bias[None, None]


def _norm(architecture: Architecture, x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    wide = wide - wide.mean(-1, keepdims=True)
    variance = jnp.square(wide).mean(-1, keepdims=True)
    wide = wide * jax.lax.rsqrt(variance + architecture.norm_epsilon)
    scale, bias = scale.astype(jnp.float32), bias.astype(jnp.float32)
    return (wide * scale[None, None] + bias[None, None]).astype(x.dtype)


def _attention(
    architecture: Architecture, layer: Params, h_BTD: jax.Array, real_BT: jax.Array
) -> jax.Array:
    B, T, D = h_BTD.shape
    N, H = architecture.heads, architecture.hidden // architecture.heads
    qkv = _dense(h_BTD, layer["qkv"], layer["qkv_bias"]).reshape(B, T, 3, N, H)
    q_BNTH, k_BNSH, v_BNSH = qkv.transpose(2, 0, 3, 1, 4)  # heads first is faster on CPUs
    # Not −inf: a row without a real token would be NaN.
    hidden = jnp.where(real_BT, 0.0, jnp.finfo(jnp.float32).min)[:, None, None, :]

    def attend(q_BNTH: jax.Array) -> jax.Array:
        scores_BNTS = jnp.einsum(
            "BNTH,BNSH->BNTS", q_BNTH, k_BNSH, preferred_element_type=jnp.float32
        )
        weights_BNTS = jax.nn.softmax(scores_BNTS * H**-0.5 + hidden, axis=-1).astype(h_BTD.dtype)
        return jnp.einsum("BNTS,BNSH->BNTH", weights_BNTS, v_BNSH)

    if T <= 2 * QUERY_BLOCK or T % QUERY_BLOCK:
        attended_BNTH = attend(q_BNTH)
    else:
        blocks = q_BNTH.reshape(B, N, T // QUERY_BLOCK, QUERY_BLOCK, H)
        attended = jax.lax.map(attend, jnp.moveaxis(blocks, 2, 0))
        attended_BNTH = jnp.moveaxis(attended, 0, 2).reshape(B, N, T, H)
    return attended_BNTH.swapaxes(1, 2).reshape(B, T, D)
