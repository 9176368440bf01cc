"""The table of ratios to peers: each row is read from the record it names, in the direction it says."""

import json
from pathlib import Path

import pytest
import torch

import fewstep as fs
from experiments import benchmarks, peers_k_diffusion
from fewstep_analysis import Record

RECORDS = Path(__file__).resolve().parents[1] / "docs" / "records"


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
        if r["unit"] != "ms":  # taken over as they stand
            assert str(r["ours"]) in numbers
            assert str(r["theirs"]) in numbers


def test_twins_have_the_same_errors():
    """Else their seconds would not be of the same work: RMSE of each pair within 1 % on one stored path."""
    found = {(s["package"], s["name"]): s["error"] for s in record("work-precision-sde").data["series"]}
    for theirs, ours in benchmarks.TWINS.items():
        for package in ("torchsde", "diffrax"):
            if (package, theirs) in found:
                other = torch.tensor(found[package, theirs])
                torch.testing.assert_close(torch.tensor(found["fewstep", ours]), other, rtol=0.01, atol=0)


def test_k_diffusions_samplers_and_ours_do_the_same_work():
    """The function asserts that both end at the same numbers before it times them."""
    if not peers_k_diffusion.installed():
        assert benchmarks.drop_in_k(1, 0) == []
    else:
        assert len(benchmarks.drop_in_k(1, 0)) == len(benchmarks.K_SAMPLERS)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the neighbours' own
def test_one_command_measures_all(tmp_path):
    threads = torch.get_num_threads()
    try:
        lines = benchmarks.run(tmp_path, budget="smoke")
    finally:
        torch.set_num_threads(threads)
    made = Record.load(tmp_path / "records" / "benchmarks.json")
    assert {"noise", "solve", "drop-in", "error"} <= {r["group"] for r in made.data["rows"]}
    assert made.data["peers"]["torchsde"]
    assert lines == benchmarks.markdown(made).splitlines()
    assert fs.__version__ == made.made["versions"]["fewstep"]
