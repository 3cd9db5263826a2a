"""Selects the references whose memories lower the loss most within a budget of bytes.

The worth of a reference is measured on validation rows (`memory_value`) and estimated for all
references (`budget`). The selection is validated on rows of other validation documents: their loss
with retrieval from the selected references only is compared with the loss with all references, with
as many random references, and without memories.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Shaped
from ml_collections import ConfigDict
from tqdm import tqdm

from m3jax.checkpoint import restore_params
from m3jax.checkpoint_folder import named_checkpoint
from m3jax.config import PACKED, prefix_tokens, to_json
from m3jax.data.pipeline import Pipeline, open_pipeline, open_rows
from m3jax.data.rows import Rows
from m3jax.errors import UsefulnessError
from m3jax.files import digest, json_text, write_atomically
from m3jax.knowledge.edit import keep_only, open_to_select
from m3jax.knowledge.memory_writer import check_reader
from m3jax.knowledge.versions import Version, open_version
from m3jax.make_model import make_model
from m3jax.memory.binding import weights_fingerprint
from m3jax.model.parameters import Params
from m3jax.selection.budget import WorthEstimates, choose, estimate
from m3jax.selection.memory_value import (
    EVERYTHING,
    NOTHING,
    RowLosses,
    drops,
    measure_drops,
    row_losses,
)

FOLDER = "usefulness"  # folder in report/ of the workdir
_BLOCK = 4096  # references read at once


def select_references(
    config: ConfigDict,
    workdir: str | Path,
    budget: int,
    *,
    checkpoint: str | Path | None = None,
    version: int | None = None,
    sample: int = 256,
    count: int = 4096,
    check: int = 256,
    draws: int = 3,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Selects references within a budget, validates the selection and commits it as a new version.

    Writes `report/usefulness/`: `report.json`, `usefulness.png`, and `chosen.jsonl`, the chosen
    references with their estimates. An interrupted measurement resumes.

    Args:
      config: a validated config with memory, of the stage that made the checkpoint.
      workdir: a prepared workdir with a bank.
      budget: most bytes that the memories of the chosen references take together.
      checkpoint: stage folder or `checkpoints/<step>`; default `workdir/<stage>`.
      version: version of the knowledge to choose from; default the current one. Older versions need
        `dry_run`.
      sample: number of validation rows in which drops of the loss are measured.
      count: most training rows whose retrieved references are counted as well.
      check: number of validation rows, of other documents, on which the choice is validated.
      draws: number of random choices to compare with.
      dry_run: make no new version.

    Returns:
      The report: counts, the expected drops of the loss, and `losses` (nats per token, with
      standard errors) of the validation rows with `all` references, the `chosen` ones, as many at
      `random`, and `none`.

    Raises:
      UsefulnessError: a budget below one memory; a stage without memory, or with packed rows; a
        version that is not the current one, without `dry_run`; `sample` or `check` below 1; fewer
        than two validation documents; no reference that is retrieved, or none that lowers the loss.
      CheckpointError, BankError, TextError, RetrievalError, VersionError: a part is missing or does
        not fit.
    """
    config, workdir = _with_bank(config), Path(workdir)
    checkpoint = named_checkpoint(checkpoint, workdir, config.stage)
    current = open_to_select(workdir)
    opened = current if version is None else open_version(workdir, version)
    if not dry_run and opened.number != current.number:
        raise UsefulnessError(
            f"version {opened.number} is not the current one; choose from it with --dry_run, or go"
            " back to it first with launch/edit_bank.py rollback"
        )
    pipeline = open_pipeline(config, workdir, split="validation", version=opened)
    model, tokenizer = make_model(config, prefix_tokens(config)), pipeline.tokenizer.fingerprint
    params, meta = restore_params(checkpoint, model, tokenizer_fingerprint=tokenizer)
    check_reader(pipeline.bank, meta, checkpoint)
    bank, references = pipeline.bank, pipeline.references
    assert bank is not None and references is not None
    each = bank.bytes // bank.size  # bytes of a memory
    if budget < each:
        raise UsefulnessError(
            f"--budget_bytes={budget} is less than one memory of this bank has: {each} bytes"
        )
    measured_rows, checked_rows = split_rows(pipeline, sample, check, config.seed)
    losses = RowLosses(config, pipeline.dequantize)
    identity = {
        "weights": weights_fingerprint(params),
        "ingredients": pipeline.ingredients,
        "config": digest(to_json(config)),
    }
    folder = workdir / "report" / FOLDER
    measured = measure_drops(losses, pipeline, params, measured_rows, folder / "measured", identity)
    estimates = _estimate(config, workdir, pipeline, measured, count)
    live = references.live
    chosen = choose(estimates.worth, np.full(len(estimates.worth), each), budget, config.seed)
    if not chosen.size:
        raise UsefulnessError(
            f"no reference is expected to lower the loss (on average one changes it by"
            f" {-estimates.mean:+.4f} nats where it is read): the checkpoint gains nothing from"
            " this knowledge; train it on, or measure more rows with --sample"
        )
    report = {
        "checkpoint": str(checkpoint),
        "step": meta["step"],
        "version": opened.number,
        "shift": config.evaluation.shift,
        "rows": {"measured": len(measured_rows), "checked": len(checked_rows)},
        **_expected(estimates, live, chosen, budget, each),
    }
    report |= _check_choice(config, opened, losses, params, checked_rows, live, chosen, draws)
    _write(folder, report, estimates, references, chosen, live)
    if not dry_run:
        note = f"{len(chosen)} of {len(live)} references, by usefulness"
        report["new_version"] = keep_only(config, opened, chosen, note=note).number
    return report


def _with_bank(config: ConfigDict) -> ConfigDict:
    """Returns a copy of the config that reads memories from the bank.

    Raises `UsefulnessError` for a stage without memory and for packed rows.
    """
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


def _estimate(
    config: ConfigDict,
    workdir: Path,
    pipeline: Pipeline,
    measured: Shaped[np.ndarray, " m"],
    count: int,
) -> WorthEstimates:
    """Estimates the worth of references from measured drops and the retrievals of training rows."""
    assert pipeline.references is not None
    _, references, changes = drops(measured)
    if not references.size:
        raise UsefulnessError(
            "no chunk of the measured rows finds any reference: the validation text shares no word"
            " with the knowledge base; prepare again with other --knowledge"
        )
    counted = np.bincount(references, minlength=len(pipeline.references))
    whole = measured[measured["absent"] == NOTHING]
    rows = len(whole)
    if count > 0:
        more, seen = _count(config, workdir, pipeline, count)
        counted, rows = counted + more, rows + seen
    tokens = float(whole["weight"].mean())
    return estimate(references, changes, counted, rows, tokens, pipeline.references.live)


def _count(
    config: ConfigDict, workdir: Path, pipeline: Pipeline, count: int
) -> tuple[Int[np.ndarray, " R"], int]:
    """Counts the training rows that retrieve each reference, and the rows; reads no memories."""
    references, size = pipeline.references, pipeline.batch_size
    assert references is not None
    rows = open_rows(config, workdir, "train", pipeline.tokenizer)
    parts = rows, pipeline.tokenizer, references, pipeline.retriever
    training = Pipeline(config, *parts, shift=pipeline.shift, batch_size=size)
    counted = np.zeros(len(references), np.int64)
    chosen = np.sort(np.random.default_rng([config.seed, 0xC0]).permutation(len(rows))[:count])
    steps = range(0, len(chosen), size)
    for low in tqdm(steps, desc="counted", unit=" batches"):
        for ids in training.retrieved(chosen[low : low + size]):
            counted[np.unique(ids[ids >= 0])] += 1
    return counted, len(chosen)


def split_rows(
    pipeline: Pipeline, sample: int, check: int, seed: int
) -> tuple[Int[np.ndarray, " s"], Int[np.ndarray, " c"]]:
    """Draws rows to measure on, and rows of other documents to validate on, both ascending.

    Raises `UsefulnessError` for fewer than two documents, or `sample` or `check` below 1.
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


def _check_choice(
    config: ConfigDict,
    opened: Version,
    losses: RowLosses,
    params: Params,
    rows: Int[np.ndarray, " n"],
    live: Int[np.ndarray, " m"],
    chosen: Int[np.ndarray, " k"],
    draws: int,
) -> dict[str, Any]:
    """Measures the losses of validation rows that retrieve from different sets of references.

    Returns `losses` with `all` live references, the `chosen` ones, as many `random` ones (mean of
    the draws) and `none`, and `differences` between them, each in nats per token with its standard
    error over documents; and `random_draws`, the loss of each draw in nats per token.
    """

    def with_only(ids: Int[np.ndarray, " k"], absent: int = NOTHING) -> np.ndarray:
        """Returns `MEASURED` records of the rows, with only `ids` in the knowledge."""
        removed = np.union1d(opened.tombstones, np.setdiff1d(live, ids))
        version = dataclasses.replace(opened, number=opened.number + 1, tombstones=removed)
        pipeline = open_pipeline(config, opened.workdir, split="validation", version=version)
        return row_losses(losses, pipeline, params, rows, absent)

    rng = np.random.default_rng([config.seed, 0xD2])
    everything = with_only(live)
    by_choice = {"all": everything["loss"], "chosen": with_only(chosen)["loss"]}
    drawn = [
        with_only(np.sort(rng.choice(live, len(chosen), replace=False)))["loss"]
        for _ in range(draws)
    ]
    if drawn:
        by_choice["random"] = np.mean(drawn, axis=0)
    by_choice["none"] = with_only(live, EVERYTHING)["loss"]
    pipeline = open_pipeline(config, opened.workdir, split="validation", version=opened)
    assert isinstance(pipeline.rows, Rows)
    document, weight = pipeline.rows.document_of(rows), everything["weight"]
    figures: dict[str, Any] = {"losses": {}, "differences": {}}
    for name, values in by_choice.items():
        figures["losses"][name] = ratio(values, weight, document)
    figures["random_draws"] = [ratio(values, weight, document)[0] for values in drawn]
    for more, less in (("random", "chosen"), ("chosen", "all"), ("none", "chosen")):
        if more in by_choice:
            change = ratio(by_choice[more] - by_choice[less], weight, document)
            figures["differences"][f"{more} - {less}"] = change
    return figures


def ratio(
    values: Float[np.ndarray, " n"], weights: Float[np.ndarray, " n"], groups: Int[np.ndarray, " n"]
) -> tuple[float, float]:
    """Returns the sum of values over the sum of weights, and its standard error over groups.

    The standard error treats groups as independent; it is NaN for a single group.
    """
    mean = float(values.sum() / weights.sum())
    _, place = np.unique(groups, return_inverse=True)
    residuals = np.bincount(place, values - mean * weights)
    many = len(residuals)
    if many < 2:
        return mean, float("nan")
    squared = many / (many - 1) * np.square(residuals).sum()
    return mean, float(np.sqrt(squared) / weights.sum())


def _expected(
    estimates: WorthEstimates,
    live: Int[np.ndarray, " m"],
    chosen: Int[np.ndarray, " k"],
    budget: int,
    each: int,
) -> dict[str, Any]:
    """Returns the part of the report with counts of references and expected drops of the loss."""
    return {
        "references": len(live),
        "measured": int((estimates.measured > 0).sum()),
        "never_found": estimates.unseen,
        "mean_drop": estimates.mean,
        "shrinkage": estimates.shrinkage,
        "bytes_each": int(each),
        "budget": int(budget),
        "chosen": len(chosen),
        "chosen_never_found": int((estimates.counted[chosen] == 0).sum()),
        "chosen_bytes": int(each * len(chosen)),
        "expected_drop": {
            "all": float(estimates.worth[live].sum()),
            "chosen": float(estimates.worth[chosen].sum()),
        },
    }


def _write(
    folder: Path,
    report: dict[str, Any],
    estimates: WorthEstimates,
    references: Any,
    chosen: Int[np.ndarray, " k"],
    live: Int[np.ndarray, " m"],
) -> None:
    """Writes the chosen references, the report and the plot."""
    from m3jax.selection.report import choice_picture  # imports matplotlib, which is slow

    order, lines = chosen[np.argsort(-estimates.worth[chosen], kind="stable")], []
    columns = {name: getattr(estimates, name) for name in ("worth", "error", "measured")}
    columns["found"] = estimates.counted
    for low in range(0, len(order), _BLOCK):
        part = order[low : low + _BLOCK]
        for i, item in zip(part.tolist(), references.read(part), strict=True):
            figures = {name: values[i].item() for name, values in columns.items()}
            record = {"key": item.key, "title": item.title, **figures}
            lines.append(json_text(record, ensure_ascii=False) + "\n")
    write_atomically(folder / "chosen.jsonl", "".join(lines).encode())
    write_atomically(folder / "report.json", (json_text(report, indent=1) + "\n").encode())
    choice_picture(estimates, live, report, folder / "usefulness.png")
