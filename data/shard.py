"""The field's token shard: a 1,024-byte header, then uint16 tokens, read by memory map.

Header: 256 little-endian int32, of which the first three are the magic number 20240520, the version 1 and the
token count; the rest are zero. Source of the format: llm.c `dev/data`, kept by modded-nanogpt.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np

from data.errors import UserError

MAGIC = 20240520
VERSION = 1
HEADER_BYTES = 256 * 4
TOKEN_BYTES = 2
_SCAN_TOKENS = 1 << 24  # tokens looked at in one go when a shard is scanned: 32 MiB


def write_shard(path: Path, tokens: np.ndarray) -> None:
    """Write tokens as one shard; the file appears whole, by rename.

    Args:
        path: the file to make; its folder exists.
        tokens: (n,) integers in [0, 65536).

    Raises:
        ValueError: a token does not fit uint16, or the array is not one-dimensional.
    """
    tokens = np.asarray(tokens)
    if tokens.ndim != 1:
        raise ValueError(f"tokens must be one-dimensional, got shape {tokens.shape}")
    if tokens.size and (tokens.min() < 0 or tokens.max() > np.iinfo(np.uint16).max):
        raise ValueError(f"tokens must lie in [0, 65536), found [{tokens.min()}, {tokens.max()}]")
    header = np.zeros(256, dtype="<i4")
    header[:3] = MAGIC, VERSION, tokens.size
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as out:
            out.write(header.tobytes())
            out.write(tokens.astype("<u2").tobytes())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def open_shard(path: Path) -> np.memmap:
    """Map a shard's tokens, header checked.

    Returns:
        (n,) uint16, read-only, backed by the file.

    Raises:
        UserError: no such file, wrong magic or version, or a length that is not what the header says.
    """
    fix = "Fetch it again: delete the file, then speedrun data get TRACK"
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            raw = file.read(HEADER_BYTES)
    except FileNotFoundError:
        raise UserError("token shard is not there", where=str(path), fix="Fetch it: speedrun data get TRACK") from None
    if len(raw) < HEADER_BYTES:
        raise UserError(f"token shard is {size} bytes, shorter than its {HEADER_BYTES}-byte header", where=str(path), fix=fix)
    header = np.frombuffer(raw, dtype="<i4")
    if header[0] != MAGIC:
        raise UserError(f"not a token shard: magic number is {header[0]}, wanted {MAGIC}", where=str(path), fix=fix)
    if header[1] != VERSION:
        raise UserError(
            f"token shard has version {header[1]}, this program reads {VERSION}", where=str(path), fix="Write it again in version 1 format"
        )
    count = int(header[2])
    expected = HEADER_BYTES + TOKEN_BYTES * count
    if count <= 0 or size != expected:
        raise UserError(f"token shard claims {count} tokens ({expected} bytes) but the file has {size} bytes", where=str(path), fix=fix)
    return np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(count,))


def check_vocabulary(path: Path, vocab_size: int) -> None:
    """Read every token of a shard and refuse one outside the vocabulary.

    Raises:
        UserError: a token is not in [0, vocab_size); names its position.
    """
    tokens = open_shard(path)
    for start in range(0, tokens.size, _SCAN_TOKENS):
        part = np.asarray(tokens[start : start + _SCAN_TOKENS])
        if part.max() >= vocab_size:
            at = start + int(np.argmax(part >= vocab_size))
            raise UserError(
                f"token {int(tokens[at])} at position {at} is outside the vocabulary of {vocab_size}",
                where=str(path),
                fix="This shard was made with another tokenizer: fetch the track's own with speedrun data get TRACK",
            )


def file_sha256(path: Path) -> str:
    """Hexadecimal sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
