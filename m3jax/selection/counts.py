"""Deals the tokens that a memory keeps to layers and key-value heads, from calibration text.

A few heads copy from what stands before them; in them nearly every token of a reference matters, in
most others few or none (method: KVzip, arXiv 2505.23416, over all layers at once). Counts that are
fixed once for a model serve as well as counts chosen for each reference, and keep shapes static:
memory heads.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int
from ml_collections import ConfigDict
from tqdm import tqdm

from m3jax.checkpoint import restore_params
from m3jax.checkpoint_folder import named_checkpoint
from m3jax.config import PREFIX_TOKENS, format_counts, memory_layers
from m3jax.errors import ConfigError
from m3jax.knowledge.versions import open_references, open_version
from m3jax.make_model import make_model
from m3jax.memory.sparsify import RECONSTRUCTION, received_weights, reconstruction_weights
from m3jax.mirror import Mirror
from m3jax.model.layer import EncodedReferences
from m3jax.model.parameters import Params
from m3jax.text.tokenizer import Tokenizer


class TokenWeights(NamedTuple):
    """Weights of the tokens of R references in every memory layer and head; −inf for padding."""

    reconstruction: Float[np.ndarray, "R L K W"]
    received: Float[np.ndarray, "R L K W"]


def measure_weights(
    config: ConfigDict,
    params: Params,
    tokens_RW: Int[np.ndarray, "R W"],
    prefix_tokens: tuple[int, ...],
    batch: int = 8,
) -> TokenWeights:
    """Computes the token weights of both rules for every memory layer and key-value head.

    Args:
      config: a validated config; `memory.first_layer` and `memory.layers` are the candidates.
      params: parameters of the writer.
      tokens_RW: 0-padded references.
      prefix_tokens: prefix of references.
      batch: references per call.
    """
    probe = config.copy_and_resolve_references()
    with probe.unlocked():
        probe.memory.update(heads="", counts="", each=0, selection=RECONSTRUCTION, kept_tokens=1)
    model = make_model(probe, prefix_tokens)

    def both(encoded: EncodedReferences) -> jax.Array:
        return jnp.stack([reconstruction_weights(encoded), received_weights(encoded)])

    @jax.jit
    def weights(params: Params, tokens: jax.Array) -> jax.Array:
        return jnp.concatenate(model.on_references(params, tokens, both))  # (L, 2, R, K, W)

    R = len(tokens_RW)
    parts = []
    for low in tqdm(range(0, R, batch), desc="calibration", unit=" batches", disable=batch >= R):
        part = tokens_RW[low : low + batch]
        padded = np.pad(part, ((0, batch - len(part)), (0, 0)))
        parts.append(np.asarray(weights(params, padded))[:, :, : len(part)])
    both_LRKW = np.concatenate(parts, axis=2)
    return TokenWeights(*(np.moveaxis(both_LRKW[:, i], 0, 1) for i in range(2)))


def check_budget(budget: float, each: int, W: int) -> None:
    """Raises `ConfigError` if a budget is below `each`, or above the W tokens of a reference."""
    if not max(each, 1) <= budget <= W:
        raise ConfigError(
            f"a budget of {budget:g} tokens for each layer and head, of which every head gets"
            f" {each}: give a budget of at least {max(each, 1)} and at most {W}, the tokens of a"
            " reference"
        )


def deal_counts(weights: TokenWeights, budget: float, each: int) -> Int[np.ndarray, "L K"]:
    """Deals budget · L · K tokens to layers and heads, by their mean share over the references.

    For each reference every head gets the `each` tokens with the largest `received` weight; the
    other tokens with the largest `reconstruction` weights over all layers and heads fill the rest
    of the budget.

    Args:
      weights: weights of calibration references.
      budget: tokens of a memory, per layer and key-value head.
      each: tokens that every head keeps.

    Raises:
      ConfigError: the budget is below `each`, or above the tokens of a reference.
    """
    R, L, K, W = weights.reconstruction.shape
    check_budget(budget, each, W)
    total = round(budget * L * K)
    order = np.argsort(-weights.received, axis=-1, kind="stable")
    rank = np.argsort(order, axis=-1, kind="stable")
    rest = np.where(rank < each, -np.inf, weights.reconstruction).reshape(R, -1)
    more = total - each * L * K
    kept = np.zeros(rest.shape)
    if more:
        np.put_along_axis(kept, np.argpartition(-rest, more - 1, axis=1)[:, :more], 1, axis=1)
    mean = each + kept.reshape(R, L, K, W).sum(-1).mean(0)
    counts = np.floor(mean).astype(np.int64)
    left = total - int(counts.sum())  # by largest remainder
    counts.ravel()[np.argsort(-(mean - counts).ravel(), kind="stable")[:left]] += 1
    return counts


def select_counts(
    config: ConfigDict,
    workdir: str | Path,
    checkpoint: str | Path | None = None,
    *,
    budget: float = 16,
    each: int = 4,
    sample: int = 64,
) -> dict[str, Any]:
    """Chooses `memory.counts` of a model from references of its workdir.

    Args:
      config: a validated config; its memory layers are the candidates.
      workdir: a workdir with references, from which the longest are sampled.
      checkpoint: stage folder or `checkpoints/<step>` of the writer; default `workdir/<stage>`.
      budget: tokens of a memory, per memory layer and key-value head.
      each: tokens that every head keeps.
      sample: number of references.

    Returns:
      The counts as text (`counts`) and by layer, the budget, the share of the heads that keeps half
      of the tokens, and the number of references.

    Raises:
      ConfigError: as `deal_counts`.
      CheckpointError, TextError, VersionError: a part is missing or does not fit.
    """
    check_budget(budget, each, config.memory.reference_length)
    checkpoint = named_checkpoint(checkpoint, workdir, config.stage)
    Mirror.of(workdir).fetch("tokenizer")
    tokenizer = Tokenizer.load(Path(workdir) / "tokenizer")
    references = open_references(config, open_version(workdir), tokenizer)
    lengths = np.asarray(references.lengths)
    live = np.asarray(references.live)
    drawn = np.random.default_rng(0).permutation(live[lengths[live] > 0])
    longest = np.argsort(-lengths[drawn], kind="stable")[:sample]
    tokens = references.tokens(np.sort(drawn[longest]))
    model = make_model(config, PREFIX_TOKENS)
    params, meta = restore_params(checkpoint, model, tokenizer_fingerprint=tokenizer.fingerprint)
    weights = measure_weights(config, params, tokens, PREFIX_TOKENS)
    counts = deal_counts(weights, budget, each)
    largest_first = np.sort(counts, axis=None)[::-1]
    half = int(np.searchsorted(largest_first.cumsum(), counts.sum() / 2)) + 1
    return {
        "checkpoint": str(checkpoint),
        "step": meta["step"],
        "references": len(tokens),
        "budget": budget,
        "each": each,
        "first_layer": config.memory.first_layer,
        "by_layer": counts.tolist(),
        "heads_of_half": half / counts.size,
        "counts": format_counts(counts, memory_layers(config.memory)),
    }


def counts_table(report: dict[str, Any]) -> str:
    """Returns the report of `select_counts` as Markdown: tokens of each head, by layer."""
    rows = report["by_layer"]
    heads = range(len(rows[0]))
    lines = [
        f"{report['checkpoint']} step {report['step']}, {report['references']} references:"
        f" {report['budget']:g} tokens for each layer and head, {report['each']} of them in every"
        f" head; {report['heads_of_half']:.0%} of the heads keep half of the tokens",
        "",
        f"| layer | {' | '.join(f'head {head}' for head in heads)} |",
        "|---" * (len(heads) + 1) + "|",
    ]
    for layer, row in enumerate(rows, report["first_layer"]):
        lines.append(f"| {layer} | {' | '.join(map(str, row))} |")
    return "\n".join(lines)
