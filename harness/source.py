"""A trainer's source: copied as it is run, hashed, compared with the frozen one, and loaded only inside a process of its own."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import shutil
import sys
from pathlib import Path
from types import ModuleType

from data.errors import UserError
from data.shard import file_sha256
from harness.home import repository

_LEFT_OUT = ("__pycache__", "FROZEN")
_LARGEST_FILE = 1 << 20  # a source file; weights smuggled in as "source" are larger


def source_files(folder: Path) -> list[Path]:
    """Every file of a trainer, sorted by its path inside; caches, hidden files and the list of frozen digests left out.

    Raises:
        UserError: no such folder, no train.py in it, a link, or a file too large to be source.
    """
    if not (folder / "train.py").is_file():
        raise UserError(
            "no trainer here: a trainer is a folder with a module train.py", where=str(folder), fix="Start from a copy of trainer/"
        )
    files = []
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        if any(part in _LEFT_OUT or part.startswith(".") for part in inside.parts):
            continue
        if path.is_symlink():
            raise UserError("trainer source holds a link", where=str(path), fix="Put a copy of the file in its place")
        if path.is_dir():
            continue
        if not path.is_file():
            raise UserError("trainer source holds something that is not a plain file", where=str(path), fix="Take it away")
        if path.stat().st_size > _LARGEST_FILE:
            raise UserError(
                f"trainer source holds a file of {path.stat().st_size} bytes, at most {_LARGEST_FILE}",
                where=str(path),
                fix="Keep data out of it",
            )
        files.append(path)
    return files


def file_digests(folder: Path) -> dict[str, str]:
    """sha256 of each source file by its path inside the folder, with forward slashes."""
    return {path.relative_to(folder).as_posix(): file_sha256(path) for path in source_files(folder)}


def source_digest(folder: Path) -> str:
    """One sha256 over the names and digests of all source files."""
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(file_digests(folder).items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def copy_source(folder: Path, destination: Path) -> str:
    """Copy a trainer's files; what is run, hashed and recorded is the copy.

    Returns:
        The copy's source digest.
    """
    for path in source_files(folder):
        target = destination / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    return source_digest(destination)


def frozen_versions() -> dict[str, str]:
    """Source digest -> version of every frozen trainer there has been, from trainer/FROZEN."""
    versions = {}
    for line in (repository() / "trainer" / "FROZEN").read_text(encoding="utf-8").splitlines():
        if line.startswith("version "):
            _, version, digest = line.split()
            versions[digest] = version
    return versions


def frozen_version(digest: str) -> str:
    """The frozen version with this source digest, or `modified`."""
    return frozen_versions().get(digest, "modified")


def load_trainer(folder: Path) -> ModuleType:
    """Import a trainer's `train` module, with the folder as package `trainer`. Only ever called in a process made for it.

    Raises:
        UserError: the import fails, or something of the contract is missing.
    """
    folder = folder.resolve()
    init = folder / "__init__.py"
    spec = importlib.util.spec_from_file_location("trainer", init if init.is_file() else None, submodule_search_locations=[str(folder)])
    if spec is None:  # a folder without __init__.py
        spec = importlib.util.spec_from_loader("trainer", loader=None, is_package=True)
        spec.submodule_search_locations = [str(folder)]
    package = importlib.util.module_from_spec(spec)
    sys.modules["trainer"] = package
    try:
        if spec.loader is not None:
            spec.loader.exec_module(package)
        train = importlib.import_module("trainer.train")
    except Exception as error:
        raise UserError(
            f"the trainer cannot be imported: {type(error).__name__}: {error}", where=str(folder / "train.py"), fix="Mend the trainer"
        ) from error
    for name in ("RECIPES", "build_model", "main"):
        if not hasattr(train, name):
            raise UserError(
                f"the trainer has no {name}", where=str(folder / "train.py"), fix="A trainer exports RECIPES, build_model and main"
            )
    return train
