"""What an event must hold for the rules to read it: its keys, their types and signs. Keys beyond these are allowed."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

from harness.events import SCHEMA_VERSION

_LARGEST = 2**63  # beyond it a count is no count, and a float overflows


def _count(value: Any) -> bool:
    return type(value) is int and 0 <= value < _LARGEST


def _positive_count(value: Any) -> bool:
    return _count(value) and value > 0


def _number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and abs(value) < _LARGEST


def _duration(value: Any) -> bool:
    return _number(value) and value >= 0


def _positive(value: Any) -> bool:
    return _number(value) and value > 0


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _mapping(value: Any) -> bool:
    return isinstance(value, dict)


def _digest(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) is not None


def _version(value: Any) -> bool:
    return type(value) is int and value == SCHEMA_VERSION


_PROGRESS = {"step": _count, "tokens": _count, "train_time_ms": _duration}
FIELDS: dict[str, dict[str, Callable[[Any], bool]]] = {
    "start": {
        "schema_version": _version,
        "track": _text,
        "recipe_name": _text,
        "recipe": _mapping,
        "seed": _count,
        "world_size": _positive_count,
        "source_sha256": _digest,
        "frozen": _text,
        "data_sha256": _mapping,
        "environment": _mapping,
        "division": _text,
    },
    "warm_up": {"digest_before": _digest, "digest_after": _digest, "warm_up_ms": _duration},
    "step": {**_PROGRESS, "train_loss": _number},
    "validation": {**_PROGRESS, "val_loss": _number},
    "finish": {
        "step": _positive_count,
        "tokens": _positive_count,
        "train_time_ms": _positive,
        "val_loss": _number,
        "epochs": _duration,
        "weights_sha256": _digest,
        "peak_memory_mib": lambda value: value is None or _duration(value),
    },
    "failure": {},
}


def misshapen(event: dict) -> str | None:
    """What keeps an event from being read: a key that is missing or has a value it cannot have; None where it is fine."""
    for key, fits in FIELDS[event["event"]].items():
        if key not in event:
            return f"{event['event']} event has no {key}"
        if not fits(event[key]):
            return f"{event['event']} event has {key} = {event[key]!r:.80}"
    return None
