"""The command line: `fewstep ...`, the same as `python -m fewstep.analysis ...`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

app: typer.Typer = typer.Typer(
    no_args_is_help=True, add_completion=True, rich_markup_mode=None, pretty_exceptions_enable=False,
    help="Few-step SDE and diffusion solvers: distil, sample, measure. Start with: fewstep demo",
)  # fmt: skip

Seed = Annotated[int, typer.Option(min=0, max=2**62, help="Fixes every random number.")]
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
    reference: Annotated[str, typer.Option(help="torchsde, exact, levels, or a solver's name.")] = "torchsde",
    levels: Annotated[tuple[int, int], typer.Option(help="Coarsest and finest level.")] = (4, 9),
    paths: Annotated[int, typer.Option(help="Number of paths.")] = 4096,
    weak: Annotated[str, typer.Option(help="Weak order of: mean, square, fourth, cosine.")] = "",
    dtype: Annotated[str, typer.Option(help="float64 or float32.")] = "float64",
    block: Annotated[int, typer.Option(help="Paths at a time; 0: what fits.")] = 0,
    out: Annotated[Path, typer.Option(help="Figure; the record goes beside it.")] = Path("order.svg"),
    seed: Seed = 0,
    device: Device = "cpu",
) -> None:
    """Measure strong (or weak) orders, draw them, and save the record. Runs under torchrun as well.

    Example: fewstep convergence --solver euler_maruyama --solver milstein --out order.svg
    """
    from . import problems
    from .convergence import REFERENCES, strong_orders, weak_orders
    from .parallel import is_first, processes

    asked = problems.by_name(problem)
    by = reference if reference in REFERENCES else _solver(reference, "reference", REFERENCES)
    options: dict[str, Any] = {
        "paths": paths, "seed": seed, "levels": range(levels[0], levels[1] + 1), "reference": by,
        "dtype": _dtype(dtype), "block": block or None,
    }  # fmt: skip
    chosen = [_solver(name) for name in solver]
    with processes(device) as mine:
        options["device"] = mine
        found = (
            weak_orders(chosen, asked, weak, **options) if weak else strong_orders(chosen, asked, **options)
        )
        if is_first():
            _report_orders(found, out, seed)


def _report_orders(found: list[Any], out: Path, seed: int) -> None:
    from .figures import order_figure
    from .records import Record

    records = [e.record() for e in found]
    order_figure(records, out)
    data: dict[str, Any] = {"estimates": [r.data for r in records]}
    kind = f"{found[0].kind}-orders"
    beside = Record(kind, data, seed, records[0].made).save(out.with_suffix(".json"))
    for e in found:
        local = " ".join(f"{v:.2f}" for v in e.local)
        typer.echo(f"{e.solver}: order {e.order:.2f} [{e.low:.2f}, {e.high:.2f}], local slopes {local}")
        typer.echo(f"  {e.verdict}")
    typer.echo(f"wrote {out} and {beside}")


def _dtype(name: str) -> Any:
    import torch
    from fewstep.errors import one_of

    if name not in ("float32", "float64"):
        raise one_of("dtype", name, ("float32", "float64"))
    return getattr(torch, name)


def _solver(name: str, argument: str = "solver", others: Iterable[str] = ()) -> Any:
    import fewstep
    from fewstep.errors import one_of

    from .cards import plain

    able = {n: c for n, c in fewstep.solvers().items() if c.card.strong_order and plain(c)}
    wanted = {n.lower(): c for n, c in able.items()}
    found = wanted.get(name.replace("_", "").lower())
    if found is None:
        raise one_of(argument, name, [*others, *(_snake(n) for n in able)])
    return found()


def _snake(name: str) -> str:
    """EulerMaruyama -> euler_maruyama; capitals in a row stay one word."""
    import re

    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()


@app.command()
def solvers(
    as_json: Annotated[bool, typer.Option("--json", help="The cards as JSON.")] = False,
    measure: Annotated[bool, typer.Option(help="Measure every order again (minutes).")] = False,
    device: Device = "cpu",
) -> None:
    """List every solver: what it solves, its declared order and the measured one.

    Example: fewstep solvers
    """
    from . import cards

    if measure:
        cards.remeasure(device)
    rows = cards.rows()
    typer.echo(json.dumps([dict(zip(cards.COLUMNS, r)) for r in rows], indent=1) if as_json
               else cards.text(rows))  # fmt: skip


@app.command("work-precision")
def work_precision(
    problem: Annotated[str, typer.Option(help="Name of an SDE or of a diffusion problem.")] = "sine",
    solver: Annotated[list[str] | None, typer.Option(help="Name of a solver; may be given again.")] = None,
    levels: Annotated[tuple[int, int], typer.Option(help="SDEs: coarsest and finest level.")] = (3, 8),
    nfe: Annotated[list[int] | None, typer.Option(help="Diffusion problems: evaluation budgets.")] = None,
    paths: Annotated[int, typer.Option(help="Number of paths or samples.")] = 2048,
    peers: Annotated[bool, typer.Option(help="torchsde's solvers too, diffrax's if installed.")] = True,
    out: Annotated[Path, typer.Option(help="Figure; the record goes beside it.")] = Path("work.svg"),
    seed: Seed = 0,
    device: Device = "cpu",
) -> None:
    """Error against evaluations and seconds: of SDE solvers beside torchsde's, or of diffusion samplers.

    Example: fewstep work-precision --problem sine --solver milstein --solver srid2 --out work.svg
    Example: fewstep work-precision --problem ring --nfe 5 8 10 20 --out ring.svg
    """
    from . import problems, work

    if not work.is_sde(problem):
        _diffusion_work(problem, solver, nfe, paths, out, seed)
        return
    asked = problems.by_name(problem)
    record = work.sde_work_precision(
        asked, [_solver(n) for n in solver] if solver else None, levels=range(levels[0], levels[1] + 1),
        paths=paths, torchsde=peers, diffrax=peers, device=device, seed=seed,
    )  # fmt: skip
    beside = record.save(out.with_suffix(".json"))
    for one in record.data["series"]:
        typer.echo(
            f"{one['package']} {one['name']}: error {one['error'][-1]:.2e} for {one['evaluations'][-1]} "
            f"evaluations, {one['seconds'][-1]:.3f} s"
        )
    typer.echo(f"wrote {work.work_figure(record, out)} and {beside}")


def _diffusion_work(
    problem: str, solver: list[str] | None, nfe: list[int] | None, samples: int, out: Path, seed: int
) -> None:
    """The samplers' half of work-precision."""
    from .work import work_precision as measure

    wanted: dict[str, Any] = {"samples": samples, "seed": seed}
    record = measure(
        problem, **wanted, **({"nfe": nfe} if nfe else {}), **({"solvers": solver} if solver else {})
    )
    from . import diffusion_work

    beside = record.save(out.with_suffix(".json"))
    typer.echo(diffusion_work.table(record, nfe or (5, 8, 10, 20, 50)))
    typer.echo(f"wrote {diffusion_work.figure(record, out)} and {beside}")


@app.command()
def study(
    name: Annotated[str, typer.Argument(help="Name of a study; without one they are listed.")] = "",
    budget: Annotated[str, typer.Option(help="smoke or paper.")] = "paper",
    out: Annotated[Path, typer.Option(help="Folder for records/ and figures/.")] = Path("docs"),
    paths: Annotated[int, typer.Option(help="Number of paths; 0: the budget's.")] = 0,
    seed: Seed = 0,
    device: Device = "cpu",
) -> None:
    """Run one of the studies again: a published experiment, or one of ours.

    Example: fewstep study headline-orders --budget smoke --out /tmp/headline
    """
    from fewstep.errors import one_of

    from .parallel import is_first, processes
    from .studies import load, names

    if not name:
        typer.echo("\n".join(f"{k:20s} {said}" for k, said in names().items()))
        return
    if name not in names():
        raise one_of("name", name, names())
    if budget not in ("smoke", "paper"):
        raise one_of("budget", budget, ("smoke", "paper"))
    with processes(device) as mine:
        lines = load(name).run(
            out, budget=budget, seed=seed, device=mine, **({"paths": paths} if paths else {})
        )
        if is_first():
            typer.echo("\n".join(lines))
            typer.echo(f"wrote {out}/records and {out}/figures")
            if budget == "smoke":
                typer.echo("budget smoke: it shows that the study runs; its numbers mean nothing", err=True)


@app.command("train-teacher")
def train_teacher(
    name: Annotated[str, typer.Argument(help="digits, mnist, or mnist-features.")] = "digits",
    out: Annotated[Path | None, typer.Option(help="Where the weights go.")] = None,
    data: Annotated[Path | None, typer.Option(help="Folder of MNIST; default: $FEWSTEP_DATA.")] = None,
    resume: Annotated[bool, typer.Option(help="mnist: go on from OUT.training.")] = False,
    seed: Seed = 0,
) -> None:
    """Train a shipped network again from scratch: digits and mnist-features in minutes, mnist in an hour.

    Example: fewstep train-teacher digits --out digits.safetensors
    Example: fewstep train-teacher mnist --data data/mnist --out mnist_unet.safetensors
    """
    from fewstep.errors import InputError

    from .teachers import train

    if (resume and name != "mnist") or (data and name == "digits"):
        raise InputError(f"name: {name} takes no {'--resume' if resume else '--data'}; leave it out.")
    options: dict[str, Any] = {"data": data} if name.startswith("mnist") else {}
    options |= {"resume": True} if resume else {}
    typer.echo(f"wrote {train(name, out or Path(f'{name}.safetensors'), seed=seed, **options)}")


distil: typer.Typer = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Distil a sampler into one of few steps."
)
app.add_typer(distil, name="distill")


@distil.command()
def dode(
    problem: Annotated[str, typer.Option(help="Name of a diffusion model; a wrong one lists them.")],
    base: Annotated[str, typer.Option(help="The solver to start from: ddim, dpm_solver_pp:2, ...")] = "ddim",
    steps: Annotated[int, typer.Option(help="Intervals of the grid.")] = 10,
    terms: Annotated[int, typer.Option(help="Fitted numbers a step; 1 is the paper's.")] = 1,
    refine: Annotated[bool, typer.Option(help="Go on by gradient descent on the final state.")] = False,
    learn_grid: Annotated[bool, typer.Option(help="Levels and all weights too; implies --refine.")] = False,
    iterations: Annotated[int, typer.Option(help="Of the descent.")] = 600,
    samples: Annotated[int, typer.Option(min=1, help="Start states; one in eight is held out.")] = 1024,
    teacher_substeps: Annotated[int, typer.Option(help="Teacher steps an interval.")] = 10,
    out: Annotated[Path, typer.Option(help="The table; .json instead is for reading.")] = Path(
        "dode.safetensors"
    ),
    seed: Seed = 0,
    device: Device = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="The report as JSON.")] = False,
) -> None:
    """Fit a few numbers a step of a diffusion sampler to a fine one, in seconds.

    Example: fewstep distill dode --problem digits --base dpm_solver_pp:2 --steps 8 --terms 3
    """
    from .studies import dode_tools

    training: dict[str, Any] = {"refine": "global", "iterations": iterations}
    training |= {"learn_grid": True, "rate": 0.03} if learn_grid else {}
    student, report = dode_tools.distil(
        problem, base, out, steps=steps, samples=samples, seed=seed, device=device, terms=terms,
        teacher_substeps=teacher_substeps, **(training if refine or learn_grid else {}),
    )  # fmt: skip
    typer.echo(dode_tools.as_json(student, report, out) if as_json else
               "\n".join([str(student), *dode_tools.words(report), f"wrote {out}"]))  # fmt: skip


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
    """Run the command line; bad input is one line and exit code 2."""
    from fewstep.errors import InputError

    try:
        app(spread(sys.argv[1:]), prog_name="fewstep")
    except (InputError, OSError) as error:
        typer.echo(f"fewstep: {error}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
