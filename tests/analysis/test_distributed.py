"""Several processes give the result of one: started by torchrun, on gloo."""

import json
import runpy
import subprocess
import sys

import pytest

CODE = """
import json, os, sys, torch, fewstep as fs
from fewstep_analysis import problems
from fewstep_analysis import strong_orders, weak_orders
from fewstep_analysis.parallel import processes

def measure():
    levels = dict(levels=range(2, 5))
    with processes("cpu") as device:
        found = strong_orders([fs.EulerMaruyama(), fs.Milstein()], problems.sine(), paths=999, reference="levels",
                              device=device, **levels)
        found += strong_orders([fs.SRA1()], problems.additive_sine(), paths=4200, device=device, **levels)
        found += strong_orders([fs.LogODE()], problems.noncommutative_pair(), paths=100, reference="levels", **levels)
        found += weak_orders([fs.ShARK()], problems.additive_sine(), paths=500, **levels)
        return [[e.order, e.low, e.high, *e.rmse, *e.mean, *e.median, *e.local] for e in found]

if __name__ == "__main__":
    torch.set_num_threads(1)
    numbers = measure()
    if os.environ["RANK"] == "0":
        json.dump(numbers, open(sys.argv[1], "w"))
"""


def torchrun(world):
    # standalone: the rendezvous chooses its own port
    return ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]


def run(words, folder):
    """Run to success; a start that dies from a signal in gloo's threads (seen once) is repeated."""
    for _ in range(2):
        done = subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=folder, timeout=120)
        if "SIGABRT" not in done.stderr:
            break
    assert done.returncode == 0, done.stderr[-6000:]
    return done


@pytest.fixture(scope="module")
def code(tmp_path_factory):
    path = tmp_path_factory.mktemp("code") / "code.py"
    path.write_text(CODE)
    return path


@pytest.fixture(scope="module")
def alone(code):
    return runpy.run_path(str(code))["measure"]()


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_several_processes_give_the_result_of_one(world, alone, code, tmp_path):
    run([*torchrun(world), str(code), "found.json"], tmp_path)
    for a, b in zip(alone, json.loads((tmp_path / "found.json").read_text()), strict=True):
        assert max(abs(x - y) / max(abs(x), 1e-3) for x, y in zip(a, b, strict=True)) < 1e-12


@pytest.mark.slow
def test_command_line_runs_under_torchrun(tmp_path):
    words = "-m fewstep_analysis convergence --solver milstein --problem sine --reference levels --levels 2 5"
    done = run([*torchrun(2), *words.split(), "--paths", "100", "--out", "o.svg"], tmp_path)
    assert done.stdout.count("Milstein: order") == 1
    assert json.loads((tmp_path / "o.json").read_text())["data"]["estimates"][0]["paths"] == 100
