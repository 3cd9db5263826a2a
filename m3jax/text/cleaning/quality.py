"""Learned quality scores of documents, 0 … 5 (Memory³ §7): the interface, and a linear scorer.

The paper scores with a model; ours is a linear regression on hashed words and pairs of words, cheap
enough for a whole corpus. Any object with `fingerprint` and `score` can replace it.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32

from m3jax.errors import TextError
from m3jax.files import checksum, digest, read_sealed, write_array, write_sealed
from m3jax.optional import optional
from m3jax.reading import read_records
from m3jax.text.cleaning.rules import normal_words
from m3jax.workdir import only_writer

LOWEST, HIGHEST = 0.0, 5.0
_WEIGHTS, _MANIFEST = "weights.npy", "manifest.json"
_HEAD = 20_000  # first characters of a document, from which it is scored
_FEATURES = 1 << 18


@runtime_checkable
class Scorer(Protocol):
    """Interface of quality scorers; `fingerprint` changes whenever scores may change."""

    fingerprint: str

    def score(self, texts: Sequence[str]) -> Float32[np.ndarray, " n"]:
        """Scores texts from 0 (useless) to 5 (excellent), each independently of the others."""


class LinearScorer:
    """Scores by linear regression on hashed words and word pairs of the first 20 000 characters."""

    def __init__(self, weights: Float32[np.ndarray, " f"], bias: float) -> None:
        self._weights, self._bias = weights, bias
        self._vectorizer = _vectorizer()
        self.fingerprint = digest("linear", weights.tobytes(), repr(bias))

    def score(self, texts: Sequence[str]) -> Float32[np.ndarray, " n"]:
        """Scores texts, 0 … 5."""
        if not texts:
            return np.empty(0, np.float32)
        scores = self._vectorizer.transform(texts) @ self._weights + self._bias
        return np.clip(scores, LOWEST, HIGHEST).astype(np.float32)

    @classmethod
    def train(
        cls, texts: Sequence[str], scores: Sequence[float], penalty: float = 0.1
    ) -> LinearScorer:
        """Fits a scorer to labelled texts; the same examples give the same scorer.

        `penalty` multiplies the squared weights (ridge regression). Raises `TextError` if there are
        fewer than two texts or different scores, or a score is outside 0 … 5.
        """
        if len(texts) < 2 or len(set(scores)) < 2:
            raise TextError(
                f"{len(texts)} labelled texts with {len(set(scores))} different scores; a scorer"
                " needs at least two of each"
            )
        wrong = [s for s in scores if not LOWEST <= s <= HIGHEST]
        if wrong:
            raise TextError(f"score {wrong[0]} is outside {LOWEST:g} … {HIGHEST:g}")
        from sklearn.linear_model import Ridge

        model = Ridge(alpha=penalty, solver="lsqr", tol=1e-6)
        model.fit(_vectorizer().transform(texts), np.asarray(scores, np.float64))
        return cls(model.coef_.astype(np.float32), float(model.intercept_))

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes the weights, then a manifest with their checksum."""
        write_array(Path(folder) / _WEIGHTS, self._weights)
        content = {"kind": "quality", "bias": self._bias, "fingerprint": self.fingerprint}
        content["weights"] = checksum(Path(folder) / _WEIGHTS)
        write_sealed(Path(folder) / _MANIFEST, content)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> LinearScorer:
        """Loads a scorer that `save` wrote; raises `TextError` if a file is missing or damaged."""
        manifest, weights = Path(folder) / _MANIFEST, Path(folder) / _WEIGHTS
        if not manifest.is_file() or not weights.is_file():
            raise TextError(
                f"no quality scorer in {folder}; train one with launch/prepare.py quality"
            )
        content = read_sealed(manifest)
        if content is None or content.get("weights") != checksum(weights):
            raise TextError(f"the quality scorer in {folder} is damaged; train it again")
        return cls(np.load(weights), content["bias"])


def load_scorer(spec: str) -> Scorer:
    """Loads a scorer from its folder, or calls the function `MODULE:NAME` that returns a scorer.

    Raises `TextError` if the folder has no intact scorer, or there is no such function.
    """
    module, _, name = spec.rpartition(":")
    if not module or Path(spec).exists():
        return LinearScorer.load(spec)
    try:
        return getattr(importlib.import_module(module), name)()
    except (ImportError, AttributeError) as error:
        raise TextError(f"--quality={spec} names no function ({error})") from error


def read_labelled(path: str | os.PathLike[str]) -> tuple[list[str], list[float]]:
    """Reads texts and scores from JSON lines `{"text", "score"}`; raises as `read_records`."""

    def parse(record: Any) -> tuple[str, float]:
        text, score = record["text"], record["score"]
        if not isinstance(text, str) or type(score) not in (int, float):  # no bool
            raise TypeError("text must be a string and score a number")
        return text, float(score)

    example = '{"text": "…", "score": 0 … 5}'
    texts, scores = zip(*read_records(path, parse, "labelled texts", example), strict=True)
    return list(texts), list(scores)


def held_out_error(
    texts: Sequence[str], scores: Sequence[float], penalty: float = 0.1
) -> dict[str, float]:
    """Trains a scorer on about four fifths of the examples, and evaluates it on the other fifth.

    A hash of the text decides the split. Returns the `count` of held-out examples, their mean
    absolute `error`, the error of always predicting the mean (`error_of_mean`), and Pearson's
    `correlation`; all are NaN if a side of the split is too small or all training scores are equal.
    """
    held = np.array([int(digest(text)[:8], 16) % 5 == 0 for text in texts])
    labels = np.asarray(scores, np.float64)
    if held.sum() < 2 or (~held).sum() < 2 or len(set(labels[~held])) < 2:
        return dict.fromkeys(("count", "error", "error_of_mean", "correlation"), float("nan"))
    every = np.array(texts, object)
    scorer = LinearScorer.train(every[~held].tolist(), labels[~held].tolist(), penalty)
    predicted = scorer.score(every[held].tolist())
    with np.errstate(invalid="ignore"):  # NaN where all scores are equal
        correlation = float(np.corrcoef(predicted, labels[held])[0, 1])
    return {
        "count": float(held.sum()),
        "error": float(np.abs(predicted - labels[held]).mean()),
        "error_of_mean": float(np.abs(labels[~held].mean() - labels[held]).mean()),
        "correlation": correlation,
    }


def train_scorer(labelled: str | Path, folder: str | Path, penalty: float = 0.1) -> str:
    """Trains a scorer on a file of `read_labelled`, saves it, and returns lines on its errors."""
    texts, scores = read_labelled(labelled)
    errors = held_out_error(texts, scores, penalty)
    scorer = LinearScorer.train(texts, scores, penalty)
    with only_writer(folder):
        scorer.save(folder)
    return (
        f"{errors['count']:g} of {len(texts)} texts held out: mean error {errors['error']:.3f}"
        f" (always guessing the mean: {errors['error_of_mean']:.3f}), correlation"
        f" {errors['correlation']:.3f}\n{folder}: scorer {scorer.fingerprint}"
    )


def _features(text: str) -> list[str]:
    words = next(iter(normal_words(text[:_HEAD])))
    return words + [f"{a} {b}" for a, b in zip(words, words[1:], strict=False)]


def _vectorizer() -> Any:
    sklearn = optional("sklearn.feature_extraction.text", "quality needs scikit-learn")
    return sklearn.HashingVectorizer(analyzer=_features, n_features=_FEATURES, alternate_sign=False)
