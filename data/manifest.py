"""Digests kept beside the shards: what each file was when it arrived, so that one that changes later is refused.

`<folder>/manifest.json` holds for each shard its sha256, its length, where the digest came from, and the file times at
the last full hash. A file whose length and times are still those is not hashed again: 27 shards of 200 MB pass in
milliseconds. Fetching is `data.fetch`; the shard format is `data.shard`.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from data.dataset import Dataset
from data.errors import UserError
from data.shard import check_vocabulary, file_sha256, open_shard

FILE_NAME = "manifest.json"
SCHEMA_VERSION = 1

State = Literal["ok", "missing", "changed", "broken"]
Source = Literal["pinned", "hub", "built", "local"]  # the track, the Hub's own digest, made here, first sight of a file put there by hand

_FETCH = "Fetch it again: speedrun data get TRACK"


class Entry(BaseModel):
    """One shard of a manifest."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    bytes: Annotated[int, Field(ge=0)]
    source: Source
    mtime_ns: int | None = None  # of the file when it was last hashed whole; None: not hashed on this machine
    ctime_ns: int | None = None  # the same; unlike mtime it cannot be set back, so `touch -d` hides nothing


class _Manifest(BaseModel):
    """`manifest.json` as written."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
    schema_version: Literal[1]
    shards: dict[str, Entry]


@dataclass(frozen=True, kw_only=True)
class ShardStatus:
    """What one shard is now."""

    name: str
    state: State
    source: Source | None  # where the wanted digest came from; None: there is none yet
    bytes: int  # on disk; 0 where it is missing
    tokens: int | None  # None: missing or broken
    sha256: str | None  # of the file; None: missing or broken
    wanted: str | None  # the digest it must have; None: not known
    problem: str | None  # one sentence; None when ok
    fix: str | None  # what to do about the problem


def check_shards(
    dataset: Dataset, folder: Path, names: Iterable[str], *, deep: bool, report: Callable[[str], None] | None = None
) -> list[ShardStatus]:
    """Look at shards: header, length and digest, and keep what was hashed.

    Args:
        dataset: the track's data; its pinned digests win over those kept in the manifest.
        folder: where the shards lie.
        names: file names to look at.
        deep: hash every byte and look at every token; else a file that has not changed since its last full hash is believed.
        report: called with the name of each shard before it is read.

    Returns:
        One status a name, in the order given. Nothing is raised for a bad shard.

    Raises:
        UserError: the manifest itself cannot be read.
    """
    kept = read_manifest(folder)
    statuses, hashed = [], {}
    for name in names:
        if report:
            report(name)
        status, entry = _check_one(dataset, folder / name, kept.get(name), deep=deep)
        statuses.append(status)
        if entry is not None and entry != kept.get(name):
            hashed[name] = entry
    if hashed:
        with contextlib.suppress(OSError):  # a folder shared read-only: the next check hashes again, which is slow but not wrong
            record(folder, hashed)
    return statuses


def require_shards(dataset: Dataset, folder: Path, names: Iterable[str]) -> dict[str, str]:
    """The digests of shards that are all there and unchanged; what a run asks before it starts.

    Returns:
        sha256 by file name, in the order given.

    Raises:
        UserError: a shard is missing, broken or changed; names the first, what was found and wanted, and how many more.
    """
    statuses = check_shards(dataset, folder, names, deep=False)
    bad = [status for status in statuses if status.state != "ok"]
    if bad:
        more = f" (and {len(bad) - 1} more of {len(statuses)} shards)" if len(bad) > 1 else ""
        raise UserError(f"{bad[0].problem}{more}", where=str(folder / bad[0].name), fix=bad[0].fix)
    return {status.name: status.sha256 for status in statuses}


def read_manifest(folder: Path) -> dict[str, Entry]:
    """What is known about the shards of a folder; empty where nothing is.

    Raises:
        UserError: the file is damaged or was written by another version.
    """
    path = folder / FILE_NAME
    try:
        return _Manifest.model_validate_json(path.read_text(encoding="utf-8")).shards
    except FileNotFoundError:
        return {}
    except (ValidationError, UnicodeDecodeError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": str(error)}
        key = ".".join(str(part) for part in first["loc"]) or "file"
        raise UserError(
            f"manifest of the shards cannot be read: {key}: {first['msg']}",
            where=str(path),
            fix="Delete it, then write it again: speedrun data get TRACK",
        ) from None


def record(folder: Path, entries: Mapping[str, Entry]) -> None:
    """Keep entries in the manifest, beside those that are there; the file appears whole, by rename.

    Raises:
        OSError: the folder cannot be written.
    """
    from filelock import FileLock

    with FileLock(folder / f".{FILE_NAME}.lock"):  # a run and a fetch may both have hashed something
        shards = {**read_manifest(folder), **entries}
        values = {"schema_version": SCHEMA_VERSION, "shards": {name: entry.model_dump() for name, entry in shards.items()}}
        partial = folder / f".{FILE_NAME}.{os.getpid()}.partial"
        try:
            partial.write_text(json.dumps(values, indent=2, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")
            partial.replace(folder / FILE_NAME)
        finally:
            partial.unlink(missing_ok=True)


def hashed_entry(path: Path, sha256: str, source: Source) -> Entry:
    """The entry of a file that was just hashed, with the times that prove it has not changed since."""
    stat = path.stat()
    return Entry(sha256=sha256, bytes=stat.st_size, source=source, mtime_ns=stat.st_mtime_ns, ctime_ns=stat.st_ctime_ns)


def unchanged(dataset: Dataset, path: Path, entry: Entry | None) -> bool:
    """The file has the times and length of its last full hash, and that hash was the wanted one."""
    wanted, _ = wanted_digest(dataset, path.name, entry)
    return entry is not None and entry.sha256 == wanted and entry == hashed_entry(path, entry.sha256, entry.source)


def wanted_digest(dataset: Dataset, name: str, entry: Entry | None) -> tuple[str | None, Source | None]:
    """The digest a shard must have and where it came from: the track's pin, else what was kept, else nothing."""
    if name in dataset.sha256:
        return dataset.sha256[name], "pinned"
    return (entry.sha256, entry.source) if entry else (None, None)


def _check_one(dataset: Dataset, path: Path, entry: Entry | None, *, deep: bool) -> tuple[ShardStatus, Entry | None]:
    """One shard's status, and its entry when it was hashed and found good."""
    wanted, source = wanted_digest(dataset, path.name, entry)
    if not path.exists():
        fix = "Put the file there" if dataset.source == "local" else "Fetch it: speedrun data get TRACK"
        return _status(path.name, "missing", source, wanted=wanted, problem="token shard is not there", fix=fix), None
    size = path.stat().st_size
    try:
        tokens = len(open_shard(path))
        if deep:
            check_vocabulary(path, dataset.vocab_size)
    except UserError as error:
        return _status(path.name, "broken", source, bytes=size, wanted=wanted, problem=error.what, fix=error.fix), None
    except OSError as error:
        problem = f"token shard cannot be read: {error.strerror}"
        return _status(path.name, "broken", source, bytes=size, wanted=wanted, problem=problem, fix="Let this user read it"), None
    facts = {"bytes": size, "tokens": tokens, "wanted": wanted}
    if not deep and unchanged(dataset, path, entry):
        return _status(path.name, "ok", source, sha256=wanted, **facts), None

    before = hashed_entry(path, "0" * 64, source or "local")  # times from before the hash: a write meanwhile must show
    found = file_sha256(path)
    if wanted is not None and found != wanted:
        problem = f"token shard has changed: found sha256 {found}, wanted {wanted} ({_ORIGIN[source]})"
        fix = f"Put the file back, or accept it as new: delete {FILE_NAME} beside it" if source == "local" else _FETCH
        return _status(path.name, "changed", source, sha256=found, problem=problem, fix=fix, **facts), None
    source = source or "local"
    return _status(path.name, "ok", source, sha256=found, **facts), before.model_copy(update={"sha256": found, "source": source})


_ORIGIN = {
    "pinned": "pinned by the track",
    "hub": "the Hub's when it was fetched",
    "built": "as it was built here",
    "local": "when it was first seen here",
}


def _status(name: str, state: State, source: Source | None, **facts) -> ShardStatus:
    """A status whose unnamed facts are those of a file that is not there."""
    return ShardStatus(
        name=name,
        state=state,
        source=source,
        **{"bytes": 0, "tokens": None, "sha256": None, "wanted": None, "problem": None, "fix": None} | facts,
    )
