"""`speedrun attempts`: the ledger for a person."""

from __future__ import annotations

import json

import click


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print the ledger's runs as JSON.")
def attempts(as_json: bool) -> None:
    """List every run started on this machine, finished or not.

    \b
    Example:
      speedrun attempts
    """
    from harness import home, ledger

    runs = ledger.runs(home.ledger_path())
    if as_json:
        click.echo(json.dumps(runs, indent=1, sort_keys=True))
        return
    if not runs:
        click.echo(f"No run has been started on this machine yet ({home.ledger_path()}).")
    for run in runs:
        finished = run["outcome"] == "finished"
        result = f"val_loss {run['val_loss']:.4f}" if finished else (run.get("reason") or "").partition("\n")[0]
        click.echo(
            f"{run['at']}  {run['track']:<8} {run['recipe_name']:<8} seed {run['seed']:<11} {run['outcome']:<11} {result}  {run['attempt']}"
        )
