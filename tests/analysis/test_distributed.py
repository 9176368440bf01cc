"""Several processes give the result of one: started by torchrun, on gloo."""

import json
import subprocess
import sys

import pytest

CODE = """
import json, os, sys, torch, fewstep as fs
from fewstep_analysis import problems
from fewstep_analysis import strong_orders, weak_orders
from fewstep_analysis.parallel import processes

torch.set_num_threads(1)
levels = dict(levels=range(2, 5))
with processes("cpu") as device:
    found = strong_orders([fs.EulerMaruyama(), fs.Milstein()], problems.sine(), paths=999, reference="levels",
                          device=device, **levels)
    found += strong_orders([fs.SRA1()], problems.additive_sine(), paths=9000, device=device, **levels)
    found += strong_orders([fs.LogODE()], problems.noncommutative_pair(), paths=100, reference="levels",
                           **levels)
    found += weak_orders([fs.ShARK()], problems.additive_sine(), paths=2000, **levels)
    if os.environ.get("RANK", "0") == "0":
        numbers = [[e.order, e.low, e.high, *e.rmse, *e.mean, *e.median, *e.local] for e in found]
        json.dump(numbers, open(sys.argv[1], "w"))
"""


def torchrun(world):
    # standalone: the rendezvous chooses its own port
    return [] if world == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]


def run(words, folder):
    """Run to success; a start that dies from a signal in gloo's threads (seen once) is repeated."""
    for _ in range(2):
        done = subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=folder, timeout=120)
        if "SIGABRT" not in done.stderr:
            break
    assert done.returncode == 0, done.stderr[-6000:]
    return done


def launch(world, folder):
    out = folder / f"{world}.json"
    (folder / "code.py").write_text(CODE)
    run([*torchrun(world), str(folder / "code.py"), str(out)], folder)
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return launch(1, tmp_path_factory.mktemp("alone"))


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_several_processes_give_the_result_of_one(world, alone, tmp_path):
    for a, b in zip(alone, launch(world, tmp_path), strict=True):
        assert max(abs(x - y) / max(abs(x), 1e-3) for x, y in zip(a, b, strict=True)) < 1e-12


@pytest.mark.slow
def test_command_line_runs_under_torchrun(tmp_path):
    words = "-m fewstep_analysis convergence --solver milstein --problem sine --reference levels --levels 2 5"
    done = run([*torchrun(2), *words.split(), "--paths", "100", "--out", "o.svg"], tmp_path)
    assert done.stdout.count("Milstein: order") == 1
    assert json.loads((tmp_path / "o.json").read_text())["data"]["estimates"][0]["paths"] == 100
