"""Chooses the references that are worth a memory within a budget, and checks the choice.

The worth of a reference is measured on validation rows (`usefulness`), estimated for all of them
(`worth`), and the choice is checked on validation rows of other documents, where retrieval searches
what was chosen and nothing else: against all references, as many at random, and no memory.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Shaped
from ml_collections import ConfigDict
from tqdm import tqdm

from m3jax.config import PACKED, prefix_tokens, to_json
from m3jax.data.edit import keep_only
from m3jax.data.knowledge import Version, open_version
from m3jax.data.pipeline import Pipeline, open_pipeline, open_rows
from m3jax.data.rows import Rows
from m3jax.evaluation.report import check_reader
from m3jax.evaluation.usefulness import (
    EVERYTHING,
    RowLosses,
    UsefulnessError,
    drops,
    measure,
    row_losses,
)
from m3jax.evaluation.worth import Worth, choose, estimate
from m3jax.model.transformer import Model, Params
from m3jax.text.files import digest, write_atomically
from m3jax.text.layers import live_ids
from m3jax.train.checkpoints import restore_params

FOLDER = "usefulness"  # in report/ of the workdir
_BLOCK = 4096  # references read at a time


@dataclasses.dataclass(frozen=True)
class Options:
    """How much is measured.

    Attributes:
      sample: validation rows in which drops are measured.
      count: training rows, at most, whose retrieved references are counted as well.
      check: validation rows, of other documents, on which the choice is checked.
      draws: random choices it is compared with.
    """

    sample: int = 256
    count: int = 4096
    check: int = 256
    draws: int = 3


def select_references(
    config: ConfigDict,
    workdir: str | Path,
    budget: int,
    *,
    checkpoint: str | Path | None = None,
    version: int | None = None,
    options: Options | None = None,
    dry_run: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Measures, chooses, checks, and makes the choice the current version of the knowledge.

    Writes `report/usefulness/`: `report.json`, `usefulness.png`, and `chosen.jsonl`, the chosen
    references with what they are worth. A measurement that was stopped goes on where it was.

    Args:
      config: a validated config, of the stage that made the checkpoint, with memory.
      workdir: a prepared workdir with a bank.
      budget: bytes that the memories of the chosen references may have together.
      checkpoint: stage folder or `checkpoints/<step>`; default `workdir/<stage>`.
      version: of the knowledge to choose from; default the current one, else with `dry_run`.
      options: how much is measured.
      dry_run: whether no version is made.
      progress: show progress bars.

    Returns:
      The report: counts, what the choice is expected to bring, and `losses` (nats a token) of the
      checked rows with `all` references, those `chosen`, as many at `random`, and `none`.

    Raises:
      UsefulnessError: a budget below one memory, a stage without memory, too little validation
        text, no reference that is found, or none that lowers the loss.
      CheckpointError, BankError, TextError, RetrievalError, VersionError: a part is missing or does
        not fit.
    """
    config, workdir, options = _with_bank(config), Path(workdir), options or Options()
    checkpoint = Path(checkpoint or workdir / config.stage)
    opened = open_version(workdir, version)
    if not dry_run and opened.number != open_version(workdir).number:
        raise UsefulnessError(
            f"version {opened.number} is not the current one; choose from it with --dry_run, or go"
            " back to it first with launch/edit_bank.py rollback"
        )
    pipeline = open_pipeline(config, workdir, split="validation", version=opened)
    params, meta = _restore(config, pipeline, checkpoint)
    bank, references = pipeline.bank, pipeline.references
    assert bank is not None and references is not None
    each = bank.bytes // bank.size
    if budget < each:
        raise UsefulnessError(
            f"--budget_bytes={budget} is less than one memory of this bank has: {each} bytes"
        )
    sample, check = split_rows(pipeline, options.sample, options.check, config.seed)
    losses = RowLosses(config, pipeline.decode)
    identity = {
        "checkpoint": [str(checkpoint.absolute()), meta["step"]],
        "bank": [bank.binding.writer, opened.number, references.fingerprint],
        "config": digest(to_json(config)),
    }
    folder = workdir / "report" / FOLDER
    measured = measure(losses, pipeline, params, sample, folder / "measured", identity, progress)
    found = _estimate(config, workdir, pipeline, measured, options.count, progress)
    live = live_ids(references)
    chosen = choose(found.worth, np.full(len(found.worth), each), budget)
    if not chosen.size:
        raise UsefulnessError(
            f"no reference is expected to lower the loss (on average one changes it by"
            f" {-found.mean:+.4f} nats where it is read): the checkpoint gains nothing from this"
            " knowledge; train it on, or measure more rows with --sample"
        )
    report: dict[str, Any] = {
        "checkpoint": str(checkpoint),
        "step": meta["step"],
        "version": opened.number,
        "shift": config.evaluation.shift,
        "rows": {"measured": len(sample), "checked": len(check)},
        "references": len(live),
        "measured": int((found.measured > 0).sum()),
        "never_found": found.unseen,
        "mean_drop": found.mean,
        "shrinkage": found.shrinkage,
        "bytes_each": int(each),
        "budget": int(budget),
        "chosen": len(chosen),
        "chosen_never_found": int((found.counted[chosen] == 0).sum()),
        "chosen_bytes": int(each * len(chosen)),
        "expected_drop": {
            "all": float(found.worth[live].sum()),
            "chosen": float(found.worth[chosen].sum()),
        },
    }
    report |= _check(config, opened, losses, params, check, live, chosen, options.draws)
    _write(folder, report, found, references, chosen, live)
    if not dry_run:
        said = f"{len(chosen)} of {len(live)} references, by usefulness"
        report["new_version"] = keep_only(config, opened, chosen, note=said).number
    return report


def _with_bank(config: ConfigDict) -> ConfigDict:
    """The config, reading memories of the bank."""
    if config.memory.source == "none":
        raise UsefulnessError(
            f"config.memory.source = 'none': the stage {config.stage!r} reads no memory, so none is"
            " worth anything to it; give the config of a stage that does"
        )
    if config.data.packing in PACKED:
        raise UsefulnessError(
            f"config.data.packing = {config.data.packing!r}: usefulness is measured on text; give"
            " the config of the stage before"
        )
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.memory.source = "precomputed"
    return config


def _restore(
    config: ConfigDict, pipeline: Pipeline, checkpoint: Path
) -> tuple[Params, dict[str, Any]]:
    model = Model(config, prefix_tokens(config))
    tokenizer = pipeline.tokenizer.fingerprint
    params, meta = restore_params(checkpoint, model, tokenizer_fingerprint=tokenizer)
    check_reader(pipeline.bank, meta, checkpoint)
    return params, meta


def split_rows(
    pipeline: Pipeline, sample: int, check: int, seed: int
) -> tuple[Int[np.ndarray, " s"], Int[np.ndarray, " c"]]:
    """Rows to measure on, and rows of other documents to check on, ascending; drawn at random.

    Raises:
      UsefulnessError: fewer than two documents, or numbers below 1.
    """
    if min(sample, check) < 1:
        raise UsefulnessError(f"--sample={sample}, --check={check}: at least one row each")
    assert isinstance(pipeline.rows, Rows)
    document = pipeline.rows.document_of(np.arange(len(pipeline.rows)))
    rng = np.random.default_rng([seed, 0x05EF])
    names = rng.permutation(np.unique(document))
    if len(names) < 2:
        raise UsefulnessError(
            f"the validation text has rows of {len(names)} document; the choice is checked on other"
            " documents than it is made on. Raise config.text.validation_share and prepare again"
        )
    sizes = np.cumsum(np.bincount(document)[names])
    share = sample / (sample + check)
    first = int(np.searchsorted(sizes, share * sizes[-1]))
    first = min(max(first, 1), len(names) - 1)
    sides = []
    for chosen, most in ((names[:first], sample), (names[first:], check)):
        rows = np.flatnonzero(np.isin(document, chosen))
        sides.append(np.sort(rng.permutation(rows)[:most]))
    return sides[0], sides[1]


def _estimate(
    config: ConfigDict,
    workdir: Path,
    pipeline: Pipeline,
    measured: Shaped[np.ndarray, " m"],
    count: int,
    progress: bool,
) -> Worth:
    """Worth from what was measured, and from what training rows find."""
    assert pipeline.references is not None
    _, found, changes = drops(measured)
    if not found.size:
        raise UsefulnessError(
            "no chunk of the measured rows finds any reference: the validation text shares no word"
            " with the knowledge base; prepare again with other --knowledge"
        )
    counted = np.bincount(found, minlength=len(pipeline.references))
    whole = measured[measured["absent"] < 0]
    rows = len(whole)
    if count > 0:
        more, seen = _count(config, workdir, pipeline, count, progress)
        counted, rows = counted + more, rows + seen
    tokens = float(whole["weight"].mean())
    return estimate(found, changes, counted, rows, tokens, live_ids(pipeline.references))


def _count(
    config: ConfigDict, workdir: Path, pipeline: Pipeline, count: int, progress: bool
) -> tuple[Int[np.ndarray, " R"], int]:
    """For every reference how many training rows find it, and of how many; reads no memory."""
    rows = open_rows(config, workdir, "train", pipeline.tokenizer)
    training = Pipeline(
        config,
        rows,
        pipeline.tokenizer,
        pipeline.references,
        pipeline.retriever,
        shift=pipeline.shift,
        batch_rows=pipeline.batch_rows,
    )
    assert pipeline.references is not None
    counted = np.zeros(len(pipeline.references), np.int64)
    chosen = np.sort(np.random.default_rng([config.seed, 0xC0]).permutation(len(rows))[:count])
    size = pipeline.batch_rows
    steps = range(0, len(chosen), size)
    for low in tqdm(steps, desc="counted", unit=" batches", disable=not progress):
        for ids in training.retrieved(chosen[low : low + size]):
            counted[np.unique(ids[ids >= 0])] += 1
    return counted, len(chosen)


def _check(
    config: ConfigDict,
    opened: Version,
    losses: RowLosses,
    params: Params,
    rows: Int[np.ndarray, " n"],
    live: Int[np.ndarray, " m"],
    chosen: Int[np.ndarray, " k"],
    draws: int,
) -> dict[str, Any]:
    """Losses of the checked rows with several choices of references, and their differences."""

    def with_only(ids: Int[np.ndarray, " k"], absent: int = -1) -> np.ndarray:
        removed = np.union1d(opened.removed, np.setdiff1d(live, ids))
        one = dataclasses.replace(opened, number=opened.number + 1, removed=removed)
        pipeline = open_pipeline(config, opened.workdir, split="validation", version=one)
        return row_losses(losses, pipeline, params, rows, absent)

    rng = np.random.default_rng([config.seed, 0xD2])
    everything = with_only(live)
    found = {"all": everything["loss"], "chosen": with_only(chosen)["loss"]}
    drawn = [
        with_only(np.sort(rng.choice(live, len(chosen), replace=False)))["loss"]
        for _ in range(draws)
    ]
    if drawn:
        found["random"] = np.mean(drawn, axis=0)
    found["none"] = with_only(live, EVERYTHING)["loss"]
    pipeline = open_pipeline(config, opened.workdir, split="validation", version=opened)
    assert isinstance(pipeline.rows, Rows)
    document, weight = pipeline.rows.document_of(rows), everything["weight"]
    figures: dict[str, Any] = {"losses": {}, "differences": {}}
    for name, values in found.items():
        figures["losses"][name] = ratio(values, weight, document)
    figures["random_draws"] = [ratio(values, weight, document)[0] for values in drawn]
    for more, less in (("random", "chosen"), ("chosen", "all"), ("none", "chosen")):
        if more in found:
            change = ratio(found[more] - found[less], weight, document)
            figures["differences"][f"{more} - {less}"] = change
    return figures


def ratio(
    values: Float[np.ndarray, " n"], weights: Float[np.ndarray, " n"], groups: Int[np.ndarray, " n"]
) -> tuple[float, float]:
    """Sum of values over sum of weights, and its standard error over groups (linearised)."""
    mean = float(values.sum() / weights.sum())
    _, place = np.unique(groups, return_inverse=True)
    residuals = np.bincount(place, values - mean * weights)
    many = len(residuals)
    if many < 2:
        return mean, float("nan")
    squared = many / (many - 1) * np.square(residuals).sum()
    return mean, float(np.sqrt(squared) / weights.sum())


def _write(
    folder: Path,
    report: dict[str, Any],
    found: Worth,
    references: Any,
    chosen: Int[np.ndarray, " k"],
    live: Int[np.ndarray, " m"],
) -> None:
    from m3jax.evaluation.choice_report import picture  # draws: a slow import

    order = chosen[np.argsort(-found.worth[chosen], kind="stable")]
    lines = []
    for low in range(0, len(order), _BLOCK):
        part = order[low : low + _BLOCK]
        for i, item in zip(part.tolist(), references.read(part), strict=True):
            figures = {"worth": float(found.worth[i]), "error": float(found.error[i])}
            counts = {"measured": int(found.measured[i]), "found": int(found.counted[i])}
            record = {"key": item.key, "title": item.title, **figures, **counts}
            lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    write_atomically(folder / "chosen.jsonl", "".join(lines).encode())
    write_atomically(folder / "report.json", (json.dumps(report, indent=1) + "\n").encode())
    picture(found, live, report, folder / "usefulness.png")
