"""EVIDENCE: are all the papers there, unchanged, complete, and do they tell one story?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from data.shard import file_sha256
from harness.machine import division
from harness.rules.reading import Evidence, RunLog
from harness.rules.rule import Outcome, Rule, count, each_run, failed, passed, warned
from harness.rules.version import RULES_VERSION

_SIGNATURES = ("manifest.sha256", "manifest.sha256.sig")  # not listed in the manifest
_FROM_EVENTS = ("seed", "steps", "tokens", "val_loss", "train_time_ms", "peak_memory_mib", "weights_sha256")


def _record(evidence: Evidence) -> Outcome:
    made = evidence.record.rules_version
    if made != RULES_VERSION:
        fix = "Compare it only with records of the same rules, or race again under these"
        return warned(f"record was made under rules {made}", wanted=f"rules {RULES_VERSION}, which judge it now", fix=fix)
    return passed(f"schema {evidence.record.schema_version}, rules {made}")


def _manifest(evidence: Evidence) -> Outcome:
    files = {name: kind for name, kind in evidence.files.items() if name not in _SIGNATURES}
    odd = [f"{name} is a {kind}" for name, kind in files.items() if kind != "file"]
    missing = [f"{name} is missing" for name in evidence.manifest if name not in files]
    extra = [f"{name} is not in the manifest" for name in files if name not in evidence.manifest]
    problems = odd + missing + extra or _changed(evidence)
    if problems:
        return failed(_first(problems), wanted="exactly the files of manifest.sha256, plain, each with its sha256")
    return passed(f"{count(len(files), 'file')}, every digest right")


def _changed(evidence: Evidence) -> list[str]:
    """Files whose digest is another; only asked once all names are known to be plain files."""
    changed = []
    for name, wanted in evidence.manifest.items():
        try:
            found = file_sha256(evidence.folder / name)
        except OSError as error:
            found = f"nothing ({error.strerror})"
        if found != wanted:
            changed.append(f"{name} has sha256 {found:.16}, the manifest {wanted:.16}")
    return changed


def _chain(evidence: Evidence) -> Outcome:
    broken = [log.broken for log in evidence.runs if log.broken]
    if broken:
        return failed(broken[0], wanted="every line with the chain value over itself and the line before")
    return passed(f"{sum(len(log.events) for log in evidence.runs)} events of {count(len(evidence.runs), 'run')}, every chain whole")


def _complete(evidence: Evidence) -> Outcome:
    every = evidence.track.val_every_steps
    frozen = evidence.record.frozen != "modified"
    steps = sorted({log.finish["step"] for log in evidence.runs if log.events})
    good = f"every run goes from start to finish, {', '.join(map(str, steps))} steps, validated every {every}"
    return each_run(evidence, lambda log: _gap(log, every, frozen=frozen), good=good)


def _gap(log: RunLog, every: int, *, frozen: bool) -> tuple[str, str] | None:
    """The first thing missing or out of order in a run's events."""
    for problem in (_ends(log), _sequence(log), _grid(log, every), _last_validation(log)):
        if problem:
            return problem
    if frozen and not log.of("warm_up"):
        return "no warm_up event", "one before the first step, as the frozen trainer writes it"
    if frozen and log.start["recipe"].get("steps") != log.finish["step"]:
        return f"finish at step {log.finish['step']}", f"the recipe's {log.start['recipe'].get('steps')} steps"
    return None


def _ends(log: RunLog) -> tuple[str, str] | None:
    """Start first and finish last, which these two ask for themselves, once each; no failure between."""
    counts = Counter(event["event"] for event in (log.start, *log.events[1:-1], log.finish))
    if counts["failure"]:
        return "a failure event", "a run that did not fail"
    if counts["start"] > 1 or counts["finish"] > 1:
        return f"{counts['start']} start and {counts['finish']} finish events", "one of each: start first, finish last"
    return None


def _sequence(log: RunLog) -> tuple[str, str] | None:
    """Steps count 1, 2, 3 ...; whatever else has a step number has that of the step before it; warm-up comes first."""
    step = 0
    for number, event in enumerate(log.events, start=1):
        kind = event["event"]
        if kind == "step":
            step += 1
        if kind == "warm_up" and step:
            return f"line {number}: warm_up after step {step}", "warm-up before the first step"
        if kind in ("step", "validation", "finish") and event["step"] != step:
            return f"line {number}: {kind} of step {event['step']}", f"step {step}"
    return None


def _grid(log: RunLog, every: int) -> tuple[str, str] | None:
    validated = {event["step"] for event in log.of("validation")}
    for step in (*range(0, log.finish["step"], every), log.finish["step"]):
        if step not in validated:
            return f"no validation at step {step}", f"one at step 0, every {every} steps, and at the end"
    return None


def _last_validation(log: RunLog) -> tuple[str, str] | None:
    """The finish event repeats the validation just before it."""
    last, finish = log.events[-2], log.finish
    keys = ("step", "tokens", "val_loss", "train_time_ms")
    for key in keys if last["event"] == "validation" else ():
        if last[key] != finish[key]:
            return f"finish has {key} {finish[key]}", f"{last[key]}, as the last validation"
    return None if last["event"] == "validation" else (f"a {last['event']} event before finish", "the last validation")


def _beginning(evidence: Evidence) -> Outcome:
    record = evidence.record
    first = evidence.runs[0].start
    wanted = {
        "track": record.track,
        "recipe_name": record.recipe_name,
        "recipe": record.recipe,
        "environment": record.environment,
        "division": record.division,
        "world_size": record.environment.get("processes", first["world_size"]),
    }
    outcome = each_run(
        evidence, lambda log: _difference(log.start, wanted), good="every run began with the record's recipe, track and environment"
    )
    if outcome.verdict == "pass" and record.division != division(record.environment):
        return failed(f"division is {record.division!r}", wanted=f"{division(record.environment)!r}, by the environment")
    return outcome


def _difference(found: dict[str, Any], wanted: dict[str, Any]) -> tuple[str, str] | None:
    """The first key whose value differs, one level down where both are mappings."""
    for key, value in wanted.items():
        if found.get(key) == value:
            continue
        if isinstance(value, dict) and isinstance(found.get(key), dict):
            inner = sorted(name for name in {*value, *found[key]} if value.get(name, _MISSING) != found[key].get(name, _MISSING))[0]
            return (
                f"start event has {key}.{inner} = {found[key].get(inner, 'nothing')!r:.80}",
                f"{value.get(inner, 'nothing')!r:.80}, as record.json",
            )
        return f"start event has {key} = {found.get(key)!r:.80}", f"{value!r:.80}, as record.json"
    return None


_MISSING = object()


def _different_runs(evidence: Evidence) -> Outcome:
    record, named = evidence.record, [run.events for run in evidence.record.runs]
    unnamed = [name for name in evidence.files if name.startswith("runs/") and name not in named]
    if unnamed:
        return failed(f"{unnamed[0]} belongs to no run of record.json", wanted="no run kept but left out")
    if record.claim.n != len(record.runs):
        return failed(f"claim says n = {record.claim.n}, the record has {len(record.runs)} runs", wanted="the claim over all runs")
    logs = evidence.runs
    marks = {
        "seed": [log.start["seed"] for log in logs],
        "event file": named,
        "final weights": [log.finish["weights_sha256"] for log in logs],
        "training losses": [tuple(event["train_loss"] for event in log.of("step")) for log in logs],
    }
    for what, values in marks.items():
        twice = _twice(values)
        if twice:
            return failed(
                f"{logs[twice[0]].name} and {logs[twice[1]].name} have the same {what}", wanted="every run from a seed of its own"
            )
    return passed(f"{count(len(logs), 'run')}, each of its own seed: {', '.join(map(str, marks['seed']))}")


def _twice(values: Iterable[Any]) -> tuple[int, int] | None:
    """Positions of the first two equal values."""
    seen: dict[Any, int] = {}
    for position, value in enumerate(values):
        if value in seen:
            return seen[value], position
        seen[value] = position
    return None


def _results(evidence: Evidence) -> Outcome:
    for computed, stated in zip(evidence.results, evidence.record.runs, strict=True):
        for key in _FROM_EVENTS:
            if getattr(computed, key) != getattr(stated, key):
                return failed(
                    f"record.json has {key} = {getattr(stated, key)} for {stated.events}",
                    wanted=f"{getattr(computed, key)}, as its events say",
                )
    return passed("record.json repeats every run's result as its events have it")


def _first(problems: list[str]) -> str:
    return problems[0] + (f" (and {len(problems) - 1} more)" if len(problems) > 1 else "")


RULES = (
    Rule(
        id="EVIDENCE-1",
        sentence="record.json is there and follows the schema.",
        false_alarms="A record of a newer release: verify it with that release.",
        check=_record,
    ),
    Rule(
        id="EVIDENCE-2",
        sentence="manifest.sha256 lists exactly the files that are there, and every digest is right.",
        false_alarms="A file that a system put there by itself (.DS_Store), or line endings changed on checkout: remove it, check out unchanged.",
        check=_manifest,
    ),
    Rule(
        id="EVIDENCE-3",
        sentence="Every run has its event file, every line of it is a whole event, and each is chained to the one before.",
        false_alarms="None known: the same program writes and reads them.",
        check=_chain,
    ),
    Rule(
        id="EVIDENCE-4",
        sentence="Every run is complete: start, warm-up, steps 1 to N without a gap, validations on the track's grid, finish; no failure.",
        false_alarms="A modified trainer that does not ask referee.due(step): let it. It may validate more often, and may do without a warm-up.",
        check=_complete,
    ),
    Rule(
        id="EVIDENCE-5",
        sentence="Every run began with what the record says: track, recipe, environment, division.",
        false_alarms="Runs put together from two machines, or from before and after an update: make a record of each.",
        check=_beginning,
    ),
    Rule(
        id="EVIDENCE-6",
        sentence="The claim counts every run that is there, and no two runs share a seed, their losses or their weights.",
        false_alarms="A trainer that does not use the seed makes all runs the same: seeds must matter, else n runs are one.",
        check=_different_runs,
    ),
    Rule(
        id="EVIDENCE-7",
        sentence="The results in record.json are those of the event files.",
        false_alarms="None known: both are copies of one number.",
        check=_results,
    ),
)
