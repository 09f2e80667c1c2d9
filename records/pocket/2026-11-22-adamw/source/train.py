"""The training itself, told in the order the machine runs it. Data, clock and evaluation belong to the referee."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .model import GPT
from .muon import Muon
from .recipe import RECIPES, Recipe

if TYPE_CHECKING:
    from harness.referee import Referee

__all__ = ["RECIPES", "build_model", "main"]


def build_model(recipe: Recipe) -> nn.Module:
    """(B, T) int64 tokens -> (B, T, vocab_size) logits; causal."""
    return GPT(recipe)


def build_optimizers(model: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or Muon for the blocks' matrices and AdamW for the embedding (which is the head too)."""
    fused = model.embedding.weight.is_cuda
    adamw = dict(lr=recipe.lr, betas=(recipe.beta1, recipe.beta2), weight_decay=recipe.weight_decay, fused=fused)
    if recipe.optimizer == "adamw":
        return [torch.optim.AdamW(model.parameters(), **adamw)]
    muon = Muon(
        model.blocks.parameters(),
        lr=recipe.muon_lr_scale * recipe.lr,
        momentum=recipe.muon_momentum,
        ns_steps=recipe.muon_ns_steps,
        dtype=getattr(torch, recipe.precision),
    )
    return [torch.optim.AdamW(model.embedding.parameters(), **adamw), muon]


def lr_factor(step: int, recipe: Recipe) -> float:
    """The trapezoid: up over warmup_steps, level, down to zero over warmdown_steps; `step` counts from 0.

    Source: Haegele et al. 2024 (arXiv:2405.18392).
    """
    if step < recipe.warmup_steps:
        return (step + 1) / recipe.warmup_steps
    if step < recipe.steps - recipe.warmdown_steps:
        return 1.0
    return (recipe.steps - step) / recipe.warmdown_steps


def accumulate(model: nn.Module, inputs: Tensor, targets: Tensor, micro_batch: int) -> Tensor:
    """Add the gradient of this rank's mean loss, a micro-batch at a time; ranks average on the last one.

    Inputs and targets are (sequences, T) int64. Returns the mean loss in nats per token, a scalar still on the device.
    """
    pieces = list(zip(inputs.split(micro_batch), targets.split(micro_batch), strict=True))
    total = torch.zeros((), device=inputs.device)
    for number, (x, y) in enumerate(pieces, start=1):
        quiet = isinstance(model, DistributedDataParallel) and number < len(pieces)
        with model.no_sync() if quiet else nullcontext():
            logits = model(x)
            loss = F.cross_entropy(logits.float().flatten(0, 1), y.flatten()) * (len(x) / len(inputs))
            loss.backward()
        total += loss.detach()
    return total


def main(referee: Referee, recipe: Recipe) -> None:
    """Train one model under the referee."""
    # ---- model and optimizers, the same on every rank because the seed is ----
    model = build_model(recipe).to(referee.device)
    optimizers = build_optimizers(model, recipe)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    full_lrs = [group["lr"] for group in groups]
    fast = torch.compile(model) if recipe.compile and referee.device.type == "cuda" else model
    parallel = DistributedDataParallel(fast) if referee.world_size > 1 else fast

    def train_step(step: int, inputs: Tensor, targets: Tensor) -> Tensor:
        loss = accumulate(parallel, inputs, targets, recipe.micro_batch)
        for group, full_lr in zip(groups, full_lrs, strict=True):
            group["lr"] = full_lr * lr_factor(step, recipe)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss

    # ---- warm-up: kernels compile and memory is claimed on random tokens, before the clock ----
    with referee.warm_up(model, *optimizers) as random_batch:
        train_step(0, *random_batch(recipe.batch_tokens, recipe.sequence_length))

    # ---- the race ----
    batches = referee.batches(recipe.batch_tokens, recipe.sequence_length)
    for step in range(recipe.steps):
        if referee.due(step):
            referee.validate(fast, step)
        loss = train_step(step, *next(batches))
        referee.log(step + 1, loss)
    referee.finish(fast)
