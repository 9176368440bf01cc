"""The experiment on fitted grids, at its smoke budget, and what its committed record shows."""

import fitted_grids
from base import RECORDS
from fewstep_analysis import Record


def test_smoke_run_has_every_grid(run):
    (record,) = run(fitted_grids, counts=(8,)).values()
    assert {row["grid"] for row in record.data["rows"]} == {
        *fitted_grids.SPACINGS, fitted_grids.FITTED, fitted_grids.INTERPOLATED,
    }  # fmt: skip


def test_fitted_grids_of_the_record_beat_every_usual_spacing():
    rows = Record.load(RECORDS / "fitted-grids.json").data["rows"]
    for fitted in (row for row in rows if row["grid"] == fitted_grids.FITTED):
        same = ("problem", "solver", "evaluations")
        usual = [r["rmse"] for r in rows if r["grid"] in fitted_grids.SPACINGS and all(r[k] == fitted[k] for k in same)]
        assert fitted["rmse"] < min(usual)
