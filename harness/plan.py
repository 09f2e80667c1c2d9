"""Everything checked before anything starts: from what was asked to a plan, or one clear sentence why not."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from data.errors import UserError, naming_track
from harness import home
from harness.machine import Machine, division, environment, require_devices, require_torch, this_machine
from harness.preflight import Shards, list_data, memory_mib_of, minutes_of, recipe_numbers, require_data, require_disk, require_memory
from harness.record import NAME_LENGTH, record_folder, require_free, slug
from harness.resolve import Resolved, resolve_recipe
from harness.source import frozen_version, source_digest
from harness.track import Track, load_track


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the command line asks for."""

    trainer: Path
    track: str | None = None  # None: pocket without a GPU, else fineweb
    recipe: str | None = None  # None: the trainer's first for the track
    settings: tuple[str, ...] = ()
    gpus: int | None = None  # over all nodes; None: all there are
    nproc: int | None = None  # processes on the processor
    runs: int = 1
    seed: int | None = None  # of the first run, then counted up; None: drawn afresh for each
    name: str | None = None
    authors: tuple[str, ...] = ()
    note: str = ""
    records: Path | None = None
    nnodes: int = 1
    node_rank: int = 0
    rdzv_endpoint: str | None = None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What will happen, completely resolved."""

    request: Request
    track: Track
    track_name: str  # as load_track takes it
    source_sha256: str
    frozen: str
    resolved: Resolved
    machine: Machine
    device: str  # "cpu" or "cuda"
    processes: int  # over all nodes
    division: str
    environment: dict[str, object]
    seeds: tuple[int, ...]
    name: str
    record: Path
    shards: Shards
    steps: int
    tokens: int  # of one run
    memory_mib: int  # estimate for one process
    minutes: float  # estimate for one run's train_time

    @property
    def recipe(self) -> dict[str, object]:
        """Every hyper-parameter."""
        return self.resolved.recipe

    def summary(self) -> dict[str, object]:
        """The plan as JSON-ready values."""
        return {
            "track": self.track.id,
            "target_loss": self.track.target_loss,
            "trainer": str(self.request.trainer),
            "frozen": self.frozen,
            "source_sha256": self.source_sha256,
            "recipe_name": self.resolved.recipe_name,
            "recipe": self.recipe,
            "parameters": self.resolved.parameters,
            "steps": self.steps,
            "tokens": self.tokens,
            "device": self.device,
            "processes": self.processes,
            "division": self.division,
            "seeds": list(self.seeds),
            "estimated_minutes_per_run": self.minutes,
            "estimated_memory_mib_per_process": self.memory_mib,
            "train_shards": [str(path) for path in self.shards.train],
            "val_shards": [str(path) for path in self.shards.val],
            "missing_shards": list(self.shards.missing),
            "record": str(self.record),
        }


def make_plan(request: Request, *, dry: bool = False, say: Callable[[str], None] = lambda text: None) -> Plan:
    """Check everything, start nothing.

    Args:
        request: what is asked.
        dry: missing data is listed in the plan; else small data is fetched and large data refused.
        say: told in a sentence about anything that takes time.

    Raises:
        UserError: the first thing that stands in the way.
    """
    require_torch()
    machine = this_machine()
    gpus, processes = _devices(request, machine)
    track_name = request.track or ("fineweb" if gpus else "pocket")
    track = load_track(track_name)
    digest = source_digest(request.trainer)
    resolved = resolve_recipe(request.trainer, track.id, request.recipe, request.settings, gpus=bool(gpus))
    if gpus // request.nnodes > resolved.cuda_devices:
        raise UserError(
            f"{gpus // request.nnodes} GPUs wanted on this node, torch sees {resolved.cuda_devices}",
            where="--gpus",
            fix="Install a torch built for this machine's CUDA driver, or race on the processor with --gpus 0",
        )
    steps, batch_tokens = recipe_numbers(resolved, track, processes)
    name, record = name_and_folder(request, track, resolved)
    memory_mib = memory_mib_of(resolved)
    require_memory(machine, memory_mib, gpus, processes)
    require_disk(4 * resolved.parameters * request.runs)
    with naming_track(track.id):
        shards = list_data(track, steps * batch_tokens) if dry else require_data(track, steps * batch_tokens, say)
    here = environment(machine, gpus=gpus // request.nnodes, processes=processes, nodes=request.nnodes)
    return Plan(
        request=request,
        track=track,
        track_name=track_name,
        source_sha256=digest,
        frozen=frozen_version(digest),
        resolved=resolved,
        machine=machine,
        device="cuda" if gpus else "cpu",
        processes=processes,
        division=division(here),
        environment=here,
        seeds=_seeds(request),
        name=name,
        record=record,
        shards=shards,
        steps=steps,
        tokens=steps * batch_tokens,
        memory_mib=memory_mib,
        minutes=minutes_of(resolved, steps * batch_tokens, gpus, division(here), digest),
    )


def _devices(request: Request, machine: Machine) -> tuple[int, int]:
    """(GPUs, processes), both over all nodes."""
    if request.gpus and request.nproc:
        raise UserError(
            "--gpus and --nproc together", where="--gpus", fix="--gpus N for a race on GPUs, --nproc N for one on the processor"
        )
    if request.nnodes > 1 and not request.rdzv_endpoint:
        raise UserError(
            f"{request.nnodes} nodes need a place to meet",
            where="--nnodes",
            fix="Give --rdzv-endpoint HOST:PORT of node 0, the same on every node",
        )
    if request.rdzv_endpoint and not re.fullmatch(r"\S+:\d{1,5}", request.rdzv_endpoint):
        raise UserError(
            f"{request.rdzv_endpoint!r} is not HOST:PORT", where="--rdzv-endpoint", fix="For example --rdzv-endpoint node0:29500"
        )
    if request.nnodes > 1 and request.seed is None:
        raise UserError("several nodes must agree on the seed", where="--nnodes", fix="Give the same --seed on every node")
    if not 0 <= request.node_rank < request.nnodes:
        raise UserError(f"node rank {request.node_rank} of {request.nnodes} nodes", where="--node-rank", fix="Count nodes from 0")
    if request.nproc is not None or (request.gpus is None and not machine.gpus) or request.gpus == 0:
        return 0, (request.nproc or 1) * request.nnodes
    gpus = request.gpus if request.gpus is not None else len(machine.gpus) * request.nnodes
    if gpus % request.nnodes:
        raise UserError(
            f"{gpus} GPUs do not split over {request.nnodes} nodes", where="--gpus", fix="--gpus counts the GPUs of all nodes together"
        )
    require_devices(machine, gpus // request.nnodes)
    return gpus, gpus


def name_and_folder(request: Request, track: Track, resolved: Resolved) -> tuple[str, Path]:
    """The record's name and folder; a name nobody chose is counted up until it is free."""
    records = request.records or home.repository() / "records"
    date = datetime.now(UTC).date().isoformat()
    if request.name is not None:
        if len(request.name) > NAME_LENGTH:
            raise UserError(
                f"the name has {len(request.name)} characters, at most {NAME_LENGTH}", where="--name", fix="Choose a shorter one"
            )
        folder = record_folder(records, track.id, date, request.name)
        require_free(folder)
        return request.name, folder
    recipe_name = resolved.recipe_name.rpartition("/")[2]
    base = recipe_name if request.trainer.resolve() == home.repository() / "trainer" else f"{request.trainer.resolve().name}-{recipe_name}"
    name, number = base, 1
    while record_folder(records, track.id, date, name).exists():
        number += 1
        name = f"{base}-{number}"
    folder = record_folder(records, track.id, date, name)
    require_free(folder)
    return slug(name), folder


def _seeds(request: Request) -> tuple[int, ...]:
    if request.runs < 1:
        raise UserError(f"{request.runs} runs", where="--runs", fix="At least 1")
    if request.seed is not None:
        return tuple(range(request.seed, request.seed + request.runs))
    drawn: set[int] = set()
    while len(drawn) < request.runs:
        drawn.add(secrets.randbelow(2**31))
    return tuple(drawn)
