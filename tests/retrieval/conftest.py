"""Small knowledge bases for the tests of retrieval."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from m3jax import config as configs
from m3jax.text.documents import Document
from m3jax.text.references import References, write_references
from m3jax.text.tokenizer import Tokenizer


def _vocabulary() -> list[str]:
    syllables = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
    return [a + b for a in syllables for b in syllables[::7]]


@pytest.fixture(scope="session")
def vocabulary() -> list[str]:
    """700 invented words."""
    return _vocabulary()


@pytest.fixture(scope="session")
def tokenizer(vocabulary) -> Tokenizer:
    return Tokenizer.train([" ".join(vocabulary)] * 2, 2000, 2)


@pytest.fixture(scope="session")
def write(tokenizer) -> Callable[[Path, Sequence[str]], References]:
    """Writes one reference per text, in their order."""

    def write(folder: Path, texts: Sequence[str]) -> References:
        documents = [Document(f"d{i}", text) for i, text in enumerate(texts)]
        write_references(documents, tokenizer, folder, 128)
        references = References(folder)
        assert references.texts(range(len(references))) == list(texts)
        return references

    return write


@pytest.fixture(scope="session")
def sentences(vocabulary) -> Callable[..., list[str]]:
    """Texts of words drawn by Zipf's law; every text also has a name that no other has."""

    def sentences(n: int, seed: int = 0, length: int = 20) -> list[str]:
        rng = np.random.default_rng(seed)
        share = 1.0 / np.arange(1, len(vocabulary) + 1)
        drawn = rng.choice(len(vocabulary), (n, length), p=share / share.sum())
        return [
            " ".join([f"Name{i}x", *(vocabulary[j] for j in row)]) for i, row in enumerate(drawn)
        ]

    return sentences


@pytest.fixture
def config():
    """Dimension 64 and exact search up to 50 references."""
    changed = configs.default()
    changed.retrieval.dimension = 64
    changed.retrieval.exact_below = 50
    return changed
