"""How every figure looks, and how it reaches the disk: the same bytes each time, on screen, in grey print and without colour vision."""

from __future__ import annotations

import io
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib.style

from data.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = ("png", "svg")
_DPI = 160
# Okabe & Ito 2008 without yellow, which is lost on white; neighbours differ in lightness, markers and dashes tell them apart in grey
_COLORS = ("#0072B2", "#D55E00", "#000000", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_DASHES = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (5, 1, 1, 1)))
_SETTINGS = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, so the figure is the same everywhere
    "font.size": 9,
    "text.parse_math": False,  # a record's name may hold a $
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.4,
    "svg.hashsalt": "speedrun",  # element ids are hashes; without it they are random
    "svg.fonttype": "path",
}
_METADATA = {"png": {"Software": None}, "svg": {"Date": None, "Creator": "speedrun"}}


@contextmanager
def style() -> Iterator[None]:
    """matplotlib's defaults and our settings, whatever the user's own file says; all is as before afterwards."""
    with matplotlib.style.context(["default", _SETTINGS]):
        yield


def series_style(number: int) -> dict[str, object]:
    """Colour, marker and dashes of the n-th curve, from 0; no two of the first 56 share colour and marker."""
    return {
        "color": _COLORS[number % len(_COLORS)],
        "marker": _MARKERS[number % len(_MARKERS)],
        "linestyle": _DASHES[number % len(_DASHES)],
    }


def save(figure: Figure, base: Path) -> list[Path]:
    """Write BASE.png and BASE.svg, each by rename; the same figure gives the same bytes.

    Returns:
        The files written.

    Raises:
        UserError: the folder is not there or cannot be written to.
    """
    paths = []
    for kind in FORMATS:
        content = io.BytesIO()
        with style():
            figure.savefig(content, format=kind, dpi=_DPI, metadata=_METADATA[kind])  # no pyplot, so no display: Agg draws
        paths.append(base.with_name(f"{base.name}.{kind}"))
        replace_file(paths[-1], content.getvalue())
    return paths


def replace_file(path: Path, content: bytes) -> None:
    """Write a file whole or not at all.

    Raises:
        UserError: the folder is not there or cannot be written to.
    """
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(
            f"the file cannot be written: {error.strerror}", where=str(path), fix="Choose a folder that exists and has room"
        ) from None
