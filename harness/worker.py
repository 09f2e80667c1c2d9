"""One rank of a run, started by torchrun: `python -m harness.worker JOB.json`. Sets the stage, then hands over to the trainer."""

from __future__ import annotations

import json
import os
import random
import sys
import traceback
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from data.errors import UserError
from data.stream import TokenSequence
from harness import events
from harness.job import Job
from harness.orphan import die_with_parent
from harness.recipe import choose, from_values
from harness.referee import Referee
from harness.source import load_trainer, source_digest
from harness.track import load_track

_COLLECTIVE_TIMEOUT = timedelta(minutes=10)


def main(job_path: Path) -> int:
    """Run one rank; the exit status is 0 when the trainer finished."""
    die_with_parent()
    job = Job.load(job_path)
    rank = int(os.environ.get("RANK", "0"))
    try:
        _race(job, rank)
    except BaseException as error:  # every reason is written down, also SystemExit from a trainer
        _note_failure(Path(job.run_folder), rank, error)
        traceback.print_exc()
        return 1
    return 0


def _race(job: Job, rank: int) -> None:
    world_size, local_rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank) if job.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(job.threads)
    if world_size > 1:
        if device.type == "cuda":
            dist.init_process_group("nccl", timeout=_COLLECTIVE_TIMEOUT, device_id=device)
        else:
            dist.init_process_group("gloo", timeout=_COLLECTIVE_TIMEOUT)
    torch.manual_seed(job.seed)
    np.random.seed(job.seed % 2**32)
    random.seed(job.seed)

    if source_digest(Path(job.source)) != job.source_sha256:
        raise UserError("the trainer's source changed after it was copied", where=job.source, fix="Start the attempt again")
    train = load_trainer(Path(job.source))
    track = load_track(job.track)
    recipe = from_values(choose(train.RECIPES, track.id, job.recipe_name)[1], job.recipe)
    run_folder = Path(job.run_folder)
    writer = events.EventWriter(run_folder / "events.jsonl") if rank == 0 else None
    if writer is not None:
        writer.write(_start_event(job, track.id, world_size))
    referee = Referee(
        track=track,
        seed=job.seed,
        train=TokenSequence([Path(path) for path in job.train_shards], track.data.vocab_size),
        val=TokenSequence([Path(path) for path in job.val_shards], track.data.vocab_size),
        device=device,
        writer=writer,
        weights_folder=Path(job.weights_folder),
    )
    train.main(referee, recipe)
    if not referee.finished:
        raise UserError(
            "the trainer returned without referee.finish(model)", where="train.main", fix="Call referee.finish(model) after the last step"
        )
    if world_size > 1:
        dist.destroy_process_group()


def _start_event(job: Job, track_id: str, world_size: int) -> dict:
    return {
        "event": "start",
        "schema_version": events.SCHEMA_VERSION,
        "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "track": track_id,
        "recipe_name": job.recipe_name,
        "recipe": job.recipe,
        "seed": job.seed,
        "world_size": world_size,
        "source_sha256": job.source_sha256,
        "frozen": job.frozen,
        "data_sha256": job.data_sha256,
        "environment": job.environment,
        "division": job.division,
    }


def _note_failure(run_folder: Path, rank: int, error: BaseException) -> None:
    """Leave this rank's reason for the launcher, which makes it the run's failure event."""
    reason = error.what if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    note = {"rank": rank, "reason": reason, "where": getattr(error, "where", None), "fix": getattr(error, "fix", None)}
    (run_folder / "reserve").unlink(missing_ok=True)  # a full disk keeps room for the reason
    (run_folder / f"failure-{rank}.json").write_text(json.dumps(note, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    status = main(Path(sys.argv[1]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # an orderly end would wait for ranks that never come, and take torch apart for a second
