"""Which query finds which memories, and which tokens they shape: literal, by Memory³ §3.5."""

import pytest

from m3jax.inference.memory_retrieval import MemoryRetrieval, retrieval_schedule

Q = 64


def retrievals(*rows):
    return [MemoryRetrieval(*row) for row in rows]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        (
            1,
            retrievals(
                ((0, 1), (0, 64), (1, 65)),
                ((1, 65), (64, 128), (65, 129)),
                ((65, 129), (128, 130), (129, 131)),
            ),
        ),
        (
            63,
            retrievals(
                ((0, 63), (0, 126), (63, 127)),
                ((63, 127), (126, 190), (127, 191)),
                ((127, 191), (190, 192), (191, 193)),
            ),
        ),
        (
            64,
            retrievals(
                ((0, 64), (0, 127), (64, 128)),
                ((64, 128), (127, 191), (128, 192)),
                ((128, 192), (191, 193), (192, 194)),
            ),
        ),
        (
            65,
            retrievals(
                ((0, 64), (0, 64), (65, 65)),
                ((64, 65), (64, 128), (65, 129)),
                ((65, 129), (128, 192), (129, 193)),
                ((129, 193), (192, 194), (193, 195)),
            ),
        ),
        (
            200,
            retrievals(
                ((0, 64), (0, 64), (200, 200)),
                ((64, 128), (64, 128), (200, 200)),
                ((128, 192), (128, 192), (200, 200)),
                ((192, 200), (192, 263), (200, 264)),
                ((200, 264), (263, 327), (264, 328)),
                ((264, 328), (327, 329), (328, 330)),
            ),
        ),
    ],
)
def test_130_new_tokens(prompt, expected):
    assert retrieval_schedule(prompt, 130, Q) == expected


@pytest.mark.parametrize("prompt", [1, 63, 64, 65, 200])
@pytest.mark.parametrize("new", [1, 63, 64, 65, 130])
def test_every_token_has_one_retrieval_and_no_query_sees_what_it_predicts(prompt, new):
    found = retrieval_schedule(prompt, new, Q)
    fed = [t for retrieval in found for t in range(*retrieval.read_by)]
    assert fed == list(range(prompt + new - 1))
    made = [t for retrieval in found for t in range(*retrieval.generates)]
    assert made == list(range(prompt, prompt + new))
    for retrieval in found:
        low, high = retrieval.generates
        assert low == high or retrieval.query[1] <= low


def test_the_speed_test_of_the_paper_has_three_retrievals():
    """128 tokens in and 128 out: two for the prompt, one after 64 generated tokens (§9)."""
    assert len(retrieval_schedule(128, 128, Q)) == 3
