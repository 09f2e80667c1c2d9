"""The statistics of races: is the mean final loss convincingly below the target? Everything from scipy; imports no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from harness.track import Track


@dataclass(frozen=True, kw_only=True)
class TargetTest:
    """Outcome of a track's significance rule."""

    n: int
    mean: float  # nats per token
    sd: float | None  # sample standard deviation; None for one run
    p_value: float | None  # None: cannot be computed
    target_met: bool  # the mean meets the target
    significant: bool  # the track's rule holds
    statement: str  # the rule and its outcome, in one sentence


def target_test(losses: Sequence[float], track: Track) -> TargetTest:
    """Apply a track's rule to the final losses of independent runs.

    Args:
        losses: final validation losses, nats per token, one per run; at least one.
        track: the race.

    Raises:
        ValueError: no losses.
    """
    if not losses:
        raise ValueError("a test needs at least one loss")
    n, mean = len(losses), fmean(losses)
    sd = stdev(losses) if n > 1 else None
    if track.significance.test == "z":
        return _z_rule(track, n, mean, sd)
    met = mean <= track.target_loss
    p = one_sided_p(losses, track.target_loss)
    wanted = track.significance.p_below
    if p is None:
        statement = f"one run: the t-test p < {wanted:g} needs at least 2 runs, usually 4"
    else:
        statement = f"t-test, mean {mean:.4f} below {track.target_loss:g}: p = {p:.2g}, wanted < {wanted:g}"
    return TargetTest(
        n=n, mean=mean, sd=sd, p_value=p, target_met=met, significant=met and p is not None and p < wanted, statement=statement
    )


def one_sided_p(losses: Sequence[float], target: float) -> float | None:
    """p-value of a one-sided one-sample t-test that the mean is below the target; None for fewer than 2 runs.

    Losses without any spread give 0 below the target and 1 otherwise, as the limit of the test does.
    """
    if len(losses) < 2:
        return None
    if max(losses) == min(losses):
        return 0.0 if losses[0] < target else 1.0
    from scipy.stats import ttest_1samp

    return float(ttest_1samp(losses, target, alternative="less").pvalue)


def _z_rule(track: Track, n: int, mean: float, sd: float | None) -> TargetTest:
    """(target - mean) * sqrt(n) >= margin: a z-test with the spread that the field has agreed on."""
    score = (track.target_loss - mean) * math.sqrt(n)
    p = None
    if track.significance.sigma:
        from scipy.stats import norm

        p = float(norm.sf(score / track.significance.sigma))
    statement = f"z-rule, ({track.target_loss:g} - {mean:.5f}) * sqrt({n}) = {score:.5f}, wanted >= {track.significance.margin:g}"
    return TargetTest(
        n=n,
        mean=mean,
        sd=sd,
        p_value=p,
        target_met=mean < track.target_loss,
        significant=score >= track.significance.margin,
        statement=statement,
    )


def mean_and_sd(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation; None for the latter of one value."""
    return fmean(values), stdev(values) if len(values) > 1 else None
