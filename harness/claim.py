"""From event files to run results, and from run results to the claim: the same code when a record is made and when it is judged."""

from __future__ import annotations

from collections.abc import Sequence

from data.errors import UserError
from harness.record import Claim, RunResult
from harness.statistics import mean_and_sd, target_test
from harness.track import Track

RUN_FIELDS = ("tokens", "val_loss", "train_time_ms", "peak_memory_mib", "weights_sha256")  # copied from the finish event


def result_of(events: Sequence[dict], *, events_name: str, process_time_ms: float, other_load_cores: float | None) -> RunResult:
    """A finished run's result from its events.

    Raises:
        UserError: the run has not finished.
    """
    start, finish = events[0], events[-1]
    if start["event"] != "start" or finish["event"] != "finish":
        raise UserError(f"run has not finished: its last event is {finish['event']!r}", where=events_name, fix="Run this seed again")
    return RunResult(
        seed=start["seed"],
        events=events_name,
        steps=finish["step"],
        process_time_ms=process_time_ms,
        other_load_cores=other_load_cores,
        **{key: finish[key] for key in RUN_FIELDS},
    )


def claim_of(runs: Sequence[RunResult], track: Track) -> Claim:
    """What a set of runs lets a record say.

    Raises:
        UserError: runs of different length.
    """
    if len({(run.steps, run.tokens) for run in runs}) > 1:
        raise UserError("the runs differ in steps or tokens, so they are not runs of one recipe", fix="Run all seeds with the same recipe")
    test = target_test([run.val_loss for run in runs], track)
    mean_time, sd_time = mean_and_sd([run.train_time_ms for run in runs])
    return Claim(
        n=test.n,
        steps=runs[0].steps,
        tokens=runs[0].tokens,
        mean_val_loss=round(test.mean, 6),
        sd_val_loss=None if test.sd is None else round(test.sd, 6),
        p_value=test.p_value,
        mean_train_time_ms=round(mean_time, 3),
        sd_train_time_ms=None if sd_time is None else round(sd_time, 3),
        target_met=test.target_met,
        significant=test.significant,
    )
