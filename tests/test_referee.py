"""The referee: what its clock counts, what it hands out and when, what it refuses, and what it writes down."""

from __future__ import annotations

import itertools
import math
import threading

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from data.dataset import Dataset
from data.errors import UserError
from data.shard import file_sha256
from data.stream import TokenSequence
from harness.events import EventWriter, chain_of, read_events
from harness.referee import Referee, unwrap
from harness.track import Significance, Track

VOCAB = 16
BATCH, SEQUENCE = 16, 4
TRAIN = np.arange(1000) % VOCAB
VAL = np.arange(200) % VOCAB
LOSS = torch.tensor(2.0)
MOMENT_S = 0.05


def make_track(**changes):
    fields = dict(
        id="toy",
        title="a toy",
        target_loss=0.5,
        val_tokens=64,
        val_sequence_length=8,
        val_every_steps=2,
        batch_tokens=None,
        clock="as always",
        ranked_by="train_time",
        significance=Significance(test="t", p_below=0.01),
        data=Dataset(
            name="toy", source="local", vocab_size=VOCAB, val_shards=("val.bin",), train_shards=("train.bin",), default_train_shards=1
        ),
    )
    return Track(**{**fields, **changes})


class Bigram(nn.Module):
    """Uniform logits at first; takes a while of hand-turned time for each forward pass in evaluation mode."""

    def __init__(self, on_evaluation=lambda: None):
        super().__init__()
        self.table = nn.Embedding(VOCAB, VOCAB)
        nn.init.zeros_(self.table.weight)
        self.on_evaluation = on_evaluation

    def forward(self, tokens):
        """(B, T) -> (B, T, V)."""
        if not self.training:
            self.on_evaluation()
        return self.table(tokens)


class Watched(TokenSequence):
    """Training tokens that note each read, and whether the clock was started by then."""

    def __init__(self, paths, vocab_size):
        super().__init__(paths, vocab_size)
        self.reads, self.clock_started = [], lambda: None

    def read(self, start, count):
        """Note, then read."""
        self.reads.append(self.clock_started())
        return super().read(start, count)


@pytest.fixture
def make_referee(make_tokens, tmp_path):
    """A function (**track changes) that makes a referee over small shards; what it opened is closed at the end."""
    made = []

    def make(**changes):
        train = Watched(make_tokens(TRAIN[:300], TRAIN[300:], name="train").paths, VOCAB)
        writer = EventWriter(tmp_path / "events.jsonl")
        referee = Referee(
            track=make_track(**changes),
            seed=7,
            train=train,
            val=make_tokens(VAL, vocab_size=VOCAB, name="val"),
            device=torch.device("cpu"),
            writer=writer,
            weights_folder=tmp_path / "weights",
        )
        referee.watched = train
        train.clock_started = lambda: referee._clock.started
        made.append((referee, writer))
        return referee

    yield make
    for referee, writer in made:
        if referee._stream is not None:
            referee._stream.close()
        writer.close()
    assert "prefetch" not in [thread.name for thread in threading.enumerate()]


@pytest.fixture
def referee(make_referee):
    return make_referee()


@pytest.fixture
def events(tmp_path):
    return lambda *kinds: [event for event in read_events(tmp_path / "events.jsonl") if not kinds or event["event"] in kinds]


def race(referee, model, steps=4, hand=None, step_ms=10.0):
    """A trainer in short: learns the next token of the toy sequence."""
    optimizer = torch.optim.SGD(model.parameters(), lr=5.0)
    with referee.warm_up(model, optimizer) as random_batch:
        nn.functional.cross_entropy(model(random_batch(BATCH, SEQUENCE)[0]).flatten(0, 1), torch.zeros(BATCH, dtype=torch.int64)).backward()
        optimizer.step()
    batches = referee.batches(BATCH, SEQUENCE)
    for step in range(steps):
        if referee.due(step):
            referee.validate(model, step)
        inputs, targets = next(batches)
        loss = nn.functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if hand is not None:
            hand.advance(step_ms)
        referee.log(step + 1, loss)
    referee.finish(model)


# ---- the clock ----


def test_clock_starts_with_the_first_batch(referee, hand, events):
    """Building, the first validation and asking for batches cost nothing; from the first batch drawn on, time counts."""
    model = Bigram()
    hand.advance(1000)
    batches = referee.batches(BATCH, SEQUENCE)
    hand.advance(1000)
    referee.validate(model, 0)
    hand.advance(1000)
    next(batches)
    hand.advance(30)
    referee.log(1, LOSS)
    hand.advance(12)
    referee.finish(model)

    assert [("validation", 0.0), ("step", 30.0), ("validation", 42.0), ("finish", 42.0)] == [
        (event["event"], event["train_time_ms"]) for event in events()
    ]


def test_no_training_token_is_touched_before_the_clock(referee):
    """Reading ahead is inside the clock: the first read of a training shard finds it started."""
    batches = referee.batches(BATCH, SEQUENCE)
    referee.validate(Bigram(), 0)
    untouched = list(referee.watched.reads)
    next(batches)

    assert [] == untouched
    assert {True} == set(referee.watched.reads)


def test_clock_and_prefetch_stand_still_during_validation(referee, hand, events):
    """However long an evaluation takes, no time passes on the clock and no training token is read."""
    reads = []

    def evaluating():
        hand.advance(500)
        before = len(referee.watched.reads)
        threading.Event().wait(MOMENT_S)
        reads.append(len(referee.watched.reads) - before)

    model = Bigram(evaluating)
    batches = referee.batches(BATCH, SEQUENCE)
    for step in (1, 2):
        next(batches)
        hand.advance(10)
        referee.log(step, LOSS)
    referee.validate(model, 2)
    next(batches)
    hand.advance(10)
    referee.log(3, LOSS)
    referee.finish(model)

    assert [20.0, 30.0] == [event["train_time_ms"] for event in events("validation")]
    assert 30.0 == events("finish")[0]["train_time_ms"]
    assert len(reads) >= 2
    assert {0} == set(reads)


# ---- tokens ----


def test_batches_are_the_shards_in_order_and_are_counted(referee):
    """Inputs are the training shards read through, targets one token later; tokens counts what was handed out."""
    batches = referee.batches(BATCH, SEQUENCE)
    assert 0 == referee.tokens
    drawn = [next(batches) for _ in range(30)]

    assert TRAIN[: 30 * BATCH].tolist() == torch.cat([inputs.flatten() for inputs, _ in drawn]).tolist()
    assert TRAIN[1 : 30 * BATCH + 1].tolist() == torch.cat([targets.flatten() for _, targets in drawn]).tolist()
    assert 30 * BATCH == referee.tokens


def test_batches_called_again_go_on_where_the_stream_stands(referee):
    """Another batch size or sequence length begins at the next token; the older iterator hands out nothing more."""
    first = referee.batches(BATCH, SEQUENCE)
    next(first)
    second = referee.batches(24, 8)
    inputs, _ = next(second)
    third, _ = next(referee.batches(BATCH, SEQUENCE))

    assert (3, 8) == tuple(inputs.shape)
    assert TRAIN[BATCH : BATCH + 24].tolist() == inputs.flatten().tolist()
    assert TRAIN[BATCH + 24 : 2 * BATCH + 24].tolist() == third.flatten().tolist()
    assert 2 * BATCH + 24 == referee.tokens
    with pytest.raises(RuntimeError, match="closed"):
        next(first)


def test_batches_called_twice_before_the_first_token(referee):
    """Two iterators asked for before the first batch share one stream and one clock."""
    first, second = referee.batches(BATCH, SEQUENCE), referee.batches(24, 8)
    next(first)
    inputs, _ = next(second)

    assert TRAIN[BATCH : BATCH + 24].tolist() == inputs.flatten().tolist()


def test_track_with_a_fixed_batch_refuses_another(make_referee):
    """Where the track fixes batch_tokens, that and no other batch is handed out."""
    referee = make_referee(batch_tokens=BATCH)
    with pytest.raises(UserError, match=f"fixes batch_tokens = {BATCH}, the trainer asks for 32"):
        referee.batches(32, SEQUENCE)

    assert (4, SEQUENCE) == tuple(next(referee.batches(BATCH, SEQUENCE))[0].shape)


@pytest.mark.parametrize("asked", ["inside", "before"])
def test_warm_up_gets_no_real_tokens(referee, asked):
    """Inside the warm-up a real batch is refused, also from an iterator made before it, and no training shard is read."""
    model = Bigram()
    early = referee.batches(BATCH, SEQUENCE) if asked == "before" else None
    with pytest.raises(UserError, match="real tokens asked for during warm-up"), referee.warm_up(model):
        next(early or referee.batches(BATCH, SEQUENCE))

    assert [] == referee.watched.reads


def test_warm_up_after_the_first_token_is_refused(referee):
    """There is no untimed work once the race has begun."""
    next(referee.batches(BATCH, SEQUENCE))
    with pytest.raises(UserError, match="warm-up after the first training token"), referee.warm_up(Bigram()):
        pass


# ---- what is refused ----


@pytest.mark.parametrize("steps", [[2], [0], [1, 1], [1, 3]])
def test_steps_are_logged_one_by_one(referee, steps):
    """A step left out, doubled or counted from zero is refused with both numbers."""
    next(referee.batches(BATCH, SEQUENCE))
    for step in steps[:-1]:
        referee.log(step, LOSS)
    with pytest.raises(UserError, match=f"step {steps[-1]} logged after step {len(steps) - 1}"):
        referee.log(steps[-1], LOSS)


def test_validation_at_another_step_is_refused_and_time_goes_on(referee, hand, events):
    """A validation is of the step that is logged; one refused stops neither the clock nor the tokens."""
    model = Bigram()
    batches = referee.batches(BATCH, SEQUENCE)
    next(batches)
    referee.log(1, LOSS)
    with pytest.raises(UserError, match="validation at step 2, but 1 steps are logged"):
        referee.validate(model, 2)
    running = referee._clock.running
    assert running  # else the next lines wait for ever
    for _ in range(4):
        next(batches)
    hand.advance(5)
    referee.validate(model, 1)

    assert [5.0] == [event["train_time_ms"] for event in events("validation")]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_training_loss_that_is_no_number_ends_the_run(referee, events, value):
    """NaN or infinity in training names the step and the rank, and is not written down."""
    referee.rank = 3
    next(referee.batches(BATCH, SEQUENCE))
    referee.log(1, LOSS)
    with pytest.raises(UserError, match=f"training loss is {value} at step 2 on rank 3"):
        referee.log(2, torch.tensor(value))

    assert [1] == [event["step"] for event in events("step")]


def test_validation_loss_that_is_no_number_ends_the_run(referee, events):
    """NaN in validation names the step and is not written down."""
    model = Bigram()
    next(referee.batches(BATCH, SEQUENCE))
    referee.log(1, LOSS)
    nn.init.constant_(model.table.weight, math.nan)
    with pytest.raises(UserError, match="validation loss is nan at step 1"):
        referee.validate(model, 1)

    assert [] == events("validation")


def test_target_met_before_any_training_is_refused(make_referee, events):
    """A model that meets the target untrained has seen the data, or the track is too easy."""
    referee = make_referee(target_loss=math.log(VOCAB) + 0.01)
    with pytest.raises(UserError, match=r"meets the target .* before any training"):
        referee.validate(Bigram(), 0)

    assert [] == events("validation")


# ---- what is written ----


def test_due_follows_the_grid_of_the_track(referee):
    """A validation is due at step 0 and every val_every_steps."""
    assert [0, 2, 4, 6] == [step for step in range(8) if referee.due(step)]


def test_whole_race_is_written_in_order(referee, hand, events):
    """Warm-up, validations on the grid, steps, the last validation and the finish stand in order, with tokens, time and an unbroken chain."""
    race(referee, Bigram(), hand=hand)
    order = ["warm_up", "validation", "step", "step", "validation", "step", "step", "validation", "finish"]
    previous = ""
    for event in events():
        assert chain_of(previous, event) == event["chain"]
        previous = event["chain"]

    assert order == [event["event"] for event in events()]
    assert [(0, 0, 0.0), (2, 2 * BATCH, 20.0), (4, 4 * BATCH, 40.0)] == [
        (event["step"], event["tokens"], event["train_time_ms"]) for event in events("validation")
    ]
    assert [(step, step * BATCH, 10.0 * step) for step in (1, 2, 3, 4)] == [
        (event["step"], event["tokens"], event["train_time_ms"]) for event in events("step")
    ]
    losses = [event["val_loss"] for event in events("validation")]
    assert math.log(VOCAB) == pytest.approx(losses[0], abs=1e-6)
    assert losses == sorted(losses, reverse=True)


def test_finish_keeps_the_weights_by_digest(referee, hand, events, tmp_path):
    """The weights are a safetensors file named by its sha256, which the finish event repeats with the result and the sizes."""
    model = Bigram()
    race(referee, model, hand=hand)
    (weights,) = (tmp_path / "weights").iterdir()
    (finish,) = events("finish")
    tensors = safetensors.torch.load_file(weights)
    same = ("step", "tokens", "val_loss", "train_time_ms")

    assert f"{finish['weights_sha256']}.safetensors" == weights.name
    assert finish["weights_sha256"] == file_sha256(weights)
    assert weights.stat().st_size == finish["weights_bytes"]
    assert torch.equal(model.table.weight.detach(), tensors["table.weight"])
    assert [events("validation")[-1][key] for key in same] == [finish[key] for key in same]
    assert (VOCAB * VOCAB, 4 * BATCH / len(TRAIN)) == (finish["parameters"], finish["epochs"])
    assert finish["peak_memory_mib"] > 1
    assert referee.finished


def test_weights_that_cannot_be_kept_end_in_a_sentence(referee, tmp_path, monkeypatch):
    """A full disk at the very end is an error with the folder, no partial file stays, and the run is not finished."""

    def full(*_):
        raise safetensors.SafetensorError("No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_model", full)
    with pytest.raises(UserError, match="cannot keep the final weights: No space left") as caught:
        race(referee, Bigram())

    assert str(tmp_path / "weights") == caught.value.where
    assert [] == list((tmp_path / "weights").iterdir())
    assert not referee.finished


def test_nothing_is_handed_out_after_the_finish(referee):
    """Once the weights stand there are no more tokens."""
    batches = referee.batches(BATCH, SEQUENCE)
    next(batches)
    referee.log(1, LOSS)
    referee.finish(Bigram())
    with pytest.raises(RuntimeError, match="closed"):
        next(batches)


def test_evaluation_leaves_the_trainer_as_it_was(referee):
    """A validation changes neither the model's mode nor the next random number."""
    model = Bigram(lambda: torch.rand(5))
    torch.manual_seed(1)
    expected = torch.rand(3).tolist()
    torch.manual_seed(1)
    referee.validate(model, 0)

    assert model.training
    assert expected == torch.rand(3).tolist()


def test_unwrap_finds_the_trainers_own_module():
    """Weights are kept under the names of the module itself, below torch.compile's wrapper."""
    model = Bigram()

    assert model is unwrap(model)
    assert model is unwrap(torch.compile(model, backend="eager"))


def race_on_a_rank(train_paths, val_paths, folder):
    """One rank of a race with an averaged gradient; (tokens drawn, loss of each validation)."""
    rank = torch.distributed.get_rank()
    referee = Referee(
        track=make_track(),
        seed=7,
        train=TokenSequence(train_paths, VOCAB),
        val=TokenSequence(val_paths, VOCAB),
        device=torch.device("cpu"),
        writer=EventWriter(folder / "events.jsonl") if rank == 0 else None,
        weights_folder=folder / f"weights-{rank}",
    )
    model, drawn, losses = Bigram(), [], []
    for step, (inputs, _) in enumerate(itertools.islice(referee.batches(BATCH, SEQUENCE), 4), start=1):
        drawn += inputs.flatten().tolist()
        referee.log(step, torch.tensor(float(rank)))
        losses.append(referee.validate(model, step))
    referee.finish(model)
    return drawn, losses, referee.tokens


def test_ranks_share_tokens_and_agree_on_the_loss(make_tokens, run_ranks, tmp_path, events):
    """Two ranks draw the two halves of each batch, get one loss, count the tokens of both, and only rank 0 writes."""
    train, val = make_tokens(TRAIN, name="train").paths, make_tokens(VAL, name="val").paths
    (first, losses, tokens), (second, others, other_tokens) = run_ranks(race_on_a_rank, 2, train, val, tmp_path)
    halves = TRAIN[: 4 * BATCH].reshape(4, 2, BATCH // 2)

    assert [halves[:, 0].ravel().tolist(), halves[:, 1].ravel().tolist()] == [first, second]
    assert losses == others
    assert 4 * BATCH == tokens == other_tokens
    assert ["step", "validation"] * 4 + ["validation", "finish"] == [event["event"] for event in events()]
    assert (True, False) == ((tmp_path / "weights-0").exists(), (tmp_path / "weights-1").exists())
