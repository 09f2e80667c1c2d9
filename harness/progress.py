"""What is seen while a run goes on: one live line on a terminal, the field's plain lines on a pipe. Both go to stderr."""

from __future__ import annotations

import sys
import time
from typing import TextIO

_PLAIN_EVERY_S = 1.0  # training steps are printed no more often; validations always


def step_line(event: dict, steps: int) -> str:
    """An event in the field's form, `step:120/160 val_loss:1.8123 train_time:61234ms step_avg:510.28ms`."""
    key = "val_loss" if event["event"] == "validation" else "train_loss"
    average = event["train_time_ms"] / event["step"] if event["step"] else float("nan")
    return f"step:{event['step']}/{steps} {key}:{event[key]:.4f} train_time:{event['train_time_ms']:.0f}ms step_avg:{average:.2f}ms"


class Progress:
    """Follows the events of all runs of an attempt.

    Args:
        steps: optimizer steps of a run.
        runs: number of runs.
        target: the track's target loss.
        stream: where to write.
    """

    def __init__(self, *, steps: int, runs: int, target: float, stream: TextIO = sys.stderr) -> None:
        self._steps, self._runs, self._target, self._stream = steps, runs, target, stream
        self._val_loss: float | None = None
        self._last_plain = 0.0
        self._live = _live_line(stream) if stream.isatty() else None

    def event(self, number: int, seed: int, event: dict) -> None:
        """Show one event of run `number`."""
        kind = event["event"]
        if kind == "start":
            self._val_loss = None
            self._print(f"run {number}/{self._runs}, seed {seed}")
        if kind == "validation":
            self._val_loss = event["val_loss"]
            self._print(step_line(event, self._steps))
        if kind == "step":
            self._step(event)

    def close(self) -> None:
        """Take the live line away."""
        if self._live is not None:
            self._live.stop()

    def _step(self, event: dict) -> None:
        if self._live is not None:
            self._live.update(self._status(event))
        elif time.monotonic() - self._last_plain >= _PLAIN_EVERY_S:
            self._last_plain = time.monotonic()
            self._print(step_line(event, self._steps))

    def _status(self, event: dict) -> str:
        """Step, share done, speed, losses against the target, time and time left."""
        done, seconds = event["step"], event["train_time_ms"] / 1e3
        left = seconds / done * (self._steps - done)
        val = "-" if self._val_loss is None else f"{self._val_loss:.4f}"
        return (
            f"step {done}/{self._steps}  {100 * done / self._steps:.0f} %  {event['tokens'] / max(seconds, 1e-9):,.0f} tokens/s  "
            f"train_loss {event['train_loss']:.4f}  val_loss {val} (target {self._target:g})  train_time {seconds:.1f} s  ETA {left:.0f} s"
        )

    def _print(self, line: str) -> None:
        if self._live is not None:
            self._live.console.print(line, highlight=False, markup=False)
        else:
            print(line, file=self._stream, flush=True)


def _live_line(stream: TextIO):
    """A line that is redrawn in place."""
    from rich.console import Console
    from rich.live import Live

    live = Live("starting ...", console=Console(file=stream), refresh_per_second=4, transient=True)
    live.start()
    return live
