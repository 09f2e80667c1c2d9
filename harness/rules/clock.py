"""CLOCK: did the time that is claimed pass, and no other?"""

from __future__ import annotations

from harness.rules.reading import Evidence, RunLog
from harness.rules.rule import Outcome, Rule, count, each_run, failed, passed


def _never_falls(evidence: Evidence) -> Outcome:
    return each_run(evidence, _fall, good="train_time_ms never falls, from step 0 to the end")


def _fall(log: RunLog) -> tuple[str, str] | None:
    before = 0.0
    for number, event in enumerate(log.events, start=1):
        now = event.get("train_time_ms", before) if event["event"] in ("step", "validation", "finish") else before
        if now < before:
            return f"line {number}: train_time_ms falls from {before} to {now}", "a clock that only goes forward"
        before = now
    return None


def _stands_still(evidence: Evidence) -> Outcome:
    return each_run(evidence, _moving, good="no time before the first training token, none during the last evaluation")


def _moving(log: RunLog) -> tuple[str, str] | None:
    for event in log.of("validation"):
        if event["tokens"] == 0 and event["train_time_ms"] > 0:
            return f"{event['train_time_ms']} ms before the first training token", "0: the clock starts at the first training token"
    finish, validations = log.finish, log.of("validation")
    if validations and validations[-1]["train_time_ms"] != finish["train_time_ms"]:
        return (
            f"finish at {finish['train_time_ms']} ms, its validation at {validations[-1]['train_time_ms']} ms",
            "the same: evaluation takes no train time",
        )
    return None


def _fits_the_process(evidence: Evidence) -> Outcome:
    for run in evidence.results:
        if run.process_time_ms < run.train_time_ms:
            found = f"{run.events}: process_time_ms {run.process_time_ms} is below train_time_ms {run.train_time_ms}"
            return failed(found, wanted="launch to exit takes at least as long as the training inside it")
    longest = max(run.process_time_ms - run.train_time_ms for run in evidence.results)
    return passed(f"every run's train time fits into its process; at most {longest / 1000:.1f} s lie outside the clock")


def _warm_up(evidence: Evidence) -> Outcome:
    number = sum(len(log.of("warm_up")) for log in evidence.runs)
    return each_run(evidence, _trace, good=f"{count(number, 'warm-up')} left no trace" if number else "no run warmed up")


def _trace(log: RunLog) -> tuple[str, str] | None:
    for event in log.of("warm_up"):
        if event["digest_before"] != event["digest_after"]:
            return (
                f"state {event['digest_after']:.16} after the warm-up, {event['digest_before']:.16} before",
                "the same state: a warm-up trains nothing",
            )
    return None


RULES = (
    Rule(
        id="CLOCK-1",
        sentence="train_time_ms never falls.",
        false_alarms="None known: the clock is monotonic.",
        check=_never_falls,
    ),
    Rule(
        id="CLOCK-2",
        sentence="The clock stands still before the first training token and while the referee evaluates.",
        false_alarms="None known: both values are read while the clock is paused.",
        check=_stands_still,
    ),
    Rule(
        id="CLOCK-3",
        sentence="The process of a run took at least as long as its training.",
        false_alarms="A system clock set back during a run, if the launcher's measurement follows it: race again.",
        check=_fits_the_process,
    ),
    Rule(
        id="CLOCK-4",
        sentence="Warm-up left no trace: the digest of model, optimizers and random state is the same before and after.",
        false_alarms="None known: a run whose digests differ is stopped when it happens.",
        check=_warm_up,
    ),
)
