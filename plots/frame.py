"""Records as tables: one row per validation, one row per record. What the figures draw, and what `--csv` writes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from pydantic import ValidationError

from data.errors import UserError
from harness.claim import result_of
from harness.events import read_events
from harness.record import Record, RunResult, read_record

VALIDATIONS = (  # columns of validations()
    "record",  # name of the record's folder
    "name",
    "track",
    "division",
    "recipe_name",
    "n",  # runs of the record
    "target_loss",  # the track's, nats per token
    "step_avg_ms",  # mean training time of an optimizer step over the record's runs
    "seed",
    "step",  # optimizer steps done
    "tokens",  # training tokens handed out
    "val_loss",  # nats per token
    "train_time_ms",  # the clock
)
SUMMARIES = (  # columns of summaries()
    "record",
    "name",
    "track",
    "title",  # the track's
    "division",
    "recipe_name",
    "frozen",
    "rules_version",
    "n",
    "steps",
    "tokens",
    "target_loss",
    "mean_val_loss",
    "sd_val_loss",
    "p_value",
    "target_met",
    "significant",
    "mean_train_time_ms",
    "sd_train_time_ms",
    "step_avg_ms",
)


def validations(folders: Sequence[Path]) -> pd.DataFrame:
    """One row per validation of each run, in the order of the folders, seeds and events.

    Args:
        folders: record folders, each of another name.

    Raises:
        UserError: no folder, a record or event file is broken, or the two disagree about a run.
    """
    rows = []
    for folder, record in _read(folders):
        common = _common(folder, record)
        for run in record.runs:
            rows += [{**common, "seed": run.seed, **values} for values in _validations_of(folder / run.events, run)]
    return pd.DataFrame(rows, columns=list(VALIDATIONS))


def summaries(folders: Sequence[Path]) -> pd.DataFrame:
    """One row per record: what it claims, and where and under which rules it was made.

    Raises:
        UserError: no folder, or a record is broken.
    """
    rows = []
    for folder, record in _read(folders):
        claim = record.claim.model_dump()
        rows.append({**claim, **_common(folder, record), "title": record.track_definition.get("title") or record.track})
        rows[-1].update(frozen=record.frozen, rules_version=record.rules_version)
    return pd.DataFrame(rows, columns=list(SUMMARIES))


def _read(folders: Sequence[Path]) -> list[tuple[Path, Record]]:
    """Every folder with its record; the folders' names tell the records apart, so they differ."""
    if not folders:
        raise UserError("there are no records to plot", fix="Give the folders of records, records/<track>/<date>-<name>")
    folders = [Path(folder).resolve() for folder in folders]
    names = [folder.name for folder in folders]
    for folder in folders:
        if names.count(folder.name) > 1:
            raise UserError(f"two records have the folder name {folder.name}", where=str(folder), fix="Give each record once")
    return [(folder, read_record(folder)) for folder in folders]


def _common(folder: Path, record: Record) -> dict[str, object]:
    """What holds for every row of a record."""
    target = record.track_definition.get("target_loss")
    if not _is_number(target):
        raise UserError(
            f"track_definition.target_loss is {target!r}, not a number", where=str(folder / "record.json"), fix="Copy the record again"
        )
    return {
        "record": folder.name,
        "name": record.name,
        "track": record.track,
        "division": record.division,
        "recipe_name": record.recipe_name,
        "n": record.claim.n,
        "target_loss": float(target),
        "step_avg_ms": round(record.claim.mean_train_time_ms / record.claim.steps, 3),
    }


def _validations_of(path: Path, run: RunResult) -> list[dict[str, float]]:
    """Step, tokens, loss and time of each validation of a run that agrees with its result."""
    events = read_events(path)
    _require_same(path, events, run)
    rows = []
    for number, event in enumerate(events, start=1):
        if event["event"] != "validation":
            continue
        values = {key: event.get(key) for key in ("step", "tokens", "val_loss", "train_time_ms")}
        for key, value in values.items():
            if not _is_number(value):
                raise UserError(
                    f"{key} of a validation is {value!r}, not a number", where=f"{path}, line {number}", fix="Copy the record again"
                )
        rows.append(values)
    last = rows[-1] if rows else {}
    if last != {"step": run.steps, "tokens": run.tokens, "val_loss": run.val_loss, "train_time_ms": run.train_time_ms}:
        raise UserError(f"the last validation is {last or 'missing'}, not that of the finish", where=str(path), fix="Run this seed again")
    return rows


def _require_same(path: Path, events: Sequence[dict], run: RunResult) -> None:
    """Refuse an event file that tells another story than record.json."""
    try:
        told = result_of(events, events_name=run.events, process_time_ms=run.process_time_ms, other_load_cores=run.other_load_cores)
    except UserError as error:  # not finished: names the file as the record does
        raise UserError(error.what, where=str(path), fix=error.fix) from None
    except (IndexError, KeyError, ValidationError) as error:
        reason = (
            "it is empty"
            if isinstance(error, IndexError)
            else "start or finish lacks a value"
            if isinstance(error, KeyError)
            else "a value has the wrong type"
        )
        raise UserError(f"event file is not that of a run: {reason}", where=str(path), fix="Copy the record again") from None
    for key, value in run.model_dump().items():
        if getattr(told, key) != value:
            raise UserError(
                f"{key} is {getattr(told, key)} in the event file and {value} in record.json", where=str(path), fix="Copy the record again"
            )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
