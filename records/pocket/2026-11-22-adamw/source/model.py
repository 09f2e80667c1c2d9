"""The transformer: rotary positions, QK-norm, RMSNorm, ReLU^2, projections that start at zero, head tied to the embedding.

No biases and no affine parameters: every trained number is an entry of a matrix.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .recipe import Recipe


def rms_norm(x: Tensor) -> Tensor:
    """Scale the last dimension to root mean square 1. Source: Zhang & Sennrich 2019 (arXiv:1910.07467), without a gain."""
    return F.rms_norm(x, (x.size(-1),))


def rotary_angles(length: int, head_width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position's rotation.

    Returns:
        Two (length, 1, head_width / 2) float32 tensors.

    Source: Su et al. 2021, RoFormer (arXiv:2104.09864); base 10000.
    """
    frequencies = 10000.0 ** -(torch.arange(0, head_width, 2, device=device, dtype=torch.float32) / head_width)
    angles = torch.outer(torch.arange(length, device=device, dtype=torch.float32), frequencies)[:, None, :]
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x[i], x[i + half]) of (B, T, heads, head_width) by its position's angle."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat((first * cos + second * sin, second * cos - first * sin), dim=-1)


class Attention(nn.Module):
    """Causal self-attention with normalised queries and keys."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.project = nn.Linear(width, width, bias=False)
        nn.init.zeros_(self.project.weight)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(B, T, width) -> (B, T, width)."""
        split = (*x.shape[:2], self.heads, -1)
        query, key, value = self.query(x).view(split), self.key(x).view(split), self.value(x).view(split)
        query, key = rotate(rms_norm(query), cos, sin), rotate(rms_norm(key), cos, sin)
        mixed = F.scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), is_causal=True)
        return self.project(mixed.transpose(1, 2).reshape(x.shape))


class MLP(nn.Module):
    """Four times as wide inside, ReLU^2 between. Source: So et al. 2021, Primer (arXiv:2109.08668)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.expand = nn.Linear(width, 4 * width, bias=False)
        self.project = nn.Linear(4 * width, width, bias=False)
        nn.init.zeros_(self.project.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, width) -> (B, T, width)."""
        return self.project(F.relu(self.expand(x)).square())


class Block(nn.Module):
    """Attention, then the MLP, each added to the residual stream."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.attention = Attention(recipe.width, recipe.heads)
        self.mlp = MLP(recipe.width)
        self.attention_scale = recipe.attention_scale

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(B, T, width) -> (B, T, width)."""
        x = x + self.attention_scale * self.attention(rms_norm(x), cos, sin)
        return x + self.mlp(rms_norm(x))


class GPT(nn.Module):
    """Tokens in, logits out; the precision of its arithmetic is part of the recipe."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        self.embedding = nn.Embedding(recipe.vocab_size, recipe.width)
        self.blocks = nn.ModuleList(Block(recipe) for _ in range(recipe.layers))
        nn.init.uniform_(self.embedding.weight, -(recipe.width**-0.5), recipe.width**-0.5)  # as a linear head starts, since it is one

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T) int64 -> (B, T, vocab_size) logits, in the recipe's precision; logits[:, t] depend on tokens[:, : t + 1] alone."""
        low = self.recipe.precision == "bfloat16"
        with torch.autocast(tokens.device.type, dtype=torch.bfloat16, enabled=low):
            x = self.embedding(tokens)
            cos, sin = rotary_angles(tokens.size(1), self.recipe.width // self.recipe.heads, tokens.device)
            for block in self.blocks:
                x = block(x, cos, sin)
            return F.linear(rms_norm(x), self.embedding.weight)
