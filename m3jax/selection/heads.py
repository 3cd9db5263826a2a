"""Ranks attention heads by how much the loss rises when one head at a time is masked.

Memory³ (§7) proposes this as a better choice of memory heads than the first half of the layers:
restrict a head to the last 100 tokens and BOS, measure the loss of the model, and take the heads
whose restriction raises it most. A bank with memories of these heads only is smaller
(`config.memory.heads`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict
from tqdm import tqdm

from m3jax.checkpoint import restore_params
from m3jax.checkpoint_folder import named_checkpoint
from m3jax.config import PACKED, format_heads, memory_heads, prefix_tokens
from m3jax.data.batch import Batch
from m3jax.data.pipeline import open_pipeline
from m3jax.errors import ConfigError
from m3jax.files import digest, json_text, write_array
from m3jax.knowledge.memory_writer import check_reader
from m3jax.make_model import make_model
from m3jax.memory.binding import weights_fingerprint
from m3jax.model.attention_mask import ShortSight
from m3jax.model.parameters import Params
from m3jax.model.transformer import Model
from m3jax.train.evaluator import LossEvaluator
from m3jax.workdir import only_writer

HIDES = ("context", "memory")


@dataclasses.dataclass(frozen=True)
class HeadScores:
    """Rise of the loss caused by masking each head; NaN for heads that were not masked."""

    loss: float  # of the model without masks, nats per token
    increase: Float[np.ndarray, "layers heads"]  # of the loss, nats per token
    error: Float[np.ndarray, "layers heads"]  # standard error, paired by row
    rows: int  # number of rows with predicted tokens
    tokens: int  # number of predicted tokens
    about: dict[str, Any]  # checkpoint, step, and the kind of mask

    def ranking(self) -> list[tuple[int, int]]:
        """Returns (layer, head) of every masked head, by descending rise of the loss."""
        order = np.argsort(-self.increase, axis=None, kind="stable")  # NaN comes last
        masked = np.isfinite(self.increase).sum()
        return [divmod(int(i), self.increase.shape[1]) for i in order[:masked]]

    def best(self, share: float, layers: range) -> list[tuple[int, int]]:
        """Returns (layer, head) of the top `share` of the masked heads in `layers`, ascending.

        Returns at least one head if any was masked. Raises `ConfigError` if the share is outside
        (0, 1].
        """
        if not 0 < share <= 1:
            raise ConfigError(f"a share of {share} of the heads; give one above 0, at most 1")
        inside = [pair for pair in self.ranking() if pair[0] in layers]
        return sorted(inside[: max(1, round(share * len(inside)))])


def score_heads(
    config: ConfigDict,
    workdir: str | Path,
    checkpoint: str | Path | None = None,
    *,
    hide: str = "context",
    window: int = 100,
    by_query: bool = False,
) -> HeadScores:
    """Measures the rise of the validation loss with each head masked in turn.

    The mask is an argument of one compiled program, which runs all masks of a batch. The losses of
    each batch are saved in `<workdir>/report/heads/`, from where an interrupted run resumes.

    Args:
      config: a validated config of the checkpoint's stage; `evaluation` sets the rows.
      workdir: a prepared workdir.
      checkpoint: stage folder or `checkpoints/<step>`; default `workdir/<stage>`.
      hide: `context`: a masked head sees its last `window` tokens, the prefix and the first token
        of the row, and no head reads memories (Memory³ §7); `memory`: a masked head reads no
        memories, all other heads do.
      window: number of tokens that a masked head sees with `context`, the query's own included.
      by_query: mask single query heads; default: key-value heads with all of their query heads,
        since a bank stores memories by key-value head.

    Raises:
      ConfigError: an unknown `hide`; a window that hides nothing or everything; no memories to
        hide, or memories that are not read from a bank; query heads with `memory`; packed rows.
      CheckpointError, TextError, BankError: a part is missing or does not fit.
      LockError: another process ranks heads in the workdir.
    """
    _check(config, hide, window, by_query)
    checkpoint = named_checkpoint(checkpoint, workdir, config.stage)
    plain = config.copy_and_resolve_references()
    with plain.unlocked():
        plain.model.attention = "blocked"  # fused kernels take no mask per head
        if hide == "context":
            plain.memory.source = "none"
    model = make_model(plain, prefix_tokens(config))
    pipeline = open_pipeline(plain, workdir, split="validation")
    tokenizer = pipeline.tokenizer.fingerprint
    params, meta = restore_params(checkpoint, model, tokenizer_fingerprint=tokenizer)
    check_reader(pipeline.bank, meta, checkpoint)
    shape, candidates = _candidates(config, hide, by_query)
    score = jax.jit(masked_losses(model, hide, window, pipeline.dequantize))
    evaluator = LossEvaluator(plain, pipeline)
    about = {
        **{"checkpoint": str(checkpoint), "step": meta["step"], "hide": hide},
        **{"window": window if hide == "context" else None, "by": "query" if by_query else "kv"},
    }
    named = {name: about[name] for name in ("hide", "window", "by")}
    what = [named, weights_fingerprint(params), config.to_dict(), tokenizer, pipeline.ingredients]
    store = Path(workdir) / "report" / "heads" / f"{digest(json_text(what))}.npy"
    batches = tqdm(evaluator.each(), total=evaluator.batches, desc="heads", unit=" batches")
    with only_writer(store.parent):
        done = np.load(store) if store.is_file() else np.zeros((0, 2 + len(candidates), 0))
        for number, batch in enumerate(batches):
            if number >= len(done):
                losses = score(params, jax.device_put(batch.for_step()), candidates)
                weights = batch.weights.astype(np.float64).sum(1)
                block = np.concatenate([weights[None], np.asarray(losses, np.float64)])[None]
                done = np.concatenate([done.reshape(-1, *block.shape[1:]), block])
                write_array(store, done)
    rows = np.moveaxis(done, 1, 0).reshape(len(candidates) + 2, -1)
    return _scores(rows[0], rows[1], rows[2:], shape, candidates, about)


def masked_losses(
    model: Model, hide: str, window: int, dequantize: Callable | None = None
) -> Callable[[Params, Batch, Int[Array, "n 3"]], Float[Array, "n+1 B"]]:
    """Returns a function that sums the loss of every row, unmasked and with each head masked.

    The function takes `(params, batch, candidates)` and returns nats; row 0 is unmasked. A
    candidate is layer, key-value head, and query head within its group (−1 = the whole group). The
    model must be on one device, its attention `naive` or `blocked`; `hide` and `window` are as for
    `score_heads`.
    """
    shape, (low, high) = model.config, model.ranges["memory"]
    L, K, G = shape.layers, shape.kv_heads, shape.query_heads // shape.kv_heads
    reading_LK = jnp.asarray(model.slots.counts_LK > 0)

    def losses(params: Params, batch: Batch, candidates: Array) -> Array:
        memory = batch.memory if hide == "memory" else None
        if memory is not None and dequantize is not None:
            memory = dequantize(memory)

        def loss(candidate: Array) -> Array:
            layer, head, group = candidate
            masked_LKG = (
                (jnp.arange(L)[:, None, None] == layer)
                & (jnp.arange(K)[None, :, None] == head)
                & ((jnp.arange(G)[None, None] == group) | (group < 0))
            )
            if hide == "memory":
                reading = reading_LK & ~masked_LKG[low:high].any(axis=-1)
                hidden = model.hidden(params, batch.tokens, memory, memory_heads=reading)
            else:
                sight = ShortSight(masked_LKG, window)
                hidden = model.hidden(params, batch.tokens, sight=sight)
            of_tokens = model.token_losses(params, hidden, batch.targets)
            return jnp.sum(of_tokens * batch.weights.astype(jnp.float32), axis=1)

        nobody = jnp.full((1, 3), L, jnp.int32)
        return jax.lax.map(loss, jnp.concatenate([nobody, candidates]))

    return losses


def _check(config: ConfigDict, hide: str, window: int, by_query: bool) -> None:
    if hide not in HIDES:
        raise ConfigError(f"hide = {hide!r}; known: {', '.join(HIDES)}")
    if config.data.packing in PACKED:
        raise ConfigError(
            f"config.data.packing = {config.data.packing!r}: heads are ranked on rows of one text"
            " each; use the config of another stage and name the checkpoint"
        )
    if hide == "context" and not 0 < window < config.data.sequence_length:
        raise ConfigError(
            f"a window of {window} tokens hides nothing, or all: rows have"
            f" config.data.sequence_length = {config.data.sequence_length} tokens; give a smaller"
            f" window, or longer rows"
        )
    if hide == "memory" and config.memory.source == "none":
        raise ConfigError(
            "config.memory.source = 'none': there are no memories to hide; use the config of a"
            " stage that reads them"
        )
    if hide == "memory" and config.memory.source == "online":
        raise ConfigError(
            "config.memory.source = 'online': heads are ranked with memories of a bank; set"
            " --config.memory.source=precomputed after launch/write_bank.py"
        )
    if hide == "memory" and by_query:
        raise ConfigError("memories are stored for key-value heads; rank those")


def _candidates(
    config: ConfigDict, hide: str, by_query: bool
) -> tuple[tuple[int, int], np.ndarray]:
    """Returns the shape (layers, heads) of the scores, and the heads to mask.

    These are all heads or, if memories are hidden, the heads that have memories. A row is layer,
    key-value head, and query head within its group (−1 = the whole group).
    """
    model = config.model
    L, K, G = model.layers, model.kv_heads, model.query_heads // model.kv_heads
    groups = range(G) if by_query else [-1]
    first, count = config.memory.first_layer, config.memory.layers
    pairs: Any = [(layer, head) for layer in range(L) for head in range(K)]
    if hide == "memory":
        inside = [pair for pair in pairs if first <= pair[0] < first + count]
        pairs = memory_heads(config.model, config.memory) or inside
    triples = [(layer, head, g) for layer, head in pairs for g in groups]
    return (L, K * len(groups)), np.array(triples, np.int32)


def _scores(
    weights: np.ndarray,
    base: np.ndarray,
    masked: np.ndarray,
    shape: tuple[int, int],
    candidates: np.ndarray,
    about: dict[str, Any],
) -> HeadScores:
    """Computes scores from weights `(rows,)` and summed losses `(rows,)`, `(candidates, rows)`."""

    def placed(values: np.ndarray) -> np.ndarray:
        """Puts values of the candidates into an array (layers, heads), NaN elsewhere."""
        layer, head, group = candidates.T
        whole = np.full(shape, np.nan)
        per_head = 1 if (group < 0).all() else int(group.max()) + 1
        whole[layer, head * per_head + np.maximum(group, 0)] = values
        return whole

    total, count = weights.sum(), int((weights > 0).sum())
    more = masked - base
    increase = more.sum(1) / total
    apart = more - increase[:, None] * weights[None]
    error = np.sqrt(np.square(apart).sum(1) * count / max(count - 1, 1)) / total
    loss, tokens = float(base.sum() / total), int(round(total))
    return HeadScores(loss, placed(increase), placed(error), count, tokens, about)


def heads_report(scores: HeadScores, chosen: list[tuple[int, int]]) -> dict[str, Any]:
    """Returns the scores as JSON values, by descending rise of the loss, `chosen` heads marked."""
    ranked = [
        {
            "layer": layer,
            "head": head,
            "increase": float(scores.increase[layer, head]),
            "error": float(scores.error[layer, head]),
            "chosen": (layer, head) in chosen,
        }
        for layer, head in scores.ranking()
    ]
    figures = {"loss": scores.loss, "rows": scores.rows, "tokens": scores.tokens}
    return {**scores.about, **figures, "heads": ranked, "memory_heads": format_heads(chosen)}


def heads_table(report: dict[str, Any], most: int = 40) -> str:
    """Returns the report of `heads_report` as Markdown, with the first `most` heads."""
    what = "memories hidden from it"
    if report["hide"] == "context":
        what = f"only its last {report['window']} tokens and the beginning seen by it"
    lines = [
        f"{report['checkpoint']} step {report['step']}: loss {report['loss']:.4f} nats a token"
        f" ({report['rows']} rows, {report['tokens']} tokens); by how much it rises, one"
        f" {'key-value' if report['by'] == 'kv' else 'query'} head at a time, {what}",
        "",
        "| rank | layer | head | rise | standard error | chosen |",
        "|---|---|---|---|---|---|",
    ]
    for rank, head in enumerate(report["heads"][:most], 1):
        mark = "yes" if head["chosen"] else ""
        figures = f"{head['increase']:+.5f} | {head['error']:.5f}"
        lines.append(f"| {rank} | {head['layer']} | {head['head']} | {figures} | {mark} |")
    left = len(report["heads"]) - most
    return "\n".join([*lines, *([f"… and {left} more"] if left > 0 else [])])
