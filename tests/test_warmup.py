"""The warm-up proof: what a step can change is put back, and what is not put back shows."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn

from data.errors import UserError
from harness.events import EventWriter, read_events
from harness.referee import Referee
from harness.warmup import Snapshot, state_bytes, state_digest
from trainer.muon import Muon


class Model(nn.Module):
    """A matrix, a vector, and a buffer of each kind that moves with every forward pass."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("kept", torch.zeros(3))
        self.register_buffer("scratch", torch.zeros(2, dtype=torch.int64), persistent=False)

    def forward(self, x):
        """Move the buffers, then the matrix."""
        self.kept += 1
        self.scratch += 2
        return self.linear(x)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model()


@pytest.fixture
def optimizers(model):
    return [
        torch.optim.AdamW([model.linear.bias], lr=0.1),
        Muon([model.linear.weight], lr=0.1, momentum=0.9, ns_steps=5, dtype=torch.float32),
    ]


@pytest.fixture
def referee(make_tokens, tmp_path):
    writer = EventWriter(tmp_path / "events.jsonl")
    tokens = make_tokens(range(100), vocab_size=100)
    yield Referee(track=None, seed=0, train=tokens, val=tokens, device=torch.device("cpu"), writer=writer, weights_folder=tmp_path)
    writer.close()


def train(model, optimizers, steps=2):
    for _ in range(steps):
        model(torch.randn(5, 4)).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


def everything(model, optimizers):
    """Copies of all tensors by name: parameters, both kinds of buffer, optimizer states."""
    tensors = {name: tensor.detach().clone() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    for number, optimizer in enumerate(optimizers):
        for index, state in enumerate(optimizer.state.values()):
            tensors |= {f"{number}.{index}.{key}": value.clone() for key, value in state.items() if isinstance(value, torch.Tensor)}
    return tensors


@pytest.mark.parametrize("steps_before", [0, 3], ids=["fresh", "with optimizer state"])
def test_training_in_the_warm_up_leaves_no_trace(model, optimizers, steps_before):
    """Parameters, buffers (non-persistent too) and optimizer states come back bit for bit, in the same tensors, with the digest as witness."""
    train(model, optimizers, steps_before)
    before, places = everything(model, optimizers), [tensor.data_ptr() for tensor in model.parameters()]
    snapshot = Snapshot(model, optimizers)
    train(model, optimizers)
    model(torch.randn(5, 4)).sum().backward()  # a gradient that is left standing
    digest_dirty = state_digest(model, optimizers)
    digest = snapshot.restore()
    after = everything(model, optimizers)

    assert snapshot.digest == digest
    assert snapshot.digest != digest_dirty
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert places == [tensor.data_ptr() for tensor in model.parameters()]
    assert [None] * 2 == [parameter.grad for parameter in model.parameters()]


def test_training_after_the_warm_up_is_as_without_it(model, optimizers):
    """Steps taken after the warm-up are the steps that would have been taken had there been none."""
    train(model, optimizers, 2)
    snapshot = Snapshot(model, optimizers)
    train(model, optimizers, 3)
    expected = everything(model, optimizers)
    snapshot.restore()
    train(model, optimizers, 5)
    snapshot.restore()
    train(model, optimizers, 3)

    for name, tensor in everything(model, optimizers).items():
        assert torch.equal(expected[name], tensor), name


def test_random_numbers_go_on_where_they_stood(model):
    """The generators of torch, numpy and python give after the warm-up what they would have given before it."""
    snapshot = Snapshot(model, [])
    expected = torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()
    torch.manual_seed(99)
    np.random.seed(99)
    random.seed(99)
    snapshot.restore()

    assert expected == (torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random())


def test_settings_of_the_optimizer_come_back_in_the_same_groups(model, optimizers):
    """A learning rate changed in the warm-up is put back, and the groups a schedule holds on to are still the optimizer's own."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    snapshot = Snapshot(model, optimizers)
    for group in groups:
        group["lr"] = 7.0
    groups[0]["betas"] = (0.5, 0.5)
    snapshot.restore()
    after = [group for optimizer in optimizers for group in optimizer.param_groups]

    assert all(group is same for group, same in zip(groups, after, strict=True))
    assert [0.1, 0.1] == [group["lr"] for group in groups]
    assert (0.9, 0.999) == groups[0]["betas"]


def test_mode_of_every_module_comes_back(model):
    """A module put into evaluation mode in the warm-up trains again after it, and the other way round."""
    model.linear.eval()
    snapshot = Snapshot(model, [])
    model.eval()
    model.linear.train()
    snapshot.restore()

    assert (True, False) == (model.training, model.linear.training)


CHANGED = {
    "parameter": lambda model, optimizers: model.linear.bias.data.add_(1),
    "last bit of a parameter": lambda model, optimizers: model.linear.bias.data.copy_(
        torch.nextafter(model.linear.bias.data, torch.tensor(9.0))
    ),
    "buffer": lambda model, optimizers: model.kept.add_(1),
    "non-persistent buffer": lambda model, optimizers: model.scratch.add_(1),
    "new buffer": lambda model, optimizers: model.register_buffer("cache", torch.zeros(1), persistent=False),
    "optimizer state": lambda model, optimizers: train(model, optimizers, 1) or model.load_state_dict(model.state_dict()),
    "optimizer setting": lambda model, optimizers: optimizers[0].param_groups[0].update(lr=0.2),
    "torch rng": lambda model, optimizers: torch.rand(1),
    "numpy rng": lambda model, optimizers: np.random.rand(),
    "python rng": lambda model, optimizers: random.random(),
}


@pytest.mark.parametrize("change", CHANGED.values(), ids=CHANGED)
def test_digest_sees_every_change(model, optimizers, change):
    """The digest is the same twice, and another after any one change."""
    before = state_digest(model, optimizers)
    assert before == state_digest(model, optimizers)
    change(model, optimizers)

    assert before != state_digest(model, optimizers)


def test_state_bytes_counts_every_tensor_once(model, optimizers):
    """AdamW keeps two numbers and a counter for each of 4 biases, Muon one number for each of 16 weights, float32."""
    assert 0 == state_bytes(optimizers)
    train(model, optimizers, 1)

    assert 4 * (2 * 4 + 1) + 4 * 16 == state_bytes(optimizers)


# ---- through the referee ----


def test_referee_writes_the_proof_down(model, optimizers, referee, tmp_path):
    """A clean warm-up is one event with two equal digests and its duration."""
    with referee.warm_up(model, *optimizers) as random_batch:
        inputs, targets = random_batch(8, 4)
        train(model, optimizers)
    (event,) = read_events(tmp_path / "events.jsonl")

    assert "warm_up" == event["event"]
    assert event["digest_before"] == event["digest_after"] == state_digest(model, optimizers)
    assert event["warm_up_ms"] > 0
    assert [(2, 4), (2, 4)] == [tuple(inputs.shape), tuple(targets.shape)]
    assert 0 <= int(inputs.min()) <= int(inputs.max()) < 100


def test_random_tokens_of_the_warm_up_do_not_move_the_generators(model, referee):
    """Whether or not there is a warm-up, a trainer draws the same random numbers after it."""
    torch.manual_seed(5)
    expected = torch.rand(3).tolist()
    torch.manual_seed(5)
    with referee.warm_up(model) as random_batch:
        random_batch(64, 8)

    assert expected == torch.rand(3).tolist()


def replace_parameter(model, optimizers):
    model.linear.weight = nn.Parameter(torch.ones(4, 4))


def grow_a_buffer(model, optimizers):
    model.kept = torch.zeros(9)


def remove_a_parameter(model, optimizers):
    del model.linear.bias


def add_a_group(model, optimizers):
    optimizers[0].add_param_group({"params": [nn.Parameter(torch.zeros(2, 2))]})


def step_an_optimizer_not_handed_over(model, optimizers):
    train(model, [torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)], 1)


TRACES = {
    "parameter replaced": replace_parameter,
    "parameter removed": remove_a_parameter,
    "buffer added": lambda model, optimizers: model.register_buffer("cache", torch.ones(1), persistent=False),
    "buffer of another shape": grow_a_buffer,
    "parameter group added": add_a_group,
    "optimizer not handed over": step_an_optimizer_not_handed_over,
}


@pytest.mark.parametrize("leave", TRACES.values(), ids=TRACES)
def test_trace_of_the_warm_up_ends_the_run(model, optimizers, referee, tmp_path, leave):
    """What cannot be put back is refused with a sentence, and no proof is written."""
    with pytest.raises(UserError, match="warm-up"), referee.warm_up(model, *optimizers):
        leave(model, optimizers)

    assert [] == read_events(tmp_path / "events.jsonl")


def test_error_of_the_trainer_passes_through(model, referee, tmp_path):
    """An error inside the warm-up is the trainer's own, not a missing proof."""
    with pytest.raises(ZeroDivisionError), referee.warm_up(model):
        raise ZeroDivisionError

    assert [] == read_events(tmp_path / "events.jsonl")
