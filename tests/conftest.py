"""Shared by the tests: token shards made on the spot, a clock turned by hand, and ranks that talk over gloo."""

from __future__ import annotations

import os
import subprocess
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import settings

from data.shard import write_shard
from data.stream import TokenSequence
from harness import clock

settings.register_profile("suite", deadline=None)  # a busy machine is no reason to fail
settings.load_profile("suite")
mp.get_context("forkserver").set_forkserver_preload(
    ["torch._dynamo", "harness.referee", "pytest", "hypothesis"]
)  # imported once, not once a rank
_RANK_TIMEOUT = timedelta(seconds=60)


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def make_tokens(tmp_path):
    """A function (parts, vocab_size) that writes each part as a shard and opens them as one sequence."""

    def make(*parts, vocab_size=65536, name="shard"):
        paths = [tmp_path / f"{name}_{number}.bin" for number in range(len(parts))]
        for path, part in zip(paths, parts, strict=True):
            write_shard(path, np.asarray(part))
        return TokenSequence(paths, vocab_size)

    return make


class HandClock:
    """Time that passes only when told."""

    def __init__(self) -> None:
        self.now_ns = 1_000_000_000

    def advance(self, ms: float) -> None:
        """Let time pass."""
        self.now_ns += round(ms * 1e6)


@pytest.fixture
def hand(monkeypatch):
    """The time that harness.clock reads, turned by hand."""
    turned = HandClock()
    monkeypatch.setattr(clock, "time", SimpleNamespace(perf_counter_ns=lambda: turned.now_ns))
    return turned


def _rank_main(rank: int, function, world_size: int, folder: Path, args: tuple) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size, timeout=_RANK_TIMEOUT)
    try:
        torch.save(function(*args), folder / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture
def run_ranks(tmp_path_factory):
    """A function (function, world_size, *args) that runs a module's function on gloo ranks and returns what each returned."""

    def run(function, world_size, *args):
        folder = tmp_path_factory.mktemp("ranks")
        mp.start_processes(_rank_main, (function, world_size, folder, args), nprocs=world_size, start_method="forkserver")
        return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world_size)]

    return run


@pytest.fixture
def mount(tmp_path):
    """A function (options) that mounts a tmpfs with these options and returns its folder; skips where that is not allowed."""
    mounted = []

    def make(options: str) -> Path:
        folder = tmp_path / f"mounted-{len(mounted)}"
        folder.mkdir()
        if os.geteuid() != 0:
            pytest.skip("only root can mount a file system")
        if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, check=False).returncode:
            pytest.skip("this machine does not let root mount a file system")
        mounted.append(folder)
        return folder

    yield make
    for folder in mounted:
        subprocess.run(["umount", "--lazy", folder], check=True)
