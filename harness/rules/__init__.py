"""The rules that a record is judged by, one file a kind.

`rule` has the nouns, `reading` reads a record folder once, `shape` says what an event holds; `evidence`, `clock`, `data`,
`statistics` and `source` hold the rules themselves. Whoever only wants the version takes it from `version`: importing this
package is cheap, and RULES is put together when it is first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from harness.rules.version import RULES_VERSION

if TYPE_CHECKING:
    from harness.rules.rule import Rule

    RULES: tuple[Rule, ...]

__all__ = ["RULES", "RULES_VERSION"]


def __getattr__(name: str) -> object:
    """RULES: every rule, in the order they are applied and shown."""
    if name != "RULES":
        raise AttributeError(name)
    from harness.rules import clock, data, evidence, source, statistics

    return evidence.RULES + clock.RULES + data.RULES + statistics.RULES + source.RULES
