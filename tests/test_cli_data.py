"""The `data` commands: tables, JSON, exit codes, and what goes to which stream."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from data.errors import UserError
from data.fetch import Progress
from harness import cli_data
from harness.cli_data import data
from tests.hub import REPO, Hub, make_dataset, make_shards, sha256

ROOT = Path(__file__).parent.parent
TRACK = f"""
id = "small"
title = "a small track"
target_loss = 3.0
val_tokens = 1024
val_sequence_length = 64
val_every_steps = 10
clock = "starts at the first token"
ranked_by = "train_time"
[significance]
test = "t"
p_below = 0.01
[data]
name = "tokens"
source = "hub"
repo = "{REPO}"
vocab_size = 1000
val_shards = ["val.bin"]
train_shards = "train_{{}}.bin"
train_shard_count = 3
"""


@pytest.fixture
def files(tmp_path):
    return make_shards(tmp_path / "origin", make_dataset())


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "home" / "data" / "tokens"


@pytest.fixture
def track(tmp_path, files, monkeypatch):
    """Path of a track whose data a stand-in Hub serves."""
    path = tmp_path / "small.toml"
    path.write_text(TRACK)
    monkeypatch.setenv("SPEEDRUN_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with Hub(files) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        yield str(path)


def invoke(*arguments, exit_code=0):
    result = CliRunner().invoke(data, arguments)
    if result.exception is not None and not isinstance(result.exception, SystemExit | UserError):
        raise result.exception
    assert result.exit_code == exit_code, result.output
    return result


def test_list_shows_each_track_and_what_is_here(track):
    """Every track has a row with its data, shards present of those wanted, and the folder."""
    lines = invoke("list").stdout.splitlines()

    assert lines[0].split() == ["TRACK", "DATASET", "SOURCE", "SHARDS", "GB", "FOLDER"]
    row = next(line for line in lines if line.startswith("fineweb "))
    assert row.split()[1:5] == ["fineweb10B", "hub", "0/28", "0.00"]


def test_list_counts_shards_without_reading_them(track, tmp_path):
    """A shard counts by name and length: listing is instant however many there are."""
    folder = tmp_path / "home" / "data" / "fineweb10B"
    folder.mkdir(parents=True)
    (folder / "fineweb_train_000001.bin").write_bytes(b"x" * 10)
    rows = {row["track"]: row for row in json.loads(invoke("list", "--json").stdout)}

    assert (rows["fineweb"]["shards_present"], rows["fineweb"]["shards_wanted"], rows["fineweb"]["bytes_present"]) == (1, 28, 10)
    assert rows["fineweb-medium"]["shards_wanted"] == 104


def test_get_brings_the_shards_and_says_where(track, files, folder):
    """After get the shards are in the track's data folder; the summary is on stdout, progress on stderr."""
    result = invoke("get", track)

    assert {path.name: path.read_bytes() for path in folder.glob("*.bin")} == files
    assert "4 shards fetched" in result.stdout
    assert str(folder) in result.stdout
    assert "4/4 shards" in result.stderr
    assert "4/4 shards" not in result.stdout


def test_get_json_holds_the_digests(track, files, folder):
    """With --json stdout is one JSON value with what came, what was here and every digest."""
    invoke("get", track, "--shards", "1")
    values = json.loads(invoke("get", track, "--json").stdout)

    assert sorted(values["fetched"]) == ["train_2.bin", "train_3.bin"]
    assert sorted(values["present"]) == ["train_1.bin", "val.bin"]
    assert values["sha256"] == {name: sha256(body) for name, body in files.items()}
    assert values["folder"] == str(folder)


def test_check_of_good_shards_shows_tokens_and_digests(track, files):
    """Each shard has a row with its tokens, the beginning of its digest and its state."""
    invoke("get", track)
    lines = invoke("check", track).stdout.splitlines()

    assert lines[0].split() == ["SHARD", "TOKENS", "SHA256", "STATE", "DIGEST", "FROM"]
    assert lines[1].split() == ["val.bin", "20,000", sha256(files["val.bin"])[:12], "ok", "hub"]
    assert len(lines) == 5


def test_check_exits_1_when_a_shard_is_wrong(track, files, folder):
    """One changed and one missing shard are both in the table; the error counts them and names the track in what to do."""
    invoke("get", track)
    (folder / "train_1.bin").write_bytes(files["val.bin"])
    (folder / "train_2.bin").unlink()
    result = invoke("check", track, exit_code=1)

    assert [line.split()[3] for line in result.stdout.splitlines()[1:]] == ["ok", "changed", "missing", "ok"]
    assert "2 of 4 shards are not right" in result.exception.what
    assert result.exception.fix.endswith(f"speedrun data get {track}")


def test_check_json_has_the_problem_and_exits_1(track):
    """With --json the same is said, and the exit code is the same."""
    values = json.loads(invoke("check", track, "--shards", "1", "--json", exit_code=1).stdout)

    assert [shard["state"] for shard in values["shards"]] == ["missing", "missing"]
    assert values["shards"][0]["problem"] == "token shard is not there"


@pytest.mark.parametrize("command", ["get", "check"])
@pytest.mark.parametrize("shards", ["4", "-1", "many"])
def test_impossible_number_of_shards_is_wrong_usage(track, command, shards):
    """More training shards than exist, or not a number, is exit code 2 with the flag named."""
    result = invoke(command, track, "--shards", shards, exit_code=2)

    assert "--shards" in result.stderr


def test_unknown_track_is_the_users_error(track):
    """A track that does not exist ends in a UserError that lists those that do."""
    result = invoke("get", "moon", exit_code=1)

    assert isinstance(result.exception, UserError)
    assert "fineweb" in result.exception.fix


def test_missing_track_is_wrong_usage(track):
    """Without a track the command is wrong usage."""
    invoke("get", exit_code=2)


@pytest.mark.parametrize("command", ["list", "get", "check"])
def test_help_has_an_example(command):
    """Each command's help shows a line to copy."""
    text = invoke(command, "--help").stdout

    assert f"Example:\n    speedrun data {command}" in text


def test_plain_lines_come_seldom(monkeypatch, capsys):
    """On a pipe a line is written at most every few seconds, but the last one and each new note always are."""
    clock = iter([0.0, 1.0, 2.0, 5.5, 6.0, 6.5])
    monkeypatch.setattr(cli_data.time, "monotonic", lambda: next(clock))
    report = cli_data._lines()
    for done, note in [(0, None), (10, None), (20, None), (30, None), (40, "again"), (100, None)]:
        report(Progress(shards_done=done // 100, shards=1, bytes_done=done * 10**7, bytes=10**9, seconds=10.0, note=note))

    assert capsys.readouterr().err.splitlines() == [
        "0/1 shards, 0.00 MB of 1.00 GB, 0.0 MB/s",
        "0/1 shards, 300.00 MB of 1.00 GB, 30.0 MB/s, 23s left",
        "again",
        "1/1 shards, 1.00 GB of 1.00 GB, 100.0 MB/s, 0s left",
    ]


def test_commands_import_nothing_heavy():
    """Importing the commands loads no library but click, so that --help is instant."""
    heavy = "{'numpy', 'pydantic', 'torch', 'rich', 'huggingface_hub', 'filelock'}"
    program = f"import sys, harness.cli_data; sys.exit(', '.join({heavy} & set(sys.modules)) or 0)"

    assert (
        subprocess.run([sys.executable, "-c", program], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False).returncode == 0
    )


def test_group_is_a_click_group():
    """The top-level command line adds it by name."""
    assert isinstance(data, click.Group)
    assert sorted(data.commands) == ["check", "get", "list"]
