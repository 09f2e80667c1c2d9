"""`speedrun doctor`: is this machine ready to race? Parses, calls, prints."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from harness.doctor import Check

_COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}


@click.command()
@click.option("--records", type=click.Path(path_type=Path), help="Where records will go. Default: records/ of this checkout.")
@click.option("--json", "as_json", is_flag=True, help="Print the same as JSON.")
def doctor(records: Path | None, as_json: bool) -> None:
    """Say whether this machine is ready to race, and what to do if not.

    Exit 1 when something stands in the way; a warning does not.

    \b
    Example:
      speedrun doctor
    """
    from harness.doctor import examine

    checks = examine(records)
    ready = all(check.state != "fail" for check in checks)
    if as_json:
        click.echo(json.dumps({"ready": ready, "checks": [asdict(check) for check in checks]}, indent=1, sort_keys=True, allow_nan=False))
    else:
        _print_checks(checks)
        click.echo("Ready to race" if ready else "Not ready to race: see what fails above")
    if not ready:
        raise click.exceptions.Exit(1)


def _print_checks(checks: list[Check]) -> None:
    width = max(len(check.name) for check in checks)
    for check in checks:
        state = f"{check.state:<4}"
        click.echo(
            f"{click.style(state, fg=_COLOURS[check.state]) if sys.stdout.isatty() else state}  {check.name:<{width}}  {check.found}"
        )
        if check.fix:
            click.echo(f"{'':<{width + 6}}  {check.fix}")
