"""`speedrun doctor`: each thing it looks at is told apart when good and when bad, and says what to do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
from click.testing import CliRunner

from data.dataset import Dataset
from data.manifest import check_shards
from data.shard import write_shard
from harness import doctor as examination
from harness import machine as machine_module
from harness.cli_doctor import doctor
from harness.machine import Gpu, Machine

ROOT = Path(__file__).resolve().parent.parent
LAPTOP = Machine(cpu="Test Processor", cores=2, memory_mib=16_000, available_mib=8_000, gpus=(), driver=None)
GPU = Gpu(name="NVIDIA H100 80GB HBM3", memory_mib=81_559, free_mib=81_000)
SERVER = Machine(cpu="Test Processor", cores=64, memory_mib=512_000, available_mib=500_000, gpus=(GPU,) * 8, driver="570.1")


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    """An empty $SPEEDRUN_HOME, and a machine without GPUs that need not be measured for long."""
    monkeypatch.setenv("SPEEDRUN_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(examination, "this_machine", lambda: LAPTOP)
    monkeypatch.setattr(examination, "_LOAD_SAMPLE_S", 0.01)
    return tmp_path / "home"


@pytest.fixture
def track(home):
    """A track of one validation and two training shards, none of them here yet."""
    data = Dataset(
        name="tiny",
        source="wheel",
        vocab_size=256,
        val_shards=("val.bin",),
        train_shards=("train_1.bin", "train_2.bin"),
        default_train_shards=2,
    )
    return SimpleNamespace(id="tiny", data=data)


@pytest.fixture
def shards(track, home):
    """The track's shards, hashed once."""
    folder = home / "data" / "tiny"
    folder.mkdir(parents=True)
    for name in track.data.shards():
        write_shard(folder / name, np.arange(100))
    check_shards(track.data, folder, track.data.shards(), deep=True)
    return folder


def test_python_and_torch_are_named():
    """Good versions are ok and shown."""
    check = examination.versions()

    assert check.state == "ok"
    assert check.found.startswith("python 3.")
    assert "torch 2." in check.found


@pytest.mark.parametrize("found", ["unknown", "2.4.1"])
def test_torch_missing_or_too_old_fails(monkeypatch, found):
    """No torch, or one that is too old, stands in the way, and the mend is a command."""
    monkeypatch.setattr(machine_module, "installed_version", lambda package: found)
    check = examination.versions()

    assert check.state == "fail"
    assert "pip install" in check.fix


def test_machine_without_gpu_is_ok():
    """No GPU is no fault: pocket races on the processor."""
    check = examination.devices(LAPTOP)

    assert check.state == "ok"
    assert "races pocket on the processor" in check.found


def test_gpus_are_listed_with_the_driver():
    """GPUs are counted, with the driver's version."""
    check = examination.devices(SERVER)

    assert check.state == "ok"
    assert check.found.startswith("8 GPUs (driver 570.1): NVIDIA H100")


@pytest.mark.parametrize(("free_mib", "state"), [(81_000, "ok"), (60_000, "warn")])
def test_gpu_that_others_use_is_warned_about(free_mib, state):
    """A driver's own share is fine, memory held by other work is not."""
    check = examination.gpu_memory(3, Gpu(name="GPU", memory_mib=81_559, free_mib=free_mib))

    assert (check.name, check.state, check.fix is None) == ("gpu 3", state, state == "ok")


@pytest.mark.parametrize(("available_mib", "state"), [(8_000, "ok"), (500, "warn")])
def test_little_memory_is_warned_about(available_mib, state):
    """Less free memory than a pocket race takes is warned about."""
    machine = Machine(cpu="Test", cores=2, memory_mib=16_000, available_mib=available_mib, gpus=(), driver=None)

    assert examination.memory(machine).state == state


@pytest.mark.parametrize(
    ("machine", "free_mib", "state"), [(LAPTOP, 5_000, "ok"), (LAPTOP, 100, "fail"), (SERVER, 5_000, "warn"), (SERVER, 50_000, "ok")]
)
def test_disk_is_judged_by_what_the_machine_would_race(monkeypatch, tmp_path, machine, free_mib, state):
    """A full disk fails; one too small for FineWeb is warned about where there are GPUs."""
    monkeypatch.setattr(examination.shutil, "disk_usage", lambda folder: SimpleNamespace(free=free_mib << 20))

    assert examination.disk(machine, tmp_path / "not" / "there").state == state


def test_folder_that_can_be_made_is_ok_and_is_not_made(home):
    """Looking leaves nothing behind, not even the folder."""
    check = examination.writable("home", home, "fix")

    assert check.state == "ok"
    assert not home.exists()


def test_writable_folder_stays_empty(tmp_path):
    """The probe in a folder that exists is gone afterwards."""
    folder = tmp_path / "folder"
    folder.mkdir()

    assert examination.writable("home", folder, "fix").state == "ok"
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("inside", [False, True])
def test_folder_that_cannot_be_written_fails(tmp_path, inside):
    """A file in the place of the folder, or of one above it, stands in the way."""
    (tmp_path / "file").write_text("")
    check = examination.writable("home", tmp_path / "file" / "deeper" if inside else tmp_path / "file", "Set SPEEDRUN_HOME")

    assert (check.state, check.fix) == ("fail", "Set SPEEDRUN_HOME")


def test_read_only_folder_fails(tmp_path, monkeypatch):
    """A folder where no file can be made stands in the way."""

    def refuse(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(examination.tempfile, "TemporaryFile", refuse)

    assert examination.writable("home", tmp_path, "fix").state == "fail"


@pytest.mark.parametrize(("busy", "state"), [(0.1, "ok"), (1.2, "warn")])
def test_busy_machine_is_warned_about(busy, state):
    """Other work beyond a third of a core spoils a time."""
    assert examination.load(2, busy).state == state


def test_other_work_leaves_out_our_own(monkeypatch):
    """Of two busy cores, the one that this process keeps busy does not count as other work."""
    clock = iter([0.0, 1.0])
    system = iter([100.0, 102.0])
    own = iter([(5.0, 0.0), (6.0, 0.0)])
    monkeypatch.setattr(examination, "busy_s", lambda: next(system))
    monkeypatch.setattr(examination.psutil, "Process", lambda: SimpleNamespace(cpu_times=lambda: next(own)))
    monkeypatch.setattr(examination, "time", SimpleNamespace(monotonic=lambda: next(clock), sleep=lambda seconds: None))

    assert examination.other_cores(1.0) == pytest.approx(1.0)


def test_busy_seconds_grow_no_faster_than_the_cores():
    """The counter of busy time rises at most by cores x time."""
    before, begun = examination.busy_s(), time.monotonic()
    time.sleep(0.05)
    rise = examination.busy_s() - before

    assert -1e-6 <= rise <= (time.monotonic() - begun) * psutil.cpu_count() + 0.1  # the kernel counts in hundredths of a second


def test_missing_data_says_how_to_fetch_it(track):
    """Shards that are not here are warned about with the command that fetches them."""
    check = examination.track_data(track, LAPTOP)

    assert (check.state, check.fix) == ("warn", "speedrun data get tiny")
    assert check.found == "3 of 3 shards are not here"


def test_missing_gpu_data_is_no_fault_without_a_gpu(track):
    """Data of a race that wants a GPU is not missed on a machine without one."""
    track.data = Dataset(**{**track.data.__dict__, "source": "hub", "repo": "a/b"})

    assert examination.track_data(track, LAPTOP).state == "ok"
    assert examination.track_data(track, SERVER).state == "warn"


def test_hashed_data_is_ok(track, shards):
    """Shards unchanged since their last full hash are ok."""
    assert examination.track_data(track, LAPTOP).state == "ok"


def test_changed_data_is_warned_about(track, shards):
    """A shard that was touched since its last hash wants another one; nothing is hashed now."""
    write_shard(shards / "train_2.bin", np.arange(100) % 7)
    check = examination.track_data(track, LAPTOP)

    assert (check.state, check.fix) == ("warn", "speedrun data check tiny")
    assert check.found == "3 shards are here, 1 not hashed since they last changed"


def test_damaged_manifest_is_warned_about(track, shards):
    """A manifest that cannot be read is named with what to do, not a crash."""
    (shards / "manifest.json").write_text("{")
    check = examination.track_data(track, LAPTOP)

    assert check.state == "warn"
    assert "speedrun data get tiny" in check.fix


def invoke(*arguments: object, exit_code: int = 0):
    result = CliRunner().invoke(doctor, [str(argument) for argument in arguments])

    assert result.exit_code == exit_code, result.output
    return result


def test_command_ends_with_a_verdict(tmp_path):
    """A line a check, what to do below it, and whether one can race; exit 0 in spite of warnings."""
    lines = invoke("--records", tmp_path).stdout.splitlines()

    assert lines[0].startswith("ok    versions ")
    assert any(line.startswith("warn  data pocket") for line in lines)
    assert "speedrun data get pocket" in "".join(lines)
    assert lines[-1] == "Ready to race"


def test_command_exits_1_when_something_stands_in_the_way(tmp_path):
    """A folder for records that cannot be written makes it exit 1."""
    (tmp_path / "file").write_text("")
    lines = invoke("--records", tmp_path / "file", exit_code=1).stdout.splitlines()

    assert any(line.startswith("fail  records") for line in lines)
    assert lines[-1].startswith("Not ready to race")


def test_json_has_the_same_checks(tmp_path):
    """--json has every check with state, what was found and what to do."""
    values = json.loads(invoke("--records", tmp_path, "--json").stdout)

    assert values["ready"] is True
    assert set(values["checks"][0]) == {"name", "state", "found", "fix"}
    assert [check["name"] for check in values["checks"]][:4] == ["versions", "devices", "memory", "disk"]


def test_every_gpu_is_looked_at(monkeypatch):
    """On a machine with GPUs each has a line of its own."""
    monkeypatch.setattr(examination, "this_machine", lambda: SERVER)
    names = [check.name for check in examination.examine()]

    assert [name for name in names if name.startswith("gpu")] == [f"gpu {number}" for number in range(8)]


def test_help_has_an_example():
    """The help shows a line to copy."""
    assert "speedrun doctor" in invoke("--help").stdout


def test_doctor_imports_no_torch():
    """Looking at the machine takes about a second because torch is not imported."""
    program = "import sys, harness.doctor; sys.exit(', '.join({'torch', 'scipy', 'pandas', 'matplotlib'} & set(sys.modules)) or 0)"

    assert (
        subprocess.run([sys.executable, "-c", program], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False).returncode == 0
    )
