"""A trainer's source: what is hashed, what is refused, and that the frozen one is what its list says."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from data.errors import UserError
from data.shard import file_sha256
from harness.home import repository
from harness.source import copy_source, file_digests, frozen_version, frozen_versions, source_digest, source_files

TRAINER = repository() / "trainer"
MOST_LINES = 400
FILES = {"train.py": "a = 1\n", "model.py": "b = 2\n", "kernels/fast.py": "c = 3\n", "README.md": "words\n"}


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "trainer"
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


# ---- the digest ----

CHANGES = {
    "content": lambda folder: (folder / "kernels" / "fast.py").write_text("c = 4\n", encoding="utf-8"),
    "white space": lambda folder: (folder / "train.py").write_text("a = 1\n\n", encoding="utf-8"),
    "name": lambda folder: (folder / "model.py").rename(folder / "models.py"),
    "folder": lambda folder: (folder / "model.py").rename(folder / "kernels" / "model.py"),
    "new file": lambda folder: (folder / "empty").touch(),
    "file removed": lambda folder: (folder / "README.md").unlink(),
    "contents exchanged": lambda folder: [
        (folder / name).write_text(text, encoding="utf-8") for name, text in [("train.py", "b = 2\n"), ("model.py", "a = 1\n")]
    ],
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_digest_changes_with_every_content_and_name(folder, change):
    """Any change of a byte or of a file's name gives another digest."""
    before = source_digest(folder)
    change(folder)

    assert before != source_digest(folder)


LEFT_OUT = ["__pycache__/train.cpython-311.pyc", "kernels/__pycache__/x.pyc", ".git/config", ".hidden", "kernels/.DS_Store", "FROZEN"]


@pytest.mark.parametrize("name", LEFT_OUT)
def test_caches_hidden_files_and_the_list_of_digests_do_not_count(folder, name):
    """What python, editors and git leave behind is neither hashed nor copied."""
    before = source_digest(folder)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"\0")

    assert before == source_digest(folder)
    assert sorted(FILES) == sorted(file_digests(folder))


def test_digest_does_not_depend_on_where_the_folder_lies(folder, tmp_path):
    """A copy under another name has the same digest, which copy_source returns; what does not count is not copied."""
    (folder / ".hidden").touch()
    digest = copy_source(folder, tmp_path / "elsewhere" / "copy")
    copied = {
        path.relative_to(tmp_path / "elsewhere" / "copy").as_posix() for path in (tmp_path / "elsewhere").rglob("*") if path.is_file()
    }

    assert source_digest(folder) == digest
    assert set(FILES) == copied


def test_digest_is_one_that_others_can_compute(folder):
    """The digest is that of `sha256sum` lines sorted by name."""
    names = sorted(FILES)
    lines = subprocess.run(["sha256sum", *names], cwd=folder, capture_output=True, text=True, check=True).stdout
    digest = subprocess.run(["sha256sum"], input=lines, capture_output=True, text=True, check=True).stdout.split()[0]

    assert digest == source_digest(folder)


# ---- what is refused ----


@pytest.mark.parametrize("target", ["file", "folder", "nothing"])
def test_link_is_refused(folder, tmp_path, target):
    """A link to a file, to a folder or to nothing is refused by name: what it leads to would not be in the record."""
    outside = tmp_path / "outside"
    if target == "file":
        outside.write_text("d = 4\n", encoding="utf-8")
    if target == "folder":
        outside.mkdir()
        (outside / "code.py").touch()
    (folder / "linked").symlink_to(outside)
    with pytest.raises(UserError, match="link") as caught:
        source_files(folder)

    assert str(folder / "linked") == caught.value.where


def test_large_file_is_refused(folder):
    """Weights in the place of source are refused with their size; one mebibyte is still source."""
    large = folder / "weights.bin"
    large.write_bytes(bytes(1 << 20))
    source_files(folder)
    large.write_bytes(bytes((1 << 20) + 1))
    with pytest.raises(UserError, match="1048577 bytes") as caught:
        source_files(folder)

    assert str(large) == caught.value.where


def test_named_pipe_is_refused(folder):
    """What is not a plain file is refused, not waited for."""
    os.mkfifo(folder / "pipe")
    with pytest.raises(UserError, match="trainer source") as caught:
        source_files(folder)

    assert str(folder / "pipe") == caught.value.where


def test_folder_without_a_trainer_is_refused(tmp_path):
    """No folder, and a folder without train.py, are refused with the place."""
    for folder in (tmp_path / "gone", tmp_path):
        with pytest.raises(UserError, match=r"no trainer here.*train\.py") as caught:
            source_files(folder)

        assert str(folder) == caught.value.where


# ---- the import, in a process of its own ----

LOAD = "import sys; from pathlib import Path; from harness.source import load_trainer; load_trainer(Path(sys.argv[1]))"
CONTRACT = "RECIPES = {}\ndef build_model(recipe): ...\ndef main(referee, recipe): ...\n"


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("from .model import b\n" + CONTRACT, None),
        (
            "import no_such_module_at_all\n" + CONTRACT,
            "UserError: the trainer cannot be imported: ModuleNotFoundError: No module named 'no_such_module_at_all'",
        ),
        (CONTRACT.replace("def main", "def other"), "UserError: the trainer has no main"),
    ],
    ids=["whole", "broken import", "no main"],
)
def test_trainer_is_loaded_or_refused_with_its_reason(folder, source, told):
    """A trainer is imported as a package from its own folder; what is missing is said."""
    (folder / "train.py").write_text(source, encoding="utf-8")
    done = subprocess.run([sys.executable, "-c", LOAD, str(folder)], cwd=repository(), capture_output=True, text=True, check=False)

    assert (told is None) == (done.returncode == 0)
    assert (told or "") in done.stderr


# ---- the frozen trainer ----


def newest():
    """Version and source digest of the newest frozen trainer."""
    digest, version = max(frozen_versions().items(), key=lambda item: [int(part) for part in item[1].split(".")])
    return version, digest


def test_frozen_trainer_is_what_its_list_says():
    """trainer/ is the newest version in trainer/FROZEN, file by file and as a whole."""
    lines = (TRAINER / "FROZEN").read_text(encoding="utf-8").splitlines()
    listed = dict(reversed(line.split()) for line in lines if line[:1] not in ("#", "") and not line.startswith("version "))

    assert listed == file_digests(TRAINER)
    assert newest()[1] == source_digest(TRAINER)
    assert newest()[0] == frozen_version(source_digest(TRAINER))


def test_any_other_source_is_modified(folder):
    """A trainer that is no frozen version is called modified."""
    assert "modified" == frozen_version(source_digest(folder))


def test_frozen_trainer_is_read_in_one_sitting():
    """The whole trainer stays under 400 lines."""
    lines = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in sorted(TRAINER.glob("*.py"))}

    assert sum(lines.values()) < MOST_LINES, lines


def test_digest_of_a_file_is_the_one_that_sha256sum_prints(folder):
    """Files are listed by the sha256 of their bytes."""
    assert {name: file_sha256(folder / name) for name in FILES} == file_digests(folder)
