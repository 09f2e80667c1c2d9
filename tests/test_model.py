"""The model: what it computes, what it may look at, and how large it is."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from trainer.model import GPT
from trainer.recipe import FINEWEB_MUON, POCKET_MUON, Recipe

TINY = Recipe(
    layers=2,
    heads=2,
    width=16,
    vocab_size=11,
    sequence_length=8,
    batch_tokens=16,
    micro_batch=2,
    steps=1,
    warmdown_steps=0,
    optimizer="muon",
    lr=0.01,
    attention_scale=0.7,  # not 1, so that leaving it out shows
    precision="float32",
)
ANGLE_ATOL = 1e-5  # the model's rotary angles are float32, everything else here float64
BF16_ATOL = 0.15  # 8 bits of mantissa over two layers on logits of size 4


@pytest.fixture
def tokens():
    return torch.randint(TINY.vocab_size, (2, 8), generator=torch.Generator().manual_seed(1))


def random_model(recipe=TINY):
    """A model whose zero projections are filled, so that every path matters."""
    torch.manual_seed(0)
    model = GPT(recipe)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
    return model


def normalised(row):
    return row / math.sqrt(sum(value * value for value in row) / len(row))


def turned(row, position):
    """Rotary positions by complex multiplication: the pair (i, i + half) is one complex number, turned clockwise."""
    half = len(row) // 2
    angles = np.array([position * 10000.0 ** (-2 * i / len(row)) for i in range(half)])
    pairs = (row[:half] + 1j * row[half:]) * np.exp(-1j * angles)
    return np.concatenate([pairs.real, pairs.imag])


def plain_attention(attention, x, heads):
    """(T, width) -> (T, width), one head and one position at a time."""
    query, key, value = (x @ layer.weight.detach().double().numpy().T for layer in (attention.query, attention.key, attention.value))
    size = x.shape[1] // heads
    mixed = np.zeros_like(x)
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        turned_keys = [turned(normalised(key[t, part]), t) for t in range(len(x))]
        for t in range(len(x)):
            scores = np.array([turned(normalised(query[t, part]), t) @ turned_keys[s] / math.sqrt(size) for s in range(t + 1)])
            weights = np.exp(scores - scores.max())
            mixed[t, part] = (weights / weights.sum()) @ value[: t + 1, part]
    return mixed @ attention.project.weight.detach().double().numpy().T


def plain_logits(model, row):
    """The whole model on one row of tokens, in float64 and in loops."""
    embedding = model.embedding.weight.detach().double().numpy()
    x = embedding[row]
    for block in model.blocks:
        inner = np.array([normalised(position) for position in x])
        x = x + model.recipe.attention_scale * plain_attention(block.attention, inner, model.recipe.heads)
        for t in range(len(x)):
            hidden = np.maximum(block.mlp.expand.weight.detach().double().numpy() @ normalised(x[t]), 0) ** 2
            x[t] = x[t] + block.mlp.project.weight.detach().double().numpy() @ hidden
    return np.array([embedding @ normalised(position) for position in x])


def test_logits_are_those_of_a_plain_rewrite(tokens):
    """The model computes what a float64 rewrite in loops computes: rotary, QK-norm, RMSNorm, causal softmax, ReLU^2, tied head."""
    model = random_model()
    expected = np.stack([plain_logits(model, row) for row in tokens.numpy()])
    logits = model.double()(tokens).detach().numpy()

    np.testing.assert_allclose(logits, expected, rtol=0, atol=ANGLE_ATOL)


def test_bfloat16_recipe_computes_in_bfloat16_and_stays_near(tokens):
    """With precision bfloat16 the logits are bfloat16, close to the float32 ones."""
    model = random_model()
    plain = model(tokens)
    model.recipe = Recipe(**{**vars(TINY), "precision": "bfloat16"})
    low = model(tokens)

    assert (torch.float32, torch.bfloat16) == (plain.dtype, low.dtype)
    torch.testing.assert_close(low.float(), plain, rtol=0, atol=BF16_ATOL)


@pytest.mark.parametrize("changed", range(1, 8))
def test_later_tokens_do_not_reach_earlier_logits(tokens, changed):
    """Changing every token from some position on leaves the logits before it as they were, and changes those after."""
    model = random_model()
    other = tokens.clone()
    other[:, changed:] = (other[:, changed:] + 1) % TINY.vocab_size
    before, after = model(tokens), model(other)

    assert torch.equal(before[:, :changed], after[:, :changed])
    assert not torch.equal(before[:, changed:], after[:, changed:])


def test_untrained_logits_depend_on_the_token_alone():
    """Projections start at zero, so at first a token's logits are the same wherever it stands and whatever came before."""
    torch.manual_seed(0)
    model = GPT(TINY)
    logits = model(torch.tensor([[3, 1, 4, 1, 5, 3], [1, 1, 2, 3, 3, 4]]))

    assert torch.equal(logits[0, 0], logits[0, 5])
    assert torch.equal(logits[0, 0], logits[1, 3])
    assert torch.equal(logits[0, 1], logits[1, 0])
    assert not torch.equal(logits[0, 0], logits[0, 1])


@pytest.mark.parametrize(("recipe", "count"), [(FINEWEB_MUON, 123_568_128), (POCKET_MUON, 819_200)], ids=["fineweb", "pocket"])
def test_parameter_count(recipe, count):
    """The baseline has exactly the published number of parameters, all matrices: no bias, no gain, no second head."""
    with torch.device("meta"):
        model = GPT(recipe)

    assert count == sum(parameter.numel() for parameter in model.parameters())
    assert {2} == {parameter.ndim for parameter in model.parameters()}
    assert [] == list(model.buffers())
