"""This machine, described: processor, GPUs, versions, and the division that its times may be compared within."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import psutil

from data.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU as the driver names it."""

    name: str
    memory_mib: int
    free_mib: int


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a run may use here."""

    cpu: str  # the processor's own name
    cores: int  # that this process may use
    memory_mib: int
    available_mib: int
    gpus: tuple[Gpu, ...]
    driver: str | None  # NVIDIA driver version


def this_machine() -> Machine:
    """Look at the machine; costs milliseconds and imports no torch."""
    gpus, driver = _nvidia()
    memory = psutil.virtual_memory()
    return Machine(
        cpu=_cpu_name(),
        cores=usable_cores(),
        memory_mib=memory.total // 2**20,
        available_mib=memory.available // 2**20,
        gpus=gpus,
        driver=driver,
    )


def usable_cores() -> int:
    """Processor cores that this process may be scheduled on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def threads_per_process(cores: int, processes: int) -> int:
    """CPU threads each of a machine's processes computes with."""
    return max(1, cores // processes)


def environment(machine: Machine, *, gpus: int, processes: int, nodes: int = 1) -> dict[str, Any]:
    """Machine and versions as a record keeps them. Names nobody: no host name, no user, no path.

    Args:
        machine: this node; the others are taken to be like it.
        gpus: GPUs of this node that are used, 0 for a race on the processor.
        processes: ranks over all nodes.
        nodes: machines in the race.
    """
    return {
        "cpu": machine.cpu,
        "cores": machine.cores,
        "memory_mib": machine.memory_mib,
        "gpus": [gpu.name for gpu in machine.gpus][:gpus],
        "driver": machine.driver,
        "nodes": nodes,
        "processes": processes,
        "threads": threads_per_process(machine.cores, processes // nodes),
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": installed_version("torch"),
        "numpy": installed_version("numpy"),
        "speedrun": installed_version("speedrun"),
    }


def division(environment: Mapping[str, Any]) -> str:
    """The machine class a time may be compared within, from the environment that a record keeps.

    Returns:
        For example `8x NVIDIA H100 80GB HBM3`, `cpu 2 threads AMD EPYC 7763` or `2x cpu 2 threads AMD EPYC 7763`.
    """
    nodes, processes = environment["nodes"], environment["processes"]
    if environment["gpus"]:
        return f"{processes}x {Counter(environment['gpus']).most_common(1)[0][0]}"
    threads = min(environment["cores"], environment["threads"] * processes // nodes)
    return f"{f'{nodes}x ' if nodes > 1 else ''}cpu {threads} threads {environment['cpu']}"


def installed_version(package: str) -> str:
    """Version of an installed distribution, `unknown` where it runs without being installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"


def require_devices(machine: Machine, gpus: int) -> None:
    """Refuse more GPUs than there are.

    Raises:
        UserError: with the number found and the number wanted.
    """
    if gpus > len(machine.gpus):
        found = f"this machine has {len(machine.gpus)}" if machine.gpus else "this machine has none that the NVIDIA driver shows"
        raise UserError(
            f"{gpus} GPUs asked for, {found}",
            where="--gpus",
            fix="Ask for fewer, or leave out --gpus and choose --nproc for a run on the processor",
        )


def require_torch() -> None:
    """Refuse a torch that is too old, before it does something odd.

    Raises:
        UserError: with the version found and the version wanted.
    """
    found = installed_version("torch")
    if found == "unknown":
        raise UserError("torch is not installed", fix="Install this project: pip install -e . -c constraints.txt")
    if tuple(int(part) for part in found.split("+")[0].split(".")[:2]) < (2, 9):
        raise UserError(f"torch {found} is too old, wanted at least 2.9", fix="pip install -e . -c constraints.txt")


def busy_s() -> float:
    """Seconds that all cores together have worked since the machine started; guests are counted in user and nice already."""
    times = psutil.cpu_times()
    return sum(times) - times.idle - sum(getattr(times, key, 0.0) for key in ("iowait", "guest", "guest_nice"))


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith(("model name", "Model")):
                    return " ".join(line.partition(":")[2].split())
    except OSError:
        pass
    if sys.platform == "darwin":
        done = subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, check=False)
        if done.stdout.strip():
            return done.stdout.strip()
    return platform.processor() or platform.machine() or "unknown processor"


def _nvidia() -> tuple[tuple[Gpu, ...], str | None]:
    """GPUs this process may use, by NVML; none where there is no driver. CUDA_VISIBLE_DEVICES is respected."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return (), None
    try:
        gpus = []
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
            gpus.append(Gpu(name=str(pynvml.nvmlDeviceGetName(handle)), memory_mib=memory.total // 2**20, free_mib=memory.free // 2**20))
        driver = str(pynvml.nvmlSystemGetDriverVersion())
    except pynvml.NVMLError:  # some integrated GPUs do not say how much memory they have
        return (), None
    finally:
        pynvml.nvmlShutdown()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        chosen = [part.strip() for part in visible.split(",") if part.strip() and part.strip() != "-1"]
        gpus = (
            [gpus[int(part)] for part in chosen if part.isdigit() and int(part) < len(gpus)]
            if all(part.isdigit() for part in chosen)
            else gpus[: len(chosen)]
        )
    return tuple(gpus), driver
