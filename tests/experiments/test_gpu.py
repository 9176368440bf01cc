"""The experiment for a GPU, run on the CPU: its parts, their records and limits; counting synchronisations."""

import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import fewstep as fs
import gpu
from base import Job, Record
from fewstep_analysis import devices

SMOKE = gpu.BUDGETS["smoke"]


def measured(tmp_path, **changes):
    return gpu.EXPERIMENT.run("smoke", tmp_path, device="cpu", changes=changes)


def test_parts_are_saved_and_resumed(tmp_path):
    parts = {"agreement": 60, "orders": 0}
    made = measured(tmp_path, parts=parts)
    saved = {name: Record.load(tmp_path / "records" / f"{name}.json").data for name in made}
    rows = saved["gpu-agreement"]["rows"]
    assert {r["solver"] for r in rows} == set(SMOKE.solvers)
    assert all(r["float32"] == r["float64"] == 0 and r["reason"] is None for r in rows)
    assert saved["gpu-orders"]["error"] == "stopped after 0 s"
    command = made["gpu-orders"].made["command"]
    assert command.startswith("python analysis/experiments/gpu.py --device cpu --budget smoke --set parts=")
    tables = gpu.EXPERIMENT.tables(made)
    assert "| `UniPC` | 1 | 0 | 0 | yes |" in tables["gpu-agreement"]
    assert "stopped after 0 s" in tables["gpu-orders"]
    assert tables["gpu-throughput"] == "Not measured yet."
    again = measured(tmp_path, parts=parts)
    assert again["gpu-agreement"].data == saved["gpu-agreement"]  # its seconds, too


def sent_by(part, **changes):
    """What a part sends, run in this process."""
    found = []
    send = SimpleNamespace(send=found.append, close=lambda: None)
    gpu.work(send, part, replace(SMOKE, **changes), Job(0, "cpu", None))
    return found


def test_error_of_a_part_is_sent_after_its_rows():
    found = sent_by("agreement", solvers=("UniPC",))
    assert found[-1] == ("error", None)
    *rows, (key, error) = sent_by("throughput", shapes=((-1,),))
    assert rows[0][0] == "copy"
    assert key == "error"
    assert "negative" in error


def test_missing_data_is_said(monkeypatch):
    monkeypatch.delenv("FEWSTEP_DATA", raising=False)
    (key, note), end = sent_by("mnist")
    assert key == "note"
    assert "FEWSTEP_DATA" in note
    assert end == ("error", None)


@pytest.mark.slow  # tracing for torch.compile
def test_throughput_measures_every_program():
    rows = [f for f in sent_by("throughput") if isinstance(f, dict)]
    eager = [r for r in rows if r["form"] == "eager"]
    assert {r["what"] for r in eager} == {*gpu.NOISE, *gpu.SOLVERS}
    for r in eager:
        elements = 64 * 2 * SMOKE.steps
        assert r["reason"] is None
        assert r["path_steps_per_second"] == pytest.approx(elements / r["seconds"])
    assert {r["form"] for r in rows} == {"eager", "steps", "torchsde", "compiled"}


def test_elements_that_a_step_moves():
    # one normal is written; Euler-Maruyama also reads it, and reads and writes the state; ShARK has two normals
    assert [gpu.elements_moved(w) for w in ("fresh W", "EulerMaruyama", "ShARK")] == [1, 4, 6]


def test_paper_budget_is_refused_on_a_cpu(tmp_path):
    with pytest.raises(fs.InputError, match="--budget smoke"):
        gpu.EXPERIMENT.run("paper", tmp_path, device="cpu")


def test_unknown_part_is_refused(tmp_path):
    with pytest.raises(fs.InputError, match="parts"):
        measured(tmp_path, parts={"speed": 1})


def test_synchronisations_are_counted_by_line(monkeypatch):
    modes = []
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def waits(*_):
        for _ in range(3):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("other", stacklevel=1)

    (place, count), *others = devices.synchronisations(waits).items()
    assert place.startswith("experiments/test_gpu.py:")
    assert (count, others) == (3, [])
    assert modes == ["warn", 0]
    steps = devices.synchronisations_of(lambda device, dtype, steps, portable: [waits() for _ in range(steps)], "cuda")
    assert sum(steps["more"].values()) == 24


@pytest.mark.parametrize("name", ["EulerMaruyama", "LogODE", "DDIM", "SASolver"])
def test_cases_are_solved_on_the_path_of_the_cpu(name):
    for _, run in devices.cases_of(fs.solvers()[name]):
        first, second = (run("cpu", torch.float64, 4, portable) for portable in (True, False))
        assert devices.distance(first, second) == 0
        assert devices.distance(first, first * (1 + 1e-12)) > 1000


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # those of other packages
def test_smoke_run_fills_every_table(tmp_path):
    made = measured(tmp_path)
    assert {name: r.data["error"] for name, r in made.items()} == dict.fromkeys(gpu.EXPERIMENT.records)
    assert all(r.data["rows"] or r.data["note"] for r in made.values())
    assert {r["solver"] for r in made["gpu-orders"].data["rows"]} == {"EulerMaruyama", "Milstein", "ShARK", "SigStep"}
    assert all("| --- |" in text or "Note: " in text for text in gpu.tables(made).values())
    assert (tmp_path / "figures" / "gpu-throughput.svg").exists()
    assert (tmp_path / "figures" / "gpu-orders.svg").exists()
