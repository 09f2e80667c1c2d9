"""Is this machine ready to race? Versions, devices, memory, disk, data and peace; values only, imports no torch."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from data.errors import UserError
from data.manifest import read_manifest, unchanged
from harness import home
from harness.machine import Gpu, Machine, busy_s, installed_version, require_torch, this_machine
from harness.track import Track, load_track, track_names

State = Literal["ok", "warn", "fail"]

_LOAD_SAMPLE_S = 0.5
_BUSY_CORES = 0.3  # other work beyond this moves a time on two cores by more than seeds do
_LEAST_MEMORY_MIB = 2048  # the pocket race, which takes about 1 GiB, and some room
_LEAST_DISK_MIB = 200  # weights and events of a few pocket runs
_GPU_DISK_MIB = 12_000  # 27 shards of 200 MB and weights
_GPU_HELD_MIB = 600  # a driver alone takes up to this much of a GPU


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing looked at."""

    name: str
    state: State
    found: str
    fix: str | None = None  # None where nothing needs doing


def examine(records: Path | None = None) -> list[Check]:
    """Look at everything, about a second in all.

    Args:
        records: where records go; None: records/ of this checkout.
    """
    machine = this_machine()
    return [
        versions(),
        devices(machine),
        *(gpu_memory(number, gpu) for number, gpu in enumerate(machine.gpus)),
        memory(machine),
        disk(machine, home.home()),
        writable("home", home.home(), "Set SPEEDRUN_HOME to a folder you may write"),
        writable("records", records or home.repository() / "records", "Give another folder: speedrun run --records DIR"),
        load(machine.cores, other_cores(_LOAD_SAMPLE_S)),
        *(track_data(load_track(name), machine) for name in track_names()),
    ]


def versions() -> Check:
    """Python and torch, by their metadata; torch itself takes seconds to import."""
    found = f"python {platform.python_version()}, torch {installed_version('torch')}"
    try:
        require_torch()
    except UserError as error:
        return Check(name="versions", state="fail", found=error.what, fix=error.fix)
    return Check(name="versions", state="ok", found=found)


def devices(machine: Machine) -> Check:
    """GPUs that the driver shows."""
    if not machine.gpus:
        return Check(name="devices", state="ok", found=f"no GPU: races pocket on the processor, {machine.cores} cores of {machine.cpu}")
    names = ", ".join(gpu.name for gpu in machine.gpus)
    return Check(name="devices", state="ok", found=f"{len(machine.gpus)} GPUs (driver {machine.driver}): {names}")


def gpu_memory(number: int, gpu: Gpu) -> Check:
    """What other processes hold of a GPU; a race wants it for itself."""
    held = gpu.memory_mib - gpu.free_mib
    found = f"{held} of {gpu.memory_mib} MiB are in use"
    if held > _GPU_HELD_MIB:
        return Check(
            name=f"gpu {number}",
            state="warn",
            found=f"{found} by other work",
            fix="End it (nvidia-smi lists it), or race on another GPU by CUDA_VISIBLE_DEVICES",
        )
    return Check(name=f"gpu {number}", state="ok", found=found)


def memory(machine: Machine) -> Check:
    """Free memory of the machine."""
    found = f"{machine.available_mib} of {machine.memory_mib} MiB are free"
    if machine.available_mib < _LEAST_MEMORY_MIB:
        return Check(
            name="memory", state="warn", found=found, fix=f"Free some: a pocket race wants {_LEAST_MEMORY_MIB} MiB, or --set micro_batch=4"
        )
    return Check(name="memory", state="ok", found=found)


def disk(machine: Machine, folder: Path) -> Check:
    """Free disk where data, attempts and weights go."""
    free = shutil.disk_usage(_existing(folder)).free >> 20
    found = f"{free} MiB are free for {folder}"
    if free < _LEAST_DISK_MIB:
        return Check(name="disk", state="fail", found=found, fix=f"Free {_LEAST_DISK_MIB} MiB, or set SPEEDRUN_HOME to a larger disk")
    if machine.gpus and free < _GPU_DISK_MIB:
        return Check(name="disk", state="warn", found=found, fix=f"fineweb wants {_GPU_DISK_MIB} MiB: set SPEEDRUN_HOME to a larger disk")
    return Check(name="disk", state="ok", found=found)


def writable(name: str, folder: Path, fix: str) -> Check:
    """Whether files can be made in a folder, or in the one it would be made in; leaves nothing behind."""
    place = _existing(folder)
    try:
        if not place.is_dir():
            raise NotADirectoryError(20, "it is a file")
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        return Check(name=name, state="fail", found=f"cannot write to {folder}: {error.strerror}", fix=fix)
    return Check(name=name, state="ok", found=f"{folder} can be written to" if place == folder else f"{folder} can be made")


def load(cores: int, busy: float) -> Check:
    """Whether the machine is quiet enough for a time to mean something.

    Args:
        cores: that this process may use.
        busy: cores busy with other work, as other_cores() measures.
    """
    found = f"{busy:.1f} of {cores} cores are busy with other work"
    if busy > _BUSY_CORES:
        return Check(
            name="load", state="warn", found=found, fix="End other work before a race for time; its time is recorded with the load"
        )
    return Check(name="load", state="ok", found=found)


def other_cores(seconds: float) -> float:
    """Mean number of cores busy with work that is not this process's, measured over so many seconds."""
    own = psutil.Process()
    before, own_before, begun = busy_s(), sum(own.cpu_times()[:2]), time.monotonic()
    time.sleep(seconds)
    busy, mine, elapsed = busy_s() - before, sum(own.cpu_times()[:2]) - own_before, time.monotonic() - begun
    return max(0.0, (busy - mine) / elapsed)


def track_data(track: Track, machine: Machine) -> Check:
    """Whether a track's shards are here and unchanged since they were last hashed; nothing is hashed now."""
    folder, names = home.data_folder(track.data.name), track.data.shards()
    name = f"data {track.id}"
    try:
        counts = _shard_states(track, folder, names)
    except UserError as error:
        return Check(name=name, state="warn", found=f"{error.what} ({error.where})", fix=error.fix.replace("TRACK", track.id))
    if counts["missing"]:
        found = f"{counts['missing']} of {len(names)} shards are not here"
        if not machine.gpus and track.data.source != "wheel":
            return Check(name=name, state="ok", found=f"{found}; this race wants a GPU, which this machine has not")
        return Check(name=name, state="warn", found=found, fix=f"speedrun data get {track.id}")
    if counts["unsure"]:
        found = f"{len(names)} shards are here, {counts['unsure']} not hashed since they last changed"
        return Check(name=name, state="warn", found=found, fix=f"speedrun data check {track.id}")
    return Check(name=name, state="ok", found=f"{len(names)} shards are here, unchanged since they were hashed")


def _shard_states(track: Track, folder: Path, names: Iterable[str]) -> dict[str, int]:
    """How many shards are known to be right, how many want a hash to tell, how many are missing."""
    kept = read_manifest(folder)
    counts = {"known": 0, "unsure": 0, "missing": 0}
    for name in names:
        path = folder / name
        if not path.is_file():
            counts["missing"] += 1
        else:
            counts["known" if unchanged(track.data, path, kept.get(name)) else "unsure"] += 1
    return counts


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    while not os.path.lexists(folder):
        folder = folder.parent
    return folder
