"""`fewstep ...`, the same as `python -m fewstep_analysis ...`: the commands in the order of the help."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from importlib import metadata
from typing import Annotated, Any

import typer

from . import measuring, training

HELP = """Solve SDEs and sample diffusion models in few steps, and measure how well.

Begin with these, in this order:

\b
  fewstep demo          distil a sampler of handwritten digits to 5 steps
  fewstep solvers       every solver, its declared and its measured order
  fewstep convergence --solver euler_maruyama --solver milstein
                        measure orders of convergence yourself
  fewstep study         the published experiments, each to be run again

Results go into the current folder (fewstep-demo/, order.svg with the numbers beside it in order.json;
of studies, analysis/records and docs/figures); --out names another place. --json prints a result as JSON.

\b
Each command:  fewstep COMMAND --help
The docs:      docs/index.md of the repository; docs/cli.md on these commands
"""
DISTILL = """Distil a sampler into one of few steps.

In Python there are more ways: distill_sigdeg, distill_sfddm (docs/learned.md)."""
CODES = {"InputError": 2, "NonFiniteError": 1}
PLAIN = {"no_args_is_help": True, "rich_markup_mode": None, "pretty_exceptions_enable": False}

app = typer.Typer(help=HELP, add_completion=True, **PLAIN)  # type: ignore[arg-type]
distill = typer.Typer(help=DISTILL, short_help="Distil a sampler into one of few steps.", **PLAIN)  # type: ignore[arg-type]

app.command("demo", short_help="The main job on real images, in minutes.")(training.demo)
app.command("solvers", short_help="The table of solvers with their orders.")(measuring.solvers)
app.command("convergence", short_help="Measure strong or weak orders.")(measuring.convergence)
app.command("work-precision", short_help="Error against evaluations and seconds.")(measuring.work_precision)
app.command("study", short_help="List the experiments, or run one again.")(measuring.study)
app.add_typer(distill, name="distill")
distill.command("dode", short_help="Fit a few numbers a step, in seconds.")(training.dode)
app.command("train-teacher", short_help="Train a shipped network again.")(training.train_teacher)


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
    """(path, command, help text of 80 columns) of every command and group: for the docs and the tests."""
    command = typer.main.get_command(app) if command is None else command
    context = command.make_context(path, [], resilient_parsing=True, terminal_width=78)
    yield path, command, command.get_help(context)
    for name, sub in getattr(command, "commands", {}).items():
        yield from helps(sub, f"{path} {name}")


def spread(words: list[str]) -> list[str]:
    """`--nfe 5 8 10` as `--nfe 5 --nfe 8 --nfe 10`, which is what the parser knows."""
    out, after = list[str](), False
    for word in words:
        if after and word.isdigit() and out[-1] != "--nfe":
            out.append("--nfe")
        after = word == "--nfe" or (after and word.isdigit())
        out.append(word)
    return out


def main() -> None:
    """Run the command line; bad input is one line and exit code 2, numbers that run away the same with 1."""
    try:
        app(spread(sys.argv[1:]), prog_name="fewstep")
    except Exception as error:
        # by name: the library's own classes come only with torch, and InputError has a twin without
        code = 2 if isinstance(error, OSError) else CODES.get(type(error).__name__)
        if code is None:
            raise
        typer.echo(f"fewstep: {error}", err=True)
        sys.exit(code)
    finally:
        _last_words()


def _last_words() -> None:
    """A reader that has gone (`| head`) is no error."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
