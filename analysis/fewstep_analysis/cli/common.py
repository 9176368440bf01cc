"""What the commands share: results on stdout, all else on stderr; Ctrl-C; places that can be written to."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from .completion import complete, errors

FIGURES = (".svg", ".png", ".pdf")


def _seed(value: int) -> int:
    if not 0 <= value <= 2**62:
        raise typer.BadParameter(f"got {value}, expected 0 to 2^62.")
    return value


Seed = Annotated[int, typer.Option(metavar="N", callback=_seed, help="Fixes every random number.")]


def word(said: str, words: Callable[[], Iterable[str]], **more: Any) -> Any:
    """An option that takes a name, and completes it."""
    return typer.Option(metavar="NAME", help=said, autocompletion=complete(words), **more)


Device = Annotated[str, word("cpu, cuda, or cuda:1.", lambda: ("cpu", "cuda"))]
Json = Annotated[bool, typer.Option("--json", help="The result as one JSON document on stdout.")]
Figure = Annotated[
    Path,
    typer.Option(
        metavar="FILE", help="Figure (.svg, .png or .pdf); the record goes beside it as .json."
    ),
]  # fmt: skip


def is_first() -> bool:
    """Whether this is the process that speaks, of those that torchrun started; known without torch."""
    return os.environ.get("RANK", "0") == "0"


@contextlib.contextmanager
def working(
    places: Sequence[Path] = (), goes_on: Callable[[], str] = lambda: ""
) -> Iterator[Callable[[], list[str]]]:
    """The long part of a command: what it prints is no result and goes to stderr; Ctrl-C is one line.

    Args:
        places: the files it writes, or folders (not theirs) in which it writes them.
        goes_on: what a stopped run keeps and how to go on, in words; "" where it keeps nothing.

    Yields:
        a function that names the files written so far.
    """
    before = _stamps(places)

    def wrote() -> list[str]:
        return [str(p) for p, stamp in _stamps(places).items() if before.get(p) != stamp]

    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield wrote
    except KeyboardInterrupt:
        # the traceback would keep a progress bar alive, which then writes over the line
        _stopped(goes_on() or _so_far(wrote()))


def _so_far(files: list[str]) -> str:
    return f"written so far: {', '.join(files)}; the same command begins again" if files else (
        "nothing was written")  # fmt: skip


def _stopped(said: str) -> NoReturn:
    if is_first():
        typer.echo(("\n" if sys.stderr.isatty() else "") + f"fewstep: stopped; {said}", err=True)
    raise typer.Exit(130)  # what a shell gives for SIGINT


def _stamps(places: Sequence[Path]) -> dict[Path, tuple[int, int]]:
    found = [f for p in places for f in (sorted(p.iterdir()) if p.is_dir() else [p])]
    # .part: on its way to become a file
    files = [f for f in found if f.is_file() and f.suffix != ".part"]
    return {f: (f.stat().st_mtime_ns, f.stat().st_size) for f in files}


def tell(as_json: bool, document: Any, lines: Sequence[str]) -> None:
    """The result on stdout: the document, or the lines for people; by the first process alone."""
    if is_first():
        typer.echo(json.dumps(document, indent=1) if as_json else "\n".join(lines))


def figure_place(out: Path) -> list[Path]:
    """The figure and the record beside it, if both can be written."""
    if out.suffix not in FIGURES:
        refuse(
            f"out: got {out}, expected a file that ends in {', '.join(FIGURES)}; the record goes beside it."
        )
    return [file_place(out), file_place(out.with_suffix(".json"))]


def file_place(out: Path, make: bool = True) -> Path:
    """A file that can be written, asked before the long work begins.

    Args:
        make: whether a missing folder will be made.
    """
    if out.is_dir():
        refuse(f"out: {out} is a folder, expected a file. Give it a name there, {out / 'NAME'}.")
    if not make and not out.parent.is_dir():
        refuse(f"out: got {out}, whose folder does not exist; make it first.")
    _writable(out.parent)
    return out


def folder_place(out: Path) -> Path:
    """A folder that is there or can be made, and written to."""
    _writable(out)
    return out


def _writable(folder: Path) -> None:
    there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not there.is_dir():
        refuse(f"out: {there} is a file, expected a folder. Choose another --out.")
    try:
        with tempfile.TemporaryFile(dir=there):  # tried: permissions do not know of read-only disks
            pass
    except OSError as error:
        refuse(f"out: nothing can be written in {there} ({error.strerror}). Choose another --out.")


def device_here(name: str) -> str:
    """A device that this machine has."""
    from fewstep import _validation

    return str(_validation.check_device(name))


def refuse(message: str) -> NoReturn:
    """Bad input; `main` makes it one line."""
    raise errors().InputError(message)
