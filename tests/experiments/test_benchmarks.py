"""The table of ratios to peers, and the experiments on speed and work-precision that it reads."""

import json

import pytest
import torch

import benchmarks
import brownian_figures
import brownian_speed
import peers_k_diffusion
import sampler_overhead
import speed_rows
import work_precision
from base import RECORDS
from fewstep_analysis import Record


def record(name):
    return Record.load(RECORDS / f"{name}.json")


READERS = {
    "noise": (benchmarks.noise, "brownian-speed", 3), "solve": (benchmarks.solves, "work-precision-sde", 2),
    "sampling loop": (benchmarks.overheads, "sampler-overhead", 24),
    "error": (benchmarks.errors, "work-precision-ring", 4),
}  # fmt: skip


@pytest.mark.parametrize("group", READERS)
def test_rows_are_read_from_records(group):
    read, name, least = READERS[group]
    rows = read(record(name))
    assert len(rows) >= least
    assert {r["group"] for r in rows} == {group}
    numbers = json.dumps(record(name).data)
    for r in rows:
        assert r["ratio"] == pytest.approx(r["theirs"] / r["ours"])
        if r["unit"] != "ms":  # copied without conversion
            assert str(r["ours"]) in numbers
            assert str(r["theirs"]) in numbers


def test_paired_methods_have_equal_errors():
    """Otherwise their seconds would not be for the same work: RMSE within 1 % along the stored paths."""
    found = {(s["package"], s["name"]): s["error"] for s in record("work-precision-sde").data["series"]}
    for theirs, ours in benchmarks.TWINS.items():
        for package in ("torchsde", "diffrax"):
            if (package, theirs) in found:
                other = torch.tensor(found[package, theirs])
                torch.testing.assert_close(torch.tensor(found["fewstep", ours]), other, rtol=0.01, atol=0)


def test_samplers_of_k_diffusion_do_the_same_work():
    """The function asserts equal results before it times them."""
    expected = len(benchmarks.K_SAMPLERS) if peers_k_diffusion.installed() else 0
    assert len(benchmarks.drop_in_k(1, 0)) == expected


def test_page_leads_with_every_row_in_which_another_package_is_faster():
    made, rows = speed_rows.tables({"speed-rows": record("speed-rows")}), record("speed-rows").data["rows"]
    below = [r for r in rows if r["cost"]["ratio"] < 1 and r["peer"] not in speed_rows.OWN]
    assert made["speed-worst"].count("\n") == len(below) + 1
    assert made["speed-rows"].count("\n| ") == len(rows) + 1
    sizes = {r["size"] for r in rows}
    assert {"(64, 1)", "(500, 2)", "(4096, 16)", "(65536, 4)"} <= sizes


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # those of other packages
def test_speed_at_every_size(run):
    rows = run(speed_rows)["speed-rows"].data["rows"]
    assert {"solve", "sdeint", "gradient", "overhead", "noise", "sampling"} <= {r["group"] for r in rows}
    assert all(r["cost"]["low"] <= r["cost"]["ratio"] <= r["cost"]["high"] for r in rows)


@pytest.mark.slow
def test_figures_of_brownian_paths(run):
    data = run(brownian_figures)["brownian-figures"].data
    path = data["path"]
    assert path["values"][-1] == pytest.approx(path["W"], rel=1e-4)
    bridge = [v - k / 512 * path["W"] for k, v in enumerate(path["values"])]
    assert sum(bridge) / 512 == pytest.approx(path["H"], abs=2e-3)  # the mean of path minus chord
    assert data["orders"]["slopes"]["true"] > 0.85  # 0.5 without the area


@pytest.mark.slow
def test_increments(run):
    rows = run(brownian_speed, turns=1)["brownian-speed"].data["rows"]
    assert {"bare torch loop", "path W, walked"} <= {r["series"] for r in rows}


@pytest.mark.filterwarnings("ignore")  # those of diffusers
@pytest.mark.slow
def test_sampling_overhead(run):
    rows = run(sampler_overhead, rounds={(2, 4, 8, 8): 2})["sampler-overhead"].data["rows"]
    assert len(rows) == len(sampler_overhead.SOLVERS) * len(sampler_overhead.STEPS)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # those of other packages
def test_benchmarks_measure_all_parts(run):
    made = run(benchmarks)
    assert {"brownian-speed", "sampler-overhead", "work-precision-sde", "work-precision-ring"} < set(made)
    assert {"noise", "solve", "drop-in", "error"} <= {r["group"] for r in made["benchmarks"].data["rows"]}
    assert made["benchmarks"].data["peers"]["torchsde"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_work_precision_needs_both_problems_for_all_tables(run):
    tables = work_precision.tables(run(work_precision, problems=("ring", "smooth"), evaluations=(5, 10)))
    assert set(tables) == {"work-ring", "work-smooth", "work-spacings", "work-sde"}
