"""Chooses the references that are worth a memory within a budget, and checks the choice.

The worth of a reference is measured on validation rows (`memory_value`), estimated for all of them
(`budget`), and the choice is checked on validation rows of other documents, where retrieval
searches what was chosen and nothing else: against all references, as many at random, and no memory.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, Shaped
from ml_collections import ConfigDict
from tqdm import tqdm

from m3jax.checkpoint import checkpoint_folder, restore_params
from m3jax.config import PACKED, prefix_tokens, to_json
from m3jax.data.pipeline import Pipeline, open_pipeline, open_rows
from m3jax.errors import UsefulnessError
from m3jax.files import digest, write_atomically
from m3jax.knowledge.edit import keep_only
from m3jax.knowledge.memory_writer import check_reader
from m3jax.knowledge.versions import Version, open_version
from m3jax.make_model import make_model
from m3jax.model.parameters import Params
from m3jax.selection.budget import WorthEstimates, choose, estimate
from m3jax.selection.memory_value import RowLosses, drops, measure_drops
from m3jax.selection.validate import check_choice, split_rows

FOLDER = "usefulness"  # in report/ of the workdir
_BLOCK = 4096  # references read at a time


@dataclass(frozen=True)
class Options:
    """Numbers of rows and draws to measure with.

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
      options: numbers of rows and draws.
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
    each = bank.bytes // bank.size  # bytes of a memory
    if budget < each:
        raise UsefulnessError(
            f"--budget_bytes={budget} is less than one memory of this bank has: {each} bytes"
        )
    sample, check = split_rows(pipeline, options.sample, options.check, config.seed)
    losses = RowLosses(config, pipeline.dequantize)
    identity = _identity(config, pipeline, opened, checkpoint, meta["step"])
    folder = workdir / "report" / FOLDER
    measured = measure_drops(
        losses, pipeline, params, sample, folder / "measured", identity, progress
    )
    estimates = _estimate(config, workdir, pipeline, measured, options.count, progress)
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
        "rows": {"measured": len(sample), "checked": len(check)},
        **_expected(estimates, live, chosen, budget, each),
    }
    report |= check_choice(config, opened, losses, params, check, live, chosen, options.draws)
    _write(folder, report, estimates, references, chosen, live)
    if not dry_run:
        said = f"{len(chosen)} of {len(live)} references, by usefulness"
        report["new_version"] = keep_only(config, opened, chosen, note=said).number
    return report


def _identity(
    config: ConfigDict, pipeline: Pipeline, version: Version, checkpoint: Path, step: int
) -> dict[str, Any]:
    """Returns all that measured drops depend on."""
    bank, references = pipeline.bank, pipeline.references
    assert bank is not None and references is not None
    return {
        "checkpoint": [str(checkpoint.absolute()), step, _age(checkpoint)],
        "corpus": pipeline.rows.corpus.fingerprint,
        "bank": [bank.binding.writer, version.number, references.fingerprint],
        "config": digest(to_json(config)),
    }


def _with_bank(config: ConfigDict) -> ConfigDict:
    """Returns the config, reading memories of the bank."""
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
    model = make_model(config, prefix_tokens(config))
    tokenizer = pipeline.tokenizer.fingerprint
    params, meta = restore_params(checkpoint, model, tokenizer_fingerprint=tokenizer)
    check_reader(pipeline.bank, meta, checkpoint)
    return params, meta


def _age(checkpoint: Path) -> int:
    """Returns the time of writing: an earlier checkpoint may have had the same path and step."""
    return checkpoint_folder(checkpoint).stat().st_mtime_ns


def _estimate(
    config: ConfigDict,
    workdir: Path,
    pipeline: Pipeline,
    measured: Shaped[np.ndarray, " m"],
    count: int,
    progress: bool,
) -> WorthEstimates:
    """WorthEstimates from what was measured, and from what training rows find."""
    assert pipeline.references is not None
    _, references, changes = drops(measured)
    if not references.size:
        raise UsefulnessError(
            "no chunk of the measured rows finds any reference: the validation text shares no word"
            " with the knowledge base; prepare again with other --knowledge"
        )
    counted = np.bincount(references, minlength=len(pipeline.references))
    whole = measured[measured["absent"] < 0]
    rows = len(whole)
    if count > 0:
        more, seen = _count(config, workdir, pipeline, count, progress)
        counted, rows = counted + more, rows + seen
    tokens = float(whole["weight"].mean())
    return estimate(references, changes, counted, rows, tokens, pipeline.references.live)


def _count(
    config: ConfigDict, workdir: Path, pipeline: Pipeline, count: int, progress: bool
) -> tuple[Int[np.ndarray, " R"], int]:
    """Counts the training rows that find each reference, and all of them; reads no memory."""
    rows = open_rows(config, workdir, "train", pipeline.tokenizer)
    training = Pipeline(
        config,
        rows,
        pipeline.tokenizer,
        pipeline.references,
        pipeline.retriever,
        shift=pipeline.shift,
        batch_size=pipeline.batch_size,
    )
    assert pipeline.references is not None
    counted = np.zeros(len(pipeline.references), np.int64)
    chosen = np.sort(np.random.default_rng([config.seed, 0xC0]).permutation(len(rows))[:count])
    size = pipeline.batch_size
    steps = range(0, len(chosen), size)
    for low in tqdm(steps, desc="counted", unit=" batches", disable=not progress):
        for ids in training.retrieved(chosen[low : low + size]):
            counted[np.unique(ids[ids >= 0])] += 1
    return counted, len(chosen)


def _expected(
    estimates: WorthEstimates,
    live: Int[np.ndarray, " m"],
    chosen: Int[np.ndarray, " k"],
    budget: int,
    each: int,
) -> dict[str, Any]:
    """Returns counts, and the drop of the loss that the chosen references should bring."""
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
    from m3jax.selection.report import choice_picture  # draws: a slow import

    order = chosen[np.argsort(-estimates.worth[chosen], kind="stable")]
    lines = []
    for low in range(0, len(order), _BLOCK):
        part = order[low : low + _BLOCK]
        for i, item in zip(part.tolist(), references.read(part), strict=True):
            figures = {"worth": float(estimates.worth[i]), "error": float(estimates.error[i])}
            counts = {"measured": int(estimates.measured[i]), "found": int(estimates.counted[i])}
            record = {"key": item.key, "title": item.title, **figures, **counts}
            lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    write_atomically(folder / "chosen.jsonl", "".join(lines).encode())
    write_atomically(folder / "report.json", (json.dumps(report, indent=1) + "\n").encode())
    choice_picture(estimates, live, report, folder / "usefulness.png")
