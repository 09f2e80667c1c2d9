"""Races through the command line, short but real: torchrun, gloo, referee, record. And the bad days."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from data.shard import write_shard
from harness.events import chain_of, read_events
from harness.record import read_record

pytestmark = pytest.mark.race

REPOSITORY = Path(__file__).resolve().parent.parent
SAME_LOSS_ATOL = 1e-4  # float32 sums in another order, six steps
TINY = [
    "steps=6",
    "warmdown_steps=2",
    "layers=1",
    "width=32",
    "sequence_length=32",
    "batch_tokens=1024",
    "micro_batch=8",
    "precision=float32",
]
TRACK = """
id = "tiny"
title = "Sixteen letters"
target_loss = {target}
val_tokens = 2048
val_sequence_length = 32
val_every_steps = 3
clock = "as everywhere"
ranked_by = "train_time"
[significance]
test = "t"
p_below = 0.01
[data]
name = "{data}"
source = "local"
vocab_size = 256
val_shards = ["val.bin"]
train_shards = ["train_1.bin", "train_2.bin"]
"""


class Field:
    """A place to race in: a home with tiny data, a track, a folder for records, and the command line."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.home, self.records = folder, folder / "home", folder / "records"
        letters = np.random.default_rng(0).integers(0, 16, size=40_000)
        self.data = self.home / "data" / "tiny"
        self.data.mkdir(parents=True)
        for name, part in {"val.bin": letters[:4000], "train_1.bin": letters[4000:9000], "train_2.bin": letters[9000:]}.items():
            write_shard(self.data / name, part)
        self.track = self.write_track("tiny.toml")

    def write_track(self, name: str, *, target: float = 2.9, data: str = "tiny") -> Path:
        path = self.folder / name
        path.write_text(TRACK.format(target=target, data=data))
        return path

    def command(self, *arguments: str, settings: list[str] = (), track: Path | None = None) -> list[str]:
        sets = [part for setting in [*TINY, *settings] for part in ("--set", setting)]
        fixed = ["--track", str(track or self.track), "--recipe", "pocket/muon", "--records", str(self.records)]
        return [sys.executable, "-m", "harness.cli", "run", *fixed, *sets, *arguments]

    def environment(self) -> dict[str, str]:
        return {**os.environ, "SPEEDRUN_HOME": str(self.home), "PYTHONPATH": str(REPOSITORY)}

    def run(self, *arguments: str, **options) -> subprocess.CompletedProcess:
        return subprocess.run(
            self.command(*arguments, **options),
            capture_output=True,
            text=True,
            env=self.environment(),
            cwd=self.folder,
            timeout=110,
            check=False,
        )

    def start(self, *arguments: str, **options) -> subprocess.Popen:
        self.before = set(self.event_files())
        return subprocess.Popen(
            self.command(*arguments, **options),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=self.environment(),
            cwd=self.folder,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a suite run in the background has it ignored
        )

    def event_files(self) -> list[Path]:
        return list(self.home.glob("attempts/*/runs/*/events.jsonl"))

    def last_events(self) -> list[dict]:
        """Events of the newest run."""
        return read_events(max(self.event_files(), key=lambda path: path.stat().st_mtime_ns))

    def workers(self) -> list[psutil.Process]:
        """Ranks and launchers of this field that are alive."""
        found = []
        for process in psutil.process_iter():
            try:
                if str(self.home) in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def wait_for_step(self, step: int) -> None:
        """Return once the run that was started has logged a step."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            files = set(self.event_files()) - self.before
            if any(event.get("step", 0) >= step for path in files for event in read_events(path, allow_partial=True)):
                return
            time.sleep(0.05)
        raise AssertionError(f"no run reached step {step} within 60 s")


@pytest.fixture(scope="module")
def field(tmp_path_factory) -> Field:
    """One field for all races that leave it as it was."""
    return Field(tmp_path_factory.mktemp("field"))


@pytest.fixture(scope="module")
def raced(field) -> subprocess.CompletedProcess:
    """A race of two runs that went well, with what it printed."""
    done = field.run("--runs", "2", "--seed", "7", "--name", "two", "--author", "ada", "--note", "a note")
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def record(field, raced) -> Path:
    """The record of that race."""
    return next(field.records.glob("tiny/*-two"))


def assert_bad_day(field: Field, reason: str) -> None:
    """The newest run ends in a failure event with this reason, its chain holds, and no process is left."""
    events = field.last_events()
    chain = ""
    for event in events:
        chain = chain_of(chain, event)
        assert chain == event["chain"]
    assert events[-1]["event"] == "failure"
    assert reason in events[-1]["reason"]
    assert field.workers() == []


# ---- a race that goes well ----


def test_race_leaves_a_record_that_says_what_was_run(record):
    """A race through the command line leaves a record with every run, the options given, and a claim over both seeds."""
    made = read_record(record)

    assert [7, 8] == [run.seed for run in made.runs]
    assert ("two", ["ada"], "a note", "tiny") == (made.name, made.authors, made.note, made.track)
    assert 6 * 1024 == made.claim.tokens == made.runs[0].tokens
    assert made.frozen == "1.0"
    assert (2, 2) == (made.attempts.started, made.attempts.finished)
    assert all(run.process_time_ms > run.train_time_ms for run in made.runs)


def test_race_learns(record):
    """The validation loss falls from the first validation to the last."""
    losses = [event["val_loss"] for event in read_events(record / "runs/7.jsonl") if event["event"] == "validation"]

    assert 3 == len(losses)
    assert losses[-1] < losses[0]


def test_race_verifies(field, record):
    """A record made by a race passes verify through the command line."""
    done = subprocess.run(
        [sys.executable, "-m", "harness.cli", "verify", str(record)],
        capture_output=True,
        text=True,
        env=field.environment(),
        timeout=60,
        check=False,
    )

    assert 0 == done.returncode, done.stdout + done.stderr


def test_weights_are_kept_by_their_digest(field, record):
    """The final weights lie in the home's weights folder under the sha256 that the record names."""
    digests = {run.weights_sha256 for run in read_record(record).runs}

    assert digests == {path.stem for path in (field.home / "weights").glob("*.safetensors")} & digests


def test_one_seed_twice_gives_the_same_events_but_for_times(field, record):
    """Two runs of one seed on one machine agree in every event, times and chain left out."""
    done = field.run("--seed", "7", "--name", "again", "--json")
    again = Path(json.loads(done.stdout)["record"])

    assert without_times(record / "runs/7.jsonl") == without_times(again / "runs/7.jsonl")


def without_times(path: Path) -> list[dict]:
    """Events without what the clock and the machine's memory add."""
    passing = ("chain", "train_time_ms", "warm_up_ms", "started_at", "peak_memory_mib")
    return [{key: value for key, value in event.items() if key not in passing} for event in read_events(path)]


@pytest.mark.parametrize("processes", [2, 4])
def test_world_size_does_not_change_the_loss(field, record, processes):
    """Several gloo processes end within 1e-4 of the loss of one, from the same seed and global batch."""
    done = field.run("--seed", "7", "--name", f"by-{processes}", "--nproc", str(processes), "--json")
    alone = read_record(record).runs[0]
    together = read_record(Path(json.loads(done.stdout)["record"])).runs[0]

    assert alone.val_loss == pytest.approx(together.val_loss, abs=SAME_LOSS_ATOL)
    assert alone.tokens == together.tokens


def test_dry_run_starts_nothing(field):
    """--dry-run prints recipe, tokens and files as JSON and leaves no attempt and no record."""
    before = sorted(field.home.glob("attempts/*"))
    done = field.run("--dry-run", "--json", "--name", "planned")
    plan = json.loads(done.stdout)

    assert (6, 6 * 1024, 32) == (plan["steps"], plan["tokens"], plan["recipe"]["width"])
    assert before == sorted(field.home.glob("attempts/*"))
    assert not (field.records / "tiny").joinpath("planned").exists()


def test_plain_progress_has_the_fields_form(raced):
    """On a pipe, progress is printed to stderr in the form that the field's tools read."""
    assert any(line.startswith("step:3/6 val_loss:") and "step_avg:" in line for line in raced.stderr.splitlines())


def test_race_ends_with_the_commands_that_come_next(raced):
    """After the verdict stand the record's path and the commands to verify and to plot it."""
    assert "python -m harness.cli verify records/tiny" in raced.stdout
    assert "python -m harness.cli plot figure1 records/tiny" in raced.stdout


# ---- refused before anything starts ----

REFUSED = {
    "unknown track": (["--track", "nowhere"], [], "there is no track 'nowhere'"),
    "unknown recipe": (["--recipe", "pocket/sgd"], [], "there is no recipe 'sgd'"),
    "wrong type": ([], ["steps=many"], "steps wants int, got 'many'"),
    "batch not divisible": (["--nproc", "3"], [], "does not split into 3 processes"),
    "too many GPUs": (["--gpus", "99"], [], "99 GPUs asked for"),
    "name of nothing": (["--name", "!!!"], [], "no letter or digit"),
    "gpus and nproc": (["--gpus", "1", "--nproc", "2"], [], "--gpus and --nproc together"),
    "nodes without a place to meet": (["--nnodes", "2"], [], "need a place to meet"),
    "no trainer here": (["."], [], "no trainer here"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_starts(field, case):
    """Each mistake ends in one clear sentence on stderr, exit code 1, no traceback and no attempt."""
    arguments, settings, sentence = REFUSED[case]
    before = sorted(field.home.glob("attempts/*"))
    done = field.run(*arguments, settings=settings)

    assert 1 == done.returncode
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
    assert before == sorted(field.home.glob("attempts/*"))


def test_wrong_flag_is_a_usage_error(field):
    """An unknown flag exits with 2 and names the flag."""
    done = field.run("--fast")

    assert 2 == done.returncode
    assert "--fast" in done.stderr


def test_record_that_exists_is_never_touched(field, record):
    """Racing under the name of an existing record is refused, and the record keeps every byte."""
    before = {path: path.read_bytes() for path in record.rglob("*") if path.is_file()}
    done = field.run("--name", "two")

    assert 1 == done.returncode
    assert "already a record" in done.stderr
    assert before == {path: path.read_bytes() for path in record.rglob("*") if path.is_file()}


def test_records_folder_that_cannot_be_written_is_refused(field, tmp_path):
    """A records folder below a plain file is refused before anything starts."""
    (tmp_path / "file").write_text("")
    done = field.run("--records", str(tmp_path / "file" / "records"))

    assert 1 == done.returncode
    assert "records cannot be written" in done.stderr


def test_read_only_records_folder_is_refused(field, mount):
    """A read-only records folder is refused before anything starts, even for root."""
    done = field.run("--records", str(mount("ro,size=64k")))

    assert 1 == done.returncode
    assert "records cannot be written: Read-only file system" in done.stderr


def test_missing_data_names_the_command(field):
    """Without data the answer is one sentence with the command that fetches it."""
    done = field.run(track=field.write_track("empty.toml", data="nothing-here"))

    assert 1 == done.returncode
    assert "data is missing: val.bin and 1 more" in done.stderr
    assert "speedrun data get tiny" in done.stderr


@pytest.mark.parametrize(("damage", "sentence"), [("truncate", "but the file has"), ("foreign", "not a token shard")])
def test_broken_shard_is_refused(field, damage, sentence):
    """A truncated shard and a file of another kind are refused with the file's name."""
    folder = field.home / "data" / damage
    shutil.copytree(field.data, folder, ignore=shutil.ignore_patterns("manifest.json"))
    path = folder / "train_1.bin"
    path.write_bytes(path.read_bytes()[:-7] if damage == "truncate" else b"PK" * 2000)
    done = field.run(track=field.write_track(f"{damage}.toml", data=damage))

    assert 1 == done.returncode
    assert sentence in done.stderr
    assert "train_1.bin" in done.stderr


# ---- bad days ----


def test_target_met_before_training_stops_the_run(field):
    """A model that meets the target at step 0 is stopped: it has seen the data, or the target is no target."""
    done = field.run("--name", "easy", track=field.write_track("easy.toml", target=100.0))

    assert 1 == done.returncode
    assert "meets the target 100.0 before any training" in done.stderr
    assert_bad_day(field, "before any training")


def test_nan_loss_stops_at_once_and_names_step_and_rank(field):
    """A training loss that is not a number ends the run within steps, naming the step and a rank."""
    done = field.run("--name", "nan", "--nproc", "2", settings=["lr=1e20"])

    assert 1 == done.returncode
    assert "training loss is nan at step" in done.stderr or "training loss is inf at step" in done.stderr
    assert_bad_day(field, "on rank")
    assert field.last_events()[-1]["step"] < 6


def test_killed_rank_is_named(field):
    """A rank killed by SIGKILL ends the run with its number and the signal, and takes the other rank along."""
    racing = field.start("--name", "killed", "--nproc", "2", settings=["steps=100000"])
    field.wait_for_step(3)
    victim = next(process for process in field.workers() if process.environ().get("RANK") == "1")
    victim.kill()
    _, stderr = racing.communicate(timeout=60)

    assert 1 == racing.returncode
    assert "rank 1 was killed by SIGKILL" in stderr
    assert_bad_day(field, "rank 1 was killed by SIGKILL")


@pytest.mark.parametrize(("number", "reason"), [(signal.SIGINT, "interrupted by Ctrl-C"), (signal.SIGTERM, "interrupted by SIGTERM")])
def test_interrupted_race_keeps_its_events(field, number, reason):
    """Ctrl-C and SIGTERM stop every process, keep the events so far with the reason, and write no record."""
    racing = field.start("--name", "stopped", settings=["steps=100000"])
    field.wait_for_step(3)
    racing.send_signal(number)
    _, stderr = racing.communicate(timeout=60)

    assert 130 == racing.returncode
    assert reason in stderr
    assert_bad_day(field, reason)
    assert not list(field.records.glob("tiny/*stopped*"))
    assert not list(field.records.glob("tiny/.partial*"))


def test_killed_launcher_leaves_no_process(field):
    """When the launcher itself is killed by SIGKILL, torchrun and all ranks go with it."""
    racing = field.start("--name", "orphans", settings=["steps=100000"])
    field.wait_for_step(3)
    racing.kill()
    racing.communicate(timeout=60)
    deadline = time.monotonic() + 10
    while field.workers() and time.monotonic() < deadline:
        time.sleep(0.1)

    assert field.workers() == []
    assert field.last_events()[-1]["event"] in ("step", "validation")


def test_full_disk_keeps_the_events_and_the_reason(field, mount):
    """A disk that fills up while events are written ends the run with whole lines, the reason, and no record."""
    home = mount("size=3m")
    shutil.copytree(field.home / "data", home / "data")
    small = Field.__new__(Field)
    small.folder, small.home, small.records, small.track = field.folder, home, field.records, field.track
    racing = small.start("--name", "full", settings=["steps=100000"])
    small.wait_for_step(3)
    with (home / "filler").open("wb", buffering=0) as filler:
        try:
            while True:
                filler.write(b"\0" * 4096)
        except OSError:
            pass
    _, stderr = racing.communicate(timeout=60)

    assert 1 == racing.returncode
    assert "cannot write the event file: No space left on device" in stderr
    assert_bad_day(small, "cannot write the event file")
    assert not list(field.records.glob("tiny/*full*"))
