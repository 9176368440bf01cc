"""The tutorial's experiment at smoke budget, and what its committed record shows."""

import pytest

import two_moons
from base import RECORDS
from fewstep_analysis import Record


@pytest.mark.slow
def test_smoke_run_keeps_points_of_every_sampler(run):
    (record,) = run(two_moons).values()
    assert {len(points) for points in record.data["points"].values()} == {20}
    assert list(record.data["points"])[2:] == [*two_moons.SOLVERS, "fitted table"]


def test_fitted_tables_of_the_record_are_far_ahead():
    rmse = {(r["sampler"], r["evaluations"]): r["rmse"] for r in Record.load(RECORDS / "two-moons.json").data["errors"]}
    for n in (4, 6, 8, 12):
        assert rmse["fitted table", n] < 0.5 * min(rmse[name, n] for name in two_moons.SOLVERS)
