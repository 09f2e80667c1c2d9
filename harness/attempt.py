"""An attempt: all runs of a plan, one after another, each kept whether it finishes or not; a record at the end if all do."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from data.errors import UserError
from harness import home, ledger
from harness.claim import claim_of, result_of
from harness.events import read_events
from harness.job import Job
from harness.launch import Nodes, Outcome, run_training
from harness.plan import Plan, name_and_folder
from harness.record import SCHEMA_VERSION, Record, RunResult, slug, write_record
from harness.rules.version import RULES_VERSION
from harness.source import copy_source
from harness.statistics import TargetTest, target_test

Watch = Callable[[int, int, dict], None]  # (run number from 1, seed, event)


@dataclass(frozen=True, kw_only=True)
class Attempted:
    """What came of an attempt."""

    folder: Path
    record_folder: Path | None  # None on the further nodes of a race over several
    record: Record | None
    test: TargetTest | None


class RunFailed(UserError):
    """A run of the attempt did not finish; the attempt's folder says why."""


def make_attempt(plan: Plan, watch: Watch) -> Attempted:
    """Run a plan and write its record.

    Raises:
        RunFailed: a run failed; finished runs stay in the attempt's folder and no record is written.
        KeyboardInterrupt: passed on after the reason is written down.
    """
    begun = datetime.now(UTC)
    folder = _new_folder(plan, begun)
    _save_state(folder, plan, "running", None)
    results: list[RunResult] = []
    try:
        digest = copy_source(plan.request.trainer, folder / "source")
        if digest != plan.source_sha256:
            raise UserError("the trainer changed while the attempt was being prepared", where=str(plan.request.trainer), fix="Start again")
        for number, seed in enumerate(plan.seeds, start=1):
            results.append(_one_run(plan, folder, number, seed, watch))
        if plan.request.node_rank > 0:
            _save_state(folder, plan, "finished", None)
            return Attempted(folder=folder, record_folder=None, record=None, test=None)
        if plan.request.name is None:  # another attempt may have taken the name meanwhile
            name, record_folder = name_and_folder(plan.request, plan.track, plan.resolved)
            plan = replace(plan, name=name, record=record_folder)
        record = _record(plan, results)
        write_record(
            plan.record,
            record,
            source=folder / "source",
            events=[folder / run.events.removesuffix(".jsonl") / "events.jsonl" for run in results],
        )
    except BaseException as error:
        _save_state(folder, plan, _outcome_of(error), str(error) or type(error).__name__)
        raise
    _save_state(folder, plan, "finished", None)
    return Attempted(
        folder=folder, record_folder=plan.record, record=record, test=target_test([run.val_loss for run in results], plan.track)
    )


def _outcome_of(error: BaseException) -> str:
    return "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"


def _new_folder(plan: Plan, begun: datetime) -> Path:
    folder = home.attempts_folder() / f"{begun:%Y%m%d-%H%M%S}-{plan.track.id}-{slug(plan.name)}-{secrets.token_hex(2)}"
    try:
        (folder / "runs").mkdir(parents=True)
    except OSError as error:
        raise UserError(
            f"cannot make the attempt's folder: {error.strerror}", where=str(folder), fix="Free some space, or set SPEEDRUN_HOME"
        ) from None
    return folder


def _one_run(plan: Plan, folder: Path, number: int, seed: int, watch: Watch) -> RunResult | None:
    """One run, in the ledger from start to end."""
    run_folder = folder / "runs" / str(seed)
    run_folder.mkdir()
    identity = {
        "attempt": folder.name,
        "seed": seed,
        "track": plan.track.id,
        "source_sha256": plan.source_sha256,
        "recipe_name": plan.resolved.recipe_name,
        "recipe_sha256": ledger.recipe_digest(plan.recipe),
        "division": plan.division,
    }

    def note(**entry: Any) -> None:
        if plan.request.node_rank == 0:  # a race over several nodes is one run
            ledger.append(home.ledger_path(), **entry, **identity)

    note(entry="run_started")
    try:
        outcome = run_training(_job(plan, folder, run_folder, seed), _nodes(plan), lambda event: watch(number, seed, event))
    except BaseException as error:
        note(entry="run_ended", outcome=_outcome_of(error), reason=str(error) or type(error).__name__)
        raise
    if not outcome.finished:
        note(entry="run_ended", outcome="failed", reason=outcome.reason)
        raise RunFailed(
            f"run {number} (seed {seed}) failed: {outcome.reason}", where=f"events and output: {run_folder}", fix="No record was written"
        )
    if plan.request.node_rank > 0:
        return None
    result = _result(run_folder, seed, outcome)
    figures = {"val_loss": result.val_loss, "train_time_ms": result.train_time_ms, "tokens": result.tokens}
    note(entry="run_ended", outcome="finished", **figures)
    return result


def _job(plan: Plan, folder: Path, run_folder: Path, seed: int) -> Job:
    return Job(
        run_folder=str(run_folder),
        source=str(folder / "source"),
        source_sha256=plan.source_sha256,
        frozen=plan.frozen,
        track=str(Path(plan.track_name).resolve()) if plan.track_name.endswith(".toml") else plan.track_name,
        recipe_name=plan.resolved.recipe_name,
        recipe=plan.recipe,
        seed=seed,
        threads=int(plan.environment["threads"]),
        device=plan.device,
        val_shards=[str(path) for path in plan.shards.val],
        train_shards=[str(path) for path in plan.shards.train],
        data_sha256=plan.shards.sha256,
        weights_folder=str(home.weights_folder()),
        environment=dict(plan.environment),
        division=plan.division,
    )


def _nodes(plan: Plan) -> Nodes:
    request = plan.request
    return Nodes(
        processes_per_node=plan.processes // request.nnodes,
        nnodes=request.nnodes,
        node_rank=request.node_rank,
        rdzv_endpoint=request.rdzv_endpoint,
    )


def _result(run_folder: Path, seed: int, outcome: Outcome) -> RunResult:
    return result_of(
        read_events(run_folder / "events.jsonl"),
        events_name=f"runs/{seed}.jsonl",
        process_time_ms=outcome.process_time_ms,
        other_load_cores=outcome.other_load_cores,
    )


def _record(plan: Plan, results: list[RunResult]) -> Record:
    return Record(
        schema_version=SCHEMA_VERSION,
        rules_version=RULES_VERSION,
        name=plan.name,
        date=plan.record.name[:10],
        authors=list(plan.request.authors),
        note=plan.request.note,
        track=plan.track.id,
        track_definition=plan.track.definition(),
        source_sha256=plan.source_sha256,
        frozen=plan.frozen,
        recipe_name=plan.resolved.recipe_name,
        recipe=plan.recipe,
        settings=list(plan.request.settings),
        environment=dict(plan.environment),
        division=plan.division,
        runs=results,
        claim=claim_of(results, plan.track),
        attempts=ledger.attempts_made(home.ledger_path(), track=plan.track.id, source_sha256=plan.source_sha256, recipe=plan.recipe),
    )


def _save_state(folder: Path, plan: Plan, state: str, reason: str | None) -> None:
    """The attempt's own page, replaced by rename; a disk too full for it leaves the older one."""
    values: dict[str, Any] = {"state": state, "reason": reason, "plan": plan.summary()}
    partial = folder / ".attempt.json.partial"
    try:
        partial.write_text(json.dumps(values, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        partial.replace(folder / "attempt.json")
    except OSError:
        partial.unlink(missing_ok=True)
