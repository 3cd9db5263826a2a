"""The server that the benchmark of inference reads a bank from."""

import time

import numpy as np
from memory.memory_tiny import build

from m3jax.bench.inference import _ROUND_TRIP, _serving
from m3jax.memory.bank import Bank


def test_a_served_bank_reads_as_the_local_one_after_a_round_trip(tmp_path):
    build(tmp_path)
    ids = np.array([[3, -1, 5], [36, 3, 0]])
    with _serving(tmp_path) as url:
        bank = Bank.open(url)
        begin = time.monotonic()
        served = bank.read(ids)
        assert time.monotonic() - begin >= _ROUND_TRIP
    for ours, local in zip(served, Bank.open(tmp_path).read(ids), strict=True):
        np.testing.assert_array_equal(ours, local)
