"""`speedrun verify`: every way to break a record is caught by the rule that is there for it, and by no rule that is not."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from data.errors import UserError
from harness import cli_verify
from harness import source as harness_source
from harness.cli_verify import verify
from harness.record import manifest_text
from harness.rules import RULES, reading
from harness.rules.reading import LONGEST_LINE
from harness.source import source_digest
from harness.track import load_track
from harness.verify import record_folders, verify_record
from records import make_record, sha256, write_events

ROOT = Path(__file__).resolve().parent.parent
IDS = [rule.id for rule in RULES]
PINNED = load_track("pocket").data.sha256
VAL, TRAIN = "pocket_val_000000.bin", "pocket_train_000001.bin"
STEPS = 40  # two validations of pocket's grid, and the last


@pytest.fixture(scope="module")
def honest(tmp_path_factory) -> Path:
    """A record with nothing wrong, made once; tests copy it."""
    return make_record(tmp_path_factory.mktemp("honest") / "records", steps=STEPS)


@pytest.fixture
def record(honest, tmp_path) -> Path:
    """A copy of the honest record to tamper with."""
    return Path(shutil.copytree(honest, tmp_path / "record"))


# ---- tools of a forger ----


def seal(folder: Path) -> None:
    """Write the manifest again, over what is there now."""
    (folder / "manifest.sha256").write_text(manifest_text(folder), encoding="utf-8")


def run_file(folder: Path, seed: int = 1) -> Path:
    return folder / "runs" / f"{seed}.jsonl"


def read_run(folder: Path, seed: int = 1) -> list[dict]:
    return [{k: v for k, v in json.loads(line).items() if k != "chain"} for line in run_file(folder, seed).read_text().splitlines()]


def write_run(folder: Path, events: list[dict], seed: int = 1) -> None:
    """Write a run with a new chain."""
    run_file(folder, seed).unlink(missing_ok=True)
    write_events(run_file(folder, seed), events)


def edit_event(index: int, **changes) -> Callable[[Path], None]:
    """Change an event of the first run and chain it again; index as in a list."""

    def forge(folder: Path) -> None:
        events = read_run(folder)
        events[index].update(changes)
        write_run(folder, events)

    return forge


def edit_all_starts(**changes) -> Callable[[Path], None]:
    """Change the start event of every run."""

    def forge(folder: Path) -> None:
        for seed in (1, 2, 3, 4):
            events = read_run(folder, seed)
            events[0].update(changes)
            write_run(folder, events, seed)

    return forge


def edit_end(**changes) -> Callable[[Path], None]:
    """Change the last validation and the finish event of the first run alike."""

    def forge(folder: Path) -> None:
        edit_event(-1, **changes)(folder)
        edit_event(-2, **changes)(folder)

    return forge


def edit_record(change: Callable[[dict], object]) -> Callable[[Path], None]:
    """Change the values of record.json."""

    def forge(folder: Path) -> None:
        values = json.loads((folder / "record.json").read_text())
        change(values)
        (folder / "record.json").write_text(json.dumps(values, indent=1, sort_keys=True) + "\n")

    return forge


def claim(**changes) -> Callable[[Path], None]:
    return edit_record(lambda values: values["claim"].update(changes))


def both(*forgeries: Callable[[Path], None]) -> Callable[[Path], None]:
    def forge(folder: Path) -> None:
        for forgery in forgeries:
            forgery(folder)

    return forge


def line_edit(change: Callable[[list[bytes]], object]) -> Callable[[Path], None]:
    """Change the raw lines of the first run."""

    def forge(folder: Path) -> None:
        lines = run_file(folder).read_bytes().splitlines(keepends=True)
        change(lines)
        run_file(folder).write_bytes(b"".join(lines))

    return forge


def set_line(number: int, text: bytes) -> Callable[[Path], None]:
    return line_edit(lambda lines: lines.__setitem__(number - 1, text))


def replace_in_line(number: int, old: bytes, new: bytes) -> Callable[[Path], None]:
    def change(lines: list[bytes]) -> None:
        assert old in lines[number - 1]
        lines[number - 1] = lines[number - 1].replace(old, new)

    return line_edit(change)


def drop_event(index: int) -> Callable[[Path], None]:
    def forge(folder: Path) -> None:
        events = read_run(folder)
        del events[index]
        write_run(folder, events)

    return forge


def swap_events(first: int, second: int) -> Callable[[Path], None]:
    def forge(folder: Path) -> None:
        events = read_run(folder)
        events[first], events[second] = events[second], events[first]
        write_run(folder, events)

    return forge


def copy_run_under_another_seed(folder: Path) -> None:
    events = read_run(folder, 1)
    events[0]["seed"] = 2
    write_run(folder, events, 2)

    def change(values: dict) -> None:
        values["runs"][1] = {**values["runs"][0], "seed": 2, "events": "runs/2.jsonl"}

    edit_record(change)(folder)


def add_failure(folder: Path) -> None:
    events = read_run(folder)
    write_run(folder, [*events[:10], {"event": "failure", "reason": "killed", "rank": None, "step": 6}, *events[10:]])


def write(name: str, text: str) -> Callable[[Path], None]:
    def forge(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)

    return forge


def link(name: str, target: str) -> Callable[[Path], None]:
    def forge(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return forge


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def read_shards(digests: dict[str, object]) -> Callable[[Path], None]:
    """Let every run say that it read these shards."""
    return edit_all_starts(data_sha256=digests)


def move_warm_up(folder: Path) -> None:
    events = read_run(folder)
    events.insert(3, events.pop(1))
    write_run(folder, events)


def huge_record(folder: Path) -> None:
    with (folder / "record.json").open("r+b") as file:
        file.truncate(reading.LARGEST_TEXT + 1)


DEEP = "[" * 100_000 + "]" * 100_000

# name -> (forgery, is the manifest written again, rules that fail: no more and no fewer)
FORGERIES: dict[str, tuple[Callable[[Path], object], bool, set[str]]] = {
    # files
    "file changed": (write("source/train.py", "pass\n"), False, {"EVIDENCE-2", "SOURCE-1"}),
    "file removed": (remove("source/train.py"), False, {"EVIDENCE-2", "SOURCE-1"}),
    "file added": (write("notes.txt", "hello\n"), False, {"EVIDENCE-2"}),
    "file became a link": (both(seal, link("source/train.py", "/dev/null")), False, {"EVIDENCE-2", "SOURCE-1"}),
    "pipe in the record": (lambda folder: os.mkfifo(folder / "pipe"), False, {"EVIDENCE-2"}),
    "pipe in the source": (lambda folder: os.mkfifo(folder / "source" / "pipe"), False, {"EVIDENCE-2", "SOURCE-1"}),
    "pipe for a run": (both(remove("runs/1.jsonl"), lambda folder: os.mkfifo(run_file(folder))), False, {"EVIDENCE-2", "EVIDENCE-3"}),
    "no manifest": (remove("manifest.sha256"), False, {"EVIDENCE-2"}),
    "manifest of nothing": (write("manifest.sha256", ""), False, {"EVIDENCE-2"}),
    "manifest names a file twice": (lambda f: write("manifest.sha256", (f / "manifest.sha256").read_text() * 2)(f), False, {"EVIDENCE-2"}),
    "no record.json": (remove("record.json"), True, {"EVIDENCE-1"}),
    "empty folder": (lambda folder: (shutil.rmtree(folder), folder.mkdir()), False, {"EVIDENCE-1", "EVIDENCE-2"}),
    "run not there": (remove("runs/3.jsonl"), True, {"EVIDENCE-3"}),
    "run that no claim counts": (lambda folder: shutil.copy(run_file(folder), run_file(folder, 9)), True, {"EVIDENCE-6"}),
    # record.json
    "record.json is empty": (write("record.json", ""), True, {"EVIDENCE-1"}),
    "record.json is a list": (write("record.json", "[]"), True, {"EVIDENCE-1"}),
    "record.json is not UTF-8": (lambda folder: (folder / "record.json").write_bytes(b"\xff\xfe"), True, {"EVIDENCE-1"}),
    "record.json is nested deeply": (write("record.json", DEEP), True, {"EVIDENCE-1"}),
    "record.json is huge": (huge_record, True, {"EVIDENCE-1"}),
    "unknown key": (edit_record(lambda values: values.update(bonus=1)), True, {"EVIDENCE-1"}),
    "key missing": (edit_record(lambda values: values.pop("claim")), True, {"EVIDENCE-1"}),
    "NaN in the claim": (claim(mean_val_loss=float("nan")), True, {"EVIDENCE-1"}),
    "NaN in free values": (edit_record(lambda values: values["recipe"].update(lr=float("nan"))), True, {"EVIDENCE-1"}),
    "key given twice": (lambda f: write("record.json", '{"name": "a", ' + (f / "record.json").read_text()[1:])(f), True, {"EVIDENCE-1"}),
    "another schema version": (edit_record(lambda values: values.update(schema_version=2)), True, {"EVIDENCE-1"}),
    "events outside the record": (edit_record(lambda values: values["runs"][0].update(events="../1.jsonl")), True, {"EVIDENCE-1"}),
    # lines of events
    "loss edited": (replace_in_line(5, b'"train_loss": ', b'"train_loss": 1'), True, {"EVIDENCE-3"}),
    "chain value edited": (replace_in_line(5, b'"chain": "', b'"chain": "0'), True, {"EVIDENCE-3"}),
    "line with other spacing": (replace_in_line(5, b'", ', b'",  '), True, {"EVIDENCE-3"}),
    "key given twice in a line": (replace_in_line(5, b'"step": 2', b'"step": 99, "step": 2'), True, {"EVIDENCE-3"}),
    "last line cut short": (line_edit(lambda lines: lines.__setitem__(-1, lines[-1][:-20])), True, {"EVIDENCE-3"}),
    "last line without its end": (line_edit(lambda lines: lines.__setitem__(-1, lines[-1][:-1])), True, {"EVIDENCE-3"}),
    "empty event file": (write("runs/1.jsonl", ""), True, {"EVIDENCE-4"}),
    "blank line": (set_line(5, b"\n"), True, {"EVIDENCE-3"}),
    "line is not JSON": (set_line(5, b"{'step': 2}\n"), True, {"EVIDENCE-3"}),
    "NaN in a line": (set_line(5, b'{"event": "step", "chain": "", "train_loss": NaN}\n'), True, {"EVIDENCE-3"}),
    "infinity in a line": (replace_in_line(5, b'"train_loss": ', b'"train_loss": 1e999'), True, {"EVIDENCE-3"}),
    "infinity under a key of one's own": (replace_in_line(5, b'"step": ', b'"more": 1e999, "step": '), True, {"EVIDENCE-3"}),
    "half a character in a line": (
        replace_in_line(1, b'"recipe_name": "muon"', b'"recipe_name": "\\ud800"'),
        True,
        {"EVIDENCE-3", "EVIDENCE-5"},
    ),
    "line nested deeply": (set_line(5, DEEP.encode() + b"\n"), True, {"EVIDENCE-3"}),
    "line too long": (set_line(5, b'{"event": "' + b"x" * LONGEST_LINE + b'"}\n'), True, {"EVIDENCE-3"}),
    "event with a key missing": (
        lambda f: write_run(f, [{k: v for k, v in e.items() if k != "tokens"} for e in read_run(f)]),
        True,
        {"EVIDENCE-3"},
    ),
    "number as text": (edit_event(3, train_loss="5.0"), True, {"EVIDENCE-3"}),
    "number beyond all": (edit_event(3, tokens=10**400), True, {"EVIDENCE-3"}),
    "truth as number": (edit_event(3, tokens=True), True, {"EVIDENCE-3"}),
    # order of events
    "step dropped": (drop_event(5), True, {"EVIDENCE-4"}),
    "steps swapped": (swap_events(5, 6), True, {"EVIDENCE-4", "CLOCK-1", "DATA-3"}),
    "start dropped": (drop_event(0), True, {"EVIDENCE-4"}),
    "finish dropped": (drop_event(-1), True, {"EVIDENCE-4"}),
    "last validation dropped": (drop_event(-2), True, {"EVIDENCE-4", "CLOCK-2"}),
    "step 0 never validated": (drop_event(2), True, {"EVIDENCE-4"}),
    "grid point left out": (drop_event(23), True, {"EVIDENCE-4"}),
    "warm-up after the first step": (move_warm_up, True, {"EVIDENCE-4"}),
    "failure inside": (add_failure, True, {"EVIDENCE-4"}),
    "two starts": (lambda folder: write_run(folder, [read_run(folder)[0], *read_run(folder)]), True, {"EVIDENCE-4"}),
    "finish differs from its validation": (edit_event(-2, val_loss=1.5), True, {"EVIDENCE-4"}),
    # start events against record.json
    "another recipe": (edit_record(lambda values: values["recipe"].update(lr=1.0)), True, {"EVIDENCE-5"}),
    "another recipe name": (edit_event(0, recipe_name="adamw"), True, {"EVIDENCE-5"}),
    "another track raced": (edit_event(0, track="fineweb"), True, {"EVIDENCE-5"}),
    "another division": (edit_record(lambda values: values.update(division="cpu 1 threads Test Processor")), True, {"EVIDENCE-5"}),
    "another division everywhere": (
        both(
            edit_record(lambda values: values.update(division="8x NVIDIA H100 80GB HBM3")),
            edit_all_starts(division="8x NVIDIA H100 80GB HBM3"),
        ),
        True,
        {"EVIDENCE-5"},
    ),
    "another machine": (edit_record(lambda values: values["environment"].update(cpu="Faster")), True, {"EVIDENCE-5"}),
    "environment that cannot be": (
        both(
            edit_record(lambda values: values["environment"].update(gpus=[[1]])),
            lambda folder: edit_all_starts(environment={**read_run(folder)[0]["environment"], "gpus": [[1]]})(folder),
        ),
        True,
        {"EVIDENCE-5"},
    ),
    # runs
    "run copied under another seed": (copy_run_under_another_seed, True, {"EVIDENCE-6", "STATISTICS-1"}),
    "same weights twice": (edit_event(-1, weights_sha256=sha256("weights 2")), True, {"EVIDENCE-6", "EVIDENCE-7"}),
    "claim counts more runs": (claim(n=5), True, {"EVIDENCE-6"}),
    "run listed twice": (edit_record(lambda values: values["runs"].append(values["runs"][0])), True, {"EVIDENCE-6", "STATISTICS-1"}),
    "seed edited": (edit_record(lambda values: values["runs"][0].update(seed=77)), True, {"EVIDENCE-7"}),
    "result edited": (edit_record(lambda values: values["runs"][0].update(val_loss=1.7)), True, {"EVIDENCE-7"}),
    "loss lowered throughout": (edit_end(val_loss=1.775), True, {"EVIDENCE-7", "STATISTICS-1"}),
    # clock
    "clock goes back": (edit_event(30, train_time_ms=1.0), True, {"CLOCK-1"}),
    "time before the first token": (edit_event(2, train_time_ms=500.0), True, {"CLOCK-2"}),
    "finish before its validation": (edit_event(-2, train_time_ms=99_999.0), True, {"EVIDENCE-4", "CLOCK-1", "CLOCK-2"}),
    "process shorter than its training": (edit_record(lambda values: values["runs"][2].update(process_time_ms=10.0)), True, {"CLOCK-3"}),
    "warm-up that trained": (edit_event(1, digest_after=sha256("trained")), True, {"CLOCK-4"}),
    # data
    "easier target": (edit_record(lambda values: values["track_definition"].update(target_loss=3.0)), True, {"DATA-1"}),
    "key added to the track": (edit_record(lambda values: values["track_definition"].update(bonus=None)), True, {"DATA-1"}),
    "definition of another track": (edit_record(lambda values: values["track_definition"].update(id="fineweb")), True, {"DATA-1"}),
    "track without a definition": (
        both(edit_record(lambda values: values.update(track="mine", track_definition={"id": "mine"})), edit_all_starts(track="mine")),
        True,
        {"DATA-1"},
    ),
    "own track under another name": (
        both(edit_record(lambda values: values.update(track="mine")), edit_all_starts(track="mine")),
        True,
        {"DATA-1"},
    ),
    "other validation data": (read_shards({VAL: sha256("x"), TRAIN: PINNED[TRAIN]}), True, {"DATA-2"}),
    "other training data": (read_shards({VAL: PINNED[VAL], TRAIN: sha256("x")}), True, {"DATA-2"}),
    "no training data": (read_shards({VAL: PINNED[VAL]}), True, {"DATA-2"}),
    "no validation data": (read_shards({TRAIN: PINNED[TRAIN]}), True, {"DATA-2"}),
    "shard the track has not": (read_shards({VAL: PINNED[VAL], "another.bin": sha256("x")}), True, {"DATA-2"}),
    "no digest but a list": (read_shards({VAL: PINNED[VAL], TRAIN: [1]}), True, {"DATA-2"}),
    "step without tokens": (edit_event(4, tokens=8192), True, {"DATA-3"}),
    "tokens fall": (edit_event(10, tokens=1), True, {"DATA-3"}),
    "more epochs": (edit_event(-1, epochs=0.25), True, {"DATA-4"}),
    # statistics
    "better mean": (claim(mean_val_loss=1.5), True, {"STATISTICS-1"}),
    "smaller p": (claim(p_value=1e-9), True, {"STATISTICS-1"}),
    "no p": (claim(p_value=None), True, {"STATISTICS-1"}),
    "faster": (claim(mean_train_time_ms=1000.0), True, {"STATISTICS-1"}),
    "fewer tokens": (claim(tokens=1000), True, {"STATISTICS-1"}),
    "fewer steps": (claim(steps=39), True, {"STATISTICS-1"}),
    "runs of different length": (edit_end(tokens=(STEPS + 1) * 8192), True, {"EVIDENCE-7", "STATISTICS-1"}),
    "target denied": (claim(target_met=False), True, {"STATISTICS-2"}),
    "significance denied": (claim(significant=False), True, {"STATISTICS-3"}),
    # source
    "source edited": (write("source/train.py", "pass\n"), True, {"SOURCE-1"}),
    "source added": (write("source/more.py", "pass\n"), True, {"SOURCE-1"}),
    "cache beside the source": (write("source/__pycache__/train.cpython-311.pyc", "x"), True, {"SOURCE-1"}),
    "hidden file in the source": (write("source/.hidden.py", "x"), True, {"SOURCE-1"}),
    "another source ran": (edit_event(0, source_sha256=sha256("other")), True, {"SOURCE-1"}),
    "source edited with its digest": (
        lambda f: both(
            write("source/train.py", "pass\n"), edit_record(lambda values: values.update(source_sha256=source_digest(f / "source")))
        )(f),
        True,
        {"SOURCE-1"},
    ),
    "called frozen": (edit_record(lambda values: values.update(frozen="1.0")), True, {"SOURCE-2"}),
    "called frozen by a run": (edit_event(0, frozen="1.0"), True, {"SOURCE-2"}),
}


def failing(folder: Path) -> set[str]:
    return {finding.rule for finding in verify_record(folder).findings if finding.verdict == "fail"}


# ---- records that are as they should be ----


def test_honest_record_passes_every_rule(honest):
    """Without tampering every rule passes, none is unknown, and the record is valid."""
    report = verify_record(honest)

    assert report.of("pass") == IDS
    assert report.valid
    assert report.sentence == f"VALID: no rule fails ({len(IDS)} pass)"


def test_comparison_that_misses_the_target_is_valid_with_a_warning(tmp_path):
    """A record that says itself that it does not meet the target is a comparison: warned about, not refused."""
    report = verify_record(make_record(tmp_path / "records", final_losses=(1.95, 1.96, 1.97, 1.94), steps=STEPS))

    assert report.of("warn") == ["STATISTICS-2", "STATISTICS-3"]
    assert report.valid
    assert "comparison" in next(finding.found for finding in report.findings if finding.rule == "STATISTICS-2")


def test_comparison_that_claims_the_target_fails(tmp_path):
    """Claiming target and significance that the runs do not show fails the two rules that judge it."""
    folder = make_record(tmp_path / "records", final_losses=(1.95, 1.96, 1.97, 1.94), steps=STEPS)
    claim(target_met=True, significant=True)(folder)
    seal(folder)

    assert failing(folder) == {"STATISTICS-2", "STATISTICS-3"}


def test_one_run_is_valid_but_not_significant(tmp_path):
    """One run below the target is warned about with how it falls short; claiming significance for it fails."""
    folder = make_record(tmp_path / "records", seeds=(1,), final_losses=(1.78,), steps=STEPS)
    report = verify_record(folder)
    claim(significant=True)(folder)
    seal(folder)

    assert report.of("warn") == ["STATISTICS-3"]
    assert "at least 2 runs" in report.findings[IDS.index("STATISTICS-3")].found
    assert failing(folder) == {"STATISTICS-3"}


def test_unpinned_data_is_unknown_not_pass(tmp_path):
    """Where the track pins no digests the rule on data cannot be told, and says so."""
    report = verify_record(make_record(tmp_path / "records", track="fineweb", final_losses=(3.270, 3.271, 3.272, 3.269), steps=STEPS))

    assert report.of("unknown") == ["DATA-2"]
    assert report.valid


def test_unpinned_data_that_differs_between_runs_fails(tmp_path):
    """Without pinned digests the runs must still have read the same."""
    folder = make_record(tmp_path / "records", track="fineweb", final_losses=(3.270, 3.271, 3.272, 3.269), steps=STEPS)
    edit_event(0, data_sha256={**read_run(folder)[0]["data_sha256"], "fineweb_val_000000.bin": sha256("x")})(folder)
    seal(folder)

    assert failing(folder) == {"DATA-2"}


def test_own_track_is_judged_by_its_own_definition_with_a_warning(tmp_path):
    """A record on somebody's own track is judged by what it defines, and the reader is told."""
    text = (ROOT / "harness" / "tracks" / "pocket.toml").read_text(encoding="utf-8").replace('id = "pocket"', 'id = "mine"')
    (tmp_path / "mine.toml").write_text(text, encoding="utf-8")
    report = verify_record(make_record(tmp_path / "records", track=str(tmp_path / "mine.toml"), steps=STEPS))

    assert report.of("warn") == ["DATA-1"]
    assert report.valid


@pytest.mark.parametrize("changes", [{"target_loss": "3"}, {"val_every_steps": 0}, {"bonus": 1}, {"significance": {"test": "t"}}])
def test_own_track_that_is_no_track_fails(tmp_path, changes):
    """A definition that no track file could give fails DATA-1, and what depends on it is unknown."""
    text = (ROOT / "harness" / "tracks" / "pocket.toml").read_text(encoding="utf-8").replace('id = "pocket"', 'id = "mine"')
    (tmp_path / "mine.toml").write_text(text, encoding="utf-8")
    folder = make_record(tmp_path / "records", track=str(tmp_path / "mine.toml"), steps=STEPS)
    edit_record(lambda values: values["track_definition"].update(changes))(folder)
    seal(folder)
    report = verify_record(folder)

    assert report.of("fail") == ["DATA-1"]
    assert {"EVIDENCE-4", "STATISTICS-1"} <= set(report.of("unknown"))


def test_record_of_other_rules_is_warned_about(record):
    """A record made under another rules version is judged, and the reader is told."""
    edit_record(lambda values: values.update(rules_version="0.9"))(record)
    seal(record)
    report = verify_record(record)

    assert report.of("warn") == ["EVIDENCE-1"]
    assert report.valid


def test_changing_batch_is_warned_about_in_a_modified_trainer(record):
    """A modified trainer may change its batch while it runs; a reader is told that tokens are not steps x batch_tokens."""
    events = read_run(record)
    events[10]["tokens"] += 4096
    write_run(record, events)
    seal(record)
    report = verify_record(record)

    assert report.of("warn") == ["DATA-3"]
    assert report.valid


def test_one_batch_drawn_ahead_is_right(record):
    """A loop that draws the next batch before it logs the step is one batch ahead all along."""
    for seed in (1, 2, 3, 4):
        events = read_run(record, seed)
        write_run(
            record,
            [
                {**event, "tokens": event["tokens"] + 8192} if event["event"] in ("step", "validation", "finish") else event
                for event in events
            ],
            seed,
        )

    def change(values: dict) -> None:
        for part in (values["claim"], *values["runs"]):
            part["tokens"] += 8192

    edit_record(change)(record)
    seal(record)

    assert not verify_record(record).of("warn")
    assert failing(record) == set()


def test_recipe_without_a_batch_is_unknown(record):
    """Where the recipe has no batch_tokens the sum of batches cannot be told."""
    recipe = {"steps": STEPS}
    both(edit_all_starts(recipe=recipe), edit_record(lambda values: values.update(recipe=recipe)))(record)
    seal(record)
    report = verify_record(record)

    assert report.of("unknown") == ["DATA-3"]
    assert report.valid


def test_division_of_gpus_counts_the_ranks(record):
    """On GPUs the division is the number of ranks and the GPU's name; one rank fewer is another division."""
    environment = {"gpus": ["NVIDIA H100 80GB HBM3"] * 8, "nodes": 1, "processes": 8}
    start = {"environment": environment, "division": "8x NVIDIA H100 80GB HBM3", "world_size": 8}
    both(edit_all_starts(**start), edit_record(lambda values: values.update(environment=environment, division=start["division"])))(record)
    seal(record)
    eight = failing(record)
    both(edit_all_starts(world_size=7), edit_record(lambda values: values["environment"].update(processes=7)))(record)
    edit_all_starts(environment={**environment, "processes": 7})(record)
    seal(record)

    assert eight == set()
    assert failing(record) == {"EVIDENCE-5"}


def test_fixed_batch_of_a_track_holds_for_every_trainer(tmp_path):
    """On a track that fixes the batch, another batch fails whatever the trainer."""
    losses = (3.270, 3.271, 3.272, 3.269)
    right = make_record(tmp_path / "records", track="fineweb-steps", final_losses=losses, steps=STEPS, batch_tokens=524_288)
    wrong = make_record(tmp_path / "records", track="fineweb-steps", final_losses=losses, steps=STEPS, name="wrong")

    assert failing(right) == set()
    assert failing(wrong) == {"DATA-3"}


@pytest.fixture
def frozen(tmp_path, monkeypatch) -> Path:
    """A record of a trainer that counts as frozen version 9.9."""
    digest = source_digest(make_record(tmp_path / "other", steps=STEPS) / "source")
    monkeypatch.setattr(harness_source, "frozen_versions", lambda: {digest: "9.9"})
    return make_record(tmp_path / "records", steps=STEPS)


def test_frozen_trainer_is_recognised(frozen):
    """A source that is a frozen trainer passes, and the finding names its version."""
    report = verify_record(frozen)

    assert report.of("pass") == IDS
    assert report.findings[IDS.index("SOURCE-2")].found == "frozen trainer 9.9"


@pytest.mark.parametrize(
    ("forgery", "rule"),
    [
        (drop_event(1), "EVIDENCE-4"),  # the frozen trainer always warms up
        (both(edit_record(lambda values: values["recipe"].update(steps=99)), edit_all_starts(recipe={"steps": 99})), "EVIDENCE-4"),
        (edit_event(10, tokens=70_000), "DATA-3"),
        (edit_record(lambda values: values.update(frozen="modified")), "SOURCE-2"),
    ],
)
def test_frozen_trainer_is_held_to_what_it_does(frozen, forgery, rule):
    """What a modified trainer may do differently, the frozen one may not."""
    forgery(frozen)
    seal(frozen)

    assert rule in failing(frozen)


# ---- records that are not ----


@pytest.mark.parametrize("name", FORGERIES)
def test_each_forgery_fails_exactly_the_rules_for_it(record, name, monkeypatch):
    """Every way to break a record is caught by the rules that are there for it, and no other rule fails."""
    monkeypatch.setattr(reading, "LARGEST_TEXT", 4 << 20)  # a smaller giant is hashed sooner
    forgery, sealed, expected = FORGERIES[name]
    forgery(record)
    if sealed:
        seal(record)
    report = verify_record(record)

    assert set(report.of("fail")) == expected
    assert not report.valid
    for finding in report.findings:
        assert finding.verdict == "pass" or (finding.wanted and finding.fix)


def test_every_rule_has_a_forgery_that_breaks_it():
    """No rule is there that nothing can fail."""
    assert set(IDS) == set().union(*(expected for _, _, expected in FORGERIES.values()))


def test_unknown_comes_only_with_a_failure(record):
    """Whatever byte is changed, judging does not crash, and a rule that cannot be applied never makes a record valid."""
    rng = random.Random(1)
    files = [record / "record.json", run_file(record)]
    whole = {path: path.read_bytes() for path in files}
    for _ in range(40):
        path = rng.choice(files)
        body = bytearray(whole[path])
        for _ in range(rng.choice((1, 1, 5))):
            body[rng.randrange(len(body))] = rng.choice(b'0129"{}[],.:eE-\n \x00\xff')
        path.write_bytes(body)
        report = verify_record(record)
        path.write_bytes(whole[path])

        assert report.valid is False or bytes(body) == whole[path]


def test_every_rule_says_what_holds_and_when_it_errs():
    """Each rule has an id of its own, one sentence, and a word on false alarms."""
    assert len(set(IDS)) == len(IDS)
    for rule in RULES:
        assert rule.sentence.endswith(".")
        assert rule.false_alarms.endswith(".")


def test_first_bad_line_is_named(record):
    """A broken chain names file and line."""
    replace_in_line(7, b'"train_loss": ', b'"train_loss": 1')(record)

    assert verify_record(record).findings[IDS.index("EVIDENCE-3")].found.startswith("runs/1.jsonl, line 7 ")


def test_text_from_a_record_cannot_move_the_cursor(record):
    """Control characters of a record are shown, not sent to the terminal, and long text ends."""
    edit_record(lambda values: values.update(frozen="\x1b[2J" + "x" * 10_000))(record)
    found = verify_record(record).findings[IDS.index("SOURCE-2")].found

    assert "\x1b" not in found
    assert "\\x1b[2J" in found
    assert len(found) < 400


# ---- the command ----


def invoke(*arguments: object, exit_code: int = 0):
    result = CliRunner().invoke(verify, [str(argument) for argument in arguments])

    assert result.exit_code == exit_code, result.output
    return result


def test_command_prints_a_table_and_the_verdict(honest):
    """A row a rule, then the verdict; exit 0."""
    lines = invoke(honest).stdout.splitlines()

    assert lines[0] == str(honest)
    assert lines[1].split() == ["RULE", "VERDICT", "FOUND"]
    assert [line.split()[:2] for line in lines[2 : 2 + len(IDS)]] == [[rule, "pass"] for rule in IDS]
    assert lines[2 + len(IDS)].startswith("VALID: ")


def test_table_for_a_terminal_has_the_same_rows(honest, capsys):
    """On a terminal the table is drawn by rich, with every rule in it and no markup read from a record."""
    cli_verify._print_rich(verify_record(honest))
    text = capsys.readouterr().out

    assert [rule for rule in IDS if rule in text] == IDS


def test_command_exits_1_and_says_what_to_do(record):
    """A failure shows what was found, what was wanted and what to do; exit 1."""
    claim(n=5)(record)
    seal(record)
    text = invoke(record, exit_code=1).stdout

    assert "claim says n = 5, the record has 4 runs" in text
    assert "wanted: the claim over all runs" in text
    assert "fix: " in text
    assert "NOT VALID: EVIDENCE-6 fails" in text


def test_one_bad_record_among_good_ones_exits_1(honest, record):
    """All are judged; one that is not valid decides."""
    claim(n=5)(record)
    text = invoke(honest, record, exit_code=1).stdout

    assert "\nVALID" in text
    assert "\nNOT VALID" in text


def test_json_has_the_same_content(honest, record):
    """--json has every finding with its rule's sentence; same exit code."""
    claim(n=5)(record)
    values = json.loads(invoke(honest, record, "--json", exit_code=1).stdout)

    assert values["valid"] is False
    assert [entry["valid"] for entry in values["records"]] == [True, False]
    assert [finding["rule"] for finding in values["records"][0]["findings"]] == IDS
    assert set(values["records"][0]["findings"][0]) == {"rule", "verdict", "found", "wanted", "fix", "sentence", "false_alarms"}


def test_folder_of_records_is_searched_and_a_damaged_one_is_not_skipped(tmp_path):
    """Records below a folder are found, also one that has lost its record.json."""
    records = tmp_path / "records"
    good, bad = make_record(records, steps=STEPS), make_record(records, steps=STEPS, name="bad")
    (bad / "record.json").unlink()

    assert record_folders([records]) == sorted([good, bad])
    assert record_folders([bad]) == [bad]
    invoke(records, exit_code=1)


@pytest.mark.parametrize("name", ["nowhere", "."])
def test_path_without_a_record_is_the_users_error(tmp_path, name):
    """A path that does not exist, or holds no record, is a UserError that says so."""
    result = invoke(tmp_path / name, exit_code=1)

    assert isinstance(result.exception, UserError)


def test_no_path_is_wrong_usage():
    """Without PATH it is wrong usage, exit code 2."""
    invoke(exit_code=2)


def test_help_has_an_example():
    """The help shows a line to copy."""
    assert "speedrun verify records/pocket" in invoke("--help").stdout


def test_verify_imports_no_torch_and_nothing_from_the_record(record):
    """Judging a record imports neither torch nor pandas nor any source of the record."""
    (record / "source" / "train.py").write_text("raise SystemExit('the source was run')\n", encoding="utf-8")
    heavy = "{'torch', 'pandas', 'matplotlib', 'huggingface_hub', 'trainer'}"
    program = f"import sys; from pathlib import Path; from harness.verify import verify_record\nverify_record(Path({str(record)!r}))\n"
    program += f"sys.exit(', '.join({heavy} & set(sys.modules)) or 0)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False, capture_output=True, text=True
    )

    assert (done.returncode, done.stderr) == (0, "")


def test_importing_the_command_or_the_version_is_cheap():
    """Neither the command's module nor the rules' version loads a library but click."""
    heavy = "{'numpy', 'pydantic', 'torch', 'rich', 'scipy'}"
    program = f"import sys, harness.cli_verify, harness.rules.version; sys.exit(', '.join({heavy} & set(sys.modules)) or 0)"

    assert (
        subprocess.run([sys.executable, "-c", program], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False).returncode == 0
    )
