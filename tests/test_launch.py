"""The launcher's own parts: the torchrun command, and why a run failed. Whole races are in test_race."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from harness.launch import Nodes, command, worker_environment
from harness.launch import _reason as reason

TORCHRUN_REPORT = """
Failures:
[1]:
  time      : 2031-02-03_00:00:00
  host      : node
  rank      : 0 (local_rank: 0)
  exitcode  : 1 (pid: 11)
  error_file: <N/A>
------------------------------------------------------------
Root Cause (first observed failure):
[0]:
  time      : 2031-02-03_00:00:00
  host      : node
  rank      : 1 (local_rank: 1)
  exitcode  : -9 (pid: 12)
  error_file: <N/A>
  traceback : Signal 9 (SIGKILL) received by PID 12
"""


def note(folder: Path, rank: int, text: str) -> None:
    """A failure as a rank leaves it."""
    (folder / f"failure-{rank}.json").write_text(json.dumps({"rank": rank, "reason": text, "where": None, "fix": None}))


def test_killed_rank_is_the_reason_not_its_neighbour(tmp_path):
    """When one rank is killed and another reports that it hung up, the reason is the kill."""
    (tmp_path / "output.log").write_text(TORCHRUN_REPORT)
    note(tmp_path, 0, "Connection closed by peer")

    assert ("rank 1 was killed by SIGKILL", 1) == (reason(tmp_path, 1)["reason"], reason(tmp_path, 1)["rank"])


def test_first_note_is_the_reason(tmp_path):
    """Of ranks that ended by themselves, the first to say why is believed."""
    (tmp_path / "output.log").write_text(TORCHRUN_REPORT.replace("-9", "1"))
    note(tmp_path, 1, "training loss is nan at step 3 on rank 1")

    assert "training loss is nan at step 3 on rank 1" == reason(tmp_path, 1)["reason"]


def test_silent_exit_code_is_told_with_the_log(tmp_path):
    """A rank that ends without a note is named with its exit code and the log to read."""
    (tmp_path / "output.log").write_text(
        TORCHRUN_REPORT.replace("exitcode  : -9", "exitcode  : 7").replace("exitcode  : 1", "exitcode  : 7")
    )

    assert "rank 0 ended with exit code 7" == reason(tmp_path, 1)["reason"]
    assert str(tmp_path / "output.log") == reason(tmp_path, 1)["where"]


def test_clean_end_has_no_reason(tmp_path):
    """Exit status 0 and no note: nothing failed."""
    (tmp_path / "output.log").write_text("")

    assert reason(tmp_path, 0) is None


def test_one_node_meets_on_a_free_port_and_several_at_the_endpoint():
    """One node uses torchrun's own rendezvous; several pass count, rank and endpoint through."""
    alone = command(Path("job.json"), Nodes(processes_per_node=8))
    several = command(Path("job.json"), Nodes(processes_per_node=8, nnodes=2, node_rank=1, rdzv_endpoint="node0:29500"))

    assert "--standalone" in alone
    assert {"--nnodes=2", "--node-rank=1", "--master-addr=node0", "--master-port=29500", "--nproc-per-node=8"} <= set(several)


@pytest.mark.parametrize(("device", "hidden"), [("cpu", True), ("cuda", False)])
def test_race_on_the_processor_hides_gpus(monkeypatch, device, hidden):
    """Ranks of a race on the processor see no GPU, so that `auto` precision means the processor."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    job = type("Job", (), {"device": device, "threads": 2, "run_folder": "."})

    assert hidden == (worker_environment(job).get("CUDA_VISIBLE_DEVICES") == "")
