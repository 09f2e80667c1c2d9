"""The house itself: imports run downward, help is instant, documents say what is true."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from data.errors import UserError
from harness import cli, machine
from harness.record import Record

REPOSITORY = Path(__file__).resolve().parent.parent
HEAVY = ("torch", "numpy", "pandas", "scipy", "matplotlib")
MAY_IMPORT = {"data": {"data"}, "harness": {"harness", "data"}, "trainer": {"trainer", "harness"}, "plots": {"plots", "harness", "data"}}
HELP_RATIO = 2.5  # of the time that importing click takes
HELP_REPEATS = 7


def loaded_by(code: str) -> list[str]:
    """Heavy packages in sys.modules after running some code in a fresh process."""
    script = f"import sys\n{code}\nprint([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=REPOSITORY, timeout=60, check=True)
    return ast.literal_eval(done.stdout.splitlines()[-1])


def test_help_imports_nothing_heavy():
    """speedrun --help imports neither torch, numpy, pandas, scipy nor matplotlib."""
    assert [] == loaded_by("from harness.cli import cli\ncli.main(['--help'], standalone_mode=False)")


@pytest.mark.parametrize("command", ["run", "verify", "plot", "data", "doctor", "attempts"])
def test_help_of_a_command_imports_nothing_heavy(command):
    """The help of every command is as light as the top one."""
    assert [] == loaded_by(f"from harness.cli import cli\ncli.main([{command!r}, '--help'], standalone_mode=False)")


def test_help_is_instant():
    """speedrun --help takes at most 2.5 times as long as importing click, by the fastest of interleaved runs."""
    code = {"click": "import click", "help": "from harness.cli import cli; cli.main(['--help'], standalone_mode=False)"}
    times = {name: [] for name in code}
    for _ in range(HELP_REPEATS):
        for name, source in code.items():
            script = (
                f"import time, resource\n{source}\nusage = resource.getrusage(resource.RUSAGE_SELF)\nprint(usage.ru_utime + usage.ru_stime)"
            )
            done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=REPOSITORY, timeout=60, check=True)
            times[name].append(float(done.stdout.splitlines()[-1]))

    assert min(times["help"]) <= HELP_RATIO * min(times["click"])


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_imports_run_downward(room):
    """Each room imports only itself and the rooms below it; the harness never imports a trainer."""
    ours = {"data", "harness", "trainer", "plots", "tests"}
    found = set()
    for path in (REPOSITORY / room).rglob("*.py"):
        if path.name in ("cli_plot.py",):  # the command line stands above plots
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                found.add(node.module.split(".")[0])

    assert found & ours <= MAY_IMPORT[room]


def test_trainer_imports_only_the_referee_of_ours():
    """The frozen trainer imports nothing of ours but the referee's type."""
    imported = {
        node.module
        for path in (REPOSITORY / "trainer").glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module.split(".")[0] in ("harness", "data", "plots")
    }

    assert {"harness.referee"} == imported


def test_record_schema_in_docs_is_the_one_in_force():
    """docs/record.schema.json is what harness.record accepts."""
    assert Record.model_json_schema() == json.loads((REPOSITORY / "docs" / "record.schema.json").read_text())


def test_every_module_stands_in_the_readme_with_one_phrase():
    """README's tree names every module of the rooms, and no module that is not there."""
    readme = (REPOSITORY / "README.md").read_text()
    tree = readme[readme.index("## Layout") :]
    named = set(re.findall(r"^\s*([a-z_0-9/]+\.py)\s+\S", tree, re.MULTILINE))
    there = {
        path.relative_to(REPOSITORY).as_posix()
        for room in ("data", "harness", "trainer", "plots")
        for path in (REPOSITORY / room).rglob("*.py")
        if path.name != "__init__.py"
    }

    assert there == named


def test_constraints_satisfy_the_ranges():
    """Every dependency has an exact version in constraints.txt inside its range, and torch is 2.13.0."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    lines = [line for line in (REPOSITORY / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    exact = {canonicalize_name(line.partition("==")[0]): line.partition("==")[2] for line in lines}
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    for text in [*project["dependencies"], *project["optional-dependencies"]["test"]]:
        requirement = Requirement(text)

        assert requirement.specifier.contains(exact[canonicalize_name(requirement.name)]), text
    assert "2.13.0" == exact["torch"]


@pytest.mark.parametrize(("found", "sentence"), [("2.8.1", "torch 2.8.1 is too old"), ("unknown", "torch is not installed")])
def test_old_or_missing_torch_is_refused(monkeypatch, found, sentence):
    """A torch older than 2.9, or none, is refused with the version found."""
    monkeypatch.setattr(machine, "installed_version", lambda package: found)

    with pytest.raises(UserError, match=sentence):
        machine.require_torch()


def test_old_python_is_refused(monkeypatch):
    """A python older than 3.11 is refused before anything else."""
    monkeypatch.setattr(cli.sys, "version_info", (3, 10, 4, "final", 0))

    with pytest.raises(UserError, match=r"python 3\.10\.4 is too old"):
        cli.require_python()


def test_old_torch_that_fits_is_accepted(monkeypatch):
    """torch 2.11 with a CUDA suffix passes."""
    monkeypatch.setattr(machine, "installed_version", lambda package: "2.11.0+cu130")

    assert machine.require_torch() is None
