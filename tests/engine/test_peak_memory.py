"""The estimate of the memory of training, against what autograd saves."""

from __future__ import annotations

import pytest
import torch

import e2e
from e2e.engine.graph_budget import saved_bytes
from e2e.engine.peak_memory import estimate_peak_memory
from e2e.heads.base import HEADS

PATCHES = 3000


@pytest.mark.parametrize("head", HEADS.names())
def test_it_is_the_graph_of_the_head_and_its_gradients(head):
    model = e2e.create_model(head, 2, encoder={"dim": 24}).train()
    memory = estimate_peak_memory(
        model, side=1, patches=PATCHES, largest_bag=PATCHES, average=False
    )
    with saved_bytes(model) as sizes:
        model(torch.randn(PATCHES, 24))
    # Bags of another size are padded to other shapes by some heads, and short ones are cheaper.
    assert 0.7 < memory.bags / (2 * sum(sizes.values()) + 4 * 24 * PATCHES) < 1.6
    assert memory.chunk == 0


def test_the_graph_of_a_chunk_does_not_grow_with_the_bag():
    model = e2e.create_model("e2e_r18_abmil", 2, pretrained=False, chunk=8).train()
    small, large = (
        estimate_peak_memory(model, side=64, patches=n, largest_bag=n, average=False)
        for n in (8, 800)
    )
    assert small.chunk == large.chunk > 0
    assert large.bags > 50 * small.bags / 2
    parameters = sum(p.nbytes for p in model.parameters())
    assert small.weights == 4 * parameters  # weights, gradients and two moments


def test_the_moving_average_is_one_more_copy_and_frozen_weights_have_no_gradients():
    model = e2e.create_model("e2e_r18_abmil", 2, pretrained=False, chunk=8)
    numbers = {"side": 32, "patches": 8, "largest_bag": 8}
    parameters = sum(p.nbytes for p in model.parameters())
    assert estimate_peak_memory(model, **numbers, average=True).weights == 5 * parameters
    model.encoder.requires_grad_(False)
    of_head = sum(p.nbytes for p in model.head.parameters())
    assert estimate_peak_memory(model, **numbers, average=False).weights == parameters + 3 * of_head


def test_neither_the_model_nor_the_random_state_changes():
    model = e2e.create_model("e2e_r18_transmil", 2, pretrained=False, chunk=8).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    estimate_peak_memory(model, side=32, patches=8, largest_bag=8, average=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
