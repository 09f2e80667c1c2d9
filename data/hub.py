"""Shards from a dataset repository of the Hugging Face Hub, by huggingface-hub, each hashed before it gets its name.

The library moves bytes: tokens, redirects, resuming a connection that breaks. It accepts a file of the right length
with wrong bytes, and starts a file again after a kill; so here a shard is the unit of resume. It arrives in
`<folder>/.partial`, is hashed and read, and only then renamed. `data.fetch` holds the lock and calls this.
"""

from __future__ import annotations

import functools
import os
import queue
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from data.dataset import Dataset
from data.errors import UserError
from data.manifest import Source, check_shards, hashed_entry, read_manifest, record, wanted_digest
from data.shard import check_vocabulary, file_sha256

WORKERS = 4  # files at once: one connection seldom fills a line, more only split it
FIRST_CONTACT_S = 8  # the Hub answers within this or it is not there
MARGIN_BYTES = 1 << 28  # left free on the disk: 256 MiB
REPORT_EVERY_S = 0.25
PARTIAL = ".partial"  # folder of what has no name yet, inside the data folder so that a rename suffices
_CHUNK_BYTES = 1 << 20  # the library's own 10 MB hides a slow line's rate, and a stop, for a minute


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a fetch is."""

    shards_done: int
    shards: int  # to fetch, without those that were there
    bytes_done: int
    bytes: int
    seconds: float  # since the first byte was asked for
    note: str | None = None  # what holds it up, in words

    @property
    def bytes_per_second(self) -> float:
        """Mean rate of this fetch."""
        return self.bytes_done / self.seconds if self.seconds > 0 else 0.0

    @property
    def eta_seconds(self) -> float | None:
        """Time left at that rate; None before the first byte."""
        return (self.bytes - self.bytes_done) / self.bytes_per_second if self.bytes_done > 0 else None


@dataclass(frozen=True, kw_only=True)
class Fetched:
    """What one call of `fetch` brought."""

    names: tuple[str, ...]
    bytes: int
    note: str | None = None  # what could not be done though nothing is missing


class HubUnreachable(UserError):
    """Nobody answers, or nobody may be asked."""


@dataclass(frozen=True, kw_only=True)
class _Listing:
    """What the Hub says it has, at one commit."""

    commit: str
    files: Mapping[str, tuple[int, str | None]]  # by name: bytes, sha256 (None: a small file outside LFS has none)


@dataclass(frozen=True, kw_only=True)
class _Job:
    """One shard to bring."""

    name: str
    bytes: int
    wanted: str | None
    source: Source


def fetch(dataset: Dataset, folder: Path, names: Iterable[str], report: Callable[[Progress], None]) -> Fetched:
    """Bring the shards that are missing or bad; those that are there and verified are left alone.

    Args:
        dataset: source "hub", with its repo and revision.
        folder: where the shards go; it exists and the caller holds its lock.
        names: file names wanted.
        report: called several times a second, from this thread.

    Raises:
        UserError: no answer, no such repository or file, no room on the disk, or a digest that stays wrong.
    """
    shutil.rmtree(folder / PARTIAL, ignore_errors=True)  # of a fetch that was killed
    statuses = check_shards(dataset, folder, names, deep=False)
    absent = [status.name for status in statuses if status.state != "ok"]
    unsure = {status.name: status.sha256 for status in statuses if status.state == "ok" and status.source == "local"}
    if not absent and not unsure:
        return Fetched(names=(), bytes=0)
    try:
        listing = _list(dataset)
    except HubUnreachable as error:
        if absent:
            raise HubUnreachable(
                f"{len(absent)} of {len(statuses)} shards are missing or wrong, and {error.what}", where=error.where, fix=error.fix
            ) from None
        return Fetched(names=(), bytes=0, note=f"{len(unsure)} shards put there by hand were not compared with the Hub: {error.what}")
    absent += _compare(folder, listing, unsure)
    jobs = [_job(dataset, folder, listing, name) for name in absent]
    _check_space(folder, jobs)
    _bring(dataset, folder, listing.commit, jobs, report)
    return Fetched(names=tuple(job.name for job in jobs), bytes=sum(job.bytes for job in jobs))


def _hub():
    """The library, imported late (half a second) and told to be quiet; its environment variables still rule."""
    # Plain HTTP unless the user says otherwise: every file is served so too, and xet can neither be stopped from here nor held to a chunk.
    os.environ.setdefault("HF_HUB_DISABLE_XET", "1")
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.utils import logging

    constants.DOWNLOAD_CHUNK_SIZE = _CHUNK_BYTES
    if "HF_HUB_VERBOSITY" not in os.environ:
        logging.set_verbosity_error()
    return huggingface_hub


def _endpoint() -> str | None:
    """`$HF_ENDPOINT`, read now: the library reads it once, when it is imported."""
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or None


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def _list(dataset: Dataset) -> _Listing:
    """Ask the Hub once, with a short patience, what the revision holds; later requests name the commit it answered."""
    place = f"{dataset.repo} (revision {dataset.revision})"
    if _offline():
        raise HubUnreachable(
            "HF_HUB_OFFLINE forbids to ask the Hub", where=place, fix="Unset HF_HUB_OFFLINE, or put the files there yourself"
        )
    hub = _hub()
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        info = hub.HfApi(endpoint=_endpoint(), library_name="speedrun").dataset_info(
            dataset.repo, revision=dataset.revision, timeout=FIRST_CONTACT_S, files_metadata=True
        )
        files = {file.rfilename: (file.size, file.lfs.sha256 if file.lfs else None) for file in info.siblings}
    except RepositoryNotFoundError:  # a gated one is a kind of it
        fix = "Check [data] repo in the track file; if the repository is private or gated, set HF_TOKEN to a token that may read it"
        raise UserError(f"the Hub shows no dataset {dataset.repo}", where=place, fix=fix) from None
    except RevisionNotFoundError:
        raise UserError(
            f"dataset {dataset.repo} has no revision {dataset.revision!r}", where=place, fix="Check [data] revision in the track file"
        ) from None
    except HfHubHTTPError as error:
        raise HubUnreachable(
            f"the Hub answered {error.response.status_code}", where=place, fix="Try again later: speedrun data get TRACK"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, _transport_error()) as error:
        fix = "Check the connection, HF_ENDPOINT and the proxy, then run the same command again"
        raise HubUnreachable(f"the Hub does not answer ({_one_line(error)})", where=_endpoint() or place, fix=fix) from None
    return _Listing(commit=info.sha, files=files)


def _transport_error() -> type[Exception]:
    """Root of what the HTTP library raises; huggingface-hub changed that library between 1.30 and 2.4."""
    from huggingface_hub.errors import HfHubHTTPError

    return next(kind for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError")


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _compare(folder: Path, listing: _Listing, unsure: Mapping[str, str]) -> list[str]:
    """Hold files that were put there by hand to the Hub's digests: keep those that agree as the Hub's, return the others."""
    agree = {name for name, sha256 in unsure.items() if listing.files.get(name, (0, None))[1] == sha256}
    if agree:
        kept = read_manifest(folder)
        record(folder, {name: kept[name].model_copy(update={"source": "hub"}) for name in agree})
    return [name for name in unsure if name not in agree]


def _job(dataset: Dataset, folder: Path, listing: _Listing, name: str) -> _Job:
    """What to bring for one name, refused where the Hub has nothing or something else than is wanted."""
    place = f"{dataset.repo}/{name}"
    if name not in listing.files:
        fix = "Check [data] in the track file, or ask for fewer: --shards"
        raise UserError(f"dataset {dataset.repo} on the Hub has no file {name}", where=f"{place} (revision {dataset.revision})", fix=fix)
    size, theirs = listing.files[name]
    kept = read_manifest(folder).get(name)
    wanted, source = wanted_digest(dataset, name, kept if kept and kept.source == "hub" else None)
    if wanted and theirs and wanted != theirs:
        why, fix = {
            "pinned": ("pinned by the track", "Name in [data] revision the commit that has it"),
            "hub": (
                "fetched from it before",
                "Delete manifest.json in the data folder to take the new one; losses before and after do not compare",
            ),
        }[source]
        raise UserError(f"the Hub has another {name}: sha256 {theirs}, wanted {wanted} ({why})", where=place, fix=fix)
    return _Job(name=name, bytes=size, wanted=wanted or theirs, source=source or "hub")


def _check_space(folder: Path, jobs: list[_Job]) -> None:
    """Refuse before the first byte what would fill the disk."""
    need, free = sum(job.bytes for job in jobs) + MARGIN_BYTES, shutil.disk_usage(folder).free
    if jobs and need > free:
        raise UserError(
            f"disk too full: {len(jobs)} shards need {need / 1e9:.2f} GB with a margin, {free / 1e9:.2f} GB are free",
            where=str(folder),
            fix="Free some space, set SPEEDRUN_HOME to another disk, or fetch fewer: --shards",
        )


class _Stopped(BaseException):
    """Raised inside the library to make it let go; no handler of its catches it."""


class _Meter:
    """Bytes that have arrived, by file, and whether to stop; written by the workers, read by the caller's thread."""

    def __init__(self) -> None:
        self.arrived: dict[str, int] = {}
        self.stop = threading.Event()
        self.note: str | None = None

    def add(self, name: str, count: int) -> None:
        if self.stop.is_set():
            raise _Stopped
        self.arrived[name] = self.arrived.get(name, 0) + count


class _Bar:
    """What the library takes for a tqdm: it only counts."""

    def __init__(self, meter: _Meter, name: str, **_: object) -> None:
        self._meter, self._name = meter, name

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to close."""

    def update(self, count: int = 1) -> None:
        """Count bytes; negative when the library starts a file again."""
        self._meter.add(self._name, int(count))


def _bring(dataset: Dataset, folder: Path, commit: str, jobs: list[_Job], report: Callable[[Progress], None]) -> None:
    """Run the workers, report from this thread, and keep each digest as its shard gets its name."""
    todo: queue.SimpleQueue[_Job] = queue.SimpleQueue()
    for job in jobs:
        todo.put(job)
    outcomes: queue.SimpleQueue[_Job | BaseException] = queue.SimpleQueue()
    meter, start = _Meter(), time.monotonic()
    # Daemon threads, not an executor: an executor's are waited for at exit, and one that hangs in a read would keep Ctrl-C waiting.
    work = functools.partial(_work, dataset, folder, commit, todo, outcomes, meter)
    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(WORKERS, len(jobs)))]
    total, done = sum(job.bytes for job in jobs), 0

    def progress() -> Progress:
        seconds = time.monotonic() - start
        return Progress(
            shards_done=done, shards=len(jobs), bytes_done=sum(list(meter.arrived.values())), bytes=total, seconds=seconds, note=meter.note
        )

    try:
        for thread in threads:
            thread.start()
        while done < len(jobs):
            report(progress())
            try:
                outcome = outcomes.get(timeout=REPORT_EVERY_S)
            except queue.Empty:
                continue
            if isinstance(outcome, BaseException):
                raise outcome
            done += 1
        report(progress())
    finally:
        meter.stop.set()
        patience = (
            time.monotonic() + 0.5
        )  # on success they are done; one that hangs in a read stops at its next chunk, without a name to write
        for thread in threads:
            thread.join(timeout=max(0.0, patience - time.monotonic()))
        shutil.rmtree(folder / PARTIAL, ignore_errors=True)


def _work(dataset: Dataset, folder: Path, commit: str, todo: queue.SimpleQueue, outcomes: queue.SimpleQueue, meter: _Meter) -> None:
    """Bring one shard after the other until none is left or one fails."""
    while not meter.stop.is_set():
        try:
            job = todo.get_nowait()
        except queue.Empty:
            return
        try:
            _bring_one(dataset, folder, commit, job, meter)
            outcomes.put(job)
        except _Stopped:
            return
        except BaseException as error:  # a bug too must end the fetch, in the caller's thread
            outcomes.put(error)
            return


def _bring_one(dataset: Dataset, folder: Path, commit: str, job: _Job, meter: _Meter) -> None:
    """Download, hash, read, rename, record: in that order, so that a file with a final name is a good one."""
    for again in (False, True):
        meter.arrived[job.name] = 0
        path = _download(dataset, folder, commit, job, meter, force=again)
        found = file_sha256(path)
        if job.wanted in (None, found):
            break
        meter.note = f"{job.name} came with wrong bytes, fetching it again"
    else:
        raise UserError(
            f"{job.name} came twice with wrong bytes: found sha256 {found}, wanted {job.wanted}",
            where=f"{dataset.repo}/{job.name}",
            fix="Something between here and the Hub alters files: check HF_ENDPOINT and the proxy, then run the same command again",
        )
    meter.arrived[job.name] = job.bytes  # the library may have taken it from its own cache
    try:
        check_vocabulary(path, dataset.vocab_size)
    except UserError as error:
        fix = "The repository holds something else: check [data] repo and vocab_size in the track file"
        raise UserError(error.what, where=f"{dataset.repo}/{job.name}", fix=fix) from None
    if meter.stop.is_set():
        raise _Stopped
    final = path.replace(folder / job.name)
    record(folder, {job.name: hashed_entry(final, found, job.source)})


def _download(dataset: Dataset, folder: Path, commit: str, job: _Job, meter: _Meter, *, force: bool) -> Path:
    """One file into `.partial`, as the library does it."""
    hub = _hub()
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    place = f"{dataset.repo}/{job.name}"
    try:
        return Path(
            hub.hf_hub_download(
                dataset.repo,
                job.name,
                repo_type="dataset",
                revision=commit,
                local_dir=folder / PARTIAL,
                endpoint=_endpoint(),
                etag_timeout=FIRST_CONTACT_S,
                force_download=force,
                tqdm_class=functools.partial(_Bar, meter, job.name),
                library_name="speedrun",
            )
        )
    except (OSError, ValueError, _transport_error()) as error:
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            fix = "Check [data] in the track file, or ask for fewer: --shards"
            raise UserError(f"dataset {dataset.repo} on the Hub has no file {job.name}", where=place, fix=fix) from None
        if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
            raise UserError(
                f"cannot write {job.name}: {error.strerror}", where=str(folder), fix="Mend the folder, then run the same command again"
            ) from None
        if meter.stop.is_set():
            raise _Stopped from None
        fix = "Run the same command again: shards that have arrived are kept"
        raise HubUnreachable(f"fetching {job.name} broke off ({_one_line(error.__cause__ or error)})", where=place, fix=fix) from None
