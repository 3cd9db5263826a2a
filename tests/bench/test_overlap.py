"""The benchmark of the overlap filter: what its made text is like, and that it measures."""

import numpy as np
import pytest
from data.data_workdir import tiny_config, write_text

from m3jax.bench import overlap as bench_overlap
from m3jax.retrieval.build import build_index
from m3jax.retrieval.embed import make_embedder
from m3jax.text.overlap import overlap
from m3jax.text.prepare import prepare_text
from m3jax.text.references import References


@pytest.mark.parametrize("length", [512, 2048])
def test_made_pairs_are_like_retrieved_ones(length):
    """Shares of copies and of pairs that the cheap bounds leave, within those of real text."""
    pairs = bench_overlap.made_pairs(length, 3)
    measured, occurring = [], []
    for text, references, lengths in pairs:
        assert text.shape == (length,)
        assert references.shape == (length // 64 * 16, 128) and lengths.max() <= 128
        for reference, n in zip(references[::5], lengths[::5], strict=True):
            measured.append(overlap(text, reference[:n]))
            occurring.append(np.isin(reference[:n], text).mean())
    measured, occurring = np.array(measured), np.array(occurring)
    assert 0.15 < np.median(measured) < 0.3
    assert 0.06 < (measured > 0.9).mean() < 0.35
    assert ((measured > 0.3) & (measured <= 0.9)).any()  # edited copies
    assert 0.4 < np.median(occurring) < 0.8


def test_it_measures_both_and_repeats_its_text():
    result, again = (next(bench_overlap.overlap(rows=1)) for _ in range(2))
    assert set(result) == {"ratios", "pairs_per_second", "shares"}
    assert all(0 < ratio < 1 for ratio in result["ratios"].values())
    assert min(result["pairs_per_second"].values()) > 0
    assert result["shares"] == again["shares"]


def test_it_measures_a_prepared_folder(tmp_path):
    config = tiny_config()
    prepare_text(config, tmp_path, *write_text(tmp_path), say=lambda line: None)
    references = References(tmp_path / "references")
    build_index(references, make_embedder(config), tmp_path / "index", config)
    made = next(bench_overlap.overlap(rows=1))["shares"]
    assert next(bench_overlap.overlap(rows=1, workdir=tmp_path))["shares"] != made
