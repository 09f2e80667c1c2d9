"""The token shard: what is written is read, and what is not a shard is refused."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.errors import UserError
from data.shard import HEADER_BYTES, MAGIC, check_vocabulary, file_sha256, open_shard, write_shard


@pytest.fixture
def shard(tmp_path):
    """A valid shard of the tokens 0..99."""
    path = tmp_path / "shard.bin"
    write_shard(path, np.arange(100))
    return path


def set_header(path, index, value):
    raw = bytearray(path.read_bytes())
    raw[4 * index : 4 * index + 4] = np.array([value], dtype="<i4").tobytes()
    path.write_bytes(raw)


@given(st.lists(st.integers(0, 65535), min_size=1, max_size=300))
def test_tokens_survive_the_round_trip(tokens):
    """Any tokens that fit uint16 are read as they were written, in the field's layout."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "shard.bin"
        write_shard(path, np.array(tokens))
        raw = path.read_bytes()

        assert open_shard(path).tolist() == tokens
        assert np.frombuffer(raw[:HEADER_BYTES], "<i4")[:3].tolist() == [20240520, 1, len(tokens)]
        assert np.frombuffer(raw[:HEADER_BYTES], "<i4")[3:].any() == np.False_
        assert raw[HEADER_BYTES:] == np.array(tokens, "<u2").tobytes()
        assert [path] == list(Path(folder).iterdir())


@pytest.mark.parametrize("tokens", [[-1], [65536], [[1, 2]]])
def test_tokens_that_do_not_fit_are_not_written(tmp_path, tokens):
    """A negative token, one above uint16, or a second dimension is refused, and no file is left."""
    with pytest.raises(ValueError, match="tokens must"):
        write_shard(tmp_path / "shard.bin", np.array(tokens))

    assert list(tmp_path.iterdir()) == []


def test_failed_write_leaves_the_old_file(shard, monkeypatch):
    """A shard is replaced by rename: when that fails, the old one stands and no partial file stays."""
    before = shard.read_bytes()
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("no")))
    with pytest.raises(OSError, match="no"):
        write_shard(shard, np.arange(5))

    assert before == shard.read_bytes()
    assert [shard] == list(shard.parent.iterdir())


def test_tokens_are_mapped_read_only(shard):
    """A reader cannot alter the data by accident."""
    with pytest.raises(ValueError, match="read-only"):
        open_shard(shard)[0] = 1


def test_foreign_magic_is_refused_with_the_number_found(shard):
    """A file with another magic number is not a token shard."""
    set_header(shard, 0, 20240801)

    with pytest.raises(UserError, match=f"magic number is 20240801, wanted {MAGIC}"):
        open_shard(shard)


def test_other_version_is_refused_with_the_number_found(shard):
    """A shard of a later format is not read as if it were this one."""
    set_header(shard, 1, 2)

    with pytest.raises(UserError, match="has version 2, this program reads 1"):
        open_shard(shard)


@pytest.mark.parametrize("size", [HEADER_BYTES, HEADER_BYTES + 1, HEADER_BYTES + 198, HEADER_BYTES + 199])
def test_truncated_shard_is_refused_with_both_lengths(shard, size):
    """A shard cut short says how long it is and how long it claims to be."""
    shard.write_bytes(shard.read_bytes()[:size])

    with pytest.raises(UserError, match=f"claims 100 tokens \\(1224 bytes\\) but the file has {size} bytes"):
        open_shard(shard)


def test_shard_with_bytes_after_its_tokens_is_refused(shard):
    """More bytes than the header claims are not silently left out."""
    shard.write_bytes(shard.read_bytes() + b"\0\0")

    with pytest.raises(UserError, match="claims 100 tokens"):
        open_shard(shard)


@pytest.mark.parametrize("count", [0, -100])
def test_header_without_tokens_is_refused(shard, count):
    """A count of zero or below is refused even when the length agrees."""
    set_header(shard, 2, count)
    shard.write_bytes(shard.read_bytes()[:HEADER_BYTES])

    with pytest.raises(UserError, match=f"claims {count} tokens"):
        open_shard(shard)


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n", b"x" * 1023])
def test_file_shorter_than_a_header_is_refused(tmp_path, content):
    """An empty or foreign small file is refused by its length."""
    path = tmp_path / "shard.bin"
    path.write_bytes(content)

    with pytest.raises(UserError, match=f"is {len(content)} bytes, shorter than its 1024-byte header"):
        open_shard(path)


def test_foreign_file_is_refused(tmp_path):
    """A text file of any length is not a token shard."""
    path = tmp_path / "shard.bin"
    path.write_text("To be, or not to be\n" * 1000)

    with pytest.raises(UserError, match="not a token shard") as refused:
        open_shard(path)
    assert refused.value.where == str(path)


def test_missing_shard_names_the_command_that_fetches_it(tmp_path):
    """A shard that is not there ends in the command that brings it."""
    with pytest.raises(UserError) as refused:
        open_shard(tmp_path / "shard.bin")

    assert "speedrun data get TRACK" in refused.value.fix


def test_token_outside_the_vocabulary_is_named_with_its_position(shard, monkeypatch):
    """The first token at or above the vocabulary size is found wherever the scan's pieces end."""
    monkeypatch.setattr("data.shard._SCAN_TOKENS", 7)
    check_vocabulary(shard, 100)

    with pytest.raises(UserError, match="token 51 at position 51 is outside the vocabulary of 51"):
        check_vocabulary(shard, 51)


def test_digest_is_of_the_whole_file(tmp_path):
    """The digest is the plain sha256 that sha256sum prints."""
    (tmp_path / "a").write_bytes(b"abc")

    assert file_sha256(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
