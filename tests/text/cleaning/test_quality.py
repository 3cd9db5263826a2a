"""The learned quality score: it learns, is saved and used again, and refuses what it cannot use."""

import json
import random

import numpy as np
import pytest

from m3jax.errors import TextError
from m3jax.text.cleaning.quality import (
    LinearScorer,
    Scorer,
    held_out_error,
    load_scorer,
    read_labelled,
)

GOOD = ["theorem", "therefore", "because", "energy", "evidence", "proof", "measured", "history"]
POOR = ["click", "buy", "cheap", "casino", "subscribe", "free", "offer", "login", "cookie"]


def _labelled(count, seed=0):
    rng = random.Random(seed)
    texts, scores = [], []
    for _ in range(count):
        score = rng.randrange(6)
        texts.append(
            " ".join(rng.choice(GOOD if rng.random() < score / 5 else POOR) for _ in range(80))
        )
        scores.append(float(score))
    return texts, scores


@pytest.mark.slow
def test_learns_is_saved_and_scores_the_same_again(tmp_path):
    texts, scores = _labelled(200)
    scorer = LinearScorer.train(texts, scores)
    assert isinstance(scorer, Scorer)
    new, wanted = _labelled(60, seed=1)
    found = scorer.score(new)
    assert np.corrcoef(found, wanted)[0, 1] > 0.9 and np.abs(found - wanted).mean() < 0.7
    assert found.min() >= 0 and found.max() <= 5
    scorer.save(tmp_path / "s")
    loaded = load_scorer(str(tmp_path / "s"))
    assert loaded.fingerprint == scorer.fingerprint
    assert np.array_equal(loaded.score(new), found)
    assert np.array_equal(np.concatenate([loaded.score([t]) for t in new]), found)
    assert LinearScorer.train(texts, scores).fingerprint == scorer.fingerprint
    other = LinearScorer.train(texts, scores[::-1])
    assert other.fingerprint != scorer.fingerprint
    assert len(scorer.score([])) == 0


def test_held_out_texts_show_what_it_is_worth():
    texts, scores = _labelled(200)
    found = held_out_error(texts, scores)
    assert 20 < found["count"] < 60
    assert found["error"] < 0.6 * found["error_of_mean"] and found["correlation"] > 0.85
    random.Random(3).shuffle(scores)
    assert held_out_error(texts, scores)["correlation"] < 0.5
    assert np.isnan(held_out_error(texts[:3], scores[:3])["error"])


def test_refusals(tmp_path, monkeypatch):
    with pytest.raises(TextError, match="1 labelled texts"):
        LinearScorer.train(["a"], [1.0])
    with pytest.raises(TextError, match="score 7 is outside 0 … 5"):
        LinearScorer.train(["a", "b"], [1, 7])
    with pytest.raises(TextError, match="no quality scorer in .*launch/prepare.py quality"):
        load_scorer(str(tmp_path / "none"))
    LinearScorer.train(*_labelled(20)).save(tmp_path / "s")
    data = bytearray((tmp_path / "s/weights.npy").read_bytes())
    data[-2] ^= 1
    (tmp_path / "s/weights.npy").write_bytes(data)
    with pytest.raises(TextError, match="damaged; train it again"):
        load_scorer(str(tmp_path / "s"))
    with pytest.raises(TextError, match="names no function"):
        load_scorer("m3jax.text.cleaning.quality:nothing")


def test_a_scorer_of_the_users_own(monkeypatch, tmp_path):
    (tmp_path / "my_scorer.py").write_text(
        "class Long:\n    fingerprint = 'long-1'\n"
        "    def score(self, texts):\n        return [min(5, len(t)) for t in texts]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    scorer = load_scorer("my_scorer:Long")
    assert scorer.fingerprint == "long-1" and scorer.score(["abc"]) == [3]


def test_labelled_files(tmp_path):
    path = tmp_path / "labelled.jsonl"
    path.write_text(json.dumps({"text": "a", "score": 3}) + "\n" + '{"text": "b", "score": 0.5}\n')
    assert read_labelled(path) == (["a", "b"], [3.0, 0.5])
    for wrong in ("{", '{"text": "a"}', '{"text": "a", "score": "3"}', "[]"):
        path.write_text('{"text": "a", "score": 1}\n' + wrong + "\n")
        with pytest.raises(TextError, match=r"labelled\.jsonl:2: .*(expected|JSON)"):
            read_labelled(path)
