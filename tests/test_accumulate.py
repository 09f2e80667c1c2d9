"""Gradient accumulation: the size of the pieces is a matter of memory, never of the result."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from trainer.model import GPT
from trainer.recipe import POCKET_MUON
from trainer.train import accumulate

SEQUENCES = 6
RECIPE = replace(POCKET_MUON, layers=1, width=16, vocab_size=11, sequence_length=8, batch_tokens=48, precision="float32")
FLOAT32_RTOL = 2e-5  # sums of 48 float32 losses in another order
FLOAT32_ATOL = 1e-7  # the same for gradient entries that nearly cancel


def make_model():
    torch.manual_seed(0)
    model = GPT(RECIPE)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


def make_batch():
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randint(RECIPE.vocab_size, (SEQUENCES, 8), generator=generator) for _ in range(2))


@pytest.fixture
def model():
    return make_model()


@pytest.fixture
def batch():
    return make_batch()


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 4, 5, 6, 100])
def test_any_micro_batch_gives_the_whole_batch_gradient(model, batch, micro_batch):
    """Loss and gradient are those of one backward pass over the whole batch, also when the last piece is smaller."""
    inputs, targets = batch
    whole = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
    expected = torch.autograd.grad(whole, list(model.parameters()))
    loss = accumulate(model, inputs, targets, micro_batch)

    torch.testing.assert_close(loss, whole.detach(), rtol=FLOAT32_RTOL, atol=FLOAT32_ATOL)
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=FLOAT32_RTOL, atol=FLOAT32_ATOL)


def test_loss_carries_no_graph_and_pieces_are_no_larger_than_asked(model, batch):
    """The returned loss is a detached scalar, and no forward pass sees more sequences than micro_batch."""
    seen = []
    model.register_forward_pre_hook(lambda _, arguments: seen.append(len(arguments[0])))
    loss = accumulate(model, *batch, 4)

    assert ((), False) == (tuple(loss.shape), loss.requires_grad)
    assert [4, 2] == seen


def test_gradient_is_added_to_what_is_there(model, batch):
    """Two calls without zeroing add up: accumulate never clears a gradient."""
    accumulate(model, *batch, 2)
    once = [parameter.grad.clone() for parameter in model.parameters()]
    accumulate(model, *batch, 2)

    for parameter, gradient in zip(model.parameters(), once, strict=True):
        torch.testing.assert_close(parameter.grad, 2 * gradient)


def gradient_on_a_rank(micro_batch):
    """Gradients of this rank after its half of the batch."""
    model, rank = make_model(), dist.get_rank()
    inputs, targets = (part[3 * rank : 3 * rank + 3] for part in make_batch())
    accumulate(DistributedDataParallel(model), inputs, targets, micro_batch)
    return [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("micro_batch", [2, 3])
def test_ranks_end_with_the_gradient_of_the_whole_batch(model, batch, run_ranks, micro_batch):
    """Two ranks with half of the batch each, in one piece or in uneven ones, both end with the mean over all of it."""
    accumulate(model, *batch, SEQUENCES)

    for gradients in run_ranks(gradient_on_a_rank, 2, micro_batch):
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            torch.testing.assert_close(gradient, parameter.grad, rtol=FLOAT32_RTOL, atol=FLOAT32_ATOL)
