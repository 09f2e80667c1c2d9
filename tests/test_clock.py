"""The clock: what it counts, what it leaves out, and that the device settles before it is read."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.clock import Clock


def test_time_before_the_start_is_not_counted(hand):
    """A clock stands at zero until it starts."""
    clock = Clock(lambda: None)
    hand.advance(500)

    assert (0.0, False, False) == (clock.read_ms(), clock.started, clock.running)


def test_pauses_are_left_out(hand):
    """Only the stretches between start and pause add up, and a clock that stands reads the same at any time."""
    clock = Clock(lambda: None)
    readings = []
    for running_ms, standing_ms in [(10, 1000), (0.5, 2000), (7.25, 3000)]:
        clock.start()
        hand.advance(running_ms)
        readings.append(clock.read_ms())
        clock.pause()
        hand.advance(standing_ms)
        readings.append(clock.read_ms())

    assert [10.0, 10.0, 10.5, 10.5, 17.75, 17.75] == readings
    assert (True, False) == (clock.started, clock.running)


def test_work_given_to_the_device_settles_on_its_side_of_the_line(hand):
    """Settling before a start is not counted, settling before a pause is; a reading between does not settle."""
    calls = []

    def settle():
        calls.append(clock.running)
        hand.advance(100)

    clock = Clock(settle)
    clock.start()
    hand.advance(1)
    clock.read_ms()
    clock.pause()

    assert [False, True] == calls
    assert 101.0 == clock.read_ms()


def test_misuse_is_our_own_mistake(hand):
    """Starting a running clock or pausing a standing one is a failed assertion."""
    clock = Clock(lambda: None)
    with pytest.raises(AssertionError, match="paused while it stands"):
        clock.pause()
    clock.start()
    with pytest.raises(AssertionError, match="started while it runs"):
        clock.start()


def test_real_time_is_counted():
    """Without a hand-turned clock, time passes and never runs back."""
    clock = Clock(lambda: None)
    clock.start()
    readings = [clock.read_ms() for _ in range(1000)]
    clock.pause()

    assert sorted(readings) == readings
    assert 0 < clock.read_ms() < 60_000


@given(st.lists(st.tuples(st.integers(0, 10**12), st.integers(0, 10**12)), max_size=20))
def test_stretches_add_up_without_loss(stretches):
    """Any number of stretches is summed in nanoseconds and rounded once, when read."""
    now = [0]
    clock = Clock(lambda: None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("harness.clock.time.perf_counter_ns", lambda: now[0])
        for running_ns, standing_ns in stretches:
            clock.start()
            now[0] += running_ns
            clock.pause()
            now[0] += standing_ns

        assert round(sum(running for running, _ in stretches) / 1e6, 3) == clock.read_ms()
