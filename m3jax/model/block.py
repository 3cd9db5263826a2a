"""One transformer block in parts, which the layer scans and the memory writer recombine."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from m3jax.model.collectives import Parallel


def rms_norm(
    x: Float[Array, "*batch D"], scale: Float[Array, D], epsilon: float
) -> Float[Array, "*batch D"]:
    """RMSNorm in float32, result in the dtype of `x`."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + epsilon)
    return (x32 * scale.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))).astype(x.dtype)


def _product(x: Array, matrix: Array) -> Array:
    """`x @ matrix` over the last axis; with B and T apart its gradient is twice as slow on CPUs."""
    flat = x.reshape(-1, x.shape[-1]) @ matrix.astype(x.dtype)
    return flat.reshape(*x.shape[:-1], matrix.shape[-1])


class Block(nnx.Module):
    """Pre-norm block: grouped-query attention and a gated MLP, no biases unless configured."""

    def __init__(self, config: ConfigDict, rngs: nnx.Rngs, parallel: Parallel | None = None):
        model = config.model
        D, F, K, H = model.hidden, model.mlp_width, model.kv_heads, model.head_dim
        G = model.query_heads // K
        dtype = jnp.dtype(model.param_dtype)
        residual = (2 * model.layers) ** -0.5  # keeps the sum of 2L residual branches at unit scale

        def matrix(
            shape: tuple[int, ...], fan_in: int, axes: tuple[str, ...], factor: float = 1.0
        ) -> nnx.Param:
            deviation = factor * fan_in**model.init_exponent
            values = jax.random.normal(rngs.params(), shape, jnp.float32) * deviation
            return nnx.Param(values.astype(dtype), out_sharding=axes)

        def constant(value: int, shape: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param:
            return nnx.Param(jnp.full(shape, value, dtype), out_sharding=axes)

        self.attention_norm = constant(1, (D,), ("norm",))
        self.query = matrix((D, K, G, H), D, ("embed", "kv_heads", "group", "head_dim"))
        self.key = matrix((D, K, H), D, ("embed", "kv_heads", "head_dim"))
        self.value = matrix((D, K, H), D, ("embed", "kv_heads", "head_dim"))
        self.output = matrix(
            (K, G, H, D), K * G * H, ("kv_heads", "group", "head_dim", "embed"), residual
        )
        if model.attention_bias:
            self.query_bias = constant(0, (K, G, H), ("kv_heads", "group", "head_dim"))
            self.key_bias = constant(0, (K, H), ("kv_heads", "head_dim"))
            self.value_bias = constant(0, (K, H), ("kv_heads", "head_dim"))
        if model.qk_norm:  # a scale for all heads
            self.query_norm = constant(1, (H,), ("norm",))
            self.key_norm = constant(1, (H,), ("norm",))
        self.mlp_norm = constant(1, (D,), ("norm",))
        self.gate = matrix((D, F), D, ("embed", "mlp"))
        self.up = matrix((D, F), D, ("embed", "mlp"))
        self.down = matrix((F, D), F, ("mlp", "embed"), residual)
        self.epsilon = model.norm_epsilon
        self.bias, self.normed = model.attention_bias, model.qk_norm
        self.parallel = parallel or Parallel()

    def qkv(self, hidden: Float[Array, "B T D"]) -> tuple[Array, Array, Array]:
        """Queries `(B, T, K, G, H)`, keys and values `(B, T, K, H)`, before RoPE.

        With `model.qk_norm` queries and keys are normed here, so that whatever reads, chooses or
        stores keys has normed ones.
        """
        x = self.parallel.enter(rms_norm(hidden, self.attention_norm[...], self.epsilon))
        q = jnp.einsum("BTD,DKGH->BTKGH", x, self.query[...].astype(x.dtype))
        k = jnp.einsum("BTD,DKH->BTKH", x, self.key[...].astype(x.dtype))
        v = jnp.einsum("BTD,DKH->BTKH", x, self.value[...].astype(x.dtype))
        if self.bias:
            q = q + self.query_bias[...].astype(x.dtype)[None, None]
            k = k + self.key_bias[...].astype(x.dtype)[None, None]
            v = v + self.value_bias[...].astype(x.dtype)[None, None]
        if self.normed:  # over `tensor` each device has some heads, but all share the scales
            q = rms_norm(q, self.parallel.enter(self.query_norm[...]), self.epsilon)
            k = rms_norm(k, self.parallel.enter(self.key_norm[...]), self.epsilon)
        return q, k, v

    def rest(
        self, hidden: Float[Array, "B T D"], attended: Float[Array, "B T K G H"]
    ) -> Float[Array, "B T D"]:
        """Output projection and MLP, each added to the residual stream."""
        dtype = hidden.dtype
        projected = jnp.einsum("BTKGH,KGHD->BTD", attended, self.output[...].astype(dtype))
        hidden = hidden + self.parallel.leave(projected)
        x = self.parallel.enter(rms_norm(hidden, self.mlp_norm[...], self.epsilon))
        gate = jax.nn.silu(_product(x, self.gate[...]))
        product = _product(gate * _product(x, self.up[...]), self.down[...])
        return hidden + self.parallel.leave(product)
