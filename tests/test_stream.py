"""The token stream: order over shards and ranks, the pause, the end, and shards that go wrong."""

from __future__ import annotations

import multiprocessing
import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data.errors import UserError
from data.shard import HEADER_BYTES, write_shard
from data.stream import BatchStream, TokenSequence

PATIENCE_S = 10  # for what must happen
MOMENT_S = 0.05  # for what must not
SHARDS = (np.arange(0, 100), np.arange(100, 107), np.arange(107, 250))
EPOCH = 250


@pytest.fixture(autouse=True)
def no_thread_left():
    yield
    left = [thread for thread in threading.enumerate() if thread.name == "prefetch"]

    assert [] == left


@pytest.fixture
def tokens(make_tokens):
    return make_tokens(*SHARDS)


@pytest.fixture
def open_stream():
    """A function that opens a stream; all are closed at the end."""
    streams = []

    def make(tokens, batch_tokens=8, sequence_length=4, rank=0, world_size=1, **more):
        stream = BatchStream(
            tokens,
            batch_tokens=batch_tokens,
            sequence_length=sequence_length,
            rank=rank,
            world_size=world_size,
            device=torch.device("cpu"),
            **more,
        )
        streams.append(stream)
        return stream

    yield make
    for stream in streams:
        stream.close()


class Gated:
    """Tokens 0, 1, 2, ... whose reading waits at a gate."""

    vocab_size = 1 << 30

    def __init__(self, *, gate_open=True):
        self.gate, self.entered, self.reads = threading.Event(), threading.Event(), 0
        if gate_open:
            self.gate.set()

    def read(self, start, count):
        """Wait at the gate, then read."""
        self.entered.set()
        assert self.gate.wait(PATIENCE_S)
        self.reads += 1
        return np.arange(start, start + count)


def settled(count):
    """Wait until a number no longer grows, at most a second, and return it."""
    before, pause = -1, threading.Event()
    for _ in range(20):
        if before == count():
            break
        before = count()
        pause.wait(MOMENT_S)
    return before


def in_background(function):
    """Start a function in a thread of its own; (thread, list for its result or error)."""
    outcome = []

    def call():
        try:
            outcome.append(function())
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    return thread, outcome


# ---- order ----


@given(start=st.integers(0, 600), count=st.integers(1, 600))
def test_reading_is_slicing_of_the_endless_sequence(tmp_path_factory, start, count):
    """Any stretch, over shard borders and past the end, is the shards laid end to end and repeated."""
    folder = tmp_path_factory.mktemp("shards")
    paths = [folder / f"{number}.bin" for number in range(len(SHARDS))]
    for path, part in zip(paths, SHARDS, strict=True):
        write_shard(path, part)
    tokens = TokenSequence(paths, 65536)

    assert EPOCH == len(tokens)
    assert [at % EPOCH for at in range(start, start + count)] == tokens.read(start, count).tolist()


@pytest.mark.parametrize("sequence_length", [2, 5])
@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_parts_of_all_ranks_laid_together_are_the_sequence(tokens, open_stream, world_size, sequence_length):
    """Batch k is the same tokens whatever the world size: ranks take its parts in order, targets are one token later, epochs follow on."""
    batch = 80
    streams = [open_stream(tokens, batch, sequence_length, rank, world_size) for rank in range(world_size)]
    inputs, targets = [], []
    for _ in range(7):  # 560 tokens: more than two epochs
        for stream in streams:
            x, y = next(stream)
            assert [(batch // world_size // sequence_length, sequence_length)] * 2 == [tuple(x.shape), tuple(y.shape)]
            inputs += x.flatten().tolist()
            targets += y.flatten().tolist()

    assert [at % EPOCH for at in range(560)] == inputs
    assert [(at + 1) % EPOCH for at in range(560)] == targets
    assert torch.int64 == x.dtype == y.dtype


def test_position_counts_what_is_handed_out_not_what_is_read_ahead(open_stream):
    """Position moves by a whole batch of all ranks with each one drawn, however far the thread has read."""
    tokens = Gated()
    stream = open_stream(tokens, 8, 4, rank=1, world_size=2)
    assert settled(lambda: tokens.reads) > 1
    positions = [stream.position]
    for _ in range(3):
        next(stream)
        positions.append(stream.position)

    assert [0, 8, 16, 24] == positions


def test_reading_ahead_is_bounded(open_stream):
    """Without a taker the thread stops after a few batches."""
    tokens = Gated()
    open_stream(tokens)

    assert settled(lambda: tokens.reads) <= 4


def test_later_stream_goes_on_where_an_earlier_one_stood(tokens, open_stream):
    """A stream opened at a position hands out the tokens from there, with another batch size too."""
    first = open_stream(tokens, 8, 4)
    next(first)
    second = open_stream(tokens, 12, 6, position=first.position)

    assert list(range(8, 20)) == next(second)[0].flatten().tolist()
    assert 20 == second.position


# ---- pause, resume, close ----


def test_pause_returns_only_when_nothing_is_read(open_stream):
    """A pause that falls into a read waits for its end."""
    tokens = Gated(gate_open=False)
    stream = open_stream(tokens)
    assert tokens.entered.wait(PATIENCE_S)
    pausing, _ = in_background(stream.pause)
    pausing.join(MOMENT_S)
    still_waiting = pausing.is_alive()
    tokens.gate.set()
    pausing.join(PATIENCE_S)

    assert (True, False) == (still_waiting, pausing.is_alive())


def test_nothing_is_read_while_paused_and_resume_goes_on(open_stream):
    """Batches read before the pause can be drawn; nothing more is read until resume, and then no token is lost."""
    tokens = Gated()
    stream = open_stream(tokens)
    settled(lambda: tokens.reads)
    stream.pause()
    before = tokens.reads
    drawn = next(stream)[0].flatten().tolist()
    threading.Event().wait(MOMENT_S)
    while_paused = tokens.reads
    stream.resume()
    for _ in range(5):
        drawn += next(stream)[0].flatten().tolist()

    assert before == while_paused
    assert list(range(48)) == drawn
    assert tokens.reads > before


def test_stream_opened_paused_reads_nothing(open_stream):
    """Opened paused, not one token is touched before resume."""
    tokens = Gated()
    stream = open_stream(tokens, paused=True)
    untouched = not tokens.entered.wait(MOMENT_S)
    stream.resume()

    assert untouched
    assert list(range(8)) == next(stream)[0].flatten().tolist()


@pytest.mark.parametrize("state", ["idle", "paused", "opened paused", "drained", "twice"])
def test_close_ends_the_thread(open_stream, state):
    """However the stream stands when it is closed, its thread ends, nothing more is read and nothing more is handed out."""
    tokens = Gated()
    stream = open_stream(tokens, paused=state == "opened paused")
    if state == "drained":
        next(stream)
    if state == "paused":
        stream.pause()
    if state == "twice":
        stream.close()
    stream.close()
    reads = tokens.reads

    assert "prefetch" not in [thread.name for thread in threading.enumerate()]
    with pytest.raises(RuntimeError, match="closed"):
        next(stream)
    assert reads == tokens.reads


def test_close_while_reading_waits_for_the_read(open_stream):
    """A close that falls into a read ends after it."""
    tokens = Gated(gate_open=False)
    stream = open_stream(tokens)
    assert tokens.entered.wait(PATIENCE_S)
    closing, _ = in_background(stream.close)
    closing.join(MOMENT_S)
    still_waiting = closing.is_alive()
    tokens.gate.set()
    closing.join(PATIENCE_S)

    assert (True, False) == (still_waiting, closing.is_alive())


# ---- what is refused ----


@pytest.mark.parametrize(("batch", "sequence_length", "world_size"), [(8, 4, 4), (10, 4, 1), (0, 4, 1), (-8, 4, 1)])
def test_batch_that_does_not_divide_is_refused(tokens, open_stream, batch, sequence_length, world_size):
    """A batch that is not whole sequences on every rank is refused with a number that would do."""
    with pytest.raises(UserError, match=f"batch of {batch} tokens") as caught:
        open_stream(tokens, batch, sequence_length, 0, world_size)

    assert str(sequence_length * world_size) in caught.value.fix


def test_token_outside_the_vocabulary_stops_the_run(make_tokens, open_stream):
    """A token the model has no row for is refused when it is read, with shard, value and position."""
    tokens = make_tokens([1, 2, 3], [4, 5, 11, 6], vocab_size=11)
    stream = open_stream(tokens, 2, 2)

    assert [1, 2] == next(stream)[0].flatten().tolist()
    with pytest.raises(UserError, match="token 11 is outside the vocabulary of 11, at or after position 2") as caught:
        list(stream)
    assert str(tokens.paths[1]) == caught.value.where


def test_stream_that_failed_fails_again(make_tokens, open_stream):
    """Asked for another batch after an error, the stream raises instead of waiting for ever."""
    stream = open_stream(make_tokens([1, 2, 99], vocab_size=11), 2, 2)
    with pytest.raises(UserError):
        next(stream)
    again, outcome = in_background(lambda: next(stream))
    again.join(1)

    assert not again.is_alive()
    assert isinstance(outcome[0], UserError)


def test_missing_shard_is_refused_when_opened(tokens, tmp_path):
    """A sequence names the shard that is not there, and needs at least one."""
    with pytest.raises(UserError, match="not there") as caught:
        TokenSequence([tokens.paths[0], tmp_path / "gone.bin"], 11)
    with pytest.raises(ValueError, match="at least one shard"):
        TokenSequence([], 11)

    assert str(tmp_path / "gone.bin") == caught.value.where


def test_deleted_shard_is_read_to_its_end(tokens):
    """A shard deleted after opening stays readable: the map holds the file."""
    for path in tokens.paths:
        path.unlink()

    assert list(range(EPOCH)) == tokens.read(0, EPOCH).tolist()


def read_a_shard_cut_short(path):
    tokens = TokenSequence([path], 65536)
    with path.open("r+b") as file:
        file.truncate(HEADER_BYTES + 2)
    with pytest.raises(UserError) as caught:
        tokens.read(0, len(tokens))
    assert str(path) == caught.value.where


def test_shard_cut_short_after_opening_is_an_error_not_a_dead_process(tmp_path):
    """A shard that shrinks under the run ends in a sentence with its name, not in SIGBUS."""
    path = tmp_path / "shard.bin"
    write_shard(path, np.arange(1, 60_001))
    process = multiprocessing.get_context("forkserver").Process(target=read_a_shard_cut_short, args=(path,))
    process.start()
    process.join(60)

    assert 0 == process.exitcode
