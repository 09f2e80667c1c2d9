"""The command line: parses, calls, prints. Commands stand in the order one uses them, each in a module of its own."""

from __future__ import annotations

import importlib
import sys

import click

from data.errors import UserError

COMMANDS = {  # name -> (module, one line for --help); a module is imported only when its command is used
    "doctor": ("harness.cli_doctor", "Say whether this machine is ready to race, and what to do if not."),
    "data": ("harness.cli_data", "List, fetch and check the tokens of a track."),
    "run": ("harness.cli_run", "Attempt a record: train under the referee and write it down."),
    "attempts": ("harness.cli_attempts", "List every run started on this machine, finished or not."),
    "verify": ("harness.cli_verify", "Judge records: is the evidence whole, does the claim follow from it?"),
    "plot": ("harness.cli_plot", "Draw records: Figure 1 and its relatives."),
}


class LazyGroup(click.Group):
    """A group whose commands are imported when they are called, so that --help stays instant."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names, in workflow order."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """The command of this name."""
        if name not in COMMANDS:
            return None
        return getattr(importlib.import_module(COMMANDS[name][0]), name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of commands, without importing any."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])


@click.group(cls=LazyGroup)
@click.version_option(package_name="speedrun")
def cli() -> None:
    """The referee of the NanoGPT speedrun: runs an attempt, proves what happened, and shows it.

    \b
    Start here:
      speedrun run            # races pocket (Shakespeare) where there is no GPU
      speedrun verify records/pocket
      speedrun plot figure1
    """


def require_python() -> None:
    """Refuse a python that is too old; run from a checkout, nothing else looks.

    Raises:
        UserError: with the version found and the version wanted.
    """
    if sys.version_info < (3, 11):  # noqa: UP036  this is what tells
        found = ".".join(map(str, sys.version_info[:3]))
        raise UserError(f"python {found} is too old, wanted at least 3.11", fix="./run.sh looks for a newer one; PYTHON=... names it")


def main() -> None:
    """Entry point: a user's mistake ends in a few lines on stderr and exit code 1, wrong usage in 2, Ctrl-C in 130."""
    try:
        require_python()
        code = cli.main(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except UserError as error:
        click.echo(f"Error: {error}", err=True)
        code = 1
    except BrokenPipeError:  # the reader of a pipe has gone
        sys.stderr.close()
        code = 1
    except OSError as error:  # a disk that fills up, a folder that goes away: ours to expect, not ours to mend
        click.echo(f"Error: {error.strerror or error}\n  {error.filename or 'no file named'}", err=True)
        code = 1
    except (click.Abort, KeyboardInterrupt) as error:
        reason = str(error.__cause__ or error) or "interrupted by Ctrl-C"  # click wraps the interrupt
        click.echo(f"Stopped: {reason}. Nothing is left running; speedrun attempts shows what was done.", err=True)
        code = 130
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
