"""Measures how far a bank's memories are from the memories that a checkpoint writes now."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from ml_collections import ConfigDict

from m3jax.checkpoint import restore_params
from m3jax.config import prefix_tokens
from m3jax.data.pipeline import Pipeline, open_pipeline
from m3jax.evaluation.report import ROW, SHIFTS, search_note
from m3jax.inference.cold_start import ColdMemories
from m3jax.make_model import make_model
from m3jax.memory.document_context import writer_settings
from m3jax.train.evaluator import LossEvaluator
from m3jax.train.metrics import retrieval_shares
from m3jax.train.refresh import compare_memories


@dataclasses.dataclass(frozen=True)
class Staleness:
    """Differences between a bank's stored memories and fresh ones, and their effect on the loss.

    Attributes:
      references: number of references compared.
      keys, values: relative error of the stored keys and values in every memory layer: root of the
        summed squared distances over the summed squared norms of the fresh ones.
      key_floor, value_floor: relative error of fresh memories that are compressed as in the bank,
        mean over the layers; 0 without compression.
      first_layer: share of the squared error in the quarter of the references that have the largest
        error in the first memory layer.
      losses: nats per token on the validation rows, with `stored` and `fresh` memories, and `none`.
      gain: loss with stored memories minus loss with fresh memories.
      gain_error: standard error of `gain` over the batches; NaN for a single batch.
      search: says how the rows' memories were searched; "" = by ids stored with the documents.
    """

    references: int
    keys: list[float]
    values: list[float]
    key_floor: float
    value_floor: float
    first_layer: float
    losses: dict[str, float]
    gain: float
    gain_error: float
    search: str = ""

    @property
    def verdict(self) -> str:
        """Sentence that says whether a rewrite of the bank pays."""
        worth = f"memories are worth {self.losses['none'] - self.losses['stored']:.4f}"
        change = f"{abs(self.gain):.4f} ± {self.gain_error:.4f} nats a token; {worth}"
        if not np.isfinite(self.gain_error):
            return f"too few validation rows to say whether a rewrite pays ({worth})"
        if self.gain > 2 * self.gain_error:
            return f"a rewrite pays: the loss falls by {change}"
        if self.gain < -2 * self.gain_error:
            return (
                f"a rewrite does harm: the loss rises by {change}. The checkpoint reads its writer"
            )
        return f"a rewrite does not pay: it changes the loss by {change}"


def measure_staleness(
    config: ConfigDict,
    workdir: str | Path,
    checkpoint: str | Path,
    *,
    sample: int = 512,
    version: int | None = None,
    progress: bool = True,
) -> Staleness:
    """Compares the memories of a bank with the memories that a checkpoint writes now.

    Args:
      config: a validated config of the checkpoint's stage.
      workdir: a prepared workdir with a bank.
      checkpoint: stage folder or `checkpoints/<step>`; it writes the fresh memories and reads both
        kinds.
      sample: number of references to compare, drawn uniformly.
      version: version whose bank is compared; default the current one.
      progress: show a progress bar.

    Raises:
      CheckpointError, BankError, TextError, RetrievalError, VersionError: a part is missing or does
        not fit.
    """
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.memory.source = "precomputed"
    pipeline = open_pipeline(config, workdir, split="validation", version=version)
    model = make_model(config, prefix_tokens(config))
    tokenizer = pipeline.tokenizer.fingerprint
    params, _ = restore_params(checkpoint, model, tokenizer_fingerprint=tokenizer)
    bank, references = pipeline.bank, pipeline.references
    assert bank is not None and references is not None
    with config.unlocked():
        config.writer.update(writer_settings(bank.binding.layout))
    drawn = np.random.default_rng(0).permutation(bank.live)[:sample]
    squares, floor = compare_memories(
        config, model, params, references, bank, np.sort(drawn), progress
    )
    fresh = ColdMemories(config, model, params, references, codec=bank.codec)
    losses = _losses(config, pipeline, fresh, params)
    gains = losses["stored"] - losses["fresh"]
    error = gains.std(ddof=1) / np.sqrt(len(gains)) if len(gains) > 1 else float("nan")
    keys, values = squares.errors
    key_floor, value_floor = (0.0, 0.0) if floor is None else floor.errors.mean(axis=1)
    relative = squares.relative
    worst = np.argsort(-relative[:, 0], kind="stable")[: max(1, round(len(relative) / 4))]
    of_reference = relative.mean(axis=1)
    total = max(of_reference.sum(), np.finfo(np.float64).tiny)
    return Staleness(
        references=len(drawn),
        keys=keys.tolist(),
        values=values.tolist(),
        key_floor=float(key_floor),
        value_floor=float(value_floor),
        first_layer=float(of_reference[worst].sum() / total),
        losses={name: float(values.mean()) for name, values in losses.items()},
        gain=float(gains.mean()),
        gain_error=float(error),
        search=_search(config, pipeline),
    )


def staleness_table(staleness: Staleness) -> str:
    """Returns the staleness as Markdown tables and the verdict."""
    layers = enumerate(zip(staleness.keys, staleness.values, strict=True))
    rows: list[tuple[Any, float, float]] = [(layer, *errors) for layer, errors in layers]
    if staleness.key_floor or staleness.value_floor:
        rows.append(("of compression alone", staleness.key_floor, staleness.value_floor))
    return "\n".join(
        [
            f"{staleness.references} references; relative error of stored keys and values",
            "",
            "| memory layer | keys | values |",
            "|---|---|---|",
            *(f"| {name} | {key:.3f} | {value:.3f} |" for name, key, value in rows),
            "",
            "| memories | loss (nats a token) |",
            "|---|---|",
            *(f"| {name} | {loss:.4f} |" for name, loss in staleness.losses.items()),
            "",
            "The quarter that the first memory layer calls worst holds"
            f" {staleness.first_layer:.0%} of the error.",
            staleness.verdict,
            *(["", staleness.search] if staleness.search else []),
        ]
    )


def _search(config: ConfigDict, pipeline: Pipeline) -> str:
    shares = retrieval_shares(pipeline.report())
    if "dropped_share" not in shares:
        return ""
    query, limit = SHIFTS[config.evaluation.shift], config.retrieval.overlap_evaluation
    return search_note(query, ROW, limit, shares["dropped_share"])


def _losses(
    config: ConfigDict, pipeline: Pipeline, fresh: ColdMemories, params: Any
) -> dict[str, Float[np.ndarray, " batches"]]:
    """Computes the loss of every validation batch with stored, fresh and no memories."""
    evaluator = LossEvaluator(config, pipeline)
    losses: dict[str, list[float]] = {"stored": [], "fresh": [], "none": []}
    for batch in evaluator.each():
        assert batch.reference_ids is not None
        fresh_memory = fresh.read_stored(np.asarray(batch.reference_ids))
        again = batch._replace(memory=fresh_memory)
        reads = (("stored", "memory", batch), ("fresh", "memory", again), ("none", "none", batch))
        for name, mode, read in reads:
            loss, weight, _ = evaluator.sums(params, read, mode)
            losses[name].append(loss / weight)
    return {name: np.array(values) for name, values in losses.items()}
