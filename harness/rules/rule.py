"""The nouns of judging: a rule, what it found, and how it says so. The record folder it looks at is `reading.Evidence`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from harness.rules.reading import Evidence, RunLog, Unreadable

Verdict = Literal["pass", "fail", "warn", "unknown"]
_LONGEST_TEXT = 300  # characters of a finding; a record may hold names of any length


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a check says: the finding, before it carries the rule's id."""

    verdict: Verdict
    found: str
    wanted: str | None = None
    fix: str | None = None


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One rule's verdict on one record. `unknown` is never a pass: the rule could not be applied."""

    rule: str  # id
    verdict: Verdict
    found: str  # what is there, in a sentence with the value
    wanted: str | None  # what should be there; None where nothing is wrong
    fix: str | None  # something one can do about it


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One executable check."""

    id: str  # KIND-number; never given to another rule
    sentence: str  # what holds for a record that passes
    false_alarms: str  # honest records that may fail it, and what their authors can do
    check: Callable[[Evidence], Outcome]

    def judge(self, evidence: Evidence) -> Finding:
        """Apply the rule; whatever a record holds, this returns a finding."""
        try:
            outcome = self.check(evidence)
        except Unreadable as error:
            outcome = _not_applied(self, error)
        except Exception as error:  # a record that breaks a check must not pass by it
            outcome = failed(f"the rule could not be applied: {type(error).__name__}: {error}", wanted="a record this program wrote")
        texts = (_safe(outcome.found), _safe(outcome.wanted), _safe(outcome.fix))
        return Finding(rule=self.id, verdict=outcome.verdict, found=texts[0], wanted=texts[1], fix=texts[2])


def passed(found: str) -> Outcome:
    """The rule holds."""
    return Outcome(verdict="pass", found=found)


def failed(found: str, *, wanted: str, fix: str = "Copy the record again from where it was made, or race again") -> Outcome:
    """The rule is broken: the record is not valid."""
    return Outcome(verdict="fail", found=found, wanted=wanted, fix=fix)


def warned(found: str, *, wanted: str, fix: str) -> Outcome:
    """Not wrong, but something that a reader of the record must know."""
    return Outcome(verdict="warn", found=found, wanted=wanted, fix=fix)


def unknown(found: str, *, wanted: str, fix: str) -> Outcome:
    """What the rule asks for cannot be told from the record."""
    return Outcome(verdict="unknown", found=found, wanted=wanted, fix=fix)


def count(number: int, noun: str) -> str:
    """A number with its noun: 1 run, 2 runs."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def each_run(evidence: Evidence, problem: Callable[[RunLog], tuple[str, str] | None], *, good: str) -> Outcome:
    """Fail at the first run with a problem.

    Args:
        evidence: the record.
        problem: of one run, (found, wanted); None where there is none.
        good: what to say of a record without problems.
    """
    for log in evidence.runs:
        bad = problem(log)
        if bad:
            return failed(f"{log.name}: {bad[0]}", wanted=bad[1])
    return passed(good)


def _not_applied(rule: Rule, error: Unreadable) -> Outcome:
    """A rule that reports the broken part itself fails; one that only needs that part says unknown."""
    if error.rule == rule.id:
        return failed(error.what, wanted=rule.sentence)
    return unknown(f"cannot be told: {error.what}", wanted=rule.sentence, fix=f"See {error.rule}")


def _safe(text: str | None) -> str | None:
    """Text from a record made fit for a terminal: nothing that moves the cursor, no end without end."""
    if text is None:
        return None
    plain = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text[: 2 * _LONGEST_TEXT])
    return plain if len(plain) <= _LONGEST_TEXT else plain[: _LONGEST_TEXT - 4] + " ..."
