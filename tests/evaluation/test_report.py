"""The table of an evaluation."""

from pathlib import Path

from m3jax.evaluation.report import losses_table

ROOT = Path(__file__).parents[2]


def _report(**retrieval):
    losses = {f"{name}_{mode}": 1.5 for name in ("loss", "accuracy") for mode in ("memory", "none")}
    described = {"checkpoint": "runs/x", "step": 7, "rows": 3, "shift": 1, "overlap": 0.5}
    return {**described, **losses, "retrieval": retrieval}


def test_the_table_says_what_the_overlap_filter_dropped():
    shown = losses_table(
        _report(searched=40, returned=30, dropped=10, unfilled=2, dropped_share=0.25)
    )
    assert (
        "searched with the chunk before (shift 1); 25.0% of the references found that overlap with"
        " the whole row (also what is still to come), or it with them, above 0.5 were dropped;"
        " 40 searches, 2 places empty"
    ) in shown
    assert "dropped" not in losses_table(_report(chunks=4))


def test_every_table_of_searched_references_says_how_they_were_searched():
    """Each module that searches and makes a table calls `search_note`, or filters nothing."""
    searching = ("open_pipeline(", "open_retriever(", "session.retriever", ".retrieve(")
    silent = set()
    for path in sorted((ROOT / "m3jax" / "evaluation").rglob("*.py")):
        text = path.read_text("utf-8")
        if "_table(" in text and any(word in text for word in searching):
            silent |= set() if "search_note(" in text else {path.name}
    assert silent == {"leakage.py"}  # its table is about the filter
