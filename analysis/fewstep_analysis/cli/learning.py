"""The commands that learn: demo, fit-table and distill dode."""

from pathlib import Path
from typing import Annotated, Any

import typer

from . import common
from .common import Device, Json, Seed, Threads, name_option
from .completion import LETTERS, models, samplers


def demo(
    out: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Folder of the figures, the record and the table.")
    ] = Path("fewstep-demo"),
    seed: Seed = 0,
    quick: Annotated[bool, typer.Option("--quick", help="A tenth of the samples and the training.")] = False,
    train: Annotated[bool, typer.Option("--train", help="Also distil a network, in minutes.")] = False,
    device: Device = "cpu",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Fit a sampler of handwritten digits: 5 network evaluations in place of 300, and measure it.

    About a minute on one CPU core. Needs scikit-learn: pip install scikit-learn.

    \b
    Example: fewstep demo
    Example: fewstep demo --train --out look
    """
    with common.working([common.output_folder(out)]) as wrote:
        from ..demo import NUMBERS, lines, run

        common.use_threads(threads, NUMBERS)
        record = run(out, seed=seed, quick=quick, train=train, device=device)
        text = lines(record, out)
    common.tell(as_json, record.body() | {"wrote": wrote()}, text)


Model = Annotated[str, name_option("A diffusion model; a wrong name lists them.", models)]
States: Any = typer.Option(metavar="N", min=1, help="Initial states; one in eight is held out.")


def fit_table(
    problem: Model,
    nfe: Annotated[int, typer.Option("--nfe", "--steps", metavar="N", help="Network evaluations.")] = 5,
    levy: Annotated[
        str | None, name_option("Read W, H or K of a Brownian path; follows a fine SDE solver on it.", LETTERS)
    ] = None,
    samples: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="At least 16 initial states; default 512, with --levy 2048.")
    ] = None,
    starts: Annotated[int, typer.Option(metavar="N", help="Untrained samplers that are tried as a start.")] = 5,
    iterations: Annotated[
        int, typer.Option(metavar="N", help="Newton iterations of the best start, after short fits of all.")
    ] = 100,
    out: Annotated[
        Path, typer.Option(metavar="FILE", help="File of the table; with suffix .json it is readable text.")
    ] = Path("table.safetensors"),
    seed: Seed = 0,
    device: Device = "cpu",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Fit every number of a sampler of a few evaluations to a fine one.

    Seconds to a minute for small models.

    \b
    Example: fewstep fit-table --problem digits --steps 8 --out t.safetensors
    Example: fewstep fit-table --problem ring --nfe 5 --levy K
    """
    with common.working([common.output_file(out)]) as wrote:
        from .. import distillation

        count = (512 if levy is None else 2048) if samples is None else samples
        common.use_threads(threads, distillation.numbers(problem, count))
        table, report = distillation.fit_table(
            problem, out, nfe=nfe, samples=count, seed=seed, device=device, levy=levy, starts=starts,
            iterations=iterations,
        )  # fmt: skip
    document = distillation.table_document(table, report) | {"wrote": wrote()}
    common.tell(as_json, document, [str(table), *distillation.table_lines(report), f"wrote {out}"])


Base = Annotated[str, name_option("The solver to start from, e.g. unipc:3.", samplers)]


def dode(
    problem: Model,
    base: Base = "ddim",
    steps: Annotated[int, typer.Option(metavar="N", help="Number of steps.")] = 10,
    terms: Annotated[int, typer.Option(metavar="N", help="Fitted numbers per step; the paper has 1.")] = 1,
    samples: Annotated[int, States] = 1024,
    teacher_substeps: Annotated[int, typer.Option(metavar="N", help="Steps of the teacher per interval.")] = 10,
    out: Annotated[
        Path, typer.Option(metavar="FILE", help="File of the table; with suffix .json it is readable text.")
    ] = Path("dode.safetensors"),
    seed: Seed = 0,
    device: Device = "cpu",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Fit a few numbers per step of a diffusion sampler to a fine one, in seconds.

    \b
    Example: fewstep distill dode --problem ring --steps 5
    Example: fewstep distill dode --problem digits --base dpm_solver_pp:2 \\
                 --steps 8 --terms 3
    """
    with common.working([common.output_file(out)]) as wrote:
        from .. import distillation

        common.use_threads(threads, distillation.numbers(problem, samples))
        student, report = distillation.distill_dode(
            problem, base, out, steps=steps, samples=samples, seed=seed, device=device, terms=terms,
            teacher_substeps=teacher_substeps,
        )  # fmt: skip
    document = distillation.report_document(student, report) | {"wrote": wrote()}
    lines = [str(student), *distillation.report_lines(report), f"wrote {out}"]
    common.tell(as_json, document, lines)
