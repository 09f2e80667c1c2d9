"""The `speedrun plot` commands: figures of records as PNG and SVG, and their numbers. Parses, calls, prints."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import click

from data.errors import UserError

_DEFAULT_TRACK = "pocket"


@click.group()
def plot() -> None:
    """Figures of records: validation loss against tokens or time."""


def _figure_options(command: Callable) -> Callable:
    """What both commands take."""
    options = (
        click.argument("records", nargs=-1, type=click.Path(path_type=Path)),
        click.option("--track", metavar="NAME", help=f"Only records of this track; without RECORDS, {_DEFAULT_TRACK} when not given."),
        click.option(
            "--out",
            type=click.Path(path_type=Path),
            metavar="BASE",
            help="Write BASE.png and BASE.svg; by default COMMAND-TRACK in this folder.",
        ),
        click.option("--csv", "csv_file", metavar="FILE", help="Write the numbers of the figure too; - for stdout."),
        click.option("--json", "as_json", is_flag=True, help="Print files and numbers of each record as JSON."),
    )
    for option in reversed(options):
        command = option(command)
    return command


@plot.command("figure1")
@_figure_options
def figure1_command(records: tuple[Path, ...], track: str | None, out: Path | None, csv_file: str | None, as_json: bool) -> None:
    """Draw validation loss against training tokens.

    RECORDS are folders of records, or folders that hold some; without any, all records of the track.

    \b
    Examples:
      speedrun plot figure1 --track fineweb
      speedrun plot figure1 records/pocket/2031-02-03-muon records/pocket/2031-02-03-adamw --out muon-adamw
    """
    from plots.figure1 import figure1

    _plot("figure1", figure1, records, track, out, csv_file, as_json)


@plot.command("time")
@_figure_options
def time_command(records: tuple[Path, ...], track: str | None, out: Path | None, csv_file: str | None, as_json: bool) -> None:
    """Draw validation loss against training time.

    RECORDS are folders of records, or folders that hold some; without any, all records of the track.
    Times compare within a division only; the footer says so where divisions differ.

    \b
    Example:
      speedrun plot time --track pocket --csv time.csv
    """
    from plots.time import time

    _plot("time", time, records, track, out, csv_file, as_json)


def _plot(
    kind: str, draw: Callable, records: Sequence[Path], track: str | None, out: Path | None, csv_file: str | None, as_json: bool
) -> None:
    """Records -> tables -> figure -> files -> a few lines."""
    from plots.frame import summaries, validations
    from plots.style import replace_file, save

    if as_json and csv_file == "-":
        raise click.UsageError("--json and --csv - both want stdout; write the numbers to a file: --csv FILE")
    folders = choose_records(records, track)
    frame, summary = validations(folders), summaries(folders)
    figure = draw(frame, summary)
    files = save(figure, _base(out, f"{kind}-{summary['track'].iloc[0]}"))
    numbers = frame.to_csv(index=False, lineterminator="\n")
    if csv_file not in (None, "-"):
        files.append(Path(csv_file))
        replace_file(files[-1], numbers.encode())
    if as_json:
        rows = summary.astype(object).where(summary.notna(), None).to_dict("records")
        click.echo(json.dumps({"files": [str(path) for path in files], "records": rows}, indent=2, sort_keys=True, allow_nan=False))
        return
    if csv_file == "-":
        click.echo(numbers, nl=False)
    for path in files:
        click.echo(str(path), err=csv_file == "-")  # stdout is the table's then


def choose_records(records: Sequence[Path], track: str | None) -> list[Path]:
    """The record folders meant by the arguments.

    Args:
        records: folders given; none: all records of the track below ./records, else below the repository's records/.
        track: only records of this track; None: of any, or of pocket when no folders are given.

    Raises:
        UserError: there are none, or one of them cannot be read.
    """
    from harness.home import repository
    from harness.record import find_records, read_record
    from harness.track import load_track

    if records:
        folders = [folder for folder in find_records(records) if track is None or read_record(folder).track == track]
        if not folders:
            raise UserError(
                f"none of the records given is of track {track}", where="--track", fix="Leave out --track, or give other records"
            )
        return folders
    track = load_track(track or _DEFAULT_TRACK).id
    places = [root / track for root in (Path("records"), repository() / "records")]
    place = next((place for place in places if any(place.glob("*/record.json"))), None)
    if place is None:
        raise UserError(
            f"there are no records of track {track} yet",
            where=str(places[-1]),
            fix=f"speedrun run --track {track}, or give the folders of records",
        )
    return find_records([place])


def _base(out: Path | None, default: str) -> Path:
    """Where the figure goes without its ending; `--out muon.png` means `muon`."""
    base = out or Path(default)
    if base.name in ("", ".."):
        raise click.BadParameter(f"{str(out)!r} has no file name", param_hint="--out")
    return base.with_suffix("") if base.suffix in (".png", ".svg") else base
