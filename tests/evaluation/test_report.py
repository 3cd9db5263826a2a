"""The table of an evaluation."""

from m3jax.evaluation.report import losses_table


def _report(**retrieval):
    losses = {f"{name}_{mode}": 1.5 for name in ("loss", "accuracy") for mode in ("memory", "none")}
    described = {"checkpoint": "runs/x", "step": 7, "rows": 3, "shift": 1}
    return {**described, **losses, "retrieval": retrieval}


def test_the_table_says_what_the_overlap_filter_dropped():
    shown = losses_table(
        _report(searched=40, returned=30, dropped=10, unfilled=2, dropped_share=0.25)
    )
    assert "40 chunks searched; 25.0% of the references found dropped" in shown
    assert "2 places left empty" in shown
    assert "dropped" not in losses_table(_report(chunks=4))
