"""Judging a record: every rule applied to one folder. Values only; nothing of the record is imported or run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data.errors import UserError
from harness.record import find_records
from harness.rules import RULES, RULES_VERSION
from harness.rules.reading import Evidence
from harness.rules.rule import Finding, Verdict


@dataclass(frozen=True, kw_only=True)
class Report:
    """What the rules say of one record."""

    folder: Path
    rules_version: str
    findings: tuple[Finding, ...]  # one a rule, in the order of RULES
    valid: bool  # no rule fails
    sentence: str  # the verdict for a person

    def of(self, verdict: Verdict) -> list[str]:
        """Ids of the rules with this verdict."""
        return [finding.rule for finding in self.findings if finding.verdict == verdict]


def verify_record(folder: Path) -> Report:
    """Apply every rule to a record; a broken record is a report, never an exception."""
    evidence = Evidence(folder)
    findings = tuple(rule.judge(evidence) for rule in RULES)
    valid = all(finding.verdict != "fail" for finding in findings)
    return Report(folder=folder, rules_version=RULES_VERSION, findings=findings, valid=valid, sentence=_sentence(findings))


def record_folders(paths: Sequence[Path]) -> list[Path]:
    """Folders of records among and below the given paths, also those that have lost their record.json.

    Raises:
        UserError: a path does not exist or holds no record.
    """
    found: list[Path] = []
    for path in paths:
        damaged = sorted(file.parent for file in path.rglob("manifest.sha256") if not (file.parent / "record.json").exists())
        try:
            whole = find_records([path])
        except UserError:
            if not damaged:
                raise
            whole = []
        found += [folder for folder in sorted({*whole, *damaged}) if folder not in found]
    return found


def _sentence(findings: Sequence[Finding]) -> str:
    failed = [finding.rule for finding in findings if finding.verdict == "fail"]
    counts = {verdict: sum(finding.verdict == verdict for finding in findings) for verdict in ("pass", "warn", "unknown")}
    tally = ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)
    if failed:
        return f"NOT VALID: {', '.join(failed)} {'fails' if len(failed) == 1 else 'fail'}" + (f" ({tally})" if tally else "")
    return f"VALID: no rule fails ({tally})"
