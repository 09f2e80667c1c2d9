"""A record folder as the rules see it: read once, lazily, and never believed.

A part that cannot be read raises Unreadable, which names the rule that reports it: that rule fails, and those that need
the part say unknown. Nothing here imports, runs or unpickles anything from the record; links are not followed.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from data.errors import UserError
from harness.claim import result_of
from harness.events import canonical, chain_of, parse_line
from harness.record import Record, RunResult, read_record
from harness.rules.shape import misshapen
from harness.track import Track, load_track, track_names

LARGEST_TEXT = 64 << 20  # bytes of record.json, the manifest or an event file: ten times the longest run there is
LONGEST_LINE = 1 << 20  # bytes of an event; a start event with 103 shards has 20 thousand


class Unreadable(Exception):
    """A part of the record that cannot be read, and the id of the rule that fails for it."""

    def __init__(self, rule: str, what: str) -> None:
        super().__init__(what)
        self.rule, self.what = rule, what


@dataclass(frozen=True, kw_only=True)
class RunLog:
    """One event file: every line an event with the keys it needs."""

    name: str  # inside the record, runs/<seed>.jsonl
    events: tuple[dict, ...]  # line n is events[n - 1]
    broken: str | None  # the first line that was not written as it stands or does not follow from the one before

    def of(self, *kinds: str) -> list[dict]:
        """Events of these kinds, in order."""
        return [event for event in self.events if event["event"] in kinds]

    @property
    def start(self) -> dict:
        """The first event, which says what is run."""
        if not self.events or self.events[0]["event"] != "start":
            raise Unreadable("EVIDENCE-4", f"{self.name} does not begin with a start event")
        return self.events[0]

    @property
    def finish(self) -> dict:
        """The last event, which has the result."""
        if not self.events or self.events[-1]["event"] != "finish":
            raise Unreadable("EVIDENCE-4", f"{self.name} does not end with a finish event")
        return self.events[-1]


class Evidence:
    """What rules look at: one record folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def files(self) -> dict[str, str]:
        """Everything in the folder that is not a folder: name inside it -> "file", or what else it is."""
        found = {}
        for place, folders, names in os.walk(self.folder):
            for name in (*folders, *names):
                path = Path(place, name)
                kind = _kind(path)
                if kind != "folder":
                    found[path.relative_to(self.folder).as_posix()] = kind
        return dict(sorted(found.items()))

    def text(self, name: str, rule: str) -> str:
        """A file's text.

        Raises:
            Unreadable: blamed on `rule`: no such file, a link, too large, or not UTF-8.
        """
        if self.files.get(name) != "file":
            raise Unreadable(rule, f"{name} is {'a ' + self.files[name] if name in self.files else 'missing'}")
        path = self.folder / name
        try:
            if path.stat().st_size > LARGEST_TEXT:
                raise Unreadable(rule, f"{name} has {path.stat().st_size} bytes, more than any record's")
            return path.read_bytes().decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise Unreadable(rule, f"{name} cannot be read: {error}") from None

    @cached_property
    def record(self) -> Record:
        """record.json, checked against the schema."""
        text = self.text("record.json", "EVIDENCE-1")
        try:
            _strict_json(text)
            return read_record(self.folder)
        except UserError as error:
            raise Unreadable("EVIDENCE-1", error.what) from None
        except (ValueError, RecursionError) as error:
            raise Unreadable("EVIDENCE-1", f"record.json is not JSON as this program writes it: {error}") from None

    @cached_property
    def manifest(self) -> dict[str, str]:
        """Digest by file name, as manifest.sha256 has it."""
        listed: dict[str, str] = {}
        for number, line in enumerate(self.text("manifest.sha256", "EVIDENCE-2").removesuffix("\n").split("\n"), start=1):
            digest, gap, name = line.partition("  ")
            if not gap or len(digest) != 64 or name in listed:
                raise Unreadable("EVIDENCE-2", f"manifest.sha256, line {number} is not a digest and a new name: {line:.100}")
            listed[name] = digest
        return listed

    @cached_property
    def runs(self) -> tuple[RunLog, ...]:
        """The event file of every run that record.json names, in its order."""
        return tuple(self._log(run.events) for run in self.record.runs)

    @cached_property
    def results(self) -> tuple[RunResult, ...]:
        """Every run's result worked out from its events; only the launcher's own measurements are the record's."""
        pairs = zip(self.runs, self.record.runs, strict=True)
        return tuple(_result(log, stated) for log, stated in pairs)

    @cached_property
    def shipped_track(self) -> Track | None:
        """The track of this id that comes with the program; None for somebody's own."""
        name = self.record.track
        return load_track(name) if name in track_names() else None

    @cached_property
    def track(self) -> Track:
        """The race that the record is judged by: the shipped track of its id, else the one it defines."""
        return self.shipped_track or own_track(self.record.track_definition)

    def _log(self, name: str) -> RunLog:
        lines = self.text(name, "EVIDENCE-3").split("\n")
        events, chain, broken = [], "", None
        if lines.pop():
            raise Unreadable("EVIDENCE-3", f"{name}, line {len(lines) + 1} is cut short")
        for number, line in enumerate(lines, start=1):
            where = f"{name}, line {number}"
            event = _event(line, where)
            broken = broken or _link_problem(event, line, chain, where)
            chain = event["chain"]
            events.append(event)
        return RunLog(name=name, events=tuple(events), broken=broken)


def own_track(definition: Mapping[str, Any]) -> Track:
    """A track from a record's own definition of it.

    Raises:
        Unreadable: a key is missing, unknown, or has a value no track has.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        track = TypeAdapter(Track).validate_python(definition)
    except ValidationError as error:
        first = error.errors()[0]
        raise Unreadable("DATA-1", f"track_definition is no track: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    rule = track.significance
    whole = (rule.p_below if rule.test == "t" else rule.margin) is not None
    if track.definition() != definition or not whole or min(track.val_every_steps, track.target_loss, track.val_tokens) <= 0:
        raise Unreadable("DATA-1", "track_definition is no track: it has a key or a value that a track file cannot have")
    return track


def _kind(path: Path) -> str:
    mode = path.lstat().st_mode
    if stat.S_ISLNK(mode):
        return "link"
    if stat.S_ISDIR(mode):
        return "folder"
    return "file" if stat.S_ISREG(mode) else "device or pipe"


def _strict_json(text: str) -> None:
    """Refuse what the json module lets through: NaN, and a key given twice, of which two readers may take different ones."""

    def no_double(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            raise ValueError(f"a key is given twice among {', '.join(key for key, _ in pairs)[:100]}")
        return values

    def no_constant(name: str) -> None:
        raise ValueError(f"{name} is not a number")

    json.loads(text, object_pairs_hook=no_double, parse_constant=no_constant)


def _event(line: str, where: str) -> dict:
    if len(line) > LONGEST_LINE:
        raise Unreadable("EVIDENCE-3", f"{where} has {len(line)} characters, more than any event")
    try:
        event = parse_line(line, where)
    except UserError as error:
        raise Unreadable("EVIDENCE-3", f"{where}: {error.what}") from None
    except RecursionError:
        raise Unreadable("EVIDENCE-3", f"{where}: JSON nested too deep") from None
    problem = misshapen(event)
    if problem:
        raise Unreadable("EVIDENCE-3", f"{where}: {problem}")
    return event


def _link_problem(event: dict, line: str, previous: str, where: str) -> str | None:
    """Why a line is not the one that was written after the line before."""
    try:
        if canonical(event) != line:
            return f"{where} is not written as this program writes it (a key given twice, other spacing)"
        right = chain_of(previous, event) == event["chain"]
    except (ValueError, RecursionError) as error:  # infinity, half a character
        return f"{where} cannot be hashed: {error}"
    return None if right else f"{where} does not follow from the line before it: its chain value is not right"


def _result(log: RunLog, stated: RunResult) -> RunResult:
    events = (log.start, log.finish)
    return result_of(events, events_name=log.name, process_time_ms=stated.process_time_ms, other_load_cores=stated.other_load_cores)
