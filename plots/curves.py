"""The drawing that Figure 1 and its twin over time share: a loss curve per record, the target, a legend in columns, a footer."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from data.errors import UserError
from plots.style import series_style, style

_EARLY = 0.3  # of a record's steps; what lies above the loss there is cut off, which shows the last tenths of a nat
_LEAST_SPAN = 0.02  # of the target, for the y axis of curves that are flat
_MARGIN = 0.06  # of the y axis, below the lowest loss and above the early part
_MONO = "DejaVu Sans Mono"
_NAME_WIDTH, _FOOTER_WIDTH = 44, 140  # characters
_INCHES = {"width": 8.0, "axes": 4.6, "legend_row": 0.165, "footer_row": 0.125}


@dataclass(frozen=True, kw_only=True)
class Axis:
    """What the horizontal axis shows."""

    column: str  # of the validations
    title: str  # of the figure, after "validation loss against"
    label: str
    tick: Callable[[float], str]  # a value of the axis -> text
    divisor: float = 1.0  # a value of the column, divided by it, is a value of the axis
    heading: str  # of its column in the legend
    end: Callable[[pd.Series], str]  # a record's summary -> what stands in that column


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A record as drawn: one point per validated step, over its runs."""

    record: str
    runs: int
    points: pd.DataFrame  # index: step; columns: x (mean, in the column's unit), mean, low, high (nats per token)


def curves(frame: pd.DataFrame, column: str) -> list[Curve]:
    """The curve of every record, in the frame's order; a step validated twice counts as the last time says.

    Raises:
        UserError: the runs of a record validated at different steps, so no mean can be drawn.
    """
    drawn = []
    for name, rows in frame.groupby("record", sort=False):
        rows = rows.drop_duplicates(["seed", "step"], keep="last")
        by_step, runs = rows.groupby("step"), rows["seed"].nunique()
        if (by_step.size() != runs).any():
            step = by_step.size().ne(runs).idxmax()
            raise UserError(
                f"only some runs validated at step {step}", where=str(name), fix="Plot a record whose runs validate at the same steps"
            )
        points = by_step.agg(x=(column, "mean"), mean=("val_loss", "mean"), low=("val_loss", "min"), high=("val_loss", "max"))
        drawn.append(Curve(record=str(name), runs=runs, points=points))
    return drawn


def draw(frame: pd.DataFrame, summaries: pd.DataFrame, axis: Axis) -> Figure:
    """Loss curves of records of one track.

    Args:
        frame: as plots.frame.validations() gives it.
        summaries: of the same records, as plots.frame.summaries() gives it.
        axis: the horizontal axis.

    Raises:
        UserError: records of different tracks or targets, or curves that cannot be averaged.
    """
    track, target = one_track(summaries)
    lines = curves(frame, axis.column)
    assert [line.record for line in lines] == list(summaries["record"]), "frame and summaries are not of the same records"
    footer = _footer(summaries)
    height = _INCHES["axes"] + _INCHES["legend_row"] * (len(lines) + 1) + _INCHES["footer_row"] * len(footer)
    with style():
        figure = Figure(figsize=(_INCHES["width"], height), layout="constrained")
        axes = figure.add_subplot()
        handles = []
        for number, line in enumerate(lines):
            look, x = series_style(number), line.points["x"] / axis.divisor
            size = 5 if len(x) <= 25 else 3
            if line.runs > 1:
                axes.fill_between(x, line.points["low"], line.points["high"], color=look["color"], alpha=0.2, linewidth=0)
            handles += axes.plot(x, line.points["mean"], markersize=size, label=line.record, **look)
        _target_line(axes, target)
        axes.set_xlim(left=0)
        axes.set_ylim(*_loss_range(lines, target))
        axes.set(xlabel=axis.label, ylabel="validation loss (nats per token)")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: axis.tick(value)))
        _legend(axes, handles, _legend_rows(summaries, axis))
        figure.suptitle(f"{_printable(track)}: validation loss against {axis.title}", x=0.01, ha="left", fontsize=11)
        figure.supxlabel("\n".join(footer), x=0.01, ha="left", fontsize=6.5, color="#444444")
    return figure


def one_track(summaries: pd.DataFrame) -> tuple[str, float]:
    """Title and target of the one track that all records ran.

    Raises:
        UserError: they ran several, or one whose target has changed.
    """
    for column, what in (("track", "tracks"), ("target_loss", "target losses")):
        found = [str(value) for value in summaries[column].unique()]
        if len(found) > 1:
            raise UserError(
                f"the records have different {what}: {', '.join(found)}", fix="Plot one track at a time: --track NAME, or its records only"
            )
    return str(summaries["title"].iloc[0]), float(summaries["target_loss"].iloc[0])


def short(value: float) -> str:
    """Three digits of a number, or all before the point: 0.82, 31.4, 850."""
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:.0f}"


def _loss_range(lines: Sequence[Curve], target: float) -> tuple[float, float]:
    """From slightly below the lowest loss or the target to slightly above the early loss of the slowest record."""
    low = min(target, *(line.points["low"].min() for line in lines))
    high = max(target, *(line.points["high"][line.points.index >= _EARLY * line.points.index[-1]].max() for line in lines))
    span = max(high - low, _LEAST_SPAN * target)
    return low - _MARGIN * span, low + (1 + _MARGIN) * span


def _target_line(axes, target: float) -> None:
    """Dashed, with the loss beside it outside the axes, where no curve runs."""
    text = f"{target:.2f}" if round(target, 2) == target else f"{target:g}"
    axes.axhline(target, color="#555555", linestyle="--", linewidth=1, label="target", zorder=1)
    axes.annotate(
        f"target\n{text}", (1, target), (4, 0), xycoords=("axes fraction", "data"), textcoords="offset points", va="center", fontsize=8
    )


def _legend_rows(summaries: pd.DataFrame, axis: Axis) -> list[str]:
    """A heading and a row for each record, in columns; records of one name are told apart by their folders."""
    repeated = summaries["name"].duplicated(keep=False)
    names = summaries["name"].where(~repeated, summaries["record"])
    names = [" ".join(_printable(name).split()) for name in names]
    cells = [("record", axis.heading, "ms/step", "n")]
    for name, (_, row) in zip(names, summaries.iterrows(), strict=True):
        name = name if len(name) <= _NAME_WIDTH else name[: _NAME_WIDTH - 1] + "…"
        cells.append((name, axis.end(row), short(row["step_avg_ms"]), str(row["n"])))
    widths = [max(len(row[column]) for row in cells) for column in range(4)]
    return [" " + "   ".join([row[0].ljust(widths[0]), *(row[k].rjust(widths[k]) for k in (1, 2, 3))]) for row in cells]


def _legend(axes, handles: list, rows: list[str]) -> None:
    """Above the axes, so that it hides no curve however many records there are."""
    axes.legend(
        [Line2D([], [], linestyle="none"), *handles],
        rows,
        loc="lower left",
        bbox_to_anchor=(0, 1.0),
        frameon=False,
        borderaxespad=0.2,
        borderpad=0.2,
        labelspacing=0.25,
        handlelength=3.2,
        prop={"family": _MONO, "size": 8},
    )


def _footer(summaries: pd.DataFrame) -> list[str]:
    """Which records, rules and machines stand behind the figure."""
    divisions = list(summaries["division"].unique())
    sentences = ["Records: " + ", ".join(summaries["record"]), "Rules " + ", ".join(sorted(summaries["rules_version"].unique()))]
    if (summaries["n"] > 1).any():
        sentences.append("Line: mean over the runs of a record; band: lowest to highest run")
    if len(divisions) == 1:
        sentences.append(f"Division: {divisions[0]}")
    else:
        sentences.append("The divisions differ, so times and ms/step do not compare")
        for division, rows in summaries.groupby("division", sort=False):
            sentences.append(f"{division}: " + ", ".join(rows["record"]))
    return [line for text in sentences for line in textwrap.wrap(_printable(text) + ".", _FOOTER_WIDTH, break_on_hyphens=False)]


def _printable(text: str) -> str:
    """The text with � for what the font cannot draw, which else is a warning and an empty box."""
    known = get_font(findfont(_MONO)).get_charmap()
    return "".join(letter if letter.isspace() or ord(letter) in known else "\N{REPLACEMENT CHARACTER}" for letter in text)
