"""The commands that measure: solvers, convergence, work-precision, compare."""

from pathlib import Path
from typing import Annotated, Any

import typer

from . import common
from .common import Device, Figure, Json, Seed, Threads, name_option
from .completion import (
    DTYPES,
    REFERENCES,
    TESTS,
    complete_solver,
    diffusion_problems,
    models,
    samplers,
    sde_problems,
    sde_solvers,
    spacings,
)


def solvers(
    measure: Annotated[bool, typer.Option("--measure", help="Measure every order again (minutes).")] = False,
    seed: Seed = 0,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """List every solver: what it solves, its declared order and the measured one.

    `--measure` replaces the record of measured orders; --seed and --device apply to it.

    \b
    Example: fewstep solvers
    Example: fewstep solvers --json
    """
    from fewstep._validation import check_device

    from .. import solver_table

    check_device(device)
    if measure:
        with common.working([common.output_file(solver_table.MEASURED)]):
            solver_table.remeasure(device, seed)
    columns, rows = solver_table.COLUMNS, solver_table.rows()
    common.tell(as_json, [dict(zip(columns, r)) for r in rows], [common.table(columns, rows)])


Solver = Annotated[list[str], name_option("A solver; may be repeated.", sde_solvers)]
Problem = Annotated[str, name_option("An SDE; a wrong name lists them.", sde_problems)]
Reference = Annotated[str, name_option("The reference: torchsde, exact, levels, or a solver.", REFERENCES, sde_solvers)]
Levels = Annotated[tuple[int, int], typer.Option(metavar="N N", help="SDEs: coarsest and finest n; 2^n steps.")]
Weak = Annotated[
    str,
    name_option("Weak order for: mean, square, fourth, cosine. Default: the strong order.", TESTS, show_default=False),
]


def convergence(
    solver: Solver,
    problem: Problem = "geometric_brownian_motion",
    reference: Reference = "torchsde",
    levels: Levels = (4, 9),
    paths: Annotated[int, typer.Option(metavar="N", help="Number of Brownian paths.")] = 4096,
    weak: Weak = "",
    dtype: Annotated[str, name_option("float64 or float32.", DTYPES)] = "float64",
    block: Annotated[int, typer.Option(metavar="N", min=0, help="Paths per block; 0: what fits in memory.")] = 0,
    out: Figure = Path("order.svg"),
    seed: Seed = 0,
    device: Device = "cpu",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Measure strong (or weak) orders, draw them, and save the record. Also runs under torchrun.

    \b
    Example: fewstep convergence --solver euler_maruyama --solver milstein
    Example: fewstep convergence --solver srid2 --problem sine --out srid2.svg
    Example: fewstep convergence --solver milstein --weak square \\
                 --reference levels --levels 2 5 --paths 20000
    """
    with common.working(common.figure_files(out)) as wrote:
        import torch

        from fewstep import _validation

        from .. import problems
        from ..convergence import strong_orders, weak_orders
        from ..parallel import processes

        common.use_threads(threads, paths)
        sde, chosen = problems.by_name(problem), [_solver(name) for name in solver]
        options: dict[str, Any] = {
            "reference": reference if reference in REFERENCES else _solver(reference, "reference"),
            "levels": range(levels[0], levels[1] + 1), "paths": paths, "block": block or None, "seed": seed,
            "dtype": getattr(torch, _validation.check_choice("dtype", dtype, DTYPES)),
        }  # fmt: skip
        with processes(str(_validation.check_device(device))) as mine:
            options["device"] = mine
            found = weak_orders(chosen, sde, weak, **options) if weak else strong_orders(chosen, sde, **options)
            record = _save_orders(found, out, seed) if common.is_first() else {}
    lines = [
        f"{e.solver}: order {e.order:.2f} [{e.low:.2f}, {e.high:.2f}], local slopes "
        f"{' '.join(f'{v:.2f}' for v in e.local)}\n  {e.verdict}"
        for e in found
    ]
    common.tell(as_json, record | {"wrote": wrote()}, [*lines, f"wrote {out} and {out.with_suffix('.json')}"])


def _solver(name: str, argument: str = "solver") -> Any:
    from fewstep.catalog import solver_named

    return solver_named(name, argument, [*sde_solvers(), *(REFERENCES if argument == "reference" else ())])


def _save_orders(found: list[Any], out: Path, seed: int) -> dict[str, Any]:
    """Draw and save the estimates; returns the content of the record."""
    from ..figures import order_figure
    from ..records import Record

    records = [e.record() for e in found]
    order_figure(records, out)
    data = {"estimates": [r.data for r in records]}
    record = Record(f"{found[0].kind}-orders", data, seed, records[0].made)
    record.save(out.with_suffix(".json"))
    return record.body()


AnyProblem = Annotated[
    str, name_option("An SDE or a diffusion problem; a wrong name lists them.", sde_problems, diffusion_problems)
]
Solvers = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME", help="A solver; may be repeated. Default: all.", autocompletion=complete_solver),
]
Evaluations = Annotated[
    list[int] | None,
    typer.Option(metavar="N", help="Diffusion: network evaluations. Default: 16 values from 3 to 100."),
]


def work_precision(
    problem: AnyProblem = "sine",
    solver: Solvers = None,
    levels: Levels = (3, 8),
    nfe: Evaluations = None,
    paths: Annotated[int, typer.Option(metavar="N", min=2, help="Number of Brownian paths or samples.")] = 2048,
    peers: Annotated[bool, typer.Option(help="Also measure torchsde's or diffusers' solvers.")] = True,
    out: Figure = Path("work.svg"),
    seed: Seed = 0,
    device: Annotated[str, typer.Option(metavar="NAME", help="SDEs: cpu, cuda, or cuda:1.")] = "cpu",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Error against evaluations and seconds: SDE solvers with torchsde's, or diffusion samplers.

    \b
    Example: fewstep work-precision --solver milstein --solver srid2
    Example: fewstep work-precision --problem ring --nfe 5 8 10 20 --out ring.svg
    """
    with common.working(common.figure_files(out)) as wrote:
        from fewstep._validation import check_device

        from .. import sampler_work, work
        from ..problems import by_name

        check_device(device)
        common.use_threads(threads, paths)
        if work.is_sde(problem):
            record = work.sde_work_precision(
                by_name(problem), [_solver(name) for name in solver] or None,
                levels=range(levels[0], levels[1] + 1), paths=paths, torchsde=peers,
                device=device, seed=seed,
            )  # fmt: skip
            work.work_figure(record, out)
            columns, rows = work.summary(record)
        else:
            given: dict[str, Any] = {k: v for k, v in {"nfe": nfe, "solvers": solver}.items() if v}
            record = work.work_precision(problem, samples=paths, seed=seed, diffusers=peers, **given)
            sampler_work.figure(record, out)
            columns, rows = sampler_work.summary(record, nfe or (5, 8, 10, 20, 50))
        record.save(out.with_suffix(".json"))
    lines = [common.table(columns, rows), f"wrote {out} and {out.with_suffix('.json')}"]
    common.tell(as_json, record.body() | {"wrote": wrote()}, lines)


Compared = Annotated[
    list[str] | None,
    name_option("A sampler, e.g. unipc:3; may be repeated. Default: 13 of them.", samplers),
]
Spacings = Annotated[list[str] | None, name_option("A spacing of the levels; may be repeated. Default: 4.", spacings)]


def compare(
    problem: Annotated[str, name_option("A diffusion model; a wrong name lists them.", models)],
    nfe: Annotated[int, typer.Option(metavar="N", min=1, help="Network evaluations of each sampler.")] = 8,
    solver: Compared = None,
    spacing: Spacings = None,
    samples: Annotated[int, typer.Option(metavar="N", min=2, help="Number of start states.")] = 32,
    tol: Annotated[float, typer.Option(metavar="X", help="Error of the fine solution over the smallest.")] = 0.1,
    out: Figure = Path("compare.svg"),
    seed: Seed = 0,
    device: Device = "cpu",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Measure samplers on spacings against a fine solution of one model; prints the best ten.

    Seconds for small models, a few minutes for mnist on a CPU.

    \b
    Example: fewstep compare --problem digits --nfe 8
    Example: fewstep compare --problem mnist --nfe 5 --solver unipc:2 \\
                 --solver ipndm:3 --spacing trailing --spacing karras
    """
    with common.working(common.figure_files(out)) as wrote:
        from fewstep import compare as measured
        from fewstep._validation import check_device

        from ..distillation import numbers, task
        from ..records import Record, provenance

        common.use_threads(threads, numbers(problem, samples))
        on = check_device(device)
        model = task(problem, device)
        noise, labels = model.noise(samples, seed).to(on), model.labels(samples, seed)
        found = measured(
            model.problem, nfe, noise=noise, labels=None if labels is None else labels.to(on), solvers=solver,
            spacings=spacing, tol=tol, progress=True,
        )  # fmt: skip
        found.plot(out)
        record = Record("compare", {"problem": problem} | found.document(), seed, provenance(device))
        record.save(out.with_suffix(".json"))
    lines = [found.table(), f"wrote {out} and {out.with_suffix('.json')}"]
    common.tell(as_json, record.body() | {"wrote": wrote()}, lines)
