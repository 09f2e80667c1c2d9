"""The ledger: an append-only list of every run started on this machine, finished or not. What a claim leaves out shows here."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from data.errors import UserError
from harness.events import canonical
from harness.record import Attempts


def recipe_digest(recipe: Mapping[str, Any]) -> str:
    """sha256 that tells recipes apart."""
    return hashlib.sha256(canonical(recipe).encode()).hexdigest()


def append(path: Path, **entry: Any) -> None:
    """Add one line; several programs may do so at once.

    Raises:
        UserError: the ledger cannot be written.
    """
    line = canonical({"at": datetime.now(UTC).isoformat(timespec="seconds"), **entry}) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            before = os.fstat(file.fileno()).st_size
            try:
                file.write(line.encode())
                file.flush()
                os.fsync(file.fileno())
            except OSError:
                os.ftruncate(file.fileno(), before)
                raise
    except OSError as error:
        raise UserError(
            f"cannot write the ledger: {error.strerror}",
            where=str(path),
            fix="Free some space, or set SPEEDRUN_HOME to a folder you may write",
        ) from None


def read(path: Path) -> list[dict]:
    """All entries, oldest first; an unreadable line is left out, since it says nothing.

    Returns:
        Objects with at, entry ("run_started" or "run_ended"), attempt, seed and more.
    """
    entries = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if isinstance(entry, dict):
                entries.append(entry)
    return entries


def runs(path: Path) -> list[dict]:
    """One entry a run, oldest first; `outcome` is `no end` for a run that is going on or whose launcher was killed."""
    found: dict[tuple, dict] = {}
    for entry in read(path):
        key = (entry.get("attempt"), entry.get("seed"))
        if entry.get("entry") == "run_started":
            found[key] = {**entry, "outcome": "no end"}
        elif entry.get("entry") == "run_ended" and key in found:
            found[key] |= {name: value for name, value in entry.items() if name not in ("at", "entry")}
    return list(found.values())


def attempts_made(path: Path, *, track: str, source_sha256: str, recipe: Mapping[str, Any]) -> Attempts:
    """How often this source and recipe have been tried on this machine."""
    digest = recipe_digest(recipe)
    mine = [e for e in read(path) if (e.get("track"), e.get("source_sha256"), e.get("recipe_sha256")) == (track, source_sha256, digest)]
    return Attempts(
        started=sum(entry.get("entry") == "run_started" for entry in mine),
        finished=sum(entry.get("entry") == "run_ended" and entry.get("outcome") == "finished" for entry in mine),
    )
