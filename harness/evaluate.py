"""The evaluation, the same for every trainer: float32 log-softmax, sums in float64, one division.

Validation tokens are cut into chunks of whole sequences whose size does not depend on the world size; ranks take
chunks in turn, and the chunk sums are added in order. So the value does not depend on batch or world size.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from data.errors import UserError
from data.stream import TokenSequence

_CHUNK_LOGITS = 1 << 29  # entries of a chunk's logits at the most: 2 GiB in float32
_CHUNK_SEQUENCES = 32


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-probability of each target, nats.

    Args:
        logits: (B, T, V), any floating type.
        targets: (B, T) int64.

    Returns:
        (B, T) float32.

    Raises:
        UserError: the shapes do not fit, so the model does not return logits.
    """
    if logits.ndim != 3 or logits.shape[:2] != targets.shape or logits.size(2) <= 1:
        raise UserError(
            f"the model returned shape {tuple(logits.shape)} for targets of shape {tuple(targets.shape)}, wanted logits (B, T, V)",
            fix="build_model must return a module from (B, T) tokens to (B, T, V) logits",
        )
    losses = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
    return losses.view(targets.shape)


@torch.no_grad()
def validation_loss(model: nn.Module, tokens: TokenSequence, *, val_tokens: int, sequence_length: int, device: torch.device) -> float:
    """Mean loss over the first val_tokens targets, nats per token, the same on every rank.

    Args:
        model: (B, T) int64 -> (B, T, V) logits.
        tokens: the validation shards.
        val_tokens: a multiple of sequence_length.
        sequence_length: tokens of a row.
        device: of the model.
    """
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    rows = min(_CHUNK_SEQUENCES, max(1, _CHUNK_LOGITS // (sequence_length * tokens.vocab_size)))
    chunk = rows * sequence_length
    starts = range(0, val_tokens, chunk)
    sums = torch.zeros(len(starts), dtype=torch.float64, device=device)
    for number in range(rank, len(starts), world_size):
        count = min(chunk, val_tokens - starts[number])
        part = torch.from_numpy(tokens.read(starts[number], count + 1)).to(device)
        inputs, targets = part[:-1].view(-1, sequence_length), part[1:].view(-1, sequence_length)
        sums[number] = token_losses(model(inputs), targets).sum(dtype=torch.float64)
    if world_size > 1:
        dist.all_reduce(sums)
    return float(sums.sum().item() / val_tokens)
