"""Figure 1's twin: validation loss against training time, which is what most races are ranked by."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from plots.curves import Axis, draw, short

_SECONDS_UP_TO_MS = 300e3
_MINUTES_UP_TO_MS = 300 * 60e3


def time(frame: pd.DataFrame, summaries: pd.DataFrame) -> Figure:
    """One line per record of one track over the clock, cropped near the target; several divisions are drawn, and the footer says so.

    The time of a point is the mean over the record's runs.

    Args:
        frame: as plots.frame.validations() gives it.
        summaries: of the same records, as plots.frame.summaries() gives it.

    Raises:
        UserError: records of different tracks or targets, or a record whose runs validated at different steps.
    """
    divisor, name, unit = _unit(frame["train_time_ms"].max())
    axis = Axis(
        column="train_time_ms",
        title="training time",
        label=f"training time ({name})",
        tick=lambda value: f"{value:g}",
        divisor=divisor,
        heading="train time",
        end=lambda row: f"{short(row['mean_train_time_ms'] / divisor)} {unit}",
    )
    return draw(frame, summaries, axis)


def _unit(longest_ms: float) -> tuple[float, str, str]:
    """(milliseconds of the unit, its name, its symbol) that fits a figure so long."""
    if longest_ms <= _SECONDS_UP_TO_MS:
        return 1e3, "seconds", "s"
    return (60e3, "minutes", "min") if longest_ms <= _MINUTES_UP_TO_MS else (3600e3, "hours", "h")
