"""Which heads matter: the loss of a model in which one head at a time sees less.

Memory³ names it as better than taking the first half of the layers: mask a head so that it sees
only the last 100 tokens and BOS, score the model, and call those the memory heads whose mask hurts
most. A bank of their memories alone is smaller (`config.memory.heads`).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from ml_collections import ConfigDict
from tqdm import tqdm

from m3jax.config import PACKED, ConfigError, format_heads, prefix_tokens
from m3jax.data.pipeline import open_pipeline
from m3jax.evaluation.losses import LossEvaluator
from m3jax.evaluation.report import check_reader
from m3jax.model.attention import MASKED, ExplicitMemory, KeyValues
from m3jax.model.keyvalues import concatenate, seen_by_heads, visible_mask
from m3jax.model.transformer import Layer, Model, Params, join, segment_ranges
from m3jax.text.files import digest, write_array
from m3jax.train.checkpoints import restore_params
from m3jax.train.objective import inputs

HIDES = ("context", "memory")
_BLOCK = 256  # queries whose scores are held at a time


@dataclasses.dataclass(frozen=True)
class HeadScores:
    """What masking each head did.

    Attributes:
      loss: nats a token of the model as it is.
      increase: of the loss with the head masked, `(layers, heads)`, nats a token.
      error: its standard error over the rows, each compared with itself.
      rows, tokens: that were predicted.
      about: checkpoint, step, and what was masked.
    """

    loss: float
    increase: Float[np.ndarray, "layers heads"]
    error: Float[np.ndarray, "layers heads"]
    rows: int
    tokens: int
    about: dict[str, Any]

    def ranking(self) -> list[tuple[int, int]]:
        """Layer and head of all, the one whose mask hurts most first."""
        order = np.argsort(-self.increase, axis=None, kind="stable")
        return [divmod(int(i), self.increase.shape[1]) for i in order]

    def best(self, share: float, layers: range) -> list[tuple[int, int]]:
        """Layer and head of the share that hurts most, of the heads in some layers; at least one.

        Raises:
          ConfigError: a share outside (0, 1].
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
    progress: bool = True,
) -> HeadScores:
    """Masks every head in turn and measures the loss on the validation rows.

    One program runs all masks of a batch on the device, the mask being an argument. The figures of
    a batch are kept in `<workdir>/report/heads/`, from where a stopped run goes on.

    Args:
      config: a validated config of the checkpoint's stage; `evaluation` says which rows.
      workdir: a prepared workdir.
      checkpoint: stage folder or `checkpoints/<step>`; default `workdir/<stage>`.
      hide: `context`: a masked head sees its last `window` tokens, the prefix and the first token
        of the row, and nobody reads memories (Memory³ §7); `memory`: it sees no memories, all
        others do.
      window: tokens, the query's own included.
      by_query: mask single query heads; default key-value heads, with all of their query heads,
        since these are what a bank stores.
      progress: show a progress bar.

    Raises:
      ConfigError: a window that hides nothing, no memory to hide, rows of several texts.
      CheckpointError, TextError, BankError: a part is missing or does not fit.
    """
    _check(config, hide, window, by_query)
    checkpoint = Path(checkpoint or Path(workdir) / config.stage)
    model = Model(config, prefix_tokens(config))
    plain = config.copy_and_resolve_references()
    if hide == "context":
        with plain.unlocked():
            plain.memory.source = "none"
    pipeline = open_pipeline(plain, workdir, split="validation")
    tokenizer = pipeline.tokenizer.fingerprint
    params, meta = restore_params(checkpoint, model, tokenizer_fingerprint=tokenizer)
    check_reader(pipeline.bank, meta, checkpoint)
    shape, candidates = _candidates(config, by_query)
    score = jax.jit(masked_losses(model, hide, window, pipeline.decode))
    evaluator = LossEvaluator(plain, pipeline)
    about = {
        **{"checkpoint": str(checkpoint), "step": meta["step"], "hide": hide},
        **{"window": window if hide == "context" else None, "by": "query" if by_query else "kv"},
    }
    bank = None if pipeline.bank is None else vars(pipeline.bank.binding)
    what = [about, config.to_dict(), tokenizer, bank, str(pipeline.rows.corpus.fingerprint)]
    store = Path(workdir) / "report" / "heads" / f"{digest(json.dumps(what))}.npy"
    done = np.load(store) if store.is_file() else np.zeros((0, 2 + len(candidates), 0))
    bar = tqdm(total=evaluator.batches, desc="heads", unit=" batches", disable=not progress)
    for number, batch in enumerate(evaluator.each()):
        if number >= len(done):
            losses = score(params, jax.device_put(inputs(batch)), candidates)
            weights = batch["weights"].astype(np.float64).sum(1)
            found = np.concatenate([weights[None], np.asarray(losses, np.float64)])[None]
            done = np.concatenate([done.reshape(-1, *found.shape[1:]), found])
            write_array(store, done)
        bar.update()
    bar.close()
    rows = np.moveaxis(done, 1, 0).reshape(len(candidates) + 2, -1)
    return _scores(rows[0], rows[1], rows[2:], shape, about)


def _check(config: ConfigDict, hide: str, window: int, by_query: bool) -> None:
    if hide not in HIDES:
        raise ConfigError(f"hide = {hide!r}; known: {', '.join(HIDES)}")
    if config.data.packing in PACKED:
        raise ConfigError(
            f"config.data.packing = {config.data.packing!r}: heads are ranked on rows of one text"
            " each; use the config of another stage and name the checkpoint"
        )
    if hide == "context" and not 0 < window < config.data.row_length:
        raise ConfigError(
            f"a window of {window} tokens hides nothing, or all: rows have config.data.row_length ="
            f" {config.data.row_length} tokens; give a smaller window, or longer rows"
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


def _candidates(config: ConfigDict, by_query: bool) -> tuple[tuple[int, int], np.ndarray]:
    """Layers and heads; layer, key-value head and query head of its group (−1 = all) of each."""
    model = config.model
    L, K, G = model.layers, model.kv_heads, model.query_heads // model.kv_heads
    groups = range(G) if by_query else [-1]
    found = [(layer, head, g) for layer in range(L) for head in range(K) for g in groups]
    return (L, K * len(groups)), np.array(found, np.int32)


def _scores(
    weights: np.ndarray,
    base: np.ndarray,
    masked: np.ndarray,
    shape: tuple[int, int],
    about: dict[str, Any],
) -> HeadScores:
    """Figures from weights `(rows,)` and summed losses `(rows,)` and `(candidates, rows)`."""
    total, count = weights.sum(), int((weights > 0).sum())
    more = masked - base
    increase = more.sum(1) / total
    apart = more - increase[:, None] * weights[None]
    error = np.sqrt(np.square(apart).sum(1) * count / max(count - 1, 1)) / total
    return HeadScores(
        float(base.sum() / total),
        increase.reshape(shape),
        error.reshape(shape),
        count,
        int(round(total)),
        about,
    )


# -- the program -----------------------------------------------------------------------------------
def masked_losses(
    model: Model, hide: str, window: int, decode: Callable | None = None
) -> Callable[[Params, dict[str, Any], Int[Array, "n 3"]], Float[Array, "n+1 B"]]:
    """Summed loss of every row: as the model is, then with each candidate masked.

    Args:
      model: on one device.
      hide, window: as in `score_heads`.
      decode: makes memories of what the bank stores.

    Returns:
      `(params, batch, candidates)`: of a candidate layer, key-value head and query head of its
      group, −1 for all.
    """
    shape = model.config.model
    L, K, G = shape.layers, shape.kv_heads, shape.query_heads // shape.kv_heads

    def losses(params: Params, batch: dict[str, Any], candidates: Array) -> Array:
        memory = batch.get("memory") if hide == "memory" else None
        if memory is not None and decode is not None:
            memory = decode(memory)

        def one(candidate: Array) -> Array:
            layer, head, group = candidate
            masked_LKG = (
                (jnp.arange(L)[:, None, None] == layer)
                & (jnp.arange(K)[None, :, None] == head)
                & ((jnp.arange(G)[None, None] == group) | (group < 0))
            )
            hidden = _forward(model, params, batch["tokens"], memory, masked_LKG, hide, window)
            found = model.token_losses(params, hidden, batch["targets"])
            return jnp.sum(found * batch["weights"].astype(jnp.float32), axis=1)

        nobody = jnp.full((1, 3), L, jnp.int32)
        return jax.lax.map(one, jnp.concatenate([nobody, candidates]))

    return losses


def _forward(
    model: Model,
    params: Params,
    tokens_BT: Array,
    memory: ExplicitMemory | None,
    masked_LKG: Bool[Array, "L K G"],
    hide: str,
    window: int,
) -> Float[Array, "B T D"]:
    """`Model.hidden` with masked heads."""
    streams, hidden = model.embed(params, tokens_BT, None)
    layer = Layer(model, streams)
    for segment, (low, high) in segment_ranges(model.config).items():
        if high == low:
            continue
        slots: Any = None
        heads: Any = None
        if memory is not None and segment == "memory":
            slots = tuple(jnp.moveaxis(x, 3, 0) for x in memory[:2])
            heads = None if model.memory_heads is None else jnp.asarray(model.memory_heads)

        def body(hidden: Array, inputs: Any) -> tuple[Array, None]:
            stacked, masked_KG, slots, heads_K = inputs
            block = model.merge(stacked)
            _, context, constant = layer.heads(block, hidden)
            assert context is not None
            attended, prefix = layer.of_prefix(constant)
            read = None if memory is None or slots is None else memory
            if read is not None:
                read = ExplicitMemory(slots[0], slots[1], read.length)
            qkv = context.q, context.k, context.v
            out = _attend(model, *qkv, prefix, read, heads_K, masked_KG, hide, window)
            return block.rest(hidden, join((None, out, attended))), None

        each = (params[segment], masked_LKG[low:high], slots, heads)
        hidden, _ = jax.lax.scan(body, hidden, each)
    found = streams.split(hidden)[1]
    assert found is not None
    return found


def _attend(
    model: Model,
    q_BTKGH: Array,
    k_BTKH: Array,
    v_BTKH: Array,
    prefix: KeyValues | None,
    memory: ExplicitMemory | None,
    heads_K: Array | None,
    masked_KG: Array,
    hide: str,
    window: int,
) -> Array:
    """`attend`, some of whose heads see less; all scores of a block of queries are held."""
    T, H = q_BTKGH.shape[1], q_BTKGH.shape[-1]
    keys, values = concatenate(k_BTKH, v_BTKH, prefix, memory)
    settings = model.config.memory
    constant = 0 if prefix is None else prefix.keys.shape[0]
    slots = keys.shape[1] - T - constant
    outputs = []
    for start in range(0, T, _BLOCK):
        query_T = start + jnp.arange(min(_BLOCK, T - start))
        mask_BTS = visible_mask(query_T, T, prefix, memory, settings.chunk_length, settings.window)
        hides_TS = _hidden_keys(query_T, T, constant, slots, hide, window)
        hidden_KGTS = masked_KG[:, :, None, None] & hides_TS[None, None]
        seen = seen_by_heads(mask_BTS, heads_K, prefix, memory)[:, :, None] & ~hidden_KGTS[None]
        q = q_BTKGH[:, start : start + _BLOCK]
        scores = jnp.einsum("BTKGH,BSKH->BKGTS", q, keys, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(jnp.where(seen, scores * H**-0.5, MASKED), axis=-1)
        outputs.append(jnp.einsum("BKGTS,BSKH->BTKGH", weights.astype(values.dtype), values))
    return jnp.concatenate(outputs, axis=1)


def _hidden_keys(
    query_T: Array, context: int, constant: int, slots: int, hide: str, window: int
) -> Bool[Array, "T keys"]:
    """Which keys, in the order [prefix ; memories ; context], a masked head does not see."""
    key_S = jnp.arange(context)[None]
    far = (query_T[:, None] - key_S >= window) & (key_S > 0) & (hide == "context")
    return jnp.concatenate(
        [
            jnp.zeros((len(query_T), constant), bool),
            jnp.full((len(query_T), slots), hide == "memory"),
            far,
        ],
        axis=1,
    )


# -- for people ------------------------------------------------------------------------------------
def report(scores: HeadScores, chosen: list[tuple[int, int]]) -> dict[str, Any]:
    """The figures as plain JSON values, the ranking from most to least."""
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


def table(found: dict[str, Any], most: int = 40) -> str:
    """The ranking as Markdown."""
    what = "memories hidden from it"
    if found["hide"] == "context":
        what = f"only its last {found['window']} tokens and the beginning seen by it"
    lines = [
        f"{found['checkpoint']} step {found['step']}: loss {found['loss']:.4f} nats a token"
        f" ({found['rows']} rows, {found['tokens']} tokens); by how much it rises, one"
        f" {'key-value' if found['by'] == 'kv' else 'query'} head at a time, {what}",
        "",
        "| rank | layer | head | rise | standard error | chosen |",
        "|---|---|---|---|---|---|",
    ]
    for rank, one in enumerate(found["heads"][:most], 1):
        mark = "yes" if one["chosen"] else ""
        figures = f"{one['increase']:+.5f} | {one['error']:.5f}"
        lines.append(f"| {rank} | {one['layer']} | {one['head']} | {figures} | {mark} |")
    left = len(found["heads"]) - most
    return "\n".join([*lines, *([f"… and {left} more"] if left > 0 else [])])
