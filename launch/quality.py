r"""Trains a quality scorer from labelled texts, for `config.clean.quality_min`.

    python launch/quality.py --labelled=labelled.jsonl --scorer=runs/quality
    python launch/prepare.py … --quality=runs/quality \
        --config.clean.enabled --config.clean.quality_min=2

A line of the labelled texts is `{"text": "…", "score": 3}`, with scores from 0 to 5. First a fifth
of them is held out and scored, to see what the scorer is worth; then it learns from all.
"""

from __future__ import annotations

from absl import flags

from m3jax import cli
from m3jax.text.cleaning.quality import LinearScorer, held_out_error, read_labelled

_LABELLED = flags.DEFINE_string("labelled", None, "JSON lines of texts with their scores, 0 … 5.")
_SCORER = flags.DEFINE_string("scorer", None, "Folder to write the scorer to.")
_PENALTY = flags.DEFINE_float(
    "penalty", 0.1, "Ridge penalty; more for fewer or noisier labels.", lower_bound=0.0
)


def main(argv: list[str]) -> None:
    """Measures on held-out texts, then trains on all and saves."""
    texts, scores = read_labelled(str(_LABELLED.value))
    found = held_out_error(texts, scores, _PENALTY.value)
    print(
        f"{found['count']:g} of {len(texts)} texts held out: mean error {found['error']:.3f}"
        f" (always guessing the mean: {found['error_of_mean']:.3f}), correlation"
        f" {found['correlation']:.3f}"
    )
    scorer = LinearScorer.train(texts, scores, _PENALTY.value)
    scorer.save(str(_SCORER.value))
    print(f"{_SCORER.value}: scorer {scorer.fingerprint}")


if __name__ == "__main__":
    cli.run(main, required=["labelled", "scorer"])
