"""The commands that train: demo, train-teacher, distill dode."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from . import common as shell
from . import completion as names
from .common import Device, Json, Seed, word
from .completion import complete


def demo(
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Folder for pictures, table, student.")] = Path(
        "fewstep-demo"
    ),
    seed: Seed = 0,
    quick: Annotated[
        bool, typer.Option("--quick", help="A tenth of the training: a look, not a result.")
    ] = False,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Distil a 300-step sampler of handwritten digits to 5 steps, and prove it.

    One to three minutes on two CPU cores. Needs scikit-learn: pip install 'fewstep[demo]'.

    \b
    Example: fewstep demo
    Example: fewstep demo --quick --out look
    """
    with shell.working([shell.folder_place(out)]) as wrote:
        from ..demo import run, words

        record = run(out, seed=seed, quick=quick, device=device)
    shell.tell(as_json, record.body() | {"wrote": wrote()}, words(record, out))


Teacher = Annotated[
    str,
    typer.Argument(
        metavar="NAME",
        help="digits, mnist, or mnist-features.",
        autocompletion=complete(lambda: names.TEACHERS),
    ),
]


def train_teacher(
    name: Teacher = "digits",
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="File of the weights. Default: NAME.safetensors.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Folder of MNIST's four files. Default: $FEWSTEP_DATA."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="mnist: go on from OUT.training.")] = False,
    seed: Seed = 0,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Train a shipped network again from scratch.

    digits and mnist-features take minutes, mnist an hour; it may be stopped, and goes on with --resume.

    \b
    Example: fewstep train-teacher digits --out digits.safetensors
    Example: fewstep train-teacher mnist --data data/mnist --resume
    """
    if (resume and name != "mnist") or (data and name == "digits"):
        shell.refuse(f"name: {name} takes no {'--resume' if resume else '--data'}; leave it out.")
    place = shell.file_place(out or Path(f"{name}.safetensors"), make=False)
    options: dict[str, Any] = {"data": data} if name.startswith("mnist") else {}
    options |= {"resume": True} if resume else {}
    checkpoint = Path(f"{place}.training")

    def kept() -> str:
        there = name == "mnist" and checkpoint.exists()
        return f"finished iterations are in {checkpoint}; add --resume to go on from there" if there else ""

    with shell.working([place], kept) as wrote:
        from ..teachers import train

        file = train(name, place, seed=seed, device=device, **options)
    document = {"teacher": name, "seed": seed, "wrote": wrote()}
    shell.tell(as_json, document, [f"wrote {file}"])


Model = Annotated[str, word("A diffusion model; a wrong name lists them.", names.models)]
Base = Annotated[str, word("The solver it begins as, e.g. unipc:3.", names.bases)]


def dode(
    problem: Model,
    base: Base = "ddim",
    steps: Annotated[int, typer.Option(metavar="N", help="Number of steps.")] = 10,
    terms: Annotated[int, typer.Option(metavar="N", help="Fitted numbers a step; 1 is the paper's.")] = 1,
    refine: Annotated[
        bool, typer.Option("--refine", help="Go on by gradient descent on the final state.")
    ] = False,
    learn_grid: Annotated[
        bool, typer.Option("--learn-grid", help="Levels and all weights too; implies --refine.")
    ] = False,
    iterations: Annotated[int, typer.Option(metavar="N", help="Number of steps of the descent.")] = 600,
    samples: Annotated[
        int, typer.Option(metavar="N", min=1, help="Start states; one in eight is held out.")
    ] = 1024,
    teacher_substeps: Annotated[
        int, typer.Option(metavar="N", help="Steps of the teacher in an interval.")
    ] = 10,
    out: Annotated[
        Path,
        typer.Option(metavar="FILE", help="File of the table; one that ends in .json is for reading too."),
    ] = Path("dode.safetensors"),
    seed: Seed = 0,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Fit a few numbers a step of a diffusion sampler to a fine one, in seconds.

    \b
    Example: fewstep distill dode --problem ring --steps 5
    Example: fewstep distill dode --problem digits --base dpm_solver_pp:2 \\
                 --steps 8 --terms 3
    """
    with shell.working([shell.file_place(out, make=False)]) as wrote:
        from experiments import dode_tools

        training: dict[str, Any] = {"refine": "global", "iterations": iterations}
        training |= {"learn_grid": True, "rate": 0.03} if learn_grid else {}
        student, report = dode_tools.distil(
            problem, base, out, steps=steps, samples=samples, seed=seed, device=device, terms=terms,
            teacher_substeps=teacher_substeps, **(training if refine or learn_grid else {}),
        )  # fmt: skip
    document = dode_tools.document(student, report) | {"wrote": wrote()}
    shell.tell(as_json, document, [str(student), *dode_tools.words(report), f"wrote {out}"])
