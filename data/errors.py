"""The one exception that a user sees: what happened, where, and what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """Something the user can mend. The command line prints it without a traceback and exits with 1.

    Args:
        what: what happened, in one sentence with the value found.
        where: the true file, line or flag; None where there is none.
        fix: something one can do about it.
    """

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None) -> None:
        super().__init__(what)
        self.what, self.where, self.fix = what, where, fix

    def __str__(self) -> str:
        """The message over a few lines, the place and the mend indented below."""
        return "\n  ".join(part for part in (self.what, self.where, self.fix) if part)


@contextmanager
def naming_track(track: str) -> Iterator[None]:
    """Put the track's name where an error from code that knows only its data says TRACK."""
    try:
        yield
    except UserError as error:
        if error.fix:
            error.fix = error.fix.replace("TRACK", track)
        raise
