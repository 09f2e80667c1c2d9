"""The evaluation: its value, and what it does not depend on."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from data.errors import UserError
from data.stream import TokenSequence
from harness import evaluate
from harness.evaluate import token_losses, validation_loss

VOCAB = 13
SEQUENCE = 8
VAL_TOKENS = 8 * 70  # three chunks of 32 sequences, the last one shorter
FLOAT32_RTOL = 1e-6  # one float32 log-softmax a token, then float64 sums
CPU = torch.device("cpu")


class Bigram(nn.Module):
    """Logits of the next token from the present one, in any precision."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(VOCAB, VOCAB, dtype=dtype)

    def forward(self, tokens):
        """(B, T) -> (B, T, V)."""
        return 3 * self.table(tokens)


@pytest.fixture
def tokens(make_tokens):
    values = np.random.default_rng(0).integers(VOCAB, size=VAL_TOKENS + 30)
    return make_tokens(values[:100], values[100:], vocab_size=VOCAB)


def loss_of(model, tokens, val_tokens=VAL_TOKENS, sequence_length=SEQUENCE):
    return validation_loss(model, tokens, val_tokens=val_tokens, sequence_length=sequence_length, device=CPU)


def plain_loss(model, tokens, val_tokens):
    """Mean negative log-probability of each next token in float64, one token at a time."""
    table = 3 * model.table.weight.detach().double().numpy()
    values = tokens.read(0, val_tokens + 1)
    return float(np.mean([math.log(np.exp(table[now]).sum()) - table[now, then] for now, then in pairwise(values)]))


def test_loss_is_the_mean_over_all_next_tokens(tokens):
    """The value is that of a float64 computation of one token after another, over shard borders and every chunk."""
    model = Bigram()

    assert plain_loss(model, tokens, VAL_TOKENS) == pytest.approx(loss_of(model, tokens), rel=FLOAT32_RTOL)


def test_only_the_first_val_tokens_count(tokens):
    """A shorter validation set is the beginning of the longer one."""
    model = Bigram()

    assert plain_loss(model, tokens, 24) == pytest.approx(loss_of(model, tokens, val_tokens=24), rel=FLOAT32_RTOL)
    assert loss_of(model, tokens) != loss_of(model, tokens, val_tokens=24)


@pytest.mark.parametrize("sequences", [1, 3, 7, 1000])
def test_loss_does_not_depend_on_the_chunk(tokens, monkeypatch, sequences):
    """How many sequences go through the model at once changes nothing but the order of float64 additions."""
    expected = loss_of(Bigram(), tokens)
    monkeypatch.setattr(evaluate, "_CHUNK_SEQUENCES", sequences)

    assert expected == pytest.approx(loss_of(Bigram(), tokens), rel=1e-14)


def test_chunk_shrinks_for_large_logits(tokens, monkeypatch):
    """Where a chunk's logits would be too many, fewer sequences go through the model at once, and at least one."""
    seen, model = [], Bigram()
    model.register_forward_pre_hook(lambda _, arguments: seen.append(len(arguments[0])))
    for limit, most in [(5 * SEQUENCE * VOCAB, 5), (1, 1)]:
        monkeypatch.setattr(evaluate, "_CHUNK_LOGITS", limit)
        seen.clear()
        loss_of(model, tokens)

        assert most == max(seen)
        assert VAL_TOKENS // SEQUENCE == sum(seen)


def test_low_precision_logits_are_summed_in_high_precision(tokens):
    """bfloat16 logits are taken as they are: the loss is the float64 loss of those logits, not a bfloat16 sum."""
    model = Bigram(torch.bfloat16)
    rounded = Bigram()
    rounded.table.weight.data = (3 * model.table.weight).float() / 3

    assert plain_loss(rounded, tokens, VAL_TOKENS) == pytest.approx(loss_of(model, tokens), rel=FLOAT32_RTOL)


def test_no_gradient_is_followed(tokens):
    """The model runs without a graph: an evaluation costs no memory for a backward pass."""
    modes, model = set(), Bigram()
    model.register_forward_pre_hook(lambda *_: modes.add(torch.is_grad_enabled()))
    loss_of(model, tokens)

    assert {False} == modes


REFUSED = {
    "losses instead of logits": (2, 4),
    "one number": (),
    "another length": (2, 3, VOCAB),
    "another batch": (1, 4, VOCAB),
    "one class": (2, 4, 1),
    "a dimension too many": (2, 4, VOCAB, 1),
}


@pytest.mark.parametrize("shape", REFUSED.values(), ids=REFUSED)
def test_what_is_not_logits_is_refused(shape):
    """A model that returns anything but (B, T, V) logits is refused with both shapes."""
    with pytest.raises(UserError, match="wanted logits") as caught:
        token_losses(torch.zeros(shape), torch.zeros(2, 4, dtype=torch.int64))

    assert str(tuple(shape)) in caught.value.what


def test_uniform_logits_give_the_logarithm_of_the_vocabulary():
    """Knowing nothing costs log V nats a token."""
    losses = token_losses(torch.zeros(2, 4, VOCAB), torch.zeros(2, 4, dtype=torch.int64))

    assert torch.float32 == losses.dtype
    assert math.log(VOCAB) == pytest.approx(losses.double().mean().item(), rel=1e-6)


def loss_on_a_rank(paths):
    return loss_of(Bigram(), TokenSequence(paths, VOCAB))


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_get_bit_for_bit_the_value_of_one(tokens, run_ranks, world_size):
    """The value does not depend on the world size, not even in its last bit, also with more ranks than chunks."""
    assert [loss_of(Bigram(), tokens)] * world_size == run_ranks(loss_on_a_rank, world_size, tokens.paths)
