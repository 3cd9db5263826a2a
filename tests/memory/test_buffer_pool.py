"""Buffers are used again, and never while someone reads them."""

import gc

import jax
import numpy as np

from m3jax.memory.buffer_pool import Buffers

LARGE = (3, 1 << 20)  # float32


def taken(buffers, value, shape=LARGE, dtype="float32"):
    array = buffers.take(shape, np.dtype(dtype))
    array[:] = value
    return array


def address(array):
    return array.__array_interface__["data"][0]


def test_a_buffer_is_used_again():
    buffers = Buffers()
    first = taken(buffers, 1.0)
    where = address(first)
    del first
    assert address(taken(buffers, 2.0)) == where


def test_a_smaller_batch_takes_the_same_buffer():
    buffers = Buffers()
    first = taken(buffers, 1.0)
    where = address(first)
    del first
    smaller = taken(buffers, 7, (2, 1 << 20), jax.numpy.bfloat16)
    assert address(smaller) == where and smaller.shape == (2, 1 << 20)
    assert (smaller == 7).all()


def test_a_larger_batch_fits():
    buffers = Buffers()
    first = taken(buffers, 1.0)
    del first
    larger = taken(buffers, 2.0, (9, 1 << 20))
    assert larger.shape == (9, 1 << 20) and (larger == 2.0).all()


def test_what_is_in_use_is_left_alone():
    buffers = Buffers()
    arrays = [taken(buffers, float(i)) for i in range(5)]
    assert len({address(array) for array in arrays}) == 5
    assert all((array == i).all() for i, array in enumerate(arrays))


def test_a_view_keeps_its_buffer():
    buffers = Buffers()
    view = taken(buffers, 1.0).reshape(-1)[5:9]
    other = taken(buffers, 2.0)
    assert (view == 1.0).all() and (other == 2.0).all()


def test_jax_keeps_its_buffer():
    """On a CPU an array of JAX may be the very buffer."""
    buffers = Buffers()
    placed = jax.device_put(taken(buffers, 1.0)[1])
    doubled = 2 * placed
    gc.collect()
    others = [taken(buffers, 3.0) for _ in range(3)]
    np.testing.assert_array_equal(placed, 1.0)
    np.testing.assert_array_equal(doubled, 2.0)
    assert len(others) == 3


def test_few_buffers_wait():
    buffers = Buffers()
    arrays = [taken(buffers, float(i)) for i in range(6)]
    del arrays
    assert len(buffers._free) == 2


def test_small_arrays():
    small = taken(Buffers(), 4, (3, 2), "int32")
    assert small.tolist() == [[4, 4]] * 3
