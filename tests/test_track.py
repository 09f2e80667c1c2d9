"""Tracks: the shipped ones load, one's own does too, and a mistake in one is named by its key."""

from __future__ import annotations

import pytest

from data.errors import UserError
from harness.track import load_track, track_names

SHIPPED = {
    "fineweb": (3.28, 10_485_760, None, "train_time", "t", 50257),
    "fineweb-medium": (2.92, 10_485_760, None, "train_time", "t", 50257),
    "fineweb-steps": (3.28, 10_485_760, 524_288, "steps", "z", 50257),
    "pocket": (None, 32_768, None, "train_time", "t", 256),  # its target is calibrated, not agreed
}
OWN = """
id = "mine"
title = "My race"
target_loss = 2
val_tokens = 1024
val_sequence_length = 128
val_every_steps = 10
clock = "as always"
ranked_by = "tokens"

[significance]
test = "z"
sigma = 0.01
margin = 0.03

[data]
name = "mine"
source = "local"
vocab_size = 100
val_shards = ["val.bin"]
train_shards = "train_{:03d}.bin"
train_shard_count = 3
default_train_shards = 2
"""


@pytest.fixture
def load(tmp_path):
    """A function (old, new) that loads one's own track with one passage replaced."""

    def make(old="", new=""):
        assert old in OWN
        path = tmp_path / "mine.toml"
        path.write_text(OWN.replace(old, new, 1), encoding="utf-8")
        return load_track(str(path))

    return make


def test_four_tracks_ship():
    """The list of tracks is the four of the design."""
    assert sorted(SHIPPED) == track_names()


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_track_loads(name):
    """Every shipped track loads under its own name, with the target, data and rule that the field has agreed on."""
    track = load_track(name)
    target, *fixed = SHIPPED[name]

    assert name == track.id
    assert (target or track.target_loss) == track.target_loss
    assert fixed == [track.val_tokens, track.batch_tokens, track.ranked_by, track.significance.test, track.data.vocab_size]
    assert 0 == track.val_tokens % track.val_sequence_length
    assert 1 <= track.data.default_train_shards <= len(track.data.train_shards)


def test_fineweb_spells_its_shards_out():
    """The pattern of a Hub dataset becomes the names of its 103 shards, numbered from 1."""
    data = load_track("fineweb").data

    assert 103 == len(data.train_shards)
    assert ("fineweb_train_000001.bin", "fineweb_train_000103.bin") == (data.train_shards[0], data.train_shards[-1])
    assert ("fineweb_val_000000.bin", "fineweb_train_000001.bin", "fineweb_train_000002.bin") == data.shards(2)
    assert 1 + 27 == len(data.shards())


def test_own_track_loads_by_its_path(load):
    """A track file of one's own is loaded by path, a whole number standing for a loss."""
    track = load()

    assert ("mine", 2.0, "z", 0.03) == (track.id, track.target_loss, track.significance.test, track.significance.margin)
    assert ("train_001.bin", "train_002.bin", "train_003.bin") == track.data.train_shards
    assert ("val.bin", "train_001.bin", "train_002.bin") == track.data.shards()


MISTAKES = {
    "unknown key": ("clock =", 'color = "red"\nclock =', "color"),
    "unknown key in data": ("vocab_size = 100", "vocab_size = 100\nmirror = 1", "data.mirror"),
    "unknown key in significance": ("sigma = 0.01", "sigma = 0.01\nalpha = 1", "significance.alpha"),
    "text for a number": ("target_loss = 2", 'target_loss = "2"', "target_loss"),
    "fraction for a count": ("val_tokens = 1024", "val_tokens = 1024.5", "val_tokens"),
    "truth for a count": ("val_tokens = 1024", "val_tokens = true", "val_tokens"),
    "number for a text": ('title = "My race"', "title = 5", "title"),
    "nan": ("target_loss = 2", "target_loss = nan", "target_loss"),
    "infinity": ("target_loss = 2", "target_loss = inf", "target_loss"),
    "zero": ("val_every_steps = 10", "val_every_steps = 0", "val_every_steps"),
    "id that is no name": ('id = "mine"', 'id = "../mine"', "id"),
    "ranked by beauty": ('"tokens"', '"beauty"', "ranked_by"),
    "missing key": ("target_loss = 2\n", "", "target_loss"),
    "missing key in data": ("vocab_size = 100\n", "", "data.vocab_size"),
    "missing table": ('[significance]\ntest = "z"\nsigma = 0.01\nmargin = 0.03\n', "", "significance"),
    "z without margin": ("margin = 0.03\n", "", "margin"),
    "t without p": ('test = "z"', 'test = "t"', "p_below"),
    "p above one": ('test = "z"', 'test = "t"\np_below = 1.5', "p_below"),
    "validation that does not divide": ("val_tokens = 1024", "val_tokens = 1000", "val_tokens 1000"),
    "vocabulary beyond uint16": ("vocab_size = 100", "vocab_size = 65537", "vocab_size"),
    "shard outside the folder": ('["val.bin"]', '["../val.bin"]', "val_shards"),
    "no validation shard": ('["val.bin"]', "[]", "val_shards"),
    "pattern without count": ("train_shard_count = 3\n", "", "train_shard_count"),
    "pattern without number": ('"train_{:03d}.bin"', '"train.bin"', "train_shards"),
    "pattern of another kind": ('"train_{:03d}.bin"', '"train_{number}.bin"', "train_shards"),
    "pattern cut short": ('"train_{:03d}.bin"', '"train_{"', "train_shards"),
    "pattern outside the folder": ('"train_{:03d}.bin"', '"../train_{:03d}.bin"', "train_shards"),
    "no training shard": ('"train_{:03d}.bin"\ntrain_shard_count = 3', "[]", "train_shards"),
    "hub without repo": ('source = "local"', 'source = "hub"', "repo"),
    "wheel without digest": ('source = "local"', 'source = "wheel"\nwheel = "a==1"', "wheel_sha256"),
    "digest that is none": ("vocab_size = 100", 'vocab_size = 100\nsha256 = {"val.bin" = "abc"}', "data.sha256"),
}


@pytest.mark.parametrize(("old", "new", "key"), MISTAKES.values(), ids=MISTAKES)
def test_mistake_in_a_track_is_named_by_its_key(load, tmp_path, old, new, key):
    """An unknown, missing or wrong key is refused with the file and the key, never with a traceback."""
    with pytest.raises(UserError, match="track file is not valid") as caught:
        load(old, new)

    assert key in caught.value.what
    assert str(tmp_path / "mine.toml") == caught.value.where
    assert caught.value.fix


@pytest.mark.parametrize("raw", [b"id = ", b"\xff\xfe", b"id = 'a'\nid = 'b'"], ids=["cut short", "not text", "key twice"])
def test_what_is_not_toml_is_refused(tmp_path, raw):
    """A file that cannot be parsed is refused with its path."""
    path = tmp_path / "mine.toml"
    path.write_bytes(raw)
    with pytest.raises(UserError, match="not TOML") as caught:
        load_track(str(path))

    assert str(path) == caught.value.where


@pytest.mark.parametrize("name", ["moon", "", "tracks/moon.toml", "moon.toml"])
def test_unknown_track_is_refused_with_the_known_ones(name):
    """A name or path that is not there is answered with the tracks there are."""
    with pytest.raises(UserError, match=f"there is no track '{name}'") as caught:
        load_track(name)

    for known in SHIPPED:
        assert known in caught.value.fix
