"""The record: one folder with the claim, the source, the event files and a manifest of digests; written whole or not at all."""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from data.errors import UserError
from data.shard import file_sha256

SCHEMA_VERSION = 1
NAME_LENGTH = 200  # characters
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_Strict = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class RunResult(BaseModel):
    """One run of a record, as its event file says; `process_time_ms` and the load are the launcher's own measurements."""

    model_config = _Strict
    seed: int = Field(description="of torch, numpy and python")
    events: str = Field(pattern=r"^runs/[A-Za-z0-9_-]+\.jsonl$", description="event file inside the record")
    steps: int = Field(gt=0, description="optimizer steps")
    tokens: int = Field(gt=0, description="training tokens")
    val_loss: float = Field(description="last validation, nats per token")
    train_time_ms: float = Field(gt=0, description="the clock: first training token to final weights, evaluation left out")
    process_time_ms: float = Field(gt=0, description="launch to exit")
    peak_memory_mib: float | None = Field(description="of rank 0")
    weights_sha256: Sha256 = Field(description="final weights, safetensors")
    other_load_cores: float | None = Field(description="mean number of cores busy with other work during the run; null where not measured")


class Claim(BaseModel):
    """What the record says, worked out from its runs."""

    model_config = _Strict
    n: int = Field(gt=0, description="runs")
    steps: int = Field(gt=0, description="optimizer steps of every run")
    tokens: int = Field(gt=0, description="training tokens of every run")
    mean_val_loss: float = Field(description="nats per token")
    sd_val_loss: float | None = Field(description="sample standard deviation over runs; null for one run")
    p_value: float | None = Field(description="of the track's test that the mean is below the target; null where it cannot be computed")
    mean_train_time_ms: float = Field(gt=0, description="mean over runs")
    sd_train_time_ms: float | None = Field(description="sample standard deviation; null for one run")
    target_met: bool = Field(description="the mean final loss meets the track's target")
    significant: bool = Field(description="the track's significance rule holds")


class Attempts(BaseModel):
    """Every run of the same source, recipe and track that this machine's ledger knows, up to this record."""

    model_config = _Strict
    started: int = Field(ge=0, description="runs started")
    finished: int = Field(ge=0, description="runs that reached their last step")


class Record(BaseModel):
    """record.json: what was run, where, and what is claimed."""

    model_config = _Strict
    schema_version: Literal[1]
    rules_version: str = Field(pattern=r"^\d+\.\d+$", description="of the rules that the record was made under")
    name: str = Field(min_length=1, max_length=NAME_LENGTH, description="free text")
    date: str = Field(pattern=r"^\d{4}-\d{2}-\d{2}$", description="day of the first run, UTC")
    authors: list[str]
    note: str = Field(description="free text")
    track: str = Field(description="track id")
    track_definition: dict[str, Any] = Field(description="the track file's values, patterns spelled out")
    source_sha256: Sha256 = Field(description="over names and digests of all files in source/")
    frozen: str = Field(description="version of the frozen trainer that source/ is, or 'modified'")
    recipe_name: str
    recipe: dict[str, Any] = Field(description="every hyper-parameter, resolved")
    settings: list[str] = Field(description="key=value changes made to the preset on the command line")
    environment: dict[str, Any] = Field(description="machine and versions")
    division: str = Field(description="the machine class that times may be compared within")
    runs: list[RunResult] = Field(min_length=1)
    claim: Claim
    attempts: Attempts


def slug(name: str) -> str:
    """A name as part of a folder name: lower case, digits, hyphens.

    Raises:
        UserError: nothing is left of it.
    """
    words = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:60].strip("-")
    if not words:
        raise UserError(
            f"{name!r} has no letter or digit to make a folder name of", where="--name", fix="Give a name such as muon-baseline"
        )
    return words


def record_folder(records: Path, track: str, date: str, name: str) -> Path:
    """Where a record of this name belongs."""
    return records / track / f"{date}-{slug(name)}"


def require_free(folder: Path) -> None:
    """Refuse a record folder that exists, or one that cannot be made; leaves nothing behind.

    Raises:
        UserError: the folder is there already, or its parent cannot be written to.
    """
    if folder.exists():
        raise UserError(
            "there is already a record of this name and day",
            where=str(folder),
            fix="Choose another --name; existing records are never changed",
        )
    probe = folder.parent / f".probe-{uuid.uuid4().hex}"
    made = [parent for parent in (folder.parent, *folder.parent.parents) if not parent.exists()]
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        raise UserError(
            f"records cannot be written: {error.strerror}", where=str(folder.parent), fix="Choose another folder with --records DIR"
        ) from None
    finally:
        for parent in made:
            if parent.is_dir():
                parent.rmdir()


def write_record(folder: Path, record: Record, *, source: Path, events: Sequence[Path]) -> None:
    """Write a record; it arrives by one rename.

    Args:
        folder: where it will be; does not exist.
        record: its content; runs name the event files in the order of `events`.
        source: the copied trainer.
        events: one event file per run.

    Raises:
        UserError: the folder exists by now, or the disk refuses.
    """
    partial = folder.parent / f".partial-{uuid.uuid4().hex}"
    try:
        partial.mkdir(parents=True)
        shutil.copytree(source, partial / "source", ignore=shutil.ignore_patterns("__pycache__", ".*"))
        (partial / "runs").mkdir()
        for run, path in zip(record.runs, events, strict=True):
            shutil.copyfile(path, partial / run.events)
        (partial / "record.json").write_text(
            json.dumps(record.model_dump(), indent=1, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8"
        )
        (partial / "manifest.sha256").write_text(manifest_text(partial), encoding="utf-8")
        if folder.exists():
            raise FileExistsError(17, "a record of this name has appeared meanwhile")
        os.rename(partial, folder)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if not isinstance(error, OSError):
            raise
        raise UserError(
            f"the record could not be written: {error.strerror}", where=str(folder), fix="The attempt's folder still holds every run"
        ) from None


def manifest_text(folder: Path) -> str:
    """sha256 of every file of a record but the manifest and its signature, in the form of sha256sum."""
    return "".join(f"{file_sha256(path)}  {path.relative_to(folder).as_posix()}\n" for path in record_files(folder))


def record_files(folder: Path) -> list[Path]:
    """Every file that a manifest covers, sorted."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and path.relative_to(folder).as_posix() not in ("manifest.sha256", "manifest.sha256.sig")
    )


def read_record(folder: Path) -> Record:
    """Read record.json, checked against the schema; digests and events are the rules' business.

    Raises:
        UserError: no record here, not JSON, another schema version, or a key missing, unknown or of the wrong type.
    """
    path = folder / "record.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return Record.model_validate(values)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            "there is no record here: record.json is missing",
            where=str(folder),
            fix="Give the folder of a record, records/<track>/<date>-<name>",
        ) from None
    except ValidationError as error:
        found = values.get("schema_version") if isinstance(values, dict) else None
        if isinstance(found, int) and found != SCHEMA_VERSION:
            raise UserError(
                f"record has schema version {found}, this program reads {SCHEMA_VERSION}", where=str(path), fix="Use the matching release"
            ) from None
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "file"
        raise UserError(
            f"record.json is not valid: {key}: {first['msg']}",
            where=str(path),
            fix="Copy the record again; docs/record.schema.json has the schema",
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"record.json is not JSON: {error}", where=str(path), fix="Copy the record again") from None


def _is_own(file: Path) -> bool:
    """Not a file of a trainer's source, nor of a record that is just being written."""
    return "source" not in file.parts and not any(part.startswith(".partial") for part in file.parts)


def find_records(paths: Sequence[Path]) -> list[Path]:
    """Record folders among and below the given paths, sorted.

    Raises:
        UserError: a path does not exist or holds no record.
    """
    found: list[Path] = []
    for path in paths:
        inside = (
            [path]
            if (path / "record.json").is_file()
            else sorted(file.parent for file in path.rglob("record.json") if _is_own(file.relative_to(path)))
        )
        if not inside:
            raise UserError("no record here or below", where=str(path), fix="Give a record's folder, or a folder of records")
        found += [folder for folder in inside if folder not in found]
    return found
