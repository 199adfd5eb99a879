"""Memory that is used again: no two living tensors share it, and what waits is bounded."""

from __future__ import annotations

import gc
import threading
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from e2e.memory import Slabs


def place(tensor: Tensor) -> tuple[int, int]:
    """First and last + 1 address."""
    return tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes


def apart(tensors: list[Tensor]) -> bool:
    spans = sorted(place(tensor) for tensor in tensors if tensor.numel())
    return all(a[1] <= b[0] for a, b in pairwise(spans))


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 2000), st.booleans()), max_size=60))
def test_no_two_living_tensors_share_memory(steps):
    slabs, held = Slabs(), {}
    for slot, size, drop in steps:
        if drop:
            held.pop(slot, None)
        else:
            held[slot] = slabs.take((size, 3), torch.uint8)
        assert apart(list(held.values()))


def test_memory_is_used_again_when_its_last_tensor_is_gone_and_not_before():
    slabs = Slabs()
    first = slabs.take((100,), torch.float32)
    address, view = first.data_ptr(), first[10:20]
    del first
    gc.collect()
    other = slabs.take((100,), torch.float32)
    assert other.data_ptr() != address  # a view still looks at it
    array = view.numpy()
    del view
    gc.collect()
    assert slabs.take((100,), torch.float32).data_ptr() != address  # NumPy does
    del array
    gc.collect()
    assert slabs.take((100,), torch.float32).data_ptr() == address


def test_what_a_backward_has_saved_is_not_used_again():
    slabs = Slabs()
    images = slabs.take((4, 5), torch.float32).fill_(2.0)
    weight = torch.ones(5, 3, requires_grad=True)
    loss = (images @ weight).sum()
    address = images.data_ptr()
    del images
    gc.collect()
    other = slabs.take((4, 5), torch.float32).fill_(-1.0)
    assert other.data_ptr() != address
    loss.backward()
    torch.testing.assert_close(weight.grad, torch.full((5, 3), 8.0))


def test_no_more_slabs_wait_than_were_said():
    slabs = Slabs()
    held = [slabs.take((10,), torch.uint8) for _ in range(3 * Slabs.MAX_FREE)]
    del held
    gc.collect()
    assert len(slabs._free) == Slabs.MAX_FREE


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 3), (7,)])
def test_shape_and_type_are_those_asked_for(shape, dtype):
    found = Slabs().take(shape, dtype)
    assert (tuple(found.shape), found.dtype) == (shape, dtype)
    assert found.is_contiguous()


def test_threads_never_get_the_same_memory():
    slabs, wrong = Slabs(), []

    def work(number: int) -> None:
        for k in range(300):
            mine = slabs.take((64 + k % 7, 16), torch.uint8)
            mine.fill_(number)
            other = torch.from_numpy(np.full(tuple(mine.shape), number, np.uint8))
            if not torch.equal(mine, other):
                wrong.append(number)

    workers = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong
