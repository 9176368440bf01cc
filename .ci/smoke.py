"""The parts of `.ci/smoke` that are Python: what the archives hold, and what an installed fewstep can do."""

from __future__ import annotations

import importlib
import pkgutil
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NOT_AN_EXTRA = ["fewstep_analysis.peers_diffrax"]  # imported only where diffrax is installed
PLACES = {"analysis/cli/": "fewstep_analysis.cli/", "analysis/": "fewstep/analysis/", "solvers/": "fewstep/"}
MADE = ("PKG-INFO", "setup.cfg", "fewstep.egg-info/")  # by the build, in an sdist
LEFT_OUT = (".github/", ".gitignore", ".pre-commit-config.yaml", "docs/.gitignore")


def contents(wheel: str, sdist: str) -> None:
    """Everything that belongs into the archives is there, and nothing else."""
    held = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    expected = {"fewstep/py.typed"}
    for p in [
        *ROOT.glob("solvers/**/*.py"),
        *ROOT.glob("analysis/**/*.py"),
        *ROOT.glob("analysis/weights/*"),
    ]:
        path = p.relative_to(ROOT).as_posix()
        for folder, name in PLACES.items():  # the first that fits
            if path.startswith(folder):
                expected.add(name + path.removeprefix(folder))
                break
    same("wheel", held, expected)
    info = {n.partition(".dist-info/")[2] for n in zipfile.ZipFile(wheel).namelist()}
    assert {"licenses/LICENSE", "METADATA", "entry_points.txt"} <= info, info
    with tarfile.open(sdist) as archive:
        held = {m.name.partition("/")[2] for m in archive.getmembers() if m.isfile()}
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    same(
        "sdist",
        {n for n in held if not n.startswith(MADE)},
        {n for n in listed if not n.startswith((*LEFT_OUT, *MADE))},
    )
    print(f"{Path(wheel).name} and {Path(sdist).name} hold what they should")


def same(what: str, held: set[str], expected: set[str]) -> None:
    assert held == expected, (
        f"{what}: missing {sorted(expected - held)}, not expected {sorted(held - expected)}"
    )


def use(readme: str) -> None:
    """Import everything, run the README's first Python block, keep a plan in a file, call the commands."""
    import torch

    import fewstep as fs

    assert Path(fs.__file__).is_relative_to(sys.prefix), fs.__file__
    assert list(Path.cwd().iterdir()) == []
    for module in pkgutil.walk_packages(fs.__path__, "fewstep."):
        try:
            importlib.import_module(module.name)
        except ImportError as error:
            print(f"{module.name}: {error}")
            if not re.search(r"pip install 'fewstep\[\w+\]'", str(error)) and module.name not in NOT_AN_EXTRA:
                raise
    block = re.search(r"^```python\n(.*?)^```", Path(readme).read_text(), re.M | re.S)
    assert block is not None
    exec(compile(block[1], readme, "exec"), {})
    plan = fs.UniPC(order=2).plan(fs.sigma_grid(fs.VPLinear(), 4))
    plan.save("plan.safetensors")
    assert torch.equal(fs.load("plan.safetensors").b, plan.update_eval)
    Path("plan.safetensors").unlink()
    assert "convergence" in run("--help")
    assert "Milstein" in run("solvers")
    tiny = ["--solver", "milstein", "--problem", "sine", "--reference", "levels", "--paths", "200"]
    assert "Milstein" in run("convergence", *tiny, "--out", "order.svg")
    for made in Path.cwd().iterdir():
        made.unlink()
    assert "pip install 'fewstep[demo]'" in run("demo", "--quick", code=2)
    assert list(Path.cwd().iterdir()) == []
    print(f"fewstep {fs.__version__} works with torch {torch.__version__}")


def run(*words: str, code: int = 0) -> str:
    """What the command writes."""
    script = Path(sys.prefix, "bin", "fewstep")
    done = subprocess.run([script, *words], capture_output=True, text=True)
    assert done.returncode == code, (words, done)
    return done.stdout + done.stderr


if __name__ == "__main__":
    {"contents": contents, "use": use}[sys.argv[1]](*sys.argv[2:])
