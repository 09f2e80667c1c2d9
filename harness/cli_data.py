"""The `speedrun data` commands: which shards a track needs, fetching them, checking them. Parses, calls, prints."""

from __future__ import annotations

import json
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict

import click

from data.errors import UserError, naming_track

_LINE_EVERY_S = 5.0  # a log file wants few lines

_shards_option = click.option(
    "--shards",
    type=click.IntRange(min=0),
    default=None,
    metavar="N",
    help="Training shards wanted; by default as many as the track's baseline needs.",
)
_json_option = click.option("--json", "as_json", is_flag=True, help="Print the same as JSON.")


@click.group()
def data() -> None:
    """Token shards: what a track needs, fetch it, check it."""


@data.command("list")
@_json_option
def list_command(as_json: bool) -> None:
    """List the tracks with their data, and how much of it is here.

    \b
    Example:
      speedrun data list
    """
    from harness.track import load_track, track_names

    rows = [_presence(load_track(name)) for name in track_names()]
    if as_json:
        _print_json(rows)
        return
    table = [("TRACK", "DATASET", "SOURCE", "SHARDS", "GB", "FOLDER")]
    for row in rows:
        shards = f"{row['shards_present']}/{row['shards_wanted']}"
        table.append((row["track"], row["dataset"], row["source"], shards, f"{row['bytes_present'] / 1e9:.2f}", row["folder"]))
    _print_table(table)


@data.command("get")
@click.argument("track")
@_shards_option
@_json_option
def get_command(track: str, shards: int | None, as_json: bool) -> None:
    """Fetch the shards of TRACK; those that are here and verified are left alone.

    It may be killed and started again: a shard that has arrived is kept.

    \b
    Example:
      speedrun data get fineweb --shards 8
    """
    from data.fetch import get

    dataset, folder = _open(track, shards)
    with naming_track(track), _reporter() as report:
        result = get(dataset, folder, train_shards=shards, report=report)
    if as_json:
        _print_json({"track": track, "dataset": dataset.name, **asdict(result), "folder": str(result.folder)})
        return
    rate = f" in {_duration(result.seconds)}, {result.bytes_fetched / 1e6 / result.seconds:.1f} MB/s" if result.fetched else ""
    click.echo(f"{len(result.fetched)} shards fetched ({_size(result.bytes_fetched)}{rate}), {len(result.present)} were here and verified")
    if result.note:
        click.echo(f"Note: {result.note}")
    click.echo(str(result.folder))


@data.command("check")
@click.argument("track")
@_shards_option
@_json_option
def check_command(track: str, shards: int | None, as_json: bool) -> None:
    """Hash every shard of TRACK and look at every token; exit 1 if one is missing or wrong.

    \b
    Example:
      speedrun data check fineweb
    """
    from data.manifest import check_shards

    dataset, folder = _open(track, shards)
    with naming_track(track):
        statuses = check_shards(dataset, folder, dataset.shards(shards), deep=True, report=lambda name: _show(f"hashing {name}"))
        _show("")
        if as_json:
            _print_json({"track": track, "dataset": dataset.name, "folder": str(folder), "shards": [asdict(status) for status in statuses]})
        else:
            table = [("SHARD", "TOKENS", "SHA256", "STATE", "DIGEST FROM")]
            for status in statuses:
                tokens = "-" if status.tokens is None else f"{status.tokens:,}"
                table.append((status.name, tokens, (status.sha256 or "-")[:12], status.state, status.source or "-"))
            _print_table(table)
        bad = [status for status in statuses if status.state != "ok"]
        if bad:
            where = str(folder / bad[0].name)
            raise UserError(f"{len(bad)} of {len(statuses)} shards are not right: {bad[0].problem}", where=where, fix=bad[0].fix)


def _open(track: str, shards: int | None):
    """A track's dataset and folder; more shards than exist is wrong usage."""
    from harness.home import data_folder
    from harness.track import load_track

    dataset = load_track(track).data
    if shards is not None and shards > len(dataset.train_shards):
        raise click.BadParameter(
            f"{shards} is more than the {len(dataset.train_shards)} training shards of {dataset.name}", param_hint="--shards"
        )
    return dataset, data_folder(dataset.name)


def _presence(track) -> dict:
    """One row of `data list`; only file names and lengths are looked at, so that it is instant."""
    from harness.home import data_folder

    folder, wanted = data_folder(track.data.name), track.data.shards()
    sizes = [(folder / name).stat().st_size for name in wanted if (folder / name).is_file()]
    return {
        "track": track.id,
        "dataset": track.data.name,
        "source": track.data.source,
        "shards_present": len(sizes),
        "shards_wanted": len(wanted),
        "shards_exist": len(track.data.val_shards) + len(track.data.train_shards),
        "bytes_present": sum(sizes),
        "folder": str(folder),
    }


@contextmanager
def _reporter():
    """A function that shows Progress on stderr: a bar on a terminal, else a line every few seconds."""
    if sys.stderr.isatty():
        with _bar() as report:
            yield report
    else:
        yield _lines()


@contextmanager
def _bar():
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TextColumn("{task.fields[speed]}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("asking", total=None, speed="")

        def report(progress) -> None:
            text = progress.note or f"{progress.shards_done}/{progress.shards} shards"
            bar.update(task, description=text, completed=progress.bytes_done, total=progress.bytes or None, speed=_speed(progress))

        yield report


def _lines():
    last = {"time": float("-inf"), "note": None}

    def report(progress) -> None:
        now = time.monotonic()
        done = progress.shards_done == progress.shards
        if not done and progress.note == last["note"] and now - last["time"] < _LINE_EVERY_S:
            return
        last.update(time=now, note=progress.note)
        size = f"{_size(progress.bytes_done)} of {_size(progress.bytes)}"
        text = progress.note or f"{progress.shards_done}/{progress.shards} shards, {size}, {_speed(progress)}"
        click.echo(text, err=True)

    return report


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"


def _speed(progress) -> str:
    left = "" if progress.eta_seconds is None else f", {_duration(progress.eta_seconds)} left"
    return f"{progress.bytes_per_second / 1e6:.1f} MB/s{left}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h {minutes:02}m" if hours else f"{minutes}m {rest:02}s" if minutes else f"{rest}s"


def _show(text: str) -> None:
    """On a terminal, one line that the next one overwrites: 27 shards take a minute on a slow disk."""
    if sys.stderr.isatty():
        click.echo(f"\r\x1b[K{text}", err=True, nl=False)


def _print_json(value) -> None:
    click.echo(json.dumps(value, indent=2, sort_keys=True, allow_nan=False))


def _print_table(rows: list[tuple[str, ...]]) -> None:
    """Columns as wide as their longest cell; the last one as it is."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
