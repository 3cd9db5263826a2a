"""Evaluates a checkpoint by its losses, and tabulates them."""

from __future__ import annotations

from typing import Any

from m3jax.data.pipeline import open_pipeline
from m3jax.errors import ConfigError
from m3jax.inference.session import Session
from m3jax.knowledge.memory_writer import check_reader
from m3jax.train.evaluator import MODES, LossEvaluator
from m3jax.train.metrics import retrieval_shares


def evaluate_losses(session: Session) -> dict[str, Any]:
    """Measures losses on the validation corpus with the session's bank and version of knowledge.

    Returns the figures of `LossEvaluator`, with `wrong_hidden`, its `hidden`, if it is not 0;
    `checkpoint`, `step`, `shift`, `overlap`, `rows`, `bank_version`; and `retrieval`, counters of
    the search.

    Raises:
      ConfigError: rows of preference pairs, which have no loss per token.
      BankError, TextError, RetrievalError, VersionError: a part is missing or does not fit.
    """
    config, checkpoint = session.config, session.checkpoint
    if config.data.packing == "pairs":
        raise ConfigError(
            f"config.data.packing = 'pairs': pairs have no loss a token. Evaluate {checkpoint} with"
            f" the config of another stage and --checkpoint={checkpoint}; metrics.jsonl has what it"
            " gained"
        )
    bank, version = session.bank_folder, session.version_number
    pipeline = open_pipeline(
        config, session.workdir, split="validation", bank=bank, version=version
    )
    check_reader(pipeline.bank, session.meta, checkpoint)
    evaluator = LossEvaluator(config, pipeline)
    losses = evaluator(session.params)
    counts = dict(pipeline.report())
    counts.pop("bank_read_p99", None)  # a time, not a figure of the checkpoint
    report: dict[str, Any] = {
        "checkpoint": str(checkpoint),
        "step": session.meta["step"],
        "shift": config.evaluation.shift,
        "overlap": config.retrieval.overlap_evaluation,
        "rows": evaluator.rows,
        "bank_version": None if pipeline.version is None else pipeline.version.number,
        **losses,
        "retrieval": {**counts, **retrieval_shares(counts)},
    }
    if evaluator.hidden:
        report["wrong_hidden"] = evaluator.hidden
    return report


ROW = "the whole row (also what is still to come)"
SHIFTS = ("a chunk's own text (shift 0)", "the chunk before (shift 1)")


def search_note(query: str, text: str, overlap: float, dropped: float | None = None) -> str:
    """Returns the sentence of a table about its search and the filter of overlaps (Memory³ §6.1).

    Args:
      query: names the text that was searched with.
      text: names the text that references are compared with.
      overlap: limit of the overlap; 1 drops none.
      dropped: share of the references found that were dropped; None if the table has it elsewhere.
    """
    if overlap >= 1:
        return f"searched with {query}; no reference is dropped for overlap"
    share = "" if dropped is None else f"{dropped:.1%} of the "
    return (
        f"searched with {query}; {share}references found that overlap with {text}, or it with them,"
        f" above {overlap:.3g} were dropped"
    )


def losses_table(report: dict[str, Any]) -> str:
    """Returns the report of `evaluate_losses` as a Markdown table."""
    names = {"memory": "with memory", "none": "without", "wrong": "wrong memories"}
    lines = [
        f"{report['checkpoint']} at step {report['step']}, {report['rows']} validation rows",
        "",
        "| memories | loss (nats a token) | accuracy |",
        "|---|---|---|",
    ]
    for mode in (mode for mode in MODES if f"loss_{mode}" in report):
        loss, key = report[f"loss_{mode}"], f"accuracy_{mode}"
        lines.append(f"| {names[mode]} | {loss:.4f} | {report[key]:.4f} |")
    if "wrong_hidden" in report:
        lines += [
            "",
            f"{report['wrong_hidden']:.1%} of the wrong memories were hidden: the row retrieves"
            f" them"
            " itself, so that it reads fewer than with memory",
        ]
    counts = report["retrieval"]
    if "dropped_share" in counts:
        note = search_note(SHIFTS[report["shift"]], ROW, report["overlap"], counts["dropped_share"])
        lines += ["", f"{note}; {counts['searched']} searches, {counts['unfilled']} places empty"]
    return "\n".join(lines)
