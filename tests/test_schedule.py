"""The learning rate's trapezoid at its corners and everywhere between."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.recipe import FINEWEB_MUON, POCKET_MUON
from trainer.train import lr_factor


def trapezoid(steps, up, down):
    return replace(POCKET_MUON, steps=steps, warmup_steps=up, warmdown_steps=down)


@pytest.mark.parametrize(
    ("step", "factor"),
    [(0, 1 / 4), (2, 3 / 4), (3, 1.0), (4, 1.0), (13, 1.0), (14, 1.0), (15, 4 / 5), (18, 1 / 5)],
    ids=["first", "late-up", "last-up", "first-level", "last-level", "first-down", "second-down", "last"],
)
def test_corners_of_a_trapezoid(step, factor):
    """4 steps up, 10 level, 5 down: the first step already moves, the top is reached at the last step up, the last step still moves."""
    assert factor == pytest.approx(lr_factor(step, trapezoid(19, 4, 5)))


@pytest.mark.parametrize(("step", "factor"), [(0, 1.0), (3649, 1.0), (3650, 1.0), (3651, 1449 / 1450), (5099, 1 / 1450)])
def test_corners_of_the_baseline(step, factor):
    """The 5100-step baseline starts at full rate and falls linearly over its last 1450 steps."""
    assert factor == pytest.approx(lr_factor(step, FINEWEB_MUON))


def test_no_warmdown_stays_level():
    """Without warm-up and warmdown the rate is full at every step."""
    assert [1.0] * 7 == [lr_factor(step, trapezoid(7, 0, 0)) for step in range(7)]


@given(st.data())
def test_factor_is_above_zero_and_at_most_one_with_no_jump(data):
    """Inside the run the factor lies in (0, 1], rises only in the warm-up, falls only in the warmdown, and moves by no more than one slope."""
    steps = data.draw(st.integers(1, 200))
    up = data.draw(st.integers(0, steps))
    down = data.draw(st.integers(0, steps - up))
    recipe = trapezoid(steps, up, down)
    factors = [lr_factor(step, recipe) for step in range(steps)]

    assert all(0 < factor <= 1 for factor in factors)
    for step, (now, then) in enumerate(pairwise(factors), start=1):
        slope = (1 / up if step < up else 0) - (1 / down if step > steps - down else 0)
        assert slope == pytest.approx(then - now, abs=1e-12)
