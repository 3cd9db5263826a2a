"""Vectors that the benchmark of the quantizer takes from a bank."""

import numpy as np
import pytest
from memory.memory_tiny import build

from m3jax.bench.quantizer import bank_vectors
from m3jax.errors import BenchmarkError
from m3jax.memory.bank import Bank


def test_vectors_of_a_bank_are_those_of_its_tokens(tmp_path):
    build(tmp_path / "bank")
    bank = Bank.open(tmp_path / "bank")
    memory = bank.read(np.arange(bank.size))
    L, N, K, P, _ = memory.keys.shape
    expected = [
        x[layer, i, head, slot].tobytes()
        for layer, i, head, slot in np.ndindex(L, N, K, P)
        if slot < memory.length[i]
        for x in (memory.keys, memory.values)
    ]
    assert 0 < len(expected) < 2 * L * N * K * P  # some slots are empty
    everything = bank_vectors(tmp_path, len(expected))
    assert sorted(x.tobytes() for x in everything) == sorted(expected)
    assert bank_vectors(tmp_path, 10).shape == (10, 8)
    with pytest.raises(BenchmarkError, match=f"has {len(expected)} vectors"):
        bank_vectors(tmp_path, len(expected) + 1)
