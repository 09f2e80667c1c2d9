"""Digests beside the shards: what is believed, what is hashed again, and what is refused."""

from __future__ import annotations

import json
import os
import threading

import numpy as np
import pytest

from data import manifest
from data.errors import UserError
from data.manifest import Entry, check_shards, hashed_entry, read_manifest, record, require_shards
from data.shard import HEADER_BYTES, write_shard
from tests.hub import VOCAB, make_dataset, make_shards, sha256


@pytest.fixture
def dataset():
    return make_dataset(source="local", repo=None)


@pytest.fixture
def files(folder, dataset):
    return make_shards(folder, dataset)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "data"


@pytest.fixture
def hashed(monkeypatch):
    """Names of the files hashed so far."""
    names, whole = [], manifest.file_sha256
    monkeypatch.setattr(manifest, "file_sha256", lambda path: names.append(path.name) or whole(path))
    return names


def states(dataset, folder, *, deep=False):
    return {status.name: status.state for status in check_shards(dataset, folder, dataset.shards(), deep=deep)}


def flip_token(path, *, keep_times=False):
    """Change one token; with keep_times as one would who wants to hide it."""
    stat = path.stat()
    with path.open("r+b") as file:
        file.seek(HEADER_BYTES)
        byte = file.read(1)[0]
        file.seek(HEADER_BYTES)
        file.write(bytes([byte ^ 1]))
    if keep_times:
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_shard_put_there_by_hand_is_kept_on_first_sight(dataset, files, folder):
    """A shard with no known digest is hashed, accepted and remembered."""
    digests = require_shards(dataset, folder, dataset.shards())

    assert {name: sha256(body) for name, body in files.items()} == digests
    assert digests == {name: entry.sha256 for name, entry in read_manifest(folder).items()}
    assert {entry.source for entry in read_manifest(folder).values()} == {"local"}


def test_unchanged_shard_is_hashed_once(dataset, files, folder, hashed):
    """A quick check believes length and times; a deep one hashes every time."""
    require_shards(dataset, folder, dataset.shards())
    assert sorted(files) == sorted(hashed)

    require_shards(dataset, folder, dataset.shards())
    assert len(hashed) == len(files)

    states(dataset, folder, deep=True)
    assert len(hashed) == 2 * len(files)


def test_touched_shard_is_hashed_again_and_accepted(dataset, files, folder, hashed):
    """New times with the old bytes cost one hash and no complaint."""
    require_shards(dataset, folder, dataset.shards())
    (folder / "val.bin").touch()
    del hashed[:]
    require_shards(dataset, folder, dataset.shards())
    require_shards(dataset, folder, dataset.shards())

    assert hashed == ["val.bin"]


@pytest.mark.parametrize("keep_times", [False, True])
def test_changed_shard_is_refused(dataset, files, folder, keep_times):
    """One changed bit is refused, also when the modification time was set back; the error names file and both digests."""
    require_shards(dataset, folder, dataset.shards())
    flip_token(folder / "train_2.bin", keep_times=keep_times)
    found = sha256((folder / "train_2.bin").read_bytes())
    with pytest.raises(UserError) as refused:
        require_shards(dataset, folder, dataset.shards())

    assert f"found sha256 {found}, wanted {sha256(files['train_2.bin'])}" in refused.value.what
    assert refused.value.where == str(folder / "train_2.bin")
    assert states(dataset, folder)["train_2.bin"] == "changed"  # looking at it does not make it right


def test_pinned_digest_wins_over_the_kept_one(dataset, files, folder):
    """A track that pins a digest refuses a shard that was accepted before, and believes one that agrees."""
    require_shards(dataset, folder, dataset.shards())
    agrees = make_dataset(source="local", repo=None, sha256={"val.bin": sha256(files["val.bin"])})
    differs = make_dataset(source="local", repo=None, sha256={"val.bin": sha256(b"")})

    assert states(agrees, folder)["val.bin"] == "ok"
    assert check_shards(agrees, folder, ["val.bin"], deep=False)[0].source == "pinned"
    assert states(differs, folder)["val.bin"] == "changed"


def test_missing_shards_are_counted_and_the_first_named(dataset, files, folder):
    """The error says which shard is missing and how many more are not right."""
    (folder / "train_1.bin").unlink()
    (folder / "train_3.bin").unlink()

    with pytest.raises(UserError, match=r"token shard is not there \(and 1 more of 4 shards\)") as refused:
        require_shards(dataset, folder, dataset.shards())
    assert refused.value.where == str(folder / "train_1.bin")


def test_fix_names_the_fetch_where_there_is_one(folder):
    """What to do about a missing Hub shard is the command that fetches it."""
    with pytest.raises(UserError) as refused:
        require_shards(make_dataset(), folder, ["val.bin"])

    assert "speedrun data get TRACK" in refused.value.fix


def test_truncated_shard_is_broken_without_a_hash(dataset, files, folder, hashed):
    """Length against header is looked at first, and a broken shard is never remembered."""
    (folder / "val.bin").write_bytes(files["val.bin"][:-2])

    assert states(dataset, folder)["val.bin"] == "broken"
    assert "val.bin" not in hashed
    assert "val.bin" not in read_manifest(folder)


def test_only_a_deep_check_reads_the_tokens(dataset, files, folder):
    """A token outside the vocabulary is found by the deep check."""
    write_shard(folder / "val.bin", np.array([VOCAB]))

    assert states(dataset, folder)["val.bin"] == "ok"
    assert states(dataset, folder, deep=True)["val.bin"] == "broken"


def test_manifest_is_sorted_with_a_final_newline(dataset, files, folder):
    """The file is the same whatever the order of work, ends in a newline and says its version."""
    check_shards(dataset, folder, reversed(dataset.shards()), deep=False)
    text = (folder / "manifest.json").read_text()
    values = json.loads(text)

    assert text == json.dumps(values, indent=2, sort_keys=True) + "\n"
    assert values["schema_version"] == 1
    assert sorted(path.name for path in folder.iterdir() if not path.name.startswith(".")) == sorted([*files, "manifest.json"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "Invalid JSON"),
        ('{"schema_version": 2, "shards": {}}', "schema_version"),
        ('{"schema_version": 1, "shards": {}, "more": 1}', "more"),
        ('{"schema_version": 1, "shards": {"a.bin": {"sha256": "x", "bytes": 1, "source": "hub"}}}', r"shards\.a\.bin\.sha256"),
    ],
)
def test_damaged_manifest_is_refused_with_the_key(dataset, files, folder, text, message):
    """A manifest that is not what this version writes is refused, not overwritten."""
    (folder / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=message) as refused:
        require_shards(dataset, folder, dataset.shards())

    assert refused.value.where == str(folder / "manifest.json")
    assert (folder / "manifest.json").read_text() == text


def test_folder_that_cannot_be_written_still_works(dataset, files, folder, monkeypatch):
    """Shards on a read-only disk are hashed each time, and accepted."""
    monkeypatch.setattr(manifest, "record", lambda *_: (_ for _ in ()).throw(PermissionError("read-only")))

    assert len(require_shards(dataset, folder, dataset.shards())) == 4
    assert read_manifest(folder) == {}


def test_records_of_several_writers_all_stay(folder):
    """Writers at the same time do not lose each other's entries."""
    folder.mkdir()
    names = [f"s{number}.bin" for number in range(16)]
    entry = Entry(sha256="0" * 64, bytes=1, source="hub")
    threads = [threading.Thread(target=record, args=(folder, {name: entry})) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sorted(names) == sorted(read_manifest(folder))


def test_write_during_the_hash_shows(dataset, files, folder, monkeypatch):
    """A file changed while it is hashed is hashed again next time: the times kept are those from before."""
    whole = manifest.file_sha256

    def hash_then_change(path):
        digest = whole(path)
        flip_token(path)
        return digest

    monkeypatch.setattr(manifest, "file_sha256", hash_then_change)
    check_shards(dataset, folder, ["val.bin"], deep=False)
    monkeypatch.setattr(manifest, "file_sha256", whole)

    assert states(dataset, folder)["val.bin"] == "changed"


def test_entry_of_a_hashed_file_holds_its_length_and_times(files, folder):
    """What is compared in a quick check is length, modification time and change time."""
    stat = (folder / "val.bin").stat()
    entry = hashed_entry(folder / "val.bin", "0" * 64, "hub")

    assert (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) == (entry.bytes, entry.mtime_ns, entry.ctime_ns)
