"""What one training process needs to know, as one JSON file that the launcher writes and every rank reads."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run: a trainer, a recipe, a seed, and where everything lies."""

    run_folder: str  # events, output and failures of this run
    source: str  # the copied trainer
    source_sha256: str
    frozen: str  # frozen version, or "modified"
    track: str  # name or path of the track
    recipe_name: str
    recipe: dict[str, Any]  # every field, resolved
    seed: int
    threads: int  # CPU threads of each rank
    device: str  # "cpu" or "cuda"
    val_shards: list[str]  # paths
    train_shards: list[str]  # paths, in reading order
    data_sha256: dict[str, str]  # by shard file name
    weights_folder: str
    environment: dict[str, Any]  # machine and versions, as the record keeps them
    division: str  # the machine class that times may be compared within

    def save(self, path: Path) -> None:
        """Write the job as JSON."""
        path.write_text(json.dumps(asdict(self), indent=1, sort_keys=True) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Job:
        """Read a job that save() wrote."""
        return cls(**json.loads(path.read_text(encoding="utf-8")))
