"""Figure 1: validation loss against training tokens, as the field first drew it for Muon and AdamW."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from plots.curves import Axis, draw, short


def figure1(frame: pd.DataFrame, summaries: pd.DataFrame) -> Figure:
    """One line per record of one track, cropped near the target.

    Args:
        frame: as plots.frame.validations() gives it.
        summaries: of the same records, as plots.frame.summaries() gives it.

    Raises:
        UserError: records of different tracks or targets, or a record whose runs validated at different steps.

    Source: the optimizer figure of the NanoGPT speedrun's repository (Jordan et al. 2024).
    """
    largest = frame["tokens"].max()
    divisor, unit = _unit(largest)
    axis = Axis(
        column="tokens",
        title="training tokens",
        label="training tokens",
        tick=lambda value: f"{value / divisor:g}{unit}" if value else "0",
        heading="trained on",
        end=lambda row: f"{tokens_text(row['tokens'])} tokens",
    )
    return draw(frame, summaries, axis)


def tokens_text(tokens: float) -> str:
    """A token count as one says it: 0.82M, 2.67B."""
    divisor, unit = _unit(tokens)
    return f"{short(tokens / divisor)}{unit}"


def _unit(tokens: float) -> tuple[float, str]:
    """(tokens of the unit, its letter) for a count so large; what rounds to 1.00B is one."""
    return (1e9, "B") if tokens >= 999.5e6 else (1e6, "M") if tokens >= 1e5 else (1e3, "k")
