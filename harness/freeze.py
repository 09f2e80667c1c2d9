"""Writes trainer/FROZEN: `python -m harness.freeze VERSION` adds the trainer as it stands now as a frozen version."""

from __future__ import annotations

import sys
from pathlib import Path

from data.errors import UserError
from harness.home import repository
from harness.source import file_digests, frozen_versions, source_digest

_HEAD = "# Versions of the frozen trainer by source digest; below them, the sha256 of each file of the newest.\n"


def freeze(trainer: Path, version: str) -> None:
    """Add a version, keeping the older ones.

    Raises:
        UserError: the version is taken, or this source is frozen already.
    """
    path, digest = trainer / "FROZEN", source_digest(trainer)
    versions = frozen_versions() if path.is_file() else {}
    if version in versions.values() or digest in versions:
        raise UserError(
            f"version {versions.get(digest, version)} is frozen already",
            where=str(path),
            fix="Choose a new version, or leave trainer/ as it is",
        )
    versions[digest] = version
    lines = [f"version {name} {found}\n" for found, name in versions.items()]
    lines += [f"{found}  {name}\n" for name, found in file_digests(trainer).items()]
    path.write_text(_HEAD + "".join(lines), encoding="utf-8")


if __name__ == "__main__":
    try:
        freeze(repository() / "trainer", sys.argv[1])
    except UserError as error:
        sys.exit(f"Error: {error}")
