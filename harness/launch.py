"""Starts one run under torchrun, follows its event file, and makes sure that nothing is left running and the reason is kept."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from data.errors import UserError
from harness.events import EventWriter, parse_line, read_events
from harness.home import child_environment
from harness.job import Job
from harness.machine import busy_s
from harness.orphan import die_with_parent

_POLL_S = 0.25
_LOAD_EVERY_S = 5.0
_PATIENCE_S = 5.0  # between asking processes to end and ending them
RESERVE_BYTES = 1 << 16  # kept free in every run's folder, so that a full disk still has room for the reason


@dataclass(frozen=True, kw_only=True)
class Nodes:
    """How many processes, where; the fields go to torchrun as they are."""

    processes_per_node: int
    nnodes: int = 1
    node_rank: int = 0
    rdzv_endpoint: str | None = None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run ended."""

    finished: bool
    reason: str | None  # None: finished
    process_time_ms: float  # launch to exit
    other_load_cores: float | None  # mean cores busy with other work meanwhile


def run_training(job: Job, nodes: Nodes, watch: Callable[[dict], None]) -> Outcome:
    """Run one training to its end.

    Args:
        job: what to run; its run_folder exists.
        nodes: processes and rendezvous.
        watch: called with every event as it appears.

    Raises:
        KeyboardInterrupt: passed on after all processes are gone and the reason is written.
    """
    folder = Path(job.run_folder)
    job_path, events_path = folder / "job.json", folder / "events.jsonl"
    job.save(job_path)
    (folder / "reserve").write_bytes(b"\0" * RESERVE_BYTES)
    follower, load = _Follower(events_path), None
    begun = time.perf_counter()
    with (folder / "output.log").open("wb") as output:
        process = subprocess.Popen(
            command(job_path, nodes),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env=worker_environment(job),
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
        try:
            load = _OtherLoad(process.pid)
            while process.poll() is None:
                for event in follower.new():
                    watch(event)
                load.sample()
                time.sleep(_POLL_S)
            process_time_ms = round((time.perf_counter() - begun) * 1e3, 1)
            for event in follower.new():
                watch(event)
        except BaseException as error:
            _stop(process)
            _write_failure(folder, {"reason": _name_of(error), "rank": None})
            raise
    _stop(process)
    reason = _reason(folder, process.returncode)
    finished = reason is None and (nodes.node_rank > 0 or follower.last == "finish")
    if not finished and nodes.node_rank == 0:
        failure = reason or {"reason": "the processes ended without a finish event", "rank": None}
        _write_failure(folder, failure)
        reason = failure
    (folder / "reserve").unlink(missing_ok=True)
    return Outcome(
        finished=finished,
        reason=None if finished else _sentence(reason),
        process_time_ms=process_time_ms,
        other_load_cores=load.mean_cores(),
    )


def command(job_path: Path, nodes: Nodes) -> list[str]:
    """The torchrun command line of one run."""
    if nodes.nnodes == 1:
        meeting = ["--standalone"]
    else:
        host, _, port = nodes.rdzv_endpoint.rpartition(":")
        meeting = [f"--nnodes={nodes.nnodes}", f"--node-rank={nodes.node_rank}", f"--master-addr={host}", f"--master-port={port}"]
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        *meeting,
        f"--nproc-per-node={nodes.processes_per_node}",
        "--max-restarts=0",
        "--monitor-interval=0.2",  # its default of 0.1 s costs a twentieth of a core
        "-m",
        "harness.worker",
        str(job_path),
    ]


def worker_environment(job: Job) -> dict[str, str]:
    """Environment of the ranks: ours, with a thread count that does not depend on torchrun."""
    return {
        **child_environment(gpus=job.device == "cuda"),
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": str(job.threads),
        "GOMP_SPINCOUNT": "20000",  # threads that spin for long while they wait make a busy machine several times slower
        "TORCHELASTIC_ERROR_FILE": str(Path(job.run_folder) / "torchrun-error.json"),
    }


class _Follower:
    """Reads whole lines that are new in a growing event file."""

    def __init__(self, path: Path) -> None:
        self._path, self._at, self.last = path, 0, None

    def new(self) -> list[dict]:
        try:
            with self._path.open("rb") as file:
                file.seek(self._at)
                block = file.read()
        except FileNotFoundError:
            return []
        whole = block[: block.rfind(b"\n") + 1]
        self._at += len(whole)
        events = [parse_line(line, str(self._path)) for line in whole.decode().splitlines()]
        if events:
            self.last = events[-1]["event"]
        return events


class _OtherLoad:
    """How many cores are busy with work that is not this run's."""

    def __init__(self, pid: int) -> None:
        self._run, self._launcher = psutil.Process(pid), psutil.Process()
        self._begun = self._next = time.monotonic()
        self._busy_before, self._launcher_before = busy_s(), _spent_s(self._launcher)
        self._run_s: dict[int, float] = {}  # by process; the last reading stays when one ends
        self._elapsed = self._other = 0.0

    def sample(self) -> None:
        """Take a reading, if the last one is old enough."""
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + _LOAD_EVERY_S
        try:
            tree = [self._run, *self._run.children(recursive=True)]
        except psutil.Error:
            return
        for process in tree:
            self._run_s[process.pid] = max(_spent_s(process), self._run_s.get(process.pid, 0.0))
        own = sum(self._run_s.values()) + _spent_s(self._launcher) - self._launcher_before
        self._elapsed, self._other = now - self._begun, busy_s() - self._busy_before - own

    def mean_cores(self) -> float | None:
        """Mean over the run so far; None before the second reading."""
        return round(max(0.0, self._other / self._elapsed), 2) if self._elapsed else None


def _spent_s(process: psutil.Process) -> float:
    """Processor seconds a process has used; 0 when it is gone."""
    try:
        times = process.cpu_times()
    except psutil.Error:
        return 0.0
    return times.user + times.system


def _stop(process: subprocess.Popen) -> None:
    """End torchrun and everything it started; they sit in sessions of their own, so the tree is walked."""
    try:
        tree = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    except psutil.Error:
        tree = []
    with _deaf():
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(_PATIENCE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for child in tree:
            try:
                child.kill()
            except psutil.Error:
                continue
        psutil.wait_procs(tree, timeout=_PATIENCE_S)


@contextmanager
def _deaf() -> Iterator[None]:
    """A second Ctrl-C, or a scheduler that repeats itself, does not keep us from clearing up."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _reason(folder: Path, returncode: int) -> dict | None:
    """Why the run failed: a rank that was killed, then the first note that a rank left, then torchrun's last word."""
    notes = []
    for path in sorted(folder.glob("failure-*.json"), key=lambda path: path.stat().st_mtime_ns):
        try:
            notes.append(json.loads(path.read_text(encoding="utf-8")))
        except ValueError:
            continue
    if returncode == 0 and not notes:
        return None
    text = (folder / "output.log").read_text(encoding="utf-8", errors="replace")
    codes = {int(rank): int(code) for rank, code in re.findall(r"rank\s*:\s*(\d+)[^\n]*\n\s*exitcode\s*:\s*(-?\d+)", text)}
    noted = {note["rank"] for note in notes}
    for rank, code in codes.items():  # its neighbours only report that it hung up
        if code < 0 and -code != signal.SIGTERM and rank not in noted:
            return {"reason": f"rank {rank} was killed by {signal.Signals(-code).name}", "rank": rank, "fix": _FIX.get(code)}
    if notes:
        return notes[0]
    where = str(folder / "output.log")
    for rank, code in codes.items():
        return {"reason": f"rank {rank} ended with exit code {code}", "rank": rank, "where": where}
    last = (text.strip().splitlines() or ["no output"])[-1]
    return {"reason": f"torchrun ended with exit code {returncode}: {last[:300]}", "rank": None, "where": where}


_FIX = {-signal.SIGKILL: "Was memory short? The system kills the largest process then; try --set micro_batch=..."}


def _name_of(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return str(error) or "interrupted by Ctrl-C"
    return f"the launcher failed: {type(error).__name__}: {error}"


def _sentence(failure: dict) -> str:
    return "\n  ".join(str(part) for part in (failure["reason"], failure.get("where"), failure.get("fix")) if part)


def _write_failure(folder: Path, failure: dict) -> None:
    """Append the failure event; the ranks are gone, so this is the only writer."""
    (folder / "reserve").unlink(missing_ok=True)
    path = folder / "events.jsonl"
    events = read_events(path, allow_partial=True) if path.exists() else []
    steps = [event["step"] for event in events if "step" in event]
    writer = EventWriter(path)
    try:
        writer.write({"event": "failure", "reason": failure["reason"], "rank": failure.get("rank"), "step": steps[-1] if steps else 0})
    except UserError:
        pass  # not even the reserve is left; the reason is still told on the terminal and in the ledger
    finally:
        writer.close()
