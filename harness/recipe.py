"""Recipes from outside: a preset chosen by track and name, with single fields set from the command line.

Runs inside the process that imported the trainer; what it returns is plain data.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from data.errors import UserError


def choose(recipes: Mapping[str, Mapping[str, Any]], track_id: str, name: str | None) -> tuple[str, Any]:
    """The named preset of a track, or the track's first; `other/name` is another track's, for a track of one's own.

    Returns:
        (name, preset)

    Raises:
        UserError: the trainer has nothing for this track, or no recipe of this name.
    """
    from_track, _, short = name.rpartition("/") if name else (None, None, None)
    from_track = from_track or track_id
    if from_track not in recipes:
        known = ", ".join(f"{track}/{recipe}" for track, presets in recipes.items() for recipe in presets)
        raise UserError(f"the trainer has no recipe for track {from_track!r}", where="--recipe", fix=f"Use one of another track: {known}")
    presets = recipes[from_track]
    short = short or next(iter(presets))
    if short not in presets:
        raise UserError(f"there is no recipe {short!r} for track {from_track}", where="--recipe", fix=f"Choose one of {', '.join(presets)}")
    return (short if from_track == track_id else f"{from_track}/{short}"), presets[short]


def apply_settings(preset: Any, settings: Sequence[str]) -> Any:
    """A copy of a preset with fields replaced.

    Args:
        preset: a frozen dataclass.
        settings: `key=value` texts.

    Raises:
        UserError: no such field, a value of the wrong type, or a value the recipe refuses.
    """
    fields = typing.get_type_hints(type(preset))
    changes = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise UserError(f"{setting!r} is not key=value", where="--set", fix="For example --set lr=0.004")
        if key not in fields:
            raise UserError(f"the recipe has no field {key!r}", where="--set", fix=f"Fields: {', '.join(fields)}")
        changes[key] = _convert(text, fields[key], key)
    try:
        return dataclasses.replace(preset, **changes)
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise UserError(f"the recipe refuses this: {error}", where="--set " + " ".join(settings), fix="Change the value it names") from None


def from_values(preset: Any, values: Mapping[str, Any]) -> Any:
    """A preset with all its fields as recorded; JSON lists become tuples where the preset has tuples."""
    restored = {key: tuple(value) if isinstance(getattr(preset, key, None), tuple) else value for key, value in values.items()}
    return dataclasses.replace(preset, **restored)


def _convert(text: str, kind: Any, key: str) -> Any:
    """A command line text as the field's type."""
    if typing.get_origin(kind) is typing.Literal:
        choices = {str(choice): choice for choice in typing.get_args(kind)}
        if text not in choices:
            raise UserError(f"{key} cannot be {text!r}", where="--set", fix=f"Choose one of {', '.join(choices)}")
        return choices[text]
    try:
        if kind is bool:
            return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[text.lower()]
        if kind is int:
            return int(text.replace("_", ""))
        if kind is float:
            value = float(text)
            if value != value or value in (float("inf"), float("-inf")):
                raise ValueError
            return value
        if kind is str:
            return text
    except (ValueError, KeyError):
        raise UserError(
            f"{key} wants {kind.__name__}, got {text!r}", where="--set", fix=f"For example --set {key}={_EXAMPLE[kind]}"
        ) from None
    raise UserError(f"{key} cannot be set from the command line", where="--set", fix="Change it in the trainer's recipe")


_EXAMPLE = {bool: "true", int: "32", float: "0.004"}
