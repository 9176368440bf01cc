"""The command line: `fewstep ...`, the same as `python -m fewstep.analysis ...`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    no_args_is_help=True, add_completion=True, rich_markup_mode=None, pretty_exceptions_enable=False,
    help="Few-step SDE and diffusion solvers: distil, sample, measure. Start with: fewstep demo",
)  # fmt: skip

Seed = Annotated[int, typer.Option(help="Fixes every random number.")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for pictures and tables.")] = Path("fewstep-demo"),
    seed: Seed = 0,
    quick: Annotated[bool, typer.Option(help="A tenth of the training: a look, not a result.")] = False,
) -> None:
    """Distil a 300-step sampler of handwritten digits to 5 steps, and prove it.

    Example: fewstep demo --out fewstep-demo
    """
    from .demo import run

    run(out, seed=seed, quick=quick)


@app.command()
def convergence(
    solver: Annotated[list[str], typer.Option(help="Name of a solver; may be given again.")],
    problem: Annotated[str, typer.Option(help="Name of a problem.")] = "geometric_brownian_motion",
    reference: Annotated[str, typer.Option(help="torchsde, exact or levels.")] = "torchsde",
    levels: Annotated[tuple[int, int], typer.Option(help="Coarsest and finest level.")] = (4, 9),
    paths: Annotated[int, typer.Option(help="Number of paths.")] = 4096,
    out: Annotated[Path, typer.Option(help="Figure; the record goes beside it.")] = Path("order.svg"),
    seed: Seed = 0,
    device: Device = "cpu",
) -> None:
    """Measure strong orders, draw them, and save the record.

    Example: fewstep convergence --solver euler_maruyama --solver milstein --out order.svg
    """
    from . import problems
    from .convergence import strong_orders
    from .figures import strong_order_figure
    from .records import Record

    estimates = strong_orders(
        [_solver(name) for name in solver], problems.by_name(problem), paths=paths, seed=seed,
        levels=range(levels[0], levels[1] + 1), reference=reference, device=device,
    )  # fmt: skip
    records = [e.record() for e in estimates]
    strong_order_figure(records, out)
    data: dict[str, Any] = {"estimates": [r.data for r in records]}
    beside = Record("strong-orders", data, seed, records[0].made).save(out.with_suffix(".json"))
    for e in estimates:
        local = " ".join(f"{v:.2f}" for v in e.local)
        typer.echo(f"{e.solver}: order {e.order:.2f} [{e.low:.2f}, {e.high:.2f}], local slopes {local}")
    typer.echo(f"wrote {out} and {beside}")


def _solver(name: str) -> Any:
    import fewstep
    from fewstep.errors import one_of

    able = {n: c for n, c in fewstep.solvers().items() if c.card.strong_order}
    wanted = {n.lower(): c for n, c in able.items()}
    found = wanted.get(name.replace("_", "").lower())
    if found is None:
        raise one_of("solver", name, [_snake(n) for n in able])
    return found()


def _snake(name: str) -> str:
    """EulerMaruyama -> euler_maruyama; capitals in a row stay one word."""
    import re

    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()


@app.command()
def solvers(
    as_json: Annotated[bool, typer.Option("--json", help="The cards as JSON.")] = False,
    measure: Annotated[bool, typer.Option(help="Measure every order again (minutes).")] = False,
) -> None:
    """List every solver: what it solves, its declared order and the measured one.

    Example: fewstep solvers
    """
    from . import cards

    if measure:
        cards.measure_cards().save(cards.MEASURED)
    rows = cards.rows()
    typer.echo(json.dumps([dict(zip(cards.COLUMNS, r)) for r in rows], indent=1) if as_json
               else cards.text(rows))  # fmt: skip


@app.command("train-teacher")
def train_teacher(
    name: Annotated[str, typer.Argument(help="digits")] = "digits",
    out: Annotated[Path | None, typer.Option(help="Where the weights go.")] = None,
    seed: Seed = 0,
) -> None:
    """Train a shipped diffusion teacher again from scratch.

    Example: fewstep train-teacher digits --out digits.safetensors
    """
    from .teachers import train

    typer.echo(f"wrote {train(name, out or Path(f'{name}.safetensors'), seed=seed)}")


def main() -> None:
    """Run the command line; bad input is one line and exit code 2."""
    from fewstep.errors import InputError

    try:
        app(prog_name="fewstep")
    except InputError as error:
        typer.echo(f"fewstep: {error}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
