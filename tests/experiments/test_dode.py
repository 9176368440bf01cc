"""The D-ODE experiments: their runs and the cost of a fit."""

import time

import pytest
import torch

import dode_bench
import dode_mnist
import dode_problems
import dode_ring
import fewstep as fs
from fewstep_analysis.distillation import Task, task
from memory import PeakMemory


def by_kind(record):
    return {(r["base"], r["kind"], r["budget"]): r["rmse"] for r in record.data["rows"]}


@pytest.mark.slow
def test_ring(run):
    record = run(dode_ring)["dode-ring"]
    found = by_kind(record)
    for base in ("DDIM", "DPMSolverPP(2)"):
        assert found[base, dode_bench.TERMS, 5] < found[base, dode_bench.UNTRAINED, 5]
    assert found[dode_bench.ANY, dode_bench.TABLE, 5] < found["DDIM", dode_bench.TERMS, 5]
    assert "CPU seconds" in dode_ring.EXPERIMENT.tables({"dode-ring": record})["dode-ring"]


@pytest.mark.slow
def test_problems(run):
    records = run(dode_problems)
    gaps = [p["median"] for p in records["dode-gaussian"].data["population"]]
    assert gaps[3] < 0.01
    assert gaps[3] < 0.5 * gaps[0]
    assert records["dode-digits"].data["cost"]["fit_bytes"] > 0
    for record in records.values():
        found = by_kind(record)
        assert record.data["gains"]["5"] == pytest.approx(
            min(v for (_, kind, n), v in found.items() if n == 5 and "untrained" in kind)
            / min(v for (_, kind, n), v in found.items() if n == 5 and "untrained" not in kind)
        )


@pytest.mark.slow
def test_mnist_with_any_network(run, any_network):
    record = run(dode_mnist)["dode-mnist"]
    found = by_kind(record)
    for family in dode_bench.PEERS:  # the wider choice is at least as good
        assert found[family, dode_mnist.BEST, 5] <= found[family, dode_mnist.EVEN, 5]
    assert (dode_bench.ANY, dode_bench.TABLE, 5) in found
    assert {r["kind"] for r in record.data["guided"]} == {dode_bench.UNTRAINED, dode_bench.TERMS}


@pytest.mark.slow
def test_table_for_digits_takes_seconds():
    model, start = task("digits"), time.process_time()
    fs.distill_dode(model.problem, fs.DDIM(), noise=model.noise(256, 0), steps=10)
    assert time.process_time() - start < 10


@pytest.mark.slow
def test_fit_takes_less_memory_than_sampling():
    cost = dode_problems.cost(task("digits"), 64)
    assert cost["fit_bytes"] < 0.8 * cost["sampling_bytes_by_batch"]["64"]


@pytest.mark.slow
def test_memory_of_fit_grows_by_few_states_per_initial_state():
    """The student keeps a state and two evaluations, the teacher one of each."""
    model, peaks = task("digits"), []
    for n in (512, 1024):
        with PeakMemory() as memory:
            fs.distill_dode(model.problem, fs.DDIM(), noise=model.noise(n, 0), steps=3, batch=32)
        peaks.append(memory.peak)
    assert (peaks[1] - peaks[0]) / (1024 - 512) < 5.2 * 64 * 4  # a state is 64 float32 numbers


def test_peak_memory_counts_tensors_that_exist_together():
    with PeakMemory() as memory:
        for _ in range(5):
            x = torch.ones(1000)
            y = x + 1
            y.mul_(2)
            y.view(10, 100)
    assert 8000 <= memory.peak <= 5 * 4000


def test_labels_come_in_equal_shares():
    model = Task("ten classes", lambda y: None, fs.EDM(), (1,), classes=10)
    labels = model.labels(40, 3)
    assert labels.bincount().tolist() == [4] * 10
    assert len(labels[::8].unique()) > 3  # also among the held-out ones
    assert torch.equal(labels, model.labels(40, 3))
