"""What the commands share: options, results on stdout, Ctrl-C, and checks of output files before the work."""

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.models import OptionInfo

from fewstep.errors import InputError

from .completion import DEVICES, complete

SMALL = 2**19  # numbers of a tensor on which one thread works as fast as several


def _seed(value: int) -> int:
    if not 0 <= value <= 2**62:
        raise typer.BadParameter(f"got {value}, expected 0 to 2^62.")
    return value


def name_option(text: str, *words: Sequence[str] | Callable[[], Iterable[str]], **more: Any) -> Any:
    """An option that takes a name, and completes it from these words."""
    return typer.Option(metavar="NAME", help=text, autocompletion=complete(*words), **more)


Seed = Annotated[int, typer.Option(metavar="N", callback=_seed, help="Seed of all random numbers.")]
Device = Annotated[str, name_option("cpu, cuda, or cuda:1.", DEVICES)]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON document.")]
Threads = Annotated[
    int | None,
    typer.Option(metavar="N", min=1, max=1024, help="Threads on the CPU. Default: 1 for small tensors, else torch's."),
]
FigureOption: OptionInfo = typer.Option(
    metavar="FILE", help="Figure (.svg, .png or .pdf); a record with suffix .json is added."
)
Figure = Annotated[Path, FigureOption]


def is_first() -> bool:
    """Return True on rank 0; reads $RANK, so torch is not imported."""
    return os.environ.get("RANK", "0") == "0"


@contextlib.contextmanager
def working(places: Sequence[Path] = ()) -> Iterator[Callable[[], list[str]]]:
    """The long part of a command: its output goes to stderr, and Ctrl-C prints one line.

    Args:
        places: the files that it writes, or the folders in which it writes files.

    Yields:
        a function that returns the names of the files written so far.
    """
    before = _stamps(places)

    def wrote() -> list[str]:
        return [str(p) for p, stamp in _stamps(places).items() if before.get(p) != stamp]

    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield wrote
    except KeyboardInterrupt:
        # raised outside of the handler, whose traceback would keep a progress bar alive
        stopped = f"written so far: {', '.join(wrote())}" if wrote() else "nothing was written"
    else:
        return
    if is_first():
        typer.echo(("\n" if sys.stderr.isatty() else "") + f"fewstep: stopped; {stopped}", err=True)
    raise typer.Exit(130)  # the exit code of SIGINT


def use_threads(threads: int | None, numbers: int) -> None:
    """Set torch's threads, and print them: those asked for, else one where tensors have few numbers.

    Threads that share small tensors mostly wait for each other, on a busy machine for many times the work.
    """
    import torch

    why = "as asked" if threads else "torch's choice"
    if threads is None and numbers <= SMALL:
        threads, why = 1, f"as tensors of {numbers:,} numbers are small"
    threads = threads or torch.get_num_threads()
    torch.set_num_threads(threads)
    if is_first():
        print(f"{threads} thread{'s' * (threads > 1)}, {why}; --threads N changes it", file=sys.stderr)


def _stamps(places: Sequence[Path]) -> dict[Path, tuple[int, int]]:
    found = [f for p in places for f in (sorted(p.iterdir()) if p.is_dir() else [p])]
    files = [f for f in found if f.is_file() and f.suffix != ".part"]  # .part: not complete yet
    return {f: (f.stat().st_mtime_ns, f.stat().st_size) for f in files}


def tell(as_json: bool, document: Any, lines: Sequence[str]) -> None:
    """Print the result: the document as JSON, or the lines; on the first process only."""
    if is_first():
        typer.echo(json.dumps(document, indent=1) if as_json else "\n".join(lines))


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The rows as a table: drawn by rich on a terminal, aligned plain text in a pipe."""
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        drawn, console = Table(*columns), Console()
        for row in rows:
            drawn.add_row(*row)
        with console.capture() as capture:
            console.print(drawn)
        return capture.get().rstrip()
    lines = [columns, *rows]
    widths = [max(len(line[k]) for line in lines) for k in range(len(columns))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths)).rstrip() for line in lines)


def figure_files(out: Path) -> list[Path]:
    """The figure and its record, checked to be writable."""
    from fewstep._figures import SUFFIXES

    if out.suffix not in SUFFIXES:
        raise InputError(f"out: got {out!s:.80}, expected a file that ends in {', '.join(SUFFIXES)}.")
    return [output_file(out), output_file(out.with_suffix(".json"))]


def output_file(out: Path) -> Path:
    """A file, checked to be writable before the long work begins."""
    from fewstep._validation import check_file

    if check_file(out, "out").is_dir():
        raise InputError(f"out: {out} is a folder, expected a file. Use for instance {out / 'NAME'}.")
    output_folder(out.parent)
    return out


def output_folder(out: Path) -> Path:
    """A folder that exists or can be made, checked to be writable."""
    from fewstep._validation import check_file

    check_file(out, "out")
    existing = next(p for p in (out, *out.absolute().parents) if p.exists())
    if not existing.is_dir():
        raise InputError(f"out: {existing} is a file, expected a folder. Choose another --out.")
    try:
        with tempfile.TemporaryFile(dir=existing):  # permissions do not tell of read-only disks
            pass
    except OSError as error:
        raise InputError(
            f"out: nothing can be written in {existing} ({error.strerror}). Choose another --out."
        ) from error
    return out
