"""The Python parts of `.ci/smoke`: what the archives hold, and what an installed fewstep can do."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EXTRAS = ("scipy", "matplotlib", "torchsde", "typer", "rich", "sklearn", "diffusers")


def contents(wheel: str, sdist: str) -> None:
    """Both archives hold the two packages entirely, and no experiment."""
    command = ["git", "ls-files", "solvers/fewstep", "analysis/fewstep_analysis"]
    tracked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    expected = {path.partition("/")[2] for path in tracked}
    files = zipfile.ZipFile(wheel).namelist()
    packaged = {name for name in files if ".dist-info/" not in name}
    assert packaged == expected, f"missing {expected - packaged}, unexpected {packaged - expected}"
    info = {name.partition(".dist-info/")[2] for name in files}
    assert {"licenses/LICENSE", "METADATA", "entry_points.txt"} <= info, info
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    assert set(tracked) <= names, set(tracked) - names
    assert {"README.md", "LICENSE", "pyproject.toml", "setup.cfg", "constraints.txt"} <= names
    for archived in (packaged, names):
        assert not any("experiments" in Path(name).parent.parts for name in archived if "docs" not in name)
    print(f"{Path(wheel).name} and {Path(sdist).name} hold what they should")


def core() -> None:
    """Without extras: import every module of fewstep but the integrations of others, solve, sample, save, load."""
    import torch

    import fewstep as fs

    assert not [name for name in EXTRAS if importlib.util.find_spec(name)]
    assert Path(fs.__file__).is_relative_to(sys.prefix), fs.__file__
    for module in pkgutil.walk_packages(fs.__path__, "fewstep."):
        if not module.name.startswith("fewstep.integrations."):
            importlib.import_module(module.name)
    sde = fs.SDE(lambda t, y: -y, lambda t, y: 0.2 * y)
    path = fs.BrownianPath((8, 2), seed=1, levy="H")
    assert fs.solve(sde, fs.Milstein(), torch.ones(8, 2), torch.linspace(0, 1, 9), path=path).y.isfinite().all()
    schedule = fs.VPLinear()
    model = fs.DiffusionModel(lambda x, sigma: x / (1 + sigma**2), schedule)
    assert fs.sample(model, fs.ShARK(), shape=(2, 3), steps=4, seed=0).isfinite().all()
    plan = fs.UniPC(order=2).plan(fs.sigma_grid(schedule, 4))
    plan.save("plan.safetensors")
    assert torch.equal(fs.load("plan.safetensors").update_eval, plan.update_eval)
    Path("plan.safetensors").unlink()
    assert "pip install" in run("--help", code=2)
    print(f"fewstep {fs.__version__} solves and samples with torch {torch.__version__} and no extra")


def analysis(readme: str) -> None:
    """With the extra `analysis`: the README's first Python program, and the commands."""
    import fewstep_analysis

    for module in pkgutil.walk_packages(fewstep_analysis.__path__, "fewstep_analysis."):
        importlib.import_module(module.name)
    block = re.search(r"^```python\n(.*?)^```", Path(readme).read_text(), re.M | re.S)
    assert block is not None
    exec(compile(block[1], readme, "exec"), {})
    assert "convergence" in run("--help")
    assert "Milstein" in run("solvers")
    tiny = ["--solver", "milstein", "--problem", "sine", "--reference", "levels", "--paths", "200"]
    assert "Milstein" in run("convergence", *tiny, "--out", "order.svg")
    for made in Path.cwd().iterdir():
        made.unlink()
    assert "scikit-learn" in run("demo", "--quick", code=2)
    assert list(Path.cwd().iterdir()) == []


def run(*words: str, code: int = 0) -> str:
    """The output of a command."""
    script = Path(sys.prefix, "bin", "fewstep")
    done = subprocess.run([script, *words], capture_output=True, text=True)
    assert done.returncode == code, (words, done)
    return done.stdout + done.stderr


if __name__ == "__main__":
    {"contents": contents, "core": core, "analysis": analysis}[sys.argv[1]](*sys.argv[2:])
