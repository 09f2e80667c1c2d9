"""The clock, in code: it runs from the first training token to the final weights and stands still while the referee evaluates."""

from __future__ import annotations

import time
from collections.abc import Callable


class Clock:
    """Training time of one rank, in milliseconds.

    Args:
        settle: called before every reading that starts, pauses or stops the clock; returns once the work given to the
            device is done on all ranks, so that no work crosses the line in either direction.
    """

    def __init__(self, settle: Callable[[], None]) -> None:
        self._settle = settle
        self._before_ns = 0  # time counted before the current stretch
        self._since_ns: int | None = None  # start of the current stretch; None: standing still
        self.started = False

    @property
    def running(self) -> bool:
        """Whether time counts at this moment."""
        return self._since_ns is not None

    def start(self) -> None:
        """Begin to count, at the first training token or after a pause."""
        assert not self.running, "clock started while it runs"
        self._settle()
        self.started = True
        self._since_ns = time.perf_counter_ns()

    def pause(self) -> None:
        """Stop counting until start() is called again."""
        assert self.running, "clock paused while it stands"
        self._settle()
        self._before_ns += time.perf_counter_ns() - self._since_ns
        self._since_ns = None

    def read_ms(self) -> float:
        """Milliseconds counted so far. Does not wait for the device: between pauses this is the host's view."""
        running_ns = time.perf_counter_ns() - self._since_ns if self.running else 0
        return round((self._before_ns + running_ns) / 1e6, 3)
