"""The event file: what is written is read, the chain shows tampering, and a line is whole or not there."""

from __future__ import annotations

import errno
import itertools
import json
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import UserError
from harness.events import KINDS, EventWriter, canonical, chain_of, parse_line, read_events

SAMPLE = [
    {"event": "start", "seed": 3, "note": "naïve 日本"},
    {"event": "step", "step": 1, "train_loss": 5.25},
    {"event": "validation", "step": 1, "val_loss": 5.1},
    {"event": "finish", "step": 1, "val_loss": 5.1, "epochs": None},
]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
EVENTS = st.builds(
    lambda kind, values: {**values, "event": kind},
    st.sampled_from(KINDS),
    st.dictionaries(st.text().filter(lambda key: key != "chain"), JSON, max_size=4),
)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "events.jsonl"


def write(path, events):
    writer = EventWriter(path)
    for event in events:
        writer.write(event)
    writer.close()


def chain_holds(events):
    previous = ""
    for event in events:
        if event["chain"] != chain_of(previous, event):
            return False
        previous = event["chain"]
    return True


def without_chain(events):
    return [{key: value for key, value in event.items() if key != "chain"} for event in events]


@settings(max_examples=40)  # each one ends in several fsync
@given(st.lists(EVENTS, max_size=4))
def test_events_survive_the_round_trip(events):
    """Any JSON values are read as they were written, in order, one canonical line each, and the chain holds."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "events.jsonl"
        write(path, events)
        found = read_events(path)
        text = path.read_bytes().decode()

    assert events == without_chain(found)
    assert chain_holds(found)
    assert "".join(canonical(event) + "\n" for event in found) == text


def test_chain_goes_on_over_a_second_writer(path):
    """A file opened again is continued: the result is that of one writer."""
    write(path, SAMPLE[:2])
    write(path, SAMPLE[2:])

    assert SAMPLE == without_chain(read_events(path))
    assert chain_holds(read_events(path))


def edited(events):
    events[2]["val_loss"] = 3.2
    return events


TAMPERED = {
    "value changed": edited,
    "line dropped": lambda events: events[:1] + events[2:],
    "lines swapped": lambda events: [events[0], events[2], events[1], events[3]],
    "line doubled": lambda events: events[:2] + events[1:],
    "first line dropped": lambda events: events[1:],
    "key added": lambda events: [*events[:3], {**events[3], "extra": 1}],
    "type changed": lambda events: [*events[:3], {**events[3], "step": 1.0}],
}


@pytest.mark.parametrize("tamper", TAMPERED.values(), ids=TAMPERED)
def test_tampering_breaks_the_chain(path, tamper):
    """Whatever is changed inside the file, recomputing the chain shows it."""
    write(path, SAMPLE)
    assert chain_holds(read_events(path))

    assert not chain_holds(tamper(read_events(path)))


def test_chain_recomputed_from_the_change_differs_at_the_end(path, tmp_path):
    """Whoever mends the chain after a change gets another last value, which the record's manifest holds."""
    write(path, SAMPLE)
    write(tmp_path / "other.jsonl", [SAMPLE[0], {**SAMPLE[1], "train_loss": 5.0}, *SAMPLE[2:]])

    assert read_events(path)[-1]["chain"] != read_events(tmp_path / "other.jsonl")[-1]["chain"]


@pytest.mark.parametrize("kept", ["nothing", "one byte", "half of a character", "all but the newline"])
def test_line_cut_short_is_mended_on_reopening(path, kept):
    """A last line that a kill cut anywhere is left out and written over; every whole line stays, the chain goes on."""
    write(path, SAMPLE[1:])
    whole = path.read_bytes()
    write(path, SAMPLE[:1])
    last = path.read_bytes().removeprefix(whole)
    cut = {"nothing": 0, "one byte": 1, "half of a character": last.index("ï".encode()) + 1, "all but the newline": len(last) - 1}[kept]
    path.write_bytes(whole + last[:cut])

    assert SAMPLE[1:] == without_chain(read_events(path, allow_partial=True))
    write(path, [{"event": "failure", "reason": "killed"}])
    assert [*SAMPLE[1:], {"event": "failure", "reason": "killed"}] == without_chain(read_events(path))
    assert chain_holds(read_events(path))


def test_line_cut_short_is_refused_in_a_record(path):
    """Where the file must be complete, a cut line is an error with its number."""
    write(path, SAMPLE)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match="not JSON") as caught:
        read_events(path)

    assert f"{path}, line 4" == caught.value.where


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_is_not_written(path, value):
    """NaN and infinity are refused before a byte is written, and the writer still works."""
    writer = EventWriter(path)
    with pytest.raises(ValueError, match="not JSON compliant"):
        writer.write({"event": "validation", "val_loss": value})
    writer.write(SAMPLE[1])
    writer.close()

    assert SAMPLE[1:2] == without_chain(read_events(path))


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
def test_nan_is_not_read(text):
    """NaN, infinity and a number too large for a float are refused with the line, never read as a value."""
    with pytest.raises(UserError, match="not JSON") as caught:
        parse_line(f'{{"event": "validation", "chain": "", "val_loss": {text}}}', "events.jsonl, line 7")

    assert "events.jsonl, line 7" == caught.value.where


BROKEN = {
    "empty": "",
    "text": "step 1 of 10",
    "list": '["event", "chain"]',
    "no chain": '{"event": "step"}',
    "chain of another type": '{"event": "step", "chain": 5}',
    "unknown event": '{"event": "party", "chain": ""}',
    "event of another type": '{"event": ["step"], "chain": ""}',
    "nested without end": "[" * 100_000,
}


@pytest.mark.parametrize("line", BROKEN.values(), ids=BROKEN)
def test_line_that_is_no_event_is_refused(line):
    """A line that this program did not write ends in a sentence with its place."""
    with pytest.raises(UserError, match="line") as caught:
        parse_line(line, "events.jsonl, line 7")

    assert "events.jsonl, line 7" == caught.value.where


def test_missing_or_binary_file_is_refused(path):
    """No file, and one that is not text, each end in a sentence."""
    with pytest.raises(UserError, match="not there"):
        read_events(path)
    path.write_bytes(b'{"event": "\xff\xfe"}\n')
    with pytest.raises(UserError, match="UTF-8"):
        read_events(path)


def test_unknown_event_is_our_own_mistake(path):
    """Writing an event that has no name in the schema is a failed assertion."""
    with pytest.raises(AssertionError, match="party"):
        EventWriter(path).write({"event": "party"})


def test_failed_write_leaves_whole_lines_and_a_writer_that_goes_on(path, monkeypatch):
    """When the disk fills up within a line, the part is taken back; once there is room the next line follows without a gap."""
    writer, real = EventWriter(path), os.write
    writer.write(SAMPLE[0])
    before = path.read_bytes()
    rooms = [20, 0]

    def short_write(file, data):
        room = rooms.pop(0)
        if not room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(file, data[:room])

    monkeypatch.setattr(os, "write", short_write)
    with pytest.raises(UserError, match="No space left on device"):
        writer.write(SAMPLE[1])
    after = path.read_bytes()
    monkeypatch.setattr(os, "write", real)
    writer.write(SAMPLE[2])
    writer.close()

    assert before == after
    assert [SAMPLE[0], SAMPLE[2]] == without_chain(read_events(path))
    assert chain_holds(read_events(path))


@pytest.fixture
def small_disk(mount):
    """A file system of 64 KiB."""
    return mount("size=64k")


def test_full_disk_ends_in_a_sentence_and_a_whole_line(small_disk):
    """On a real full disk the write is refused with the file and a way out, and every line before it can be read."""
    path = small_disk / "events.jsonl"
    writer = EventWriter(path)
    written = []

    def write_for_ever():
        for step in itertools.count(1):
            writer.write({"event": "step", "step": step, "padding": "x" * 900})
            written.append(step)

    with pytest.raises(UserError, match="No space left on device") as caught:
        write_for_ever()
    writer.close()
    found = read_events(path)

    assert str(path) == caught.value.where
    assert written == [event["step"] for event in found]
    assert len(written) > 30
    assert chain_holds(found)
    assert path.read_bytes().endswith(b"\n")


def test_lines_are_sorted_json_with_a_final_newline(path):
    """The file is what other programs can read too: one JSON object a line, keys sorted, no escapes for plain letters."""
    write(path, SAMPLE)
    lines = path.read_text(encoding="utf-8").splitlines()

    assert [json.dumps(json.loads(line), sort_keys=True, ensure_ascii=False) for line in lines] == lines
    assert "日本" in lines[0]
