"""`speedrun verify`: judge records. Parses, calls, prints."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from harness.verify import Report

_COLOURS = {"pass": "green", "fail": "red", "warn": "yellow", "unknown": "yellow"}


@click.command()
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="PATH...")
@click.option("--json", "as_json", is_flag=True, help="Print the same as JSON, with what each rule says.")
def verify(paths: tuple[Path, ...], as_json: bool) -> None:
    """Judge records: is the evidence whole, does the claim follow from it?

    PATH is the folder of a record, or a folder that holds some. Nothing of a record is imported or run. Exit 0 when no rule fails
    for any of them, else 1; warn and unknown do not make a record invalid, and are not a pass.

    \b
    Example:
      speedrun verify records/pocket
    """
    from harness.verify import record_folders, verify_record

    reports = []
    for folder in record_folders(paths):
        reports.append(verify_record(folder))
        if not as_json:
            _print_report(reports[-1])
    if as_json:
        click.echo(json.dumps(_values(reports), indent=1, sort_keys=True, allow_nan=False))
    if not all(report.valid for report in reports):
        raise click.exceptions.Exit(1)


def _values(reports: list[Report]) -> dict:
    from harness.rules import RULES, RULES_VERSION

    sentences = {rule.id: {"sentence": rule.sentence, "false_alarms": rule.false_alarms} for rule in RULES}
    records = [
        {
            "folder": str(report.folder),
            "valid": report.valid,
            "sentence": report.sentence,
            "findings": [{**asdict(finding), **sentences[finding.rule]} for finding in report.findings],
        }
        for report in reports
    ]
    return {"rules_version": RULES_VERSION, "valid": all(report.valid for report in reports), "records": records}


def _print_report(report: Report) -> None:
    click.echo(str(report.folder))
    (_print_rich if sys.stdout.isatty() else _print_plain)(report)
    click.echo(f"{report.sentence}\n")


def _rows(report: Report) -> list[tuple[str, str, str]]:
    """(rule, verdict, text); what is not a pass also says what was wanted and what to do, a row each."""
    rows = []
    for finding in report.findings:
        rows.append((finding.rule, finding.verdict, finding.found))
        rows += [("", "", f"{label}: {text}") for label, text in (("wanted", finding.wanted), ("fix", finding.fix)) if text]
    return rows


def _print_plain(report: Report) -> None:
    rows = [("RULE", "VERDICT", "FOUND"), *_rows(report)]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    for rule, verdict, text in rows:
        click.echo(f"  {rule:<{widths[0]}}  {verdict:<{widths[1]}}  {text}".rstrip())


def _print_rich(report: Report) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("Rule", "Verdict", "Found", box=None, padding=(0, 2, 0, 0))
    for rule, verdict, text in _rows(report):
        table.add_row(Text(rule, no_wrap=True), Text(verdict, style=_COLOURS.get(verdict, "")), Text(text))
    Console().print(table)
