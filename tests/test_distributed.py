"""Several processes, one result: started as torchrun starts them, on gloo."""

import json
import socket
import subprocess
import sys

import pytest

CODE = """
import json, sys, torch, fewstep as fs
from fewstep.analysis import problems, strong_orders, weak_orders
from fewstep.analysis.parallel import is_first, processes

torch.set_num_threads(1)
levels = dict(levels=range(2, 5))
with processes("cpu") as device:
    found = strong_orders([fs.EulerMaruyama(), fs.Milstein()], problems.sine(), paths=999, reference="levels",
                          device=device, **levels)
    found += strong_orders([fs.SRA1()], problems.additive_sine(), paths=9000, device=device, **levels)
    found += strong_orders([fs.LogODE()], problems.noncommutative_pair(), paths=100, reference="levels",
                           **levels)
    found += weak_orders([fs.ShARK()], problems.additive_sine(), paths=2000, **levels)
    if is_first():
        numbers = [[e.order, e.low, e.high, *e.rmse, *e.mean, *e.median, *e.local] for e in found]
        json.dump(numbers, open(sys.argv[1], "w"))
"""


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def launch(world, folder):
    out = folder / f"{world}.json"
    (folder / "code.py").write_text(CODE)
    words = [] if world == 1 else ["-m", "torch.distributed.run", f"--nproc-per-node={world}",
                                   f"--master-port={free_port()}"]  # fmt: skip
    done = subprocess.run([sys.executable, *words, str(folder / "code.py"), str(out)], capture_output=True,
                          text=True, timeout=120)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return launch(1, tmp_path_factory.mktemp("alone"))


@pytest.mark.parametrize("world", [2, 3])
def test_two_and_three_processes_give_what_one_gives(world, alone, tmp_path):
    for a, b in zip(alone, launch(world, tmp_path), strict=True):
        assert max(abs(x - y) / max(abs(x), 1e-3) for x, y in zip(a, b, strict=True)) < 1e-12


def test_the_command_line_runs_under_torchrun(tmp_path):
    words = ["-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}", "-m",
             "fewstep.analysis", "convergence", "--solver", "milstein", "--problem", "sine",
             "--reference", "levels", "--levels", "2", "5", "--paths", "100", "--out", "o.svg"]  # fmt: skip
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("Milstein: order") == 1
    assert json.loads((tmp_path / "o.json").read_text())["data"]["estimates"][0]["paths"] == 100
