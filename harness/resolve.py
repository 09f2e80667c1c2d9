"""Asks a trainer what it would run: `python -m harness.resolve SOURCE TRACK RECIPE [SETTING ...]` in a process of its own.

Prints one JSON object: the resolved recipe, the parameter count, and the machine's matmul speed.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.errors import UserError
from harness.home import child_environment

_TIMEOUT_S = 120  # importing torch on a cold disk takes most of it


@dataclasses.dataclass(frozen=True, kw_only=True)
class Resolved:
    """What a trainer says it would run."""

    recipe_name: str
    recipe: dict[str, Any]  # every field
    parameters: int
    cuda_devices: int  # GPUs that torch sees
    matmul_gflops: float  # 1024^3 matrix product on this machine's processor in the recipe's precision


def resolve_recipe(source: Path, track_id: str, recipe_name: str | None, settings: Sequence[str], *, gpus: bool) -> Resolved:
    """Resolve a recipe without importing the trainer here.

    Args:
        source: the trainer's folder.
        track_id: of the race.
        recipe_name: None: the trainer's first for the track.
        settings: `key=value` changes.
        gpus: the race is on GPUs; else they are hidden, so that `auto` means the processor.

    Raises:
        UserError: whatever is wrong with trainer, recipe or settings.
    """
    command = [sys.executable, "-m", "harness.resolve", str(source), track_id, recipe_name or "", *settings]
    env = child_environment(gpus=gpus)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, env=env, check=False)
    except subprocess.TimeoutExpired:
        raise UserError(
            f"the trainer did not say its recipe within {_TIMEOUT_S} s", where=str(source), fix="Is there work at import time?"
        ) from None
    try:
        answer = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        tail = done.stderr.strip().splitlines()[-1:] or ["no output"]
        raise UserError(f"the trainer could not be asked for its recipe: {tail[0]}", where=str(source), fix="Mend the trainer") from None
    if "error" in answer:
        raise UserError(answer["error"]["what"], where=answer["error"]["where"], fix=answer["error"]["fix"])
    return Resolved(**answer)


def _resolve_here(source: Path, track_id: str, recipe_name: str | None, settings: Sequence[str]) -> Resolved:
    """The same in this process, which imports the trainer."""
    import torch

    from harness.recipe import apply_settings, choose
    from harness.source import load_trainer

    train = load_trainer(source)
    name, preset = choose(train.RECIPES, track_id, recipe_name)
    recipe = apply_settings(preset, settings)
    values = dataclasses.asdict(recipe)
    json.dumps(values, allow_nan=False)
    with torch.device("meta"), _no_random_values():
        parameters = sum(parameter.numel() for parameter in train.build_model(recipe).parameters())
    low = values.get("precision") == "bfloat16"
    return Resolved(
        recipe_name=name,
        recipe=values,
        parameters=parameters,
        cuda_devices=torch.cuda.device_count(),
        matmul_gflops=_matmul_gflops(torch.bfloat16 if low else torch.float32),
    )


def _no_random_values() -> Any:
    """A mode in which tensors are not filled: on meta there is nothing to fill, and asking costs the import of torch's compiler (2.4 s)."""
    from torch.overrides import TorchFunctionMode

    class Mode(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
            if getattr(func, "__name__", "").endswith(("uniform_", "normal_")):
                return args[0] if args else kwargs["tensor"]
            return func(*args, **(kwargs or {}))

    return Mode()


def _matmul_gflops(dtype: Any) -> float:
    """Median rate of a few 1024^3 matrix products on the CPU, 10^9 floating-point operations a second."""
    import torch

    a = torch.ones(1024, 1024, dtype=dtype)
    times = []
    for _ in range(5):
        begun = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - begun)
    return round(2 * 1024**3 / sorted(times)[2] / 1e9, 1)


def _main(arguments: list[str]) -> None:
    source, track_id, recipe_name, *settings = arguments
    try:
        answer = dataclasses.asdict(_resolve_here(Path(source), track_id, recipe_name or None, settings))
    except UserError as error:
        answer = {"error": {"what": error.what, "where": error.where, "fix": error.fix}}
    print(json.dumps(answer))


if __name__ == "__main__":
    _main(sys.argv[1:])
