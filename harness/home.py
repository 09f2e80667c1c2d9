"""Where things live that are not in the repository: data, attempts, weights and the ledger, below `$SPEEDRUN_HOME`."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def home() -> Path:
    """`$SPEEDRUN_HOME`, or `speedrun` in the user's cache folder."""
    chosen = os.environ.get("SPEEDRUN_HOME")
    if chosen:
        return Path(chosen).expanduser().resolve()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "speedrun"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "speedrun"


def data_folder(dataset: str) -> Path:
    """Where the shards of a dataset lie."""
    return home() / "data" / dataset


def attempts_folder() -> Path:
    """One folder an attempt, finished or not."""
    return home() / "attempts"


def weights_folder() -> Path:
    """Final weights, each named by the sha256 of its bytes."""
    return home() / "weights"


def ledger_path() -> Path:
    """The append-only list of attempts."""
    return home() / "ledger.jsonl"


def child_environment(*, gpus: bool) -> dict[str, str]:
    """Environment for a process of ours: this one's, with our modules to be found, and GPUs hidden unless they are wanted."""
    paths = [str(repository()), *filter(None, [os.environ.get("PYTHONPATH")])]
    hidden = {} if gpus else {"CUDA_VISIBLE_DEVICES": ""}
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONDONTWRITEBYTECODE": "1", **hidden}


def repository() -> Path:
    """The checkout this program runs from: it holds trainer/, records/ and the rest."""
    return Path(__file__).resolve().parent.parent
