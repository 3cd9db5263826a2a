"""Which query finds which memories, and which tokens they shape: literal, by Memory³ §3.5."""

import pytest

from m3jax.inference.retrieval_schedule import Recall, schedule

Q = 64


def recalls(*rows):
    return [Recall(*row) for row in rows]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        (
            1,
            recalls(
                ((0, 1), (0, 64), (1, 65)),
                ((1, 65), (64, 128), (65, 129)),
                ((65, 129), (128, 130), (129, 131)),
            ),
        ),
        (
            63,
            recalls(
                ((0, 63), (0, 126), (63, 127)),
                ((63, 127), (126, 190), (127, 191)),
                ((127, 191), (190, 192), (191, 193)),
            ),
        ),
        (
            64,
            recalls(
                ((0, 64), (0, 127), (64, 128)),
                ((64, 128), (127, 191), (128, 192)),
                ((128, 192), (191, 193), (192, 194)),
            ),
        ),
        (
            65,
            recalls(
                ((0, 64), (0, 64), (65, 65)),
                ((64, 65), (64, 128), (65, 129)),
                ((65, 129), (128, 192), (129, 193)),
                ((129, 193), (192, 194), (193, 195)),
            ),
        ),
        (
            200,
            recalls(
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
    assert schedule(prompt, 130, Q) == expected


@pytest.mark.parametrize("prompt", [1, 63, 64, 65, 200])
@pytest.mark.parametrize("new", [1, 63, 64, 65, 130])
def test_every_token_has_one_recall_and_no_query_sees_what_it_predicts(prompt, new):
    found = schedule(prompt, new, Q)
    fed = [t for recall in found for t in range(*recall.read_by)]
    assert fed == list(range(prompt + new - 1))
    made = [t for recall in found for t in range(*recall.generates)]
    assert made == list(range(prompt, prompt + new))
    for recall in found:
        low, high = recall.generates
        assert low == high or recall.query[1] <= low


def test_the_speed_test_of_the_paper_has_three_recalls():
    """128 tokens in and 128 out: two for the prompt, one after 64 generated tokens (§9)."""
    assert len(schedule(128, 128, Q)) == 3
