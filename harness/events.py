"""The event file of a run: one JSON object a line, each chained to the one before by sha256, written by rank 0."""

from __future__ import annotations

import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

from data.errors import UserError

KINDS = ("start", "warm_up", "step", "validation", "finish", "failure")
SCHEMA_VERSION = 1  # of the event lines; stands in every start event


def canonical(value: Any) -> str:
    """JSON as it is hashed and stored: sorted keys, no blanks that carry nothing, no NaN."""
    return json.dumps(value, sort_keys=True, allow_nan=False, ensure_ascii=False)


def chain_of(previous: str, event: dict) -> str:
    """The chain value of an event: sha256 over the previous chain value and the event without its own."""
    body = canonical({key: value for key, value in event.items() if key != "chain"})
    return hashlib.sha256(f"{previous}\n{body}".encode()).hexdigest()


class EventWriter:
    """Appends events to a file; every line is whole or not there.

    Raises:
        UserError: the file cannot be written, for example because the disk is full.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        known = read_events(path, allow_partial=True) if path.exists() else []
        self._chain = known[-1]["chain"] if known else ""
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
        self._size = _whole_lines(path)
        os.ftruncate(self._file, self._size)  # a line cut short by a kill
        os.lseek(self._file, self._size, os.SEEK_SET)

    def write(self, event: dict) -> None:
        """Append one event, `chain` added."""
        assert event["event"] in KINDS, f"unknown event {event['event']!r}"
        chain = chain_of(self._chain, event)
        line = (canonical({**event, "chain": chain}) + "\n").encode()
        try:
            done = 0
            while done < len(line):
                done += os.write(self._file, line[done:])
            if event["event"] != "step":
                os.fsync(self._file)
        except OSError as error:
            os.ftruncate(self._file, self._size)
            os.lseek(self._file, self._size, os.SEEK_SET)
            raise UserError(
                f"cannot write the event file: {error.strerror}",
                where=str(self.path),
                fix="Free some space, or set SPEEDRUN_HOME to a larger disk",
            ) from None
        self._chain, self._size = chain, self._size + len(line)

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)


def _whole_lines(path: Path) -> int:
    """Bytes up to and including the last newline."""
    return path.read_bytes().rfind(b"\n") + 1


def read_events(path: Path, *, allow_partial: bool = False) -> list[dict]:
    """All events of a file, in order; the chain is not checked here.

    Args:
        path: the event file.
        allow_partial: leave out a last line without a newline, as a run still going or killed leaves it.

    Raises:
        UserError: no file, or a line that is not a JSON object with a known event; names the line.
    """
    try:
        content = path.read_bytes()
        text = (content[: content.rfind(b"\n") + 1] if allow_partial else content).decode("utf-8")
    except FileNotFoundError:
        raise UserError("event file is not there", where=str(path), fix="Copy the complete record folder") from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"event file is not UTF-8 text: {error.reason} at byte {error.start}", where=str(path), fix="Copy the file again"
        ) from None
    lines = text.split("\n")
    if not lines[-1]:
        lines.pop()
    return [parse_line(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1)]


def parse_line(line: str, where: str) -> dict:
    """One event from its line.

    Raises:
        UserError: not a JSON object, NaN or infinity, or no known event.
    """
    try:
        event = json.loads(line, parse_constant=_refuse_constant, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise UserError(f"event line is not JSON: {error}", where=where, fix="Copy the file again, or run this seed again") from None
    if not isinstance(event, dict) or event.get("event") not in KINDS or not isinstance(event.get("chain"), str):
        raise UserError("line is not an event of this program", where=where, fix=f"An event has a chain and is one of {', '.join(KINDS)}")
    return event


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _refuse_constant(text)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number")
