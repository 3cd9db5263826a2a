"""Near-duplicates: estimates against exact Jaccard, the pairs that bands find, and who stays."""

import itertools
import random

import numpy as np
import pytest

from m3jax.errors import TextError
from m3jax.text.cleaning import minhash
from m3jax.text.cleaning.minhash import band_entries, bands_of, compare, groups, merged, signature


def _text(rng, words=200):
    return " ".join(f"w{rng.randrange(5000)}" for _ in range(words))


def _changed(rng, text, share):
    return " ".join(f"c{rng.random()}" if rng.random() < share else w for w in text.split())


def _jaccard(a, b):
    sets = []
    for text in (a, b):
        words = text.casefold().replace(".", " ").split()
        sets.append({tuple(words[i : i + 5]) for i in range(len(words) - 4)})
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def test_estimates_are_near_the_exact_similarity():
    rng = random.Random(0)
    errors = []
    for share in np.linspace(0, 0.2, 40):
        text = _text(rng)
        other = _changed(rng, text, share)
        exact = _jaccard(text, other)
        estimate = np.mean(signature(text, 256, 5) == signature(other, 256, 5))
        errors.append((estimate - exact) / max(np.sqrt(exact * (1 - exact) / 256), 1 / 256))
    assert np.max(np.abs(errors)) < 4 and abs(np.mean(errors)) < 0.6
    assert np.mean(signature(_text(rng), 256, 5) == signature(_text(rng), 256, 5)) < 0.02


def test_case_and_signs_do_not_matter_but_short_texts_differ():
    one, two = signature("A b, c. D e f!", 64, 5), signature("a b c d e f", 64, 5)
    assert np.array_equal(one, two)
    assert np.array_equal(signature("Hi there", 64, 5), signature("hi, there", 64, 5))
    for other in ("hi", "?!", "!?"):
        assert not np.array_equal(signature("hi there", 64, 5), signature(other, 64, 5))
    assert not np.array_equal(signature("?!", 64, 5), signature("!?", 64, 5))


@pytest.mark.parametrize("similarity", [0.3, 0.6, 0.8, 0.95, 1.0])
def test_bands_find_pairs_at_the_threshold(similarity):
    bands, rows = bands_of(similarity, 128)
    assert bands * rows <= 128
    assert 1 - (1 - similarity**rows) ** bands >= 0.97
    if rows < 128:  # the longest such bands: the fewest pairs that are far apart
        longer = rows + 1
        assert 1 - (1 - similarity**longer) ** (128 // longer) < 0.97


def _corpus(seed=1):
    """60 texts of which some repeat earlier ones, changed a little."""
    rng = random.Random(seed)
    texts = []
    for i in range(60):
        texts.append(_changed(rng, rng.choice(texts), 0.01) if i % 3 == 2 else _text(rng))
    return np.stack([signature(text, 128, 5) for text in texts])


def _brute_force(signatures, similarity):
    witnesses = {}
    for a, b in itertools.combinations(range(len(signatures)), 2):
        if np.mean(signatures[a] == signatures[b]) >= similarity:
            witnesses.setdefault(b, a)
    return witnesses


def test_finds_what_comparing_all_pairs_finds_in_any_number_of_parts():
    signatures = _corpus()
    numbers = np.arange(60, dtype=np.uint64)
    entries = band_entries(signatures, numbers, 0.8)
    wanted = _brute_force(signatures, 0.8)
    assert len(wanted) > 10
    whole = compare(entries, lambda n: signatures[n], 0.8)
    assert dict(zip(whole["number"].tolist(), whole["witness"].tolist(), strict=True)) == wanted
    thirds = np.quantile(entries["key"].astype(float), [1 / 3, 2 / 3]).astype(np.uint64)
    parts = np.split(entries, np.searchsorted(entries["key"], thirds))
    assert min(map(len, parts)) > 0
    again = merged([compare(part, lambda n: signatures[n], 0.8) for part in parts])
    assert np.array_equal(again, whole)


def test_only_an_earlier_document_takes_out_a_later_one():
    text = _text(random.Random(5))
    signatures = np.stack([signature(text, 128, 5)] * 50)
    numbers = np.arange(100, 150, dtype=np.uint64)
    found = compare(
        band_entries(signatures, numbers, 0.8), lambda n: signatures[n - 100], similarity=0.8
    )
    assert found["number"].tolist() == list(range(101, 150))
    assert set(found["witness"].tolist()) == {100} and set(found["similarity"].tolist()) == {1.0}


def test_groups_of_keys():
    entries = np.array([(5, 9), (3, 1), (5, 2), (4, 4), (3, 1), (5, 2)], minhash.ENTRY)
    assert [group.tolist() for group in groups(entries)] == [[1], [2, 9]]
    assert list(groups(np.empty(0, minhash.ENTRY))) == []
    assert len(merged([])) == 0


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "rensa", None)
    with pytest.raises(ValueError, match=r"need rensa: pip install -e '\.\[clean\]'"):
        signature("a", 64, 5)


def test_a_result_that_is_missing_is_no_empty_one(tmp_path):
    parts = [(0, 2), (1, 2)]
    np.save(tmp_path / "00000-00002.npy", np.arange(3))
    with pytest.raises(TextError, match="00001-00002.npy is missing"):
        minhash.results(tmp_path, parts, ".npy")
    np.save(tmp_path / "00001-00002.npy", np.arange(2))
    assert [len(x) for x in minhash.results(tmp_path, parts, ".npy")] == [3, 2]
