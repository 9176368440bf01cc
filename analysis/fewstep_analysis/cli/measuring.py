"""The commands that measure: solvers, convergence, work-precision, study."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Annotated, Any

import typer

from . import common as shell
from . import completion as names
from .common import Device, Figure, Json, Seed, word

BUDGETS, DTYPES = ("smoke", "paper"), ("float64", "float32")


def solvers(
    measure: Annotated[bool, typer.Option("--measure", help="Measure every order again (minutes).")] = False,
    seed: Seed = 0,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """List every solver: what it solves, its declared order and the measured one.

    `--measure` replaces the record of measured orders that the library reads; --seed and --device are for it.

    \b
    Example: fewstep solvers
    Example: fewstep solvers --json
    """
    from .. import solver_table as cards

    if measure:
        shell.device_here(device)
        with shell.working([shell.file_place(cards.MEASURED)]):
            cards.remeasure(device, seed)
    rows = cards.rows()
    shell.tell(as_json, [dict(zip(cards.COLUMNS, r)) for r in rows], [cards.text(rows)])


Solver = Annotated[list[str], word("A solver; may be given again.", names.sde_solvers)]
Problem = Annotated[str, word("An SDE; a wrong name lists them.", names.sde_problems)]
Reference = Annotated[
    str,
    word(
        "What stands for the truth: torchsde, exact, levels, or a solver.",
        lambda: [*names.REFERENCES, *names.sde_solvers()],
    ),
]
Weak = Annotated[
    str,
    word(
        "Weak order, of: mean, square, fourth, cosine. Default: the strong order.", names.weak_tests,
        show_default=False,
    ),
]  # fmt: skip
Dtype = Annotated[str, word("float64 or float32.", lambda: DTYPES)]


def convergence(
    solver: Solver,
    problem: Problem = "geometric_brownian_motion",
    reference: Reference = "torchsde",
    levels: Annotated[
        tuple[int, int], typer.Option(help="Coarsest and finest n, of 2^n steps.", metavar="N N")
    ] = (4, 9),
    paths: Annotated[int, typer.Option(metavar="N", help="Number of Brownian paths.")] = 4096,
    weak: Weak = "",
    dtype: Dtype = "float64",
    block: Annotated[
        int, typer.Option(metavar="N", min=0, help="Paths at a time; 0: what fits in memory.")
    ] = 0,
    out: Figure = Path("order.svg"),
    seed: Seed = 0,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Measure strong (or weak) orders, draw them, and save the record. Runs under torchrun as well.

    \b
    Example: fewstep convergence --solver euler_maruyama --solver milstein
    Example: fewstep convergence --solver srid2 --problem sine --out srid2.svg
    Example: fewstep convergence --solver milstein --weak square \\
                 --reference levels --levels 2 5 --paths 20000
    """
    with shell.working(shell.figure_place(out)) as wrote:
        from .. import problems
        from ..convergence import strong_orders, weak_orders
        from ..parallel import processes

        asked, chosen = problems.by_name(problem), [_solver(name) for name in solver]
        known = reference in names.REFERENCES
        options: dict[str, Any] = {
            "reference": reference if known else _solver(reference, "reference", names.REFERENCES),
            "levels": range(levels[0], levels[1] + 1), "paths": paths, "dtype": _dtype(dtype),
            "block": block or None, "seed": seed,
        }  # fmt: skip
        with processes(shell.device_here(device)) as mine:
            options["device"] = mine
            found = (
                weak_orders(chosen, asked, weak, **options)
                if weak
                else strong_orders(chosen, asked, **options)
            )
            record, files = _orders(found, out, seed) if shell.is_first() else ({}, [])
    said = [f"{line}" for e in found for line in _order_words(e)]
    shell.tell(as_json, record | {"wrote": wrote()}, [*said, f"wrote {' and '.join(files)}"])


def _orders(found: list[Any], out: Path, seed: int) -> tuple[dict[str, Any], list[str]]:
    """Draw and save; what the record holds, and the files."""
    from ..figures import order_figure
    from ..records import Record

    records = [e.record() for e in found]
    order_figure(records, out)
    data: dict[str, Any] = {"estimates": [r.data for r in records]}
    record = Record(f"{found[0].kind}-orders", data, seed, records[0].made)
    return record.body(), [str(out), str(record.save(out.with_suffix(".json")))]


def _order_words(e: Any) -> list[str]:
    local = " ".join(f"{v:.2f}" for v in e.local)
    head = f"{e.solver}: order {e.order:.2f} [{e.low:.2f}, {e.high:.2f}], local slopes {local}"
    return [head, f"  {e.verdict}"]


def _dtype(name: str) -> Any:
    import torch

    if name not in DTYPES:
        raise names.errors().one_of("dtype", name, DTYPES)
    return getattr(torch, name)


def _solver(name: str, argument: str = "solver", others: tuple[str, ...] = ()) -> Any:
    import fewstep

    from ..solver_table import plain

    able = {n: c for n, c in fewstep.solvers().items() if c.card.strong_order and plain(c)}
    expected = {n.lower(): c for n, c in able.items()}
    found = expected.get(name.replace("_", "").lower())
    if found is None:
        raise names.errors().one_of(argument, name, [*others, *(names.snake(n) for n in able)])
    return found()


Anything = Annotated[
    str,
    word(
        "An SDE or a diffusion problem; a wrong name lists them.",
        lambda: [*names.sde_problems(), *names.diffusion_problems()],
    ),
]
Workers = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME", help="A solver; may be given again. Default: all.",
        autocompletion=names.complete_worker,
    ),
]  # fmt: skip


def work_precision(
    problem: Anything = "sine",
    solver: Workers = None,
    levels: Annotated[
        tuple[int, int], typer.Option(help="SDEs: coarsest and finest n, of 2^n steps.", metavar="N N")
    ] = (3, 8),
    nfe: Annotated[
        list[int] | None,
        typer.Option(
            metavar="N", help="Diffusion: numbers of network evaluations. Default: 16 of them, 3 to 100."
        ),
    ] = None,
    paths: Annotated[
        int, typer.Option(metavar="N", min=2, help="Number of Brownian paths or samples.")
    ] = 2048,
    peers: Annotated[
        bool, typer.Option(help="SDEs: torchsde's solvers too, and diffrax's where it is installed.")
    ] = True,
    out: Figure = Path("work.svg"),
    seed: Seed = 0,
    device: Annotated[str, typer.Option(metavar="NAME", help="SDEs: cpu, cuda, or cuda:1.")] = "cpu",
    as_json: Json = False,
) -> None:
    """Error against evaluations and seconds: of SDE solvers beside torchsde's, or of diffusion samplers.

    \b
    Example: fewstep work-precision --solver milstein --solver srid2
    Example: fewstep work-precision --problem ring --nfe 5 8 10 20 --out ring.svg
    """
    with shell.working(shell.figure_place(out)) as wrote:
        from .. import problems, work

        if work.is_sde(problem):
            record = work.sde_work_precision(
                problems.by_name(problem), [_solver(n) for n in solver] if solver else None,
                levels=range(levels[0], levels[1] + 1), paths=paths, torchsde=peers, diffrax=peers,
                device=shell.device_here(device), seed=seed,
            )  # fmt: skip
            draw, said = work.work_figure, _work_words(record)
        else:
            record, draw, said = _samplers(problem, solver, nfe, paths, seed)
        files = [str(draw(record, out)), str(record.save(out.with_suffix(".json")))]
    shell.tell(as_json, record.body() | {"wrote": wrote()}, [*said, f"wrote {' and '.join(files)}"])


def _work_words(record: Any) -> list[str]:
    return [
        f"{one['package']} {one['name']}: error {one['error'][-1]:.2e} for {one['evaluations'][-1]} "
        f"evaluations, {one['seconds'][-1]:.3f} s"
        for one in record.data["series"]
    ]


def _samplers(problem: str, solver: list[str] | None, nfe: list[int] | None, samples: int, seed: int) -> Any:
    """The samplers' half of work-precision: the record, what draws it, and its words."""
    from .. import sampler_work as diffusion_work
    from ..work import work_precision

    expected = ({"nfe": nfe} if nfe else {}) | ({"solvers": solver} if solver else {})
    record = work_precision(problem, samples=samples, seed=seed, **expected)
    return record, diffusion_work.figure, [str(diffusion_work.table(record, nfe or (5, 8, 10, 20, 50)))]


Study = Annotated[
    str,
    typer.Argument(
        metavar="NAME",
        help="A study; without one they are listed.",
        autocompletion=names.complete_study,
        show_default=False,
    ),
]
Budget = Annotated[
    str,
    word(
        "paper: the published size. smoke: seconds, shows that it runs, its numbers mean nothing.",
        lambda: BUDGETS,
    ),
]


def study(
    name: Study = "",
    budget: Budget = "paper",
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Folder for records/ and figures/.")] = Path(
        "docs"
    ),
    paths: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=0,
            help="headline-orders, sigdeg-order: number of Brownian paths; 0: the budget's.",
        ),
    ] = 0,
    seed: Seed = 0,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Run one of the studies again: a published experiment, or one of ours.

    Minutes to hours each (docs/reproduce.md). What a study keeps in OUT/work it need not do again.

    \b
    Example: fewstep study
    Example: fewstep study headline-orders --budget smoke --out headline
    """
    known, one_of = names.studies(), names.errors().one_of
    if not name:
        shell.tell(as_json, known, [f"{k:20s} {said}" for k, said in known.items()])
        return
    if name not in known:
        raise one_of("name", name, known)
    if budget not in BUDGETS:
        raise one_of("budget", budget, BUDGETS)
    places = [shell.folder_place(out / part) for part in ("records", "figures")]
    with shell.working(places, lambda: _kept(out / "work", f"{name}-{budget}")) as wrote:
        lines = _run(name, out, paths, device, budget=budget, seed=seed)
    document: dict[str, Any] = {
        "study": name,
        "budget": budget,
        "seed": seed,
        "lines": lines,
        "wrote": wrote(),
    }
    shell.tell(as_json, document, [*lines, f"wrote {', '.join(document['wrote'])}"])
    if budget == "smoke" and shell.is_first():
        typer.echo("budget smoke: it shows that the study runs; its numbers mean nothing", err=True)


def _run(name: str, out: Path, paths: int, device: str, **options: Any) -> list[str]:
    from experiments import load

    from ..parallel import processes

    run = load(name).run
    if paths and "paths" not in inspect.signature(run).parameters:
        shell.refuse(f"paths: {name} takes none; leave it out.")
    with processes(shell.device_here(device)) as mine:
        lines: list[str] = run(out, device=mine, **options, **({"paths": paths} if paths else {}))
    return lines


def _kept(work: Path, name: str) -> str:
    """Studies that go on where they were stopped keep what is done in work/NAME-BUDGET..."""
    kept = [str(p) for p in sorted(work.glob(f"{name}*")) if any(f.is_file() for f in p.rglob("*"))]
    return f"finished parts are in {', '.join(kept)}; the same command goes on from there" if kept else ""
