"""Small records made of invented numbers, valid in every other way: real chain, real manifest, real claim, no training."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from harness.claim import claim_of, result_of
from harness.events import EventWriter
from harness.record import Record, record_folder, write_record
from harness.rules.version import RULES_VERSION
from harness.source import copy_source, frozen_version
from harness.track import Track, load_track

DATE = "2031-02-03"
DIVISION = "cpu 2 threads Test Processor"
ENVIRONMENT = {
    "cpu": "Test Processor",
    "cores": 2,
    "threads": 2,
    "gpus": [],
    "nodes": 1,
    "processes": 1,
    "python": "3.11.0",
    "torch": "2.13.0",
}
_TRAIN_PY = "RECIPES = {}\n\n\ndef build_model(recipe): ...\n\n\ndef main(referee, recipe): ...\n"


def make_record(
    records: Path,
    *,
    track: str = "pocket",
    name: str = "muon",
    recipe_name: str = "muon",
    seeds: Sequence[int] = (1, 2, 3, 4),
    final_losses: Sequence[float] = (1.781, 1.784, 1.779, 1.782),
    steps: int = 100,
    batch_tokens: int = 8192,
    ms_per_step: float = 800.0,
    recipe: dict[str, Any] | None = None,
    source: Path | None = None,
    division: str = DIVISION,
    **changes: Any,
) -> Path:
    """Write a record as a race would have left it.

    Args:
        records: the folder of all records; the new one is <records>/<track>/<DATE>-<name>.
        track: name of a track, or path of its file.
        final_losses: nats per token, one per seed.
        recipe: every hyper-parameter; None: the few that the numbers above imply.
        source: the trainer's folder; None: one of a few lines that is never run.
        division: the machine class, for example "8x NVIDIA H100 80GB HBM3".
        changes: other keys of record.json, for example authors=["someone"].

    Returns:
        The record's folder.
    """
    race = load_track(track)
    recipe = recipe or {
        "steps": steps,
        "batch_tokens": batch_tokens,
        "sequence_length": 256,
        "vocab_size": race.data.vocab_size,
        "optimizer": recipe_name,
    }
    folder = record_folder(records, race.id, DATE, name)
    with TemporaryDirectory(dir=records.parent) as scratch:
        digest = copy_source(source or fake_source(Path(scratch) / "trainer"), Path(scratch) / "source")
        start = start_event(race, recipe_name, recipe, digest, division)
        runs, files = [], []
        for seed, final_loss in zip(seeds, final_losses, strict=True):
            files.append(Path(scratch) / f"{seed}.jsonl")
            events = [{**start, "seed": seed}, *race_events(race, seed, final_loss, steps, batch_tokens, ms_per_step)]
            write_events(files[-1], events)
            times = {"process_time_ms": events[-1]["train_time_ms"] + 5000.0, "other_load_cores": 0.05}
            runs.append(result_of(events, events_name=f"runs/{seed}.jsonl", **times))
        values = {
            "schema_version": 1,
            "rules_version": RULES_VERSION,
            "name": name,
            "date": DATE,
            "authors": ["tester"],
            "note": "",
            "track": race.id,
            "track_definition": race.definition(),
            "source_sha256": digest,
            "frozen": frozen_version(digest),
            "recipe_name": recipe_name,
            "recipe": recipe,
            "settings": [],
            "environment": ENVIRONMENT,
            "division": division,
            "runs": [run.model_dump() for run in runs],
            "claim": claim_of(runs, race).model_dump(),
            "attempts": {"started": len(runs), "finished": len(runs)},
        }
        write_record(folder, Record.model_validate({**values, **changes}), source=Path(scratch) / "source", events=files)
    return folder


def fake_source(folder: Path) -> Path:
    """A trainer that fulfils the contract by name only."""
    folder.mkdir()
    (folder / "train.py").write_text(_TRAIN_PY, encoding="utf-8")
    return folder


def start_event(race: Track, recipe_name: str, recipe: dict[str, Any], source_sha256: str, division: str) -> dict[str, Any]:
    """The first event of a run, but for its seed; harness/worker.py writes the real one."""
    return {
        "event": "start",
        "schema_version": 1,
        "started_at": f"{DATE}T12:00:00+00:00",
        "track": race.id,
        "recipe_name": recipe_name,
        "recipe": recipe,
        "world_size": 1,
        "source_sha256": source_sha256,
        "frozen": frozen_version(source_sha256),
        "data_sha256": {shard: race.data.sha256.get(shard, sha256(shard)) for shard in race.data.shards()},
        "environment": ENVIRONMENT,
        "division": division,
    }


def race_events(race: Track, seed: int, final_loss: float, steps: int, batch_tokens: int, ms_per_step: float) -> list[dict[str, Any]]:
    """Everything after start, in the order and with the keys of harness/referee.py; each seed is 0.1 % slower than the one before."""
    first_loss = math.log(race.data.vocab_size)
    pace = ms_per_step * (1 + 0.001 * (seed % 10))

    def at(step: int) -> dict[str, Any]:
        return {"step": step, "tokens": step * batch_tokens, "train_time_ms": round(step * pace, 3)}

    def loss(step: int) -> float:
        done = step / steps
        return round(final_loss + (first_loss - final_loss) * (1 - done) / (1 + 40 * done), 6)

    events = [{"event": "warm_up", "digest_before": sha256(f"init {seed}"), "digest_after": sha256(f"init {seed}"), "warm_up_ms": 1500.0}]
    for step in range(steps):
        if step % race.val_every_steps == 0:
            events.append({"event": "validation", **at(step), "val_loss": loss(step)})
        events.append({"event": "step", **at(step + 1), "train_loss": loss(step)})
    end = {**at(steps), "val_loss": round(final_loss, 6)}
    events.append({"event": "validation", **end})
    events.append(
        {
            "event": "finish",
            **end,
            "epochs": 0.5,
            "weights_sha256": sha256(f"weights {seed}"),
            "weights_bytes": 4_000_000,
            "parameters": 1_000_000,
            "optimizer_state_bytes": 8_000_000,
            "peak_memory_mib": 700.0,
        }
    )
    return events


def write_events(path: Path, events: Sequence[dict[str, Any]]) -> None:
    """Write an event file with its chain."""
    writer = EventWriter(path)
    for event in events:
        writer.write(event)
    writer.close()


def sha256(text: str) -> str:
    """Digest of a text, where any 64 hex digits will do."""
    return hashlib.sha256(text.encode()).hexdigest()
