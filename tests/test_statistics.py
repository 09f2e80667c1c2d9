"""The track's test: against scipy's own words, at its corners."""

from __future__ import annotations

import math

import pytest
from scipy import stats

from harness.statistics import one_sided_p, target_test
from harness.track import load_track

POCKET, STEPS = load_track("pocket"), load_track("fineweb-steps")


def test_p_value_is_the_one_sided_t_test():
    """The p-value is that of Student's t for (mean - target) / (sd / sqrt(n)) with n - 1 degrees of freedom."""
    losses = [3.275, 3.279, 3.277, 3.281]
    mean = sum(losses) / 4
    sd = math.sqrt(sum((loss - mean) ** 2 for loss in losses) / 3)

    assert stats.t.cdf((mean - 3.28) / (sd / 2), df=3) == pytest.approx(one_sided_p(losses, 3.28), rel=1e-9)


def test_one_run_shows_nothing():
    """One run may meet the target but is never significant, and its p-value is unknown."""
    test = target_test([1.0], POCKET)

    assert (True, False, None, None) == (test.target_met, test.significant, test.p_value, test.sd)


@pytest.mark.parametrize(("loss", "p"), [(1.0, 0.0), (3.0, 1.0)])
def test_no_spread_is_the_limit(loss, p):
    """Equal losses give the limit of the test, not a division by zero."""
    assert p == target_test([loss] * 3, POCKET).p_value


def test_mean_above_the_target_is_never_significant():
    """Above the target nothing is significant, whatever the spread."""
    test = target_test([POCKET.target_loss + 0.01, POCKET.target_loss + 0.011], POCKET)

    assert (False, False) == (test.target_met, test.significant)


@pytest.mark.parametrize(("gap", "runs", "significant"), [(0.0021, 4, True), (0.0019, 4, False), (0.0041, 1, True), (0.0, 100, False)])
def test_z_rule(gap, runs, significant):
    """fineweb-steps asks (3.28 - mean) * sqrt(n) >= 0.004, and a mean strictly below 3.28."""
    test = target_test([3.28 - gap] * runs, STEPS)

    assert significant == test.significant
    assert (gap > 0) == test.target_met


def test_no_losses_is_an_error():
    """A test of nothing is refused."""
    with pytest.raises(ValueError, match="at least one"):
        target_test([], POCKET)
