"""Makes a `Model` from a config."""

from __future__ import annotations

from jax.sharding import Mesh
from ml_collections import ConfigDict

from m3jax.config import PACKED
from m3jax.model.transformer import Model


def make_model(
    config: ConfigDict, prefix_tokens: tuple[int, ...], mesh: Mesh | None = None
) -> Model:
    """Makes the model of a config.

    Args:
      config: a validated config.
      prefix_tokens: tokens of the constant prefix, or () for none. Use `config.prefix_tokens` for
        rows of a training stage, `config.PREFIX_TOKENS` to encode references.
      mesh: as in `Model`.
    """
    return Model(
        config.model,
        config.memory,
        prefix_tokens,
        mesh,
        loss_block=config.train.loss_block,
        z_loss=float(config.train.z_loss),
        reduce_dtype=config.train.reduce_dtype,
        packed=config.data.sequence_length if config.data.packing in PACKED else 0,
    )
