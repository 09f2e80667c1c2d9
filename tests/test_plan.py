"""Planning: what is refused before anything starts, and what a plan says. The trainer's answer is given, not asked for."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from data.errors import UserError
from data.shard import write_shard
from harness import ledger, plan, preflight
from harness.machine import Gpu, Machine, division, environment
from harness.plan import Request, make_plan
from harness.resolve import Resolved

RECIPE = {"steps": 10, "batch_tokens": 1024, "sequence_length": 32, "vocab_size": 256, "micro_batch": 8, "layers": 1, "width": 32}
RESOLVED = Resolved(recipe_name="muon", recipe=RECIPE, parameters=1000, cuda_devices=0, matmul_gflops=100.0)
LAPTOP = Machine(cpu="Test Processor", cores=2, memory_mib=8000, available_mib=6000, gpus=(), driver=None)
NODE = replace(LAPTOP, gpus=(Gpu(name="NVIDIA H100 80GB HBM3", memory_mib=81559, free_mib=81000),) * 8, driver="580")


@pytest.fixture
def ask(tmp_path, monkeypatch):
    """A function (resolved, machine, dry, **request) that plans a race on a laptop with a shard of 20,000 tokens."""
    monkeypatch.setenv("SPEEDRUN_HOME", str(tmp_path / "home"))
    folder = tmp_path / "home" / "data" / "tiny"
    folder.mkdir(parents=True)
    for name in ("val.bin", "train_1.bin"):
        write_shard(folder / name, np.arange(20_000) % 250)
    track = tmp_path / "tiny.toml"
    track.write_text(
        'id = "tiny"\ntitle = "t"\ntarget_loss = 2.0\nval_tokens = 1024\nval_sequence_length = 32\nval_every_steps = 5\nclock = "c"\n'
        'ranked_by = "train_time"\n[significance]\ntest = "t"\np_below = 0.01\n[data]\nname = "tiny"\nsource = "local"\n'
        'vocab_size = 256\nval_shards = ["val.bin"]\ntrain_shards = ["train_1.bin", "train_2.bin"]\n'
    )

    def ask(*, resolved=RESOLVED, machine=LAPTOP, dry=False, **request):
        monkeypatch.setattr(plan, "resolve_recipe", lambda *arguments, **options: resolved)
        monkeypatch.setattr(plan, "this_machine", lambda: machine)
        options = {"trainer": plan.home.repository() / "trainer", "track": str(track), "records": tmp_path / "records", **request}
        return make_plan(Request(**options), dry=dry)

    return ask


def test_plan_says_what_will_be_read(ask):
    """A plan names tokens, shards in reading order and their digests, and the division."""
    made = ask()

    assert (10, 10_240) == (made.steps, made.tokens)
    assert ["train_1.bin"] == [path.name for path in made.shards.train]
    assert {"val.bin", "train_1.bin"} == set(made.shards.sha256)
    assert "cpu 2 threads Test Processor" == made.division


def test_race_refuses_missing_data_and_a_dry_run_lists_it(ask):
    """A recipe that reads past the shards that are here is refused by a race and shown by a dry run."""
    long = replace(RESOLVED, recipe={**RECIPE, "steps": 30})

    with pytest.raises(UserError, match=r"data is missing: train_2\.bin"):
        ask(resolved=long)
    assert ("train_2.bin",) == ask(resolved=long, dry=True).shards.missing


REFUSED = {
    "GPUs that torch does not see": ({"gpus": 8, "machine": NODE}, "torch sees 0"),
    "more GPUs than there are": ({"gpus": 9, "machine": NODE}, "this machine has 8"),
    "memory": ({"resolved": replace(RESOLVED, parameters=10**9)}, "MiB of memory"),
    "vocabulary": ({"resolved": replace(RESOLVED, recipe={**RECIPE, "vocab_size": 100})}, "vocab_size 100 is below"),
    "recipe without steps": ({"resolved": replace(RESOLVED, recipe={**RECIPE, "steps": None})}, "does not say steps"),
    "batch": ({"nproc": 3}, "does not split into 3 processes"),
    "endpoint without port": ({"nnodes": 2, "seed": 1, "rdzv_endpoint": "node0"}, "is not HOST:PORT"),
    "nodes without seed": ({"nnodes": 2, "rdzv_endpoint": "node0:29500"}, "must agree on the seed"),
    "node rank": ({"nnodes": 2, "node_rank": 2, "seed": 1, "rdzv_endpoint": "node0:29500"}, "node rank 2 of 2"),
    "long name": ({"name": "x" * 201}, "201 characters"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(ask, case):
    """Each obstacle is refused with the value that was found."""
    request, sentence = REFUSED[case]

    with pytest.raises(UserError, match=sentence):
        ask(**request)


def test_name_nobody_chose_is_counted_up(ask):
    """A default name that is taken gets a number; existing records stay untouched."""
    first = ask()
    first.record.mkdir(parents=True)

    assert ("muon", "muon-2") == (first.name, ask().name)


def test_seeds_count_up_from_the_given_one_and_differ_when_drawn(ask):
    """--seed S --runs N gives S to S + N - 1; without a seed all runs differ."""
    assert (5, 6, 7) == ask(seed=5, runs=3).seeds
    assert 8 == len(set(ask(runs=8).seeds))


def test_estimate_is_the_last_time_in_this_division(ask):
    """The estimated minutes are the last measured ones of the same source and recipe, of this division only."""
    guess = ask().minutes
    known = {"recipe_sha256": ledger.recipe_digest(RECIPE), "source_sha256": ask().source_sha256, "outcome": "finished"}
    ledger.append(preflight.home.ledger_path(), entry="run_ended", division="8x NVIDIA H100 80GB HBM3", train_time_ms=60_000.0, **known)
    ledger.append(preflight.home.ledger_path(), entry="run_ended", division="cpu 2 threads Test Processor", **known)

    assert guess == ask().minutes
    ledger.append(
        preflight.home.ledger_path(), entry="run_ended", division="cpu 2 threads Test Processor", train_time_ms=180_000.0, **known
    )
    assert 3.0 == ask().minutes


@pytest.mark.parametrize(
    ("machine", "gpus", "processes", "nodes", "expected"),
    [
        (LAPTOP, 0, 1, 1, "cpu 2 threads Test Processor"),
        (LAPTOP, 0, 2, 1, "cpu 2 threads Test Processor"),
        (LAPTOP, 0, 4, 1, "cpu 2 threads Test Processor"),
        (LAPTOP, 0, 2, 2, "2x cpu 2 threads Test Processor"),
        (NODE, 8, 8, 1, "8x NVIDIA H100 80GB HBM3"),
        (NODE, 8, 16, 2, "16x NVIDIA H100 80GB HBM3"),
    ],
)
def test_division(machine, gpus, processes, nodes, expected):
    """A division names what times depend on: the GPUs, or the threads and the processor."""
    assert expected == division(environment(machine, gpus=gpus, processes=processes, nodes=nodes))
