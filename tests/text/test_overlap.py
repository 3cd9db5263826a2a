"""The overlap measure against a plain dynamic program written from the definition."""

import numpy as np
import pytest

from m3jax.text.overlap import overlap, which_exceed, which_exceed_either_way


def exceeds(text, reference, threshold):
    """Tests one reference."""
    tokens, length = np.asarray(reference, np.int64)[None], np.array([len(reference)])
    return bool(which_exceed(text, tokens, length, threshold)[0])


def _slow_lcs(t, r):
    best = [0] * (len(r) + 1)
    for token in t:
        previous = best
        best = [0]
        for j, other in enumerate(r):
            longer = previous[j] + 1 if token == other else 0
            best.append(max(longer, previous[j + 1], best[j]))
    return best[-1]


def _slow_overlap(t, r):
    """max N over all i_1: the subsequence lies in t[i_1 … i_1 + 2|r|]."""
    if not len(t) or not len(r):
        return 0.0
    return max(_slow_lcs(t[i : i + 2 * len(r) + 1], r) for i in range(len(t))) / len(r)


@pytest.mark.parametrize("alphabet", [1, 2, 3, 5, 12])
def test_equals_the_slow_definition(alphabet):
    rng = np.random.default_rng(alphabet)
    windowed = 0
    for _ in range(120):
        t = rng.integers(0, alphabet, rng.integers(0, 70))
        r = rng.integers(0, alphabet, rng.integers(0, 9))
        expected = _slow_overlap(t, r)
        assert overlap(t, r) == expected
        assert overlap(t.tolist(), r.tolist()) == expected
        windowed += len(r) > 0 and expected < _slow_lcs(t, r) / len(r)
        for threshold in (0.0, 0.2, 1 / 3, 0.5, 2 / 3, 0.9, 1.0):
            assert exceeds(t, r, threshold) == (expected > threshold)
    assert windowed or alphabet < 3  # the window mattered


@pytest.mark.parametrize("size", [1, 2, 5])
def test_window_edge_is_inclusive(size):
    r = list(range(10, 10 + size + 1))
    for distance in range(size, 4 * size + 4):
        t = [0, *r[:-1], *[0] * (distance - size), r[-1], 0]  # i_N − i_1 = distance
        inside = distance <= 2 * len(r)
        assert overlap(t, r) == (1.0 if inside else size / (size + 1))
        assert exceeds(t, r, 0.99) == inside


def test_edges():
    assert overlap([], [1]) == overlap([1], []) == overlap([], []) == 0.0
    assert not exceeds([], [1], 0.0) and not exceeds([1], [], 0.0)
    assert overlap([1, 2], [1, 9, 9, 2, 9]) == 2 / 5  # r longer than t
    assert overlap([2, 1], [1, 2]) == 1 / 2  # order counts
    assert overlap([0xD800, 70_000, 0x110000 + 5], [0xD800, 0x110000 + 5]) == 1.0
    assert exceeds([1, 2, 3], [1, 2, 3], 0.99) and not exceeds([1, 2, 3], [1, 2, 3], 1.0)


def test_threshold_is_strict_and_rounds_as_the_measure():
    for size in (1, 2, 3, 7, 10, 15, 30):
        r = list(range(size))
        for shared in range(size + 1):
            t = r[:shared] + [999]
            for threshold in (0.1, 0.3, 2 / 3, 0.7, 0.9, shared / size):
                assert exceeds(t, r, threshold) == (overlap(t, r) > threshold)


def test_many_references_with_padding():
    rng = np.random.default_rng(3)
    t = rng.integers(4, 40, 300)
    lengths = rng.integers(0, 21, 60)
    references = np.zeros((60, 20), np.int32)
    for row, length in zip(references, lengths, strict=True):
        start = rng.integers(0, 280)
        row[:length] = t[start : start + length]
        noise = rng.random(length) < rng.choice([0, 0.1, 0.4])
        row[:length][noise] = rng.integers(4, 40, noise.sum())
    expected = [overlap(t, r[:n]) > 0.8 for r, n in zip(references, lengths, strict=True)]
    assert 5 < sum(expected) < 55
    np.testing.assert_array_equal(which_exceed(t, references, lengths, 0.8), expected)
    assert which_exceed(t, references[:0], lengths[:0], 0.8).shape == (0,)


def _adversarial(rng):
    """A text and a reference with repeats, decoys and stretched copies."""
    alphabet = int(rng.integers(1, 9))
    r = rng.integers(0, alphabet, rng.integers(1, 8))
    parts = []
    for kind in rng.choice(["copy", "stretched", "scrambled", "one", "noise"], rng.integers(1, 6)):
        if kind == "copy":
            parts.append(r[rng.integers(0, len(r)) :])
        elif kind == "stretched":  # around the edge of the window
            gap = int(rng.integers(0, 5))
            parts.append(np.stack([r, *[np.full(len(r), 99)] * gap], axis=1).ravel())
        elif kind == "scrambled":  # fills a window with the right tokens in the wrong order
            parts.append(rng.permutation(np.tile(r, 2)))
        elif kind == "one":
            parts.append(np.full(rng.integers(1, 6), r[0]))
        else:
            parts.append(rng.integers(0, alphabet + 3, rng.integers(1, 9)))
    return np.concatenate(parts), r


def test_property_every_threshold_on_and_beside_the_edge():
    rng = np.random.default_rng(11)
    for _ in range(100):
        t, r = _adversarial(rng)
        expected = _slow_overlap(t, r)
        assert overlap(t, r) == expected
        edges = np.arange(len(r) + 1) / len(r)
        for threshold in {*edges, *np.nextafter(edges[1:], 0), *np.nextafter(edges[:-1], 1)}:
            assert exceeds(t, r, threshold) == (expected > threshold), (t, r, threshold)


def test_property_many_references_as_each_alone():
    rng = np.random.default_rng(12)
    for _ in range(10):
        texts, rs = zip(*(_adversarial(rng) for _ in range(7)), strict=True)
        t = np.concatenate(texts)[rng.integers(0, 5) :]
        lengths = np.array([len(r) for r in rs])
        references = rng.integers(0, 9, (7, 9))  # padding that looks like tokens
        for row, r in zip(references, rs, strict=True):
            row[: len(r)] = r
        expected = np.array([_slow_overlap(t, r) for r in rs])
        for threshold in (0.0, 0.5, 2 / 3, 0.9, 1.0):
            found = which_exceed(t, references, lengths, threshold)
            np.testing.assert_array_equal(found, expected > threshold)


def test_the_fullest_window_need_not_be_the_best():
    r = np.arange(20)
    decoy = np.tile(r[::-1], 3)  # every window is full of r's tokens, in the wrong order
    t = np.concatenate([decoy, np.full(60, 99), r[:15], np.full(60, 99), decoy])
    assert overlap(t, r) == 15 / 20
    assert exceeds(t, r, 0.74) and not exceeds(t, r, 0.75)


@pytest.mark.parametrize("width", [254, 255, 256, 300, 1000])
def test_references_with_more_tokens_than_a_byte_numbers(width):
    rng = np.random.default_rng(width)
    r = rng.permutation(width) + 10
    t = np.concatenate([rng.permutation(r), np.full(3 * width, 5), r, r[::-1]])
    t[-2 * width : -width : 4] = 5  # a copy without every fourth token
    shared = width - len(range(0, width, 4))
    # The reversed copy behind it adds at most one token.
    assert shared <= overlap(t, r) * width <= shared + 1
    assert exceeds(t, r, 0.7) and not exceeds(t, r, 0.8)


def test_either_way_is_the_larger_overlap():
    random = np.random.default_rng(5)
    for size in (1, 4, 12, 40):
        t = random.integers(0, 6, size)
        lengths = random.integers(1, 20, 30)
        rs = random.integers(0, 6, (30, 20))
        rows = [r[:n] for r, n in zip(rs, lengths, strict=True)]
        for threshold in (0.0, 0.3, 2 / 3, 1.0):
            expected = [max(overlap(t, r), overlap(r, t)) > threshold for r in rows]
            found = which_exceed_either_way(t, rs, lengths, threshold)
            assert found.tolist() == expected, (size, threshold)
    assert not which_exceed_either_way([], rs, lengths, 0.0).any()
