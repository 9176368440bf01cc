"""`fewstep distill dode` and the D-ODE studies; what a fit costs, and what it gains on digits."""

import json
import subprocess
import sys
import time

import pytest
import torch

import fewstep as fs
from experiments import dode_mnist, dode_problems, dode_tools
from fewstep_analysis.__main__ import main
from fewstep_analysis.memory import PeakMemory


def cli(*words, **kw):
    return subprocess.run(
        [sys.executable, "-m", "fewstep_analysis", *words], capture_output=True, text=True, **kw
    )


def test_the_command_fits_writes_and_tells(tmp_path):
    words = "distill dode --problem ring --base dpm_solver_pp:2 --steps 4 --terms 2 --samples 128 --seed 3"
    out = cli(*words.split(), "--out", "t.safetensors", cwd=tmp_path)
    assert out.returncode == 0, out.stderr
    for word in ("kappa", "R^2 by row", "held-out RMSE", "evaluations a start state", "seed: 3",
                 "wrote t.safetensors"):  # fmt: skip
        assert word in out.stdout
    assert "%|" not in out.stderr  # no progress bar in a pipe
    student, task = fs.load(tmp_path / "t.safetensors"), dode_tools.task("ring")
    assert student.words["problem"] == "ring"
    fs.sample(task.problem, student, noise=task.noise(4, 9))
    again = cli(*words.split(), "--out", "t.json", "--json", cwd=tmp_path)
    report = json.loads(again.stdout)
    assert report["kappa"] == student.kappa.tolist()
    assert 0 < report["student_rmse"] < report["base_rmse"]
    assert torch.equal(fs.load(tmp_path / "t.json").plan.update_eval, student.plan.update_eval)


def test_the_command_refines(tmp_path):
    words = "distill dode --problem smooth --base UniPC(2) --steps 3 --refine --iterations 5 --samples 64"
    assert cli(*words.split(), cwd=tmp_path).returncode == 0
    words = "distill dode --problem smooth --base ddim --steps 3 --learn-grid --iterations 60 --samples 64"
    out = cli(*words.split(), cwd=tmp_path)
    assert "fit: grid and weights" in out.stdout, out.stderr


BAD = {
    "problem": (["--problem", "rong"], "Did you mean 'ring'"),
    "base": (["--problem", "ring", "--base", "dpm_solver_p"], "base: got 'dpm_solver_p'"),
    "steps": (["--problem", "ring", "--steps", "0"], "steps: got 0"),
    "terms": (["--problem", "ring", "--terms", "0"], "terms: got 0"),
    "samples": (["--problem", "ring", "--samples", "9"], "at least 16"),
    "device": (["--problem", "ring", "--device", "gpu"], "device: got 'gpu'"),
    "out": (["--problem", "ring", "--out", "no/such/folder.safetensors"], "make it first"),
    "grid": (["--problem", "ring", "--base", "unipc", "--learn-grid"], "learn_grid: got"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(case, tmp_path, monkeypatch, capsys):
    words, message = BAD[case]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["fewstep", "distill", "dode", *words])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    said = capsys.readouterr()
    assert message in said.err
    assert len(said.err.strip().splitlines()) == 1
    assert said.out == ""
    assert not list(tmp_path.iterdir())


def test_the_command_has_help_with_an_example():
    assert "Example: fewstep distill dode" in cli("distill", "dode", "--help").stdout
    assert "dode" in cli("distill", "--help").stdout


def test_bases_have_the_names_of_the_other_commands():
    for name in (*dode_tools.SOLVERS, *dode_tools.MORE):
        found = dode_tools.solver(name)[0]
        assert isinstance(found, fs.DiffusionSolver)
    for name, expected in (("dpm_solver_pp:3", fs.DPMSolverPP), ("DPM-Solver++(2)", fs.DPMSolverPP),
                         ("edm_heun", fs.EDMHeun), ("dpm_solver:2m", fs.DPMSolver)):  # fmt: skip
        assert type(dode_tools.solver(name)[0]) is expected


def test_a_ten_step_table_of_the_digits_teacher_is_cheap():
    """Under 10 s, and with less memory than sampling the same start states takes."""
    task = dode_tools.task("digits")
    began = time.process_time()  # of all cores, and not of what else runs here
    fs.distill_dode(task.problem, fs.DDIM(), noise=task.noise(256, 0), steps=10)
    assert time.process_time() - began < 10
    cost = dode_problems.cost(task, 128)
    assert cost["fit_bytes"] < 0.8 * cost["sampling_bytes_by_batch"]["128"]


def test_memory_of_a_fit_beyond_a_batch_is_a_few_states_a_start_state():
    """The student keeps a state and two evaluations, the teacher one of each: nothing else grows."""
    task = dode_tools.task("digits")
    peaks = []
    for n in (128, 512):
        noise = task.noise(n, 0)
        with PeakMemory() as memory:
            fs.distill_dode(task.problem, fs.DDIM(), noise=noise, steps=3, batch=32)
        peaks.append(memory.peak)
    assert (peaks[1] - peaks[0]) / (512 - 128) < 5.2 * 64 * 4  # a state is 64 float32 numbers


def test_peak_memory_counts_what_lives_at_once():
    with PeakMemory() as memory:
        for _ in range(5):
            x = torch.ones(1000)
            y = x + 1
            y.mul_(2)
            y.view(10, 100)
    assert memory.peak <= 5 * 4000
    assert memory.peak >= 8000


@pytest.mark.slow
@pytest.mark.parametrize("n", [5, 8, 10])
def test_on_digits_the_best_learned_is_twice_as_near_as_the_best_untrained(n):
    bench = dode_tools.Bench.of(dode_tools.task("digits"), 256, 256, 0, steps=200)
    bench.peers(n)
    made = bench.fit("DPMSolverPP(2)", n, refine="global", learn_grid=True, iterations=300, rate=0.03,
                     minibatch=64, terms=3)  # fmt: skip
    best = min(r["rmse"] for r in bench.rows)
    assert bench.rmse(bench.sample(made[0])) < best / 2


def test_the_study_of_problems_runs_on_a_smoke_budget(tmp_path, monkeypatch):
    monkeypatch.setattr(
        dode_problems, "BUDGETS", {k: dode_problems.BUDGETS[k] for k in ("gaussian", "digits")}
    )
    lines = dode_problems.run(tmp_path, budget="smoke")
    record = json.loads((tmp_path / "records" / "dode-gaussian.json").read_text())["data"]
    gaps = [p["median"] for p in record["population"]]
    assert gaps[3] < 0.5 * gaps[0]
    assert gaps[3] < 0.01
    assert (
        json.loads((tmp_path / "records" / "dode-digits.json").read_text())["data"]["cost"]["fit_bytes"] > 0
    )
    assert (tmp_path / "figures" / "dode-problems.svg").exists()
    assert (tmp_path / "figures" / "dode-digits.png").exists()
    assert any("best untrained / best learned" in line for line in lines)


@pytest.mark.slow
def test_the_study_of_mnist_runs_with_any_network(tmp_path, monkeypatch):
    """A small U-Net with weights of chance in the teacher's place, and noise for data."""
    pytest.importorskip("diffusers")
    from fewstep_analysis import datasets, mnist_teacher

    torch.manual_seed(0)
    net = mnist_teacher.unet([16, 16, 16], 1, 8, 8).eval().requires_grad_(False)
    monkeypatch.setattr(mnist_teacher, "network", lambda *a: net)
    real = torch.rand(64, 1, 28, 28) * 2 - 1
    labels = torch.zeros(64, dtype=torch.long)
    monkeypatch.setattr(datasets, "mnist", lambda *a: (real, labels, real, labels))
    monkeypatch.setattr(mnist_teacher, "features", lambda: lambda x: x.flatten(1)[:, :8])
    lines = dode_mnist.run(tmp_path, budget="smoke")
    record = json.loads((tmp_path / "records" / "dode-mnist.json").read_text())["data"]
    kinds = {(r["base"], r["kind"]) for r in record["rows"]}
    assert {("DDIM", "untrained"), ("IPNDM(2)", "grid and weights"), ("iPNDM", "best untrained")} <= kinds
    of = {(r["base"], r["kind"]): r["rmse"] for r in record["rows"]}
    for family in dode_tools.PEERS:  # the wider choice is at least as good
        assert of[family, "best untrained"] <= of[family, "best untrained, even grids"]
    assert record["frechet"]["samples"] == 16
    assert {r["kind"] for r in record["guided"]} == {"untrained", "greedy, 3 terms"}
    assert (tmp_path / "figures" / "dode-mnist.svg").exists()
    assert (tmp_path / "figures" / "dode-mnist.png").exists()
    assert lines


def test_labels_of_a_study_come_in_equal_shares():
    task = dode_tools.Task("of ten", lambda y: None, fs.EDM(), (1,), classes=10)
    labels = task.labels(40, 3)
    assert labels.bincount().tolist() == [4] * 10
    assert len(labels[::8].unique()) > 3  # of the held-out ones too
    assert torch.equal(labels, task.labels(40, 3))
