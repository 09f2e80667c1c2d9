"""Muon: Newton-Schulz against an SVD, the step against torch's own, the state on one rank and on several."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist

from harness.warmup import state_bytes
from trainer.model import GPT
from trainer.muon import NEWTON_SCHULZ, Muon, orthogonalize
from trainer.recipe import FINEWEB_MUON, POCKET_MUON
from trainer.train import build_optimizers

STEPS = 5
LOWEST = 0.01  # smallest singular value looked at, as a part of the Frobenius norm
EXACT = 1e-9  # float64 through five quintic steps
BF16_ATOL = 0.05  # 8 bits of mantissa, five steps with a slope of 3.4 at zero
TORCH_RELATIVE = 0.05  # both run bfloat16 but round at other places
SHAPES = {"square": (12, 12), "tall": (20, 8), "wide": (8, 20), "row": (1, 6)}
SETTINGS = dict(lr=0.02, momentum=0.95, ns_steps=STEPS, dtype=torch.float32)


def polynomial(values, steps=STEPS):
    """The scalar that Newton-Schulz iterates."""
    a, b, c = NEWTON_SCHULZ
    for _ in range(steps):
        values = a * values + b * values**3 + c * values**5
    return values


def matrix_of(singular, rows, columns, seed=0):
    """A matrix with these singular values, and its singular vectors U and V^T."""
    generator = torch.Generator().manual_seed(seed)
    u, _ = torch.linalg.qr(torch.randn(rows, len(singular), dtype=torch.float64, generator=generator))
    v, _ = torch.linalg.qr(torch.randn(columns, len(singular), dtype=torch.float64, generator=generator))
    return u @ torch.diag(singular) @ v.mT, u, v.mT


@pytest.mark.parametrize(("rows", "columns"), SHAPES.values(), ids=SHAPES)
def test_newton_schulz_keeps_singular_vectors_and_maps_values_by_its_polynomial(rows, columns):
    """U S V^T becomes U p(S / |S|) V^T, for tall, wide and square matrices."""
    singular = torch.linspace(0.03, 1.0, min(rows, columns), dtype=torch.float64) * 7
    matrix, u, v = matrix_of(singular, rows, columns)
    expected = u @ torch.diag(polynomial(singular / (singular.norm() + 1e-7))) @ v

    torch.testing.assert_close(orthogonalize(matrix[None], STEPS, torch.float64)[0], expected, rtol=0, atol=EXACT)


def test_singular_values_land_in_the_band_of_the_polynomial():
    """Whatever stands above the lowest value looked at ends inside the band that the coefficients give, near 1."""
    grid = polynomial(torch.linspace(LOWEST, 1, 100_001, dtype=torch.float64))
    low, high = float(grid.min()), float(grid.max())
    singular = torch.logspace(-1.6, 0, 16, dtype=torch.float64)
    assert singular.min() / singular.norm() > LOWEST
    matrix, _, _ = matrix_of(singular, 16, 24)
    found = torch.linalg.svdvals(orthogonalize(matrix[None], STEPS, torch.float64)[0])

    assert (0.68, 1.14) == pytest.approx((low, high), abs=0.01)  # as the docstring of orthogonalize says
    assert low - EXACT <= found.min() <= found.max() <= high + EXACT


@pytest.mark.parametrize(("rows", "columns"), SHAPES.values(), ids=SHAPES)
def test_batch_is_the_same_as_one_by_one(rows, columns):
    """Matrices stacked into one batch do not touch each other, and the result has their shape."""
    batch = torch.randn(5, rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) * torch.logspace(-3, 3, 5).view(
        5, 1, 1
    )
    expected = torch.cat([orthogonalize(matrix[None], STEPS, torch.float64) for matrix in batch])

    torch.testing.assert_close(orthogonalize(batch, STEPS, torch.float64), expected, rtol=0, atol=EXACT)


def test_bfloat16_stays_close_to_float64():
    """Newton-Schulz in bfloat16 moves no entry of a well-conditioned result by more than its rounding."""
    singular = torch.linspace(0.2, 1.0, 16, dtype=torch.float64)
    matrix, _, _ = matrix_of(singular, 16, 32)
    low = orthogonalize(matrix[None].float(), STEPS, torch.bfloat16)

    assert torch.bfloat16 == low.dtype
    torch.testing.assert_close(low.double(), orthogonalize(matrix[None], STEPS, torch.float64), rtol=0, atol=BF16_ATOL)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_zero_gradient_moves_nothing(dtype):
    """A matrix whose gradient is zero stays where it is, without NaN, beside one that moves."""
    still, moving = (torch.nn.Parameter(torch.ones(4, 6)) for _ in range(2))
    still.grad, moving.grad = torch.zeros(4, 6), torch.eye(4, 6)
    Muon([still, moving], **{**SETTINGS, "dtype": dtype}).step()

    assert torch.equal(torch.ones(4, 6), still)
    assert torch.isfinite(moving).all()
    assert not torch.equal(torch.ones(4, 6), moving)


def test_step_is_nesterov_momentum_orthogonalised_and_scaled():
    """Several steps equal the formula written out: m = mu m + g, then lr sqrt(max(rows, columns)) NS(g + mu m)."""
    rng = np.random.default_rng(3)
    parameter = torch.nn.Parameter(torch.zeros(6, 10, dtype=torch.float64))
    optimizer = Muon([parameter], **{**SETTINGS, "dtype": torch.float64})
    expected, momentum = torch.zeros(6, 10, dtype=torch.float64), torch.zeros(6, 10, dtype=torch.float64)
    for _ in range(4):
        gradient = torch.from_numpy(rng.normal(size=(6, 10)))
        parameter.grad = gradient.clone()
        optimizer.step()
        momentum = 0.95 * momentum + gradient
        expected -= 0.02 * 10**0.5 * orthogonalize((gradient + 0.95 * momentum)[None], STEPS, torch.float64)[0]

    torch.testing.assert_close(parameter.detach(), expected, rtol=0, atol=EXACT)


@pytest.mark.parametrize(("rows", "columns"), [(16, 16), (32, 12), (12, 32)], ids=["square", "tall", "wide"])
def test_step_agrees_with_the_muon_of_torch(rows, columns):
    """With matching settings each step's update is that of torch.optim.Muon, up to bfloat16 rounding."""
    generator = torch.Generator().manual_seed(4)
    start = torch.randn(rows, columns, generator=generator)
    mine, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    matched = dict(nesterov=True, weight_decay=0.0, ns_coefficients=NEWTON_SCHULZ, ns_steps=STEPS, adjust_lr_fn="match_rms_adamw")
    optimizers = [
        Muon([mine], **{**SETTINGS, "dtype": torch.bfloat16}),
        torch.optim.Muon([theirs], lr=0.02 / 0.2, momentum=0.95, **matched),  # match_rms_adamw is 0.2 sqrt(max(rows, columns))
    ]
    for _ in range(5):
        before = mine.detach().clone(), theirs.detach().clone()
        mine.grad = torch.randn(rows, columns, generator=generator)
        theirs.grad = mine.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
        update, expected = mine.detach() - before[0], theirs.detach() - before[1]

        assert 0 == pytest.approx(float((update - expected).norm() / expected.norm()), abs=TORCH_RELATIVE)


@pytest.mark.parametrize(("recipe", "device"), [(POCKET_MUON, "cpu"), (FINEWEB_MUON, "meta")], ids=["pocket", "fineweb-on-meta"])
def test_muon_keeps_half_the_state_of_adam(recipe, device):
    """For the blocks' matrices Muon keeps one float32 number a parameter and AdamW two, measured after a step."""
    with torch.device(device):
        model = GPT(recipe)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
    blocks = list(model.blocks.parameters())
    numbers = sum(parameter.numel() for parameter in blocks)
    adamw, muon = torch.optim.AdamW(blocks), build_optimizers(model, recipe)[1]
    for optimizer in (adamw, muon):
        optimizer.step()
    counters = 4 * len(blocks)  # AdamW counts its steps in one float32 a parameter

    assert 4 * numbers == state_bytes([muon])
    assert 2 * state_bytes([muon]) == state_bytes([adamw]) - counters


def train_shared(count):
    """Three Muon steps on `count` wide and one tall matrix; (matrices, bytes of state on this rank)."""
    generator = torch.Generator().manual_seed(5)
    shapes = [(6, 8)] * count + [(9, 4)]
    matrices = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    optimizer = Muon(matrices, **{**SETTINGS, "dtype": torch.bfloat16})
    for _ in range(3):
        for matrix in matrices:
            matrix.grad = torch.randn(matrix.shape, generator=generator)
        optimizer.step()
    return [matrix.detach() for matrix in matrices], state_bytes([optimizer])


@pytest.mark.parametrize(("world_size", "count", "owned"), [(2, 5, [3, 2]), (3, 4, [2, 2, 0])])
def test_ranks_share_the_work_and_agree_with_one(run_ranks, world_size, count, owned):
    """Ranks whose number does not divide the group make exactly the update of a single process, each with its share of momentum."""
    alone, _ = train_shared(count)
    ranks = run_ranks(train_shared, world_size, count)
    tall = [4 * 9 * 4] + [0] * (world_size - 1)

    for matrices, _ in ranks:
        for matrix, expected in zip(matrices, alone, strict=True):
            assert torch.equal(expected, matrix)
    assert [4 * 6 * 8 * share + extra for share, extra in zip(owned, tall, strict=True)] == [state for _, state in ranks]
    assert not dist.is_initialized()
