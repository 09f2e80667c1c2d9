"""Recipes from the outside: the choice of a preset, fields set as text, and values that come back from a record."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.errors import UserError
from harness.recipe import apply_settings, choose, from_values
from trainer.recipe import POCKET_MUON, RECIPES, Recipe


@dataclass(frozen=True, kw_only=True)
class Toy:
    """A contestant's recipe with every kind of field."""

    layers: int = 4
    lr: float = 0.1
    compile: bool = False
    name: str = "toy"
    optimizer: Literal["muon", "adamw"] = "muon"
    bits: Literal[8, 16] = 16
    betas: tuple[float, ...] = (0.9, 0.95)
    widths: tuple[int, ...] = ()

    def __post_init__(self):
        if self.layers < 1:
            raise ValueError(f"layers must be above zero, got {self.layers}")


TOY = Toy()


# ---- choose ----


def test_first_recipe_of_a_track_is_its_default():
    """Without a name the track's first recipe is taken, and the name that was chosen is told."""
    recipes = {"pocket": {"b": 1, "a": 2}, "fineweb": {"c": 3}}

    assert ("b", 1) == choose(recipes, "pocket", None)
    assert ("a", 2) == choose(recipes, "pocket", "a")


@pytest.mark.parametrize(("track", "name", "told"), [("moon", None, "pocket"), ("pocket", "sgd", "muon, adamw")])
def test_unknown_track_or_recipe_is_refused_with_the_known_ones(track, name, told):
    """A trainer that has nothing for the track, or no recipe of the name, says what it has."""
    with pytest.raises(UserError, match=name or track) as caught:
        choose(RECIPES, track, name)

    assert told in caught.value.fix


# ---- apply_settings ----

TAKEN = {
    "layers=6": 6,
    "layers=1_000": 1000,
    "lr=0.25": 0.25,
    "lr=3": 3.0,
    "lr=1e-3": 0.001,
    "compile=true": True,
    "compile=YES": True,
    "compile=1": True,
    "compile=False": False,
    "compile=no": False,
    "name=a=b": "a=b",
    "name=": "",
    "optimizer=adamw": "adamw",
    "bits=8": 8,
}


@pytest.mark.parametrize("setting", TAKEN)
def test_setting_becomes_the_type_of_its_field(setting):
    """A text becomes the field's own type, and no other field moves."""
    key = setting.partition("=")[0]
    changed = apply_settings(TOY, [setting])

    assert (TAKEN[setting], type(TAKEN[setting])) == (getattr(changed, key), type(getattr(changed, key)))
    assert {**vars(TOY), key: TAKEN[setting]} == vars(changed)


def test_several_settings_and_none():
    """Settings add up, the last one of a field counts, the preset itself stays."""
    changed = apply_settings(TOY, ["layers=2", "lr=0.5", "layers=3"])

    assert (3, 0.5) == (changed.layers, changed.lr)
    assert apply_settings(TOY, []) == TOY == Toy()


REFUSED = {
    "layers": "'layers' is not key=value",
    "": "'' is not key=value",
    "depth=4": "the recipe has no field 'depth'",
    "=4": "the recipe has no field ''",
    "__class__=4": "no field '__class__'",
    "layers=4.5": "layers wants int, got '4.5'",
    "layers=": "layers wants int, got ''",
    "layers=true": "layers wants int, got 'true'",
    "lr=fast": "lr wants float, got 'fast'",
    "lr=nan": "lr wants float, got 'nan'",
    "lr=inf": "lr wants float, got 'inf'",
    "lr=-Infinity": "lr wants float, got '-Infinity'",
    "lr=1e999": "lr wants float, got '1e999'",
    "compile=maybe": "compile wants bool, got 'maybe'",
    "compile=2": "compile wants bool, got '2'",
    "optimizer=sgd": "optimizer cannot be 'sgd'",
    "bits=4": "bits cannot be '4'",
    "betas=0.9": "betas cannot be set from the command line",
    "layers=0": "the recipe refuses this: layers must be above zero, got 0",
}


@pytest.mark.parametrize("setting", REFUSED)
def test_setting_that_does_not_fit_is_refused_with_field_and_value(setting):
    """An unknown field, a value of another type, NaN, infinity or what the recipe itself refuses ends in a sentence and a way out."""
    with pytest.raises(UserError) as caught:
        apply_settings(TOY, [setting])

    assert REFUSED[setting] in caught.value.what
    assert caught.value.where.startswith("--set")
    assert caught.value.fix


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("width=130", "width 130 does not split into 2 heads"),
        ("warmdown_steps=101", "warmup_steps 0 + warmdown_steps 101 exceed steps 100"),
        ("lr=0", "lr must be above zero"),
        ("batch_tokens=-1", "batch_tokens must be above zero"),
        ("heads=0", "heads must be above zero"),
        ("warmup_steps=-5", "warmup_steps"),
        ("warmdown_steps=-5", "warmdown_steps"),
    ],
)
def test_frozen_recipe_refuses_what_cannot_be_trained(setting, told):
    """The reference recipe names the field whose value it refuses."""
    with pytest.raises(UserError) as caught:
        apply_settings(POCKET_MUON, [setting])

    assert told in caught.value.what


@given(st.integers(1, 10**9), st.floats(1e-30, 1e30), st.booleans(), st.text(st.characters(codec="utf-8")))
def test_any_value_written_as_text_is_read_back(layers, lr, compiled, name):
    """What python prints for a value, a setting takes for that value."""
    changed = apply_settings(TOY, [f"layers={layers}", f"lr={lr}", f"compile={compiled}", f"name={name}"])

    assert (layers, lr, compiled, name) == (changed.layers, changed.lr, changed.compile, changed.name)


# ---- from_values ----

TOYS = st.builds(
    Toy,
    layers=st.integers(1, 10**6),
    lr=st.floats(allow_nan=False, allow_infinity=False),
    compile=st.booleans(),
    name=st.text(),
    optimizer=st.sampled_from(["muon", "adamw"]),
    bits=st.sampled_from([8, 16]),
    betas=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    widths=st.lists(st.integers(), max_size=3).map(tuple),
)


@given(TOYS)
def test_recipe_survives_json(recipe):
    """A recipe written into an event and read back is the same recipe, tuples included."""
    values = json.loads(json.dumps(dataclasses.asdict(recipe)))

    assert recipe == from_values(TOY, values)


@pytest.mark.parametrize("preset", [preset for presets in RECIPES.values() for preset in presets.values()])
def test_frozen_presets_survive_json(preset):
    """Every shipped preset is restored from its JSON, whatever preset it is restored onto; `auto` has become a precision."""
    values = json.loads(json.dumps(dataclasses.asdict(preset)))

    assert preset == from_values(POCKET_MUON, values)
    assert {field.name for field in dataclasses.fields(Recipe)} == set(values)
    assert values["precision"] in ("bfloat16", "float32")
