"""`speedrun run`: parse, call, print."""

from __future__ import annotations

import json
import shutil
import signal
import sys
from pathlib import Path

import click


@click.command()
@click.argument("trainer", required=False, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--track",
    help="Race: pocket, fineweb, fineweb-medium, fineweb-steps, or the path of a .toml file. Default: pocket without a GPU, else fineweb.",
)
@click.option("--recipe", help="The trainer's recipe for the track, such as muon or adamw. Default: its first.")
@click.option("--gpus", type=click.IntRange(0), help="GPUs over all nodes. Default: all there are.")
@click.option("--nproc", type=click.IntRange(1), help="Processes of a node for a race on the processor. Default: 1.")
@click.option("--runs", type=click.IntRange(1), default=1, show_default=True, help="Runs from different seeds, one after another.")
@click.option("--seed", type=click.IntRange(0, 2**31 - 1), help="Seed of the first run, counted up. Default: drawn afresh.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Change a field of the recipe; may be repeated.")
@click.option("--name", help="Name of the record. Default: the recipe's.")
@click.option("--author", "authors", multiple=True, help="Author of the record; may be repeated.")
@click.option("--note", default="", help="Free text kept in the record.")
@click.option("--records", type=click.Path(file_okay=False, path_type=Path), help="Where records go. Default: records/ of this checkout.")
@click.option("--nnodes", type=click.IntRange(1), default=1, show_default=True, help="Machines in the race; passed to torchrun.")
@click.option("--node-rank", type=click.IntRange(0), default=0, show_default=True, help="Which of them this is; node 0 keeps the record.")
@click.option("--rdzv-endpoint", metavar="HOST:PORT", help="Where the nodes meet: an address of node 0.")
@click.option("--dry-run", is_flag=True, help="Print the plan, start nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the outcome as JSON.")
def run(trainer: Path | None, authors: tuple[str, ...], dry_run: bool, as_json: bool, **options) -> None:
    """Attempt a record: train under the referee and write it down.

    TRAINER is a folder with a module train; without it the frozen trainer runs.

    \b
    Examples:
      speedrun run                                     # pocket on a laptop
      speedrun run --track fineweb --gpus 8            # the NanoGPT speedrun
      speedrun run --runs 4 --recipe adamw --set lr=0.004 --name adamw
      speedrun run attempts/mine --runs 4 --author ada
    """
    from harness.attempt import make_attempt
    from harness.home import repository
    from harness.plan import Request, make_plan
    from harness.progress import Progress

    signal.signal(signal.SIGTERM, _terminated)
    request = Request(trainer=trainer or repository() / "trainer", authors=authors, **options)
    plan = make_plan(request, dry=dry_run, say=lambda text: click.echo(text, err=True))
    if dry_run:
        click.echo(json.dumps(plan.summary(), indent=1, sort_keys=True) if as_json else plan_text(plan))
        return
    progress = Progress(steps=plan.steps, runs=len(plan.seeds), target=plan.track.target_loss)
    try:
        done = make_attempt(plan, progress.event)
    finally:
        progress.close()
    if done.record is None:
        click.echo(f"This node's part is done; the record is on node 0. Output: {done.folder}")
    elif as_json:
        click.echo(json.dumps({"record": str(done.record_folder), **done.record.model_dump()}, indent=1, sort_keys=True))
    else:
        click.echo(outcome_text(done))


def _terminated(number: int, frame: object) -> None:
    """SIGTERM, from a scheduler for instance, ends an attempt as Ctrl-C does: everything stopped, the reason kept."""
    raise KeyboardInterrupt(f"interrupted by {signal.Signals(number).name}")


def plan_text(plan) -> str:
    """The plan for a person."""
    request, shards = plan.request, (*plan.shards.val, *plan.shards.train)
    changed = f"  ({' '.join(request.settings)})" if request.settings else ""
    recipe = "  ".join(f"{key}={value}" for key, value in plan.recipe.items())
    few = ", ".join(path.name for path in shards[:3]) + (f" and {len(shards) - 3} more" if len(shards) > 3 else "")
    missing = f", {len(plan.shards.missing)} of them MISSING: speedrun data get {plan.track.id}" if plan.shards.missing else ""
    return "\n".join(
        [
            f"track      {plan.track.id}: {plan.track.title}, {plan.track.target_text}",
            f"trainer    {relative(request.trainer)} ({'frozen ' + plan.frozen if plan.frozen != 'modified' else 'modified'}, {plan.resolved.parameters:,} parameters)",
            f"recipe     {plan.resolved.recipe_name}{changed}",
            f"           {recipe}",
            f"machine    {plan.division}, {plan.processes} process{'es' if plan.processes > 1 else ''}, about {plan.memory_mib:,} MiB each",
            f"length     {plan.steps:,} steps, {plan.tokens:,} tokens, about {plan.minutes:.1f} min a run",
            f"runs       {len(plan.seeds)}, seed{'s' if len(plan.seeds) > 1 else ''} {', '.join(map(str, plan.seeds))}",
            f"data       {few} in {plan.shards.val[0].parent}{missing}",
            f"record     {relative(plan.record)}",
            "Nothing was started.",
        ]
    )


def outcome_text(done) -> str:
    """Verdict, record, and the two commands that come next."""
    claim, test = done.record.claim, done.test
    track = done.record.track_definition
    spread = "" if claim.sd_val_loss is None else f" (n={claim.n}, sd {claim.sd_val_loss:.4f})"
    relation = "reached" if claim.target_met else "not reached"
    seconds = claim.mean_train_time_ms / 1e3
    return "\n".join(
        [
            f"{done.record.track}: target {relation}: val_loss {claim.mean_val_loss:.4f}{spread}, wanted {track['target_loss']:g}; {test.statement}",
            f"train_time {seconds:.1f} s, {claim.tokens:,} tokens, {claim.steps} steps, {claim.mean_train_time_ms / claim.steps:.1f} ms/step, {done.record.division}",
            f"record     {relative(done.record_folder)}",
            f"verify     {program()} verify {relative(done.record_folder)}",
            f"plot       {program()} plot figure1 {relative(done.record_folder)}",
        ]
    )


def program() -> str:
    """How this program was called, so that a printed command can be pasted: after ./run.sh it is not on PATH."""
    called = Path(sys.argv[0])
    if called.name != "speedrun":
        return "python -m harness.cli"
    return "speedrun" if shutil.which("speedrun") else relative(called)


def relative(path: Path) -> str:
    """A path as the user would type it from here."""
    here = Path.cwd()
    return str(path.resolve().relative_to(here)) if path.resolve().is_relative_to(here) else str(path)
