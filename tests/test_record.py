"""The record folder: whole or not at all, read strictly."""

from __future__ import annotations

import json

import pytest

from data.errors import UserError
from harness import record as record_module
from harness.record import find_records, manifest_text, read_record, require_free, slug, write_record
from tests.records import make_record


@pytest.fixture
def folder(tmp_path):
    """A record on disk."""
    return make_record(tmp_path / "records")


def test_record_survives_the_round_trip(folder):
    """What is read is what was written, and the manifest covers every file."""
    made = read_record(folder)

    assert made.model_dump() == json.loads((folder / "record.json").read_text())
    assert manifest_text(folder) == (folder / "manifest.sha256").read_text()


def test_existing_record_is_never_replaced(folder, tmp_path):
    """Writing to a folder that exists is refused, leaves it byte-identical and leaves nothing behind."""
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    events = [folder / run.events for run in read_record(folder).runs]

    with pytest.raises(UserError, match="appeared meanwhile"):
        write_record(folder, read_record(folder), source=folder / "source", events=events)
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert [folder] == list(folder.parent.iterdir())


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_interrupted_writing_leaves_nothing(folder, monkeypatch, error):
    """A full disk or Ctrl-C while a record is written leaves no half of it."""

    def fail(folder):
        raise error

    monkeypatch.setattr(record_module, "manifest_text", fail)
    made, new = read_record(folder), folder.with_name("2031-02-03-new")
    with pytest.raises((UserError, KeyboardInterrupt)):
        write_record(new, made, source=folder / "source", events=[folder / run.events for run in made.runs])
    assert [folder] == list(folder.parent.iterdir())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"extra": 1}, "extra"),
        ({"schema_version": 2}, "schema version 2"),
        ({"claim": {}}, r"claim\.n"),
        ({"date": "yesterday"}, "date"),
    ],
)
def test_record_of_another_shape_is_refused(folder, change, sentence):
    """An unknown key, another schema version, a missing key or a malformed value is refused by name."""
    path = folder / "record.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))

    with pytest.raises(UserError, match=sentence):
        read_record(folder)


def test_records_are_found_below_a_folder_named_source(tmp_path):
    """Only folders below the given one count when files of a trainer's source are left out."""
    (tmp_path / "source").mkdir()
    made = make_record(tmp_path / "source" / "records")

    assert [made] == find_records([tmp_path / "source" / "records"])


def test_no_record_is_an_error(tmp_path):
    """A folder without records is refused by name."""
    with pytest.raises(UserError, match="no record here"):
        find_records([tmp_path])


@pytest.mark.parametrize(("name", "expected"), [("My Muon, v2!", "my-muon-v2"), ("  ../../x  ", "x"), ("a" * 99, "a" * 60)])
def test_slug(name, expected):
    """A name becomes lower-case words joined by hyphens, never a path."""
    assert expected == slug(name)


def test_free_place_is_left_as_it_was(tmp_path):
    """Looking whether a record could be written makes no folder."""
    require_free(tmp_path / "records" / "pocket" / "2031-02-03-x")

    assert [] == list(tmp_path.iterdir())
