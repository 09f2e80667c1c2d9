"""STATISTICS: does the claim follow from the runs, and does it convince?"""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING

from data.errors import UserError
from harness.claim import claim_of
from harness.record import Claim
from harness.rules.reading import Evidence
from harness.rules.rule import Outcome, Rule, failed, passed, warned
from harness.statistics import target_test

if TYPE_CHECKING:
    from harness.statistics import TargetTest

# How far a number may be from the one computed here: half a unit of the last digit kept, twice.
LOSS_ATOL = 1e-6
TIME_ATOL_MS = 1e-3
P_RTOL = 1e-6  # scipy releases differ in the last bits
_TOLERANCES = {
    "steps": (0, 0),
    "tokens": (0, 0),
    "mean_val_loss": (0, LOSS_ATOL),
    "sd_val_loss": (0, LOSS_ATOL),
    "p_value": (P_RTOL, 0),
    "mean_train_time_ms": (0, TIME_ATOL_MS),
    "sd_train_time_ms": (0, TIME_ATOL_MS),
}


def _claim(evidence: Evidence) -> Outcome:
    stated, computed = evidence.record.claim, _computed_claim(evidence)
    if isinstance(computed, Outcome):
        return computed
    for key, (relative, absolute) in _TOLERANCES.items():
        found, wanted = getattr(stated, key), getattr(computed, key)
        if not _close(found, wanted, relative, absolute):
            fix = "Make the record again from its runs; a claim is never written by hand"
            return failed(f"claim has {key} = {found}", wanted=f"{wanted}, from the events", fix=fix)
    spread = "" if computed.sd_val_loss is None else f" +- {computed.sd_val_loss:.4f}"
    return passed(
        f"n = {computed.n}, val_loss {computed.mean_val_loss:.4f}{spread}, train_time {computed.mean_train_time_ms / 1000:.2f} s, from the events"
    )


def _computed_claim(evidence: Evidence) -> Claim | Outcome:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # scipy's, about losses that hardly differ; the numbers are compared all the same
            return claim_of(evidence.results, evidence.track)
    except UserError as error:
        return failed(error.what, wanted="runs of one recipe", fix=error.fix)


def _close(found: float | None, wanted: float | None, relative: float, absolute: float) -> bool:
    if found is None or wanted is None:
        return found is wanted
    return math.isclose(found, wanted, rel_tol=relative, abs_tol=absolute * (1 + 1e-6))


def _test(evidence: Evidence) -> TargetTest:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return target_test([run.val_loss for run in evidence.results], evidence.track)


def _target(evidence: Evidence) -> Outcome:
    test, target, stated = _test(evidence), evidence.track.target_loss, evidence.record.claim.target_met
    if stated != test.target_met:
        return failed(
            f"claim says target_met = {stated}".lower(),
            wanted=f"{test.target_met}: mean val_loss {test.mean:.6f}, target {target:g}".lower(),
        )
    if not test.target_met:
        found = f"mean val_loss {test.mean:.4f} does not meet the target {target:g}: this record is a comparison, not an entry"
        return warned(found, wanted=f"{target:g} or less", fix="Nothing, if a comparison is what it is for; else train longer or better")
    return passed(f"mean val_loss {test.mean:.4f} meets the target {target:g}")


def _significance(evidence: Evidence) -> Outcome:
    test, stated = _test(evidence), evidence.record.claim.significant
    if stated != test.significant:
        return failed(f"claim says significant = {stated}".lower(), wanted=f"{str(test.significant).lower()}: {test.statement}")
    if not test.significant:
        fix = "Add runs from other seeds" if test.target_met else "Nothing, for a comparison"
        return warned(f"not shown to be below the target: {test.statement}", wanted="the track's significance rule", fix=fix)
    return passed(test.statement)


RULES = (
    Rule(
        id="STATISTICS-1",
        sentence="The claim is what its runs give: steps, tokens, means, spreads and p-value, computed again from the events.",
        false_alarms=f"None known: losses may differ by {LOSS_ATOL:g}, times by {TIME_ATOL_MS:g} ms, p by {P_RTOL:g} of itself.",
        check=_claim,
    ),
    Rule(
        id="STATISTICS-2",
        sentence="The mean final loss meets the target, or the claim says that it does not.",
        false_alarms="A comparison does not meet the target on purpose: only warned about.",
        check=_target,
    ),
    Rule(
        id="STATISTICS-3",
        sentence="The track's significance rule holds, or the claim says that it does not.",
        false_alarms="One run, or few, can be below the target and not show it: only warned about.",
        check=_significance,
    ),
)
