"""The commands of `fewstep`, in the order of the help, and the exit codes of their errors."""

import contextlib
import os
import sys
from collections.abc import Iterator
from importlib import metadata
from typing import Annotated, Any

import typer

from fewstep.errors import InputError, NonFiniteError

from . import learning, measuring

HELP = """Solve SDEs and sample diffusion models in few steps, and measure the accuracy.

Start with these, in this order:

\b
  fewstep demo          fit a sampler of handwritten digits, in a minute
  fewstep solvers       every solver, its declared and its measured order
  fewstep convergence --solver euler_maruyama --solver milstein
                        measure orders of convergence

Results are written to the current folder (fewstep-demo/, order.svg and order.json);
--out chooses another place. --json prints a result as JSON.

\b
Each command:  fewstep COMMAND --help
The docs:      docs/index.md of the repository; docs/cli.md on these commands
"""
DISTILL = """Distil a sampler to few steps.

In Python there are more methods: distill_sigdeg, distill_sfddm (docs/learned.md)."""
PLAIN: dict[str, Any] = {"no_args_is_help": True, "rich_markup_mode": None, "pretty_exceptions_enable": False}

app: typer.Typer = typer.Typer(help=HELP, add_completion=True, **PLAIN)
distill: typer.Typer = typer.Typer(help=DISTILL, short_help="Distil a sampler to few steps.", **PLAIN)

app.command("demo", short_help="Fit, sample and measure on real images, in a minute.")(learning.demo)
app.command("solvers", short_help="The table of solvers with their orders.")(measuring.solvers)
app.command("convergence", short_help="Measure strong or weak orders.")(measuring.convergence)
app.command("work-precision", short_help="Error against evaluations and seconds.")(measuring.work_precision)
app.command("compare", short_help="The best sampler for one model, by its error.")(measuring.compare)
app.command("fit-table", short_help="Fit a sampler of a few evaluations, in seconds.")(learning.fit_table)
app.add_typer(distill, name="distill")
distill.command("dode", short_help="Fit a few numbers per step, in seconds.")(learning.dode)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"fewstep {metadata.version('fewstep')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None: ...


def helps(command: Any = None, path: str = "fewstep") -> Iterator[tuple[str, Any, str]]:
    """(path, command, help text of 80 columns) of every command and group, for the documentation."""
    command = typer.main.get_command(app) if command is None else command
    context = command.make_context(path, [], resilient_parsing=True, terminal_width=78)
    yield path, command, command.get_help(context)
    for name, sub in getattr(command, "commands", {}).items():
        yield from helps(sub, f"{path} {name}")


def repeat_nfe(words: list[str]) -> list[str]:
    """Rewrite `--nfe 5 8 10` as `--nfe 5 --nfe 8 --nfe 10`, which the parser understands."""
    out, after = list[str](), False
    for word in words:
        if after and word.isdigit() and out[-1] != "--nfe":
            out.append("--nfe")
        after = word == "--nfe" or (after and word.isdigit())
        out.append(word)
    return out


def run() -> None:
    """Run a command; bad input is one line and exit code 2, a non-finite result one line and exit code 1."""
    try:
        app(repeat_nfe(sys.argv[1:]), prog_name="fewstep")
    except (InputError, NonFiniteError, OSError) as error:
        typer.echo(f"fewstep: {error}", err=True)
        sys.exit(1 if isinstance(error, NonFiniteError) else 2)
    finally:
        _flush()


def _flush() -> None:
    """Flush stdout; a closed pipe (`| head`) is not an error."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
