"""The version of the rules: times and verdicts are comparable where major and minor are the same."""

from __future__ import annotations

RULES_VERSION = "1.0"
