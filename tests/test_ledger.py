"""The ledger: appended to, never rewritten, read with patience."""

from __future__ import annotations

import pytest

from data.errors import UserError
from harness import ledger

MINE = {"attempt": "a", "track": "pocket", "source_sha256": "s", "recipe_sha256": ledger.recipe_digest({"lr": 1}), "recipe_name": "muon"}


@pytest.fixture
def path(tmp_path):
    """A ledger with one finished run, one that failed and one without an end."""
    path = tmp_path / "deep" / "ledger.jsonl"
    for seed, outcome in ((1, "finished"), (2, "failed"), (3, None)):
        ledger.append(path, entry="run_started", seed=seed, **MINE)
        if outcome:
            ledger.append(path, entry="run_ended", seed=seed, outcome=outcome, **MINE)
    return path


def test_attempts_are_counted_by_source_recipe_and_track(path):
    """Every started run of this source and recipe counts, finished or not; another recipe's does not."""
    ledger.append(path, entry="run_started", seed=9, **{**MINE, "recipe_sha256": "other"})
    made = ledger.attempts_made(path, track="pocket", source_sha256="s", recipe={"lr": 1})

    assert (3, 1) == (made.started, made.finished)


def test_run_without_an_end_says_so(path):
    """A run whose launcher was killed shows as one without an end."""
    assert ["finished", "failed", "no end"] == [run["outcome"] for run in ledger.runs(path)]


def test_unreadable_line_is_left_out(path):
    """A line cut short by a power cut does not hide the others."""
    path.write_bytes(path.read_bytes()[:-20] + b"\n\xff\xfe nonsense\n")

    assert 2 <= len(ledger.runs(path))


def test_no_ledger_is_an_empty_one(tmp_path):
    """Before the first run there is nothing, and that is no error."""
    assert [] == ledger.runs(tmp_path / "ledger.jsonl")


def test_ledger_that_cannot_be_written_is_refused(tmp_path):
    """A ledger below a plain file is refused with its path."""
    (tmp_path / "file").write_text("")

    with pytest.raises(UserError, match="cannot write the ledger"):
        ledger.append(tmp_path / "file" / "ledger.jsonl", entry="run_started")
