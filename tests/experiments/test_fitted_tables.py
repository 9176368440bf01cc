"""The experiment on fitted tables: its smoke run."""

import pytest

import fitted_tables


@pytest.mark.slow
def test_every_row_of_the_smoke_run_is_judged_on_fresh_states(run):
    record = run(fitted_tables)["fitted-tables"]
    rows = record.data["rows"]
    assert [(r["problem"], r["levy"]) for r in rows] == [("ring", ""), ("mixture", "K")]
    assert all(0 < r["median"] < r["rmse"] < 1 for r in rows)
    assert rows[1]["rmse"] < rows[1]["euler_maruyama"]
    assert "CPU s" in fitted_tables.EXPERIMENT.tables({"fitted-tables": record})["fitted-tables"]
