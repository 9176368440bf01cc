"""The experiment on comparisons, at its smoke budget, and what its committed record shows."""

import compared
from base import RECORDS
from fewstep_analysis import Record


def test_smoke_run_compares_every_default_sampler(run):
    (record,) = run(compared).values()
    (one,) = record.data["comparisons"]
    assert len(one["rows"]) == 13 * 4


def test_fine_solutions_of_the_record_can_judge():
    for one in Record.load(RECORDS / "compared.json").data["comparisons"]:
        assert one["fine_rmse"] < 0.2 * one["rows"][0]["rmse"]
        assert one["rows"][0]["rmse"] < 0.6 * next(r["rmse"] for r in one["rows"] if r["name"].startswith("DDIM"))
