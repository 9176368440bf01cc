"""The tutorial's experiment at smoke budget, and what its committed record shows."""

import pytest

import neural_sde
from base import RECORDS
from fewstep_analysis import Record


@pytest.mark.slow
def test_smoke_run_scores_every_model(run):
    pytest.importorskip("statsmodels")
    (record,) = run(neural_sde).values()
    assert {r["model"] for r in record.data["scores"]} == {*neural_sde.SOLVERS, "AR(9)", "the years before"}


def test_the_neural_sde_of_the_record_learned_the_cycle():
    scores = Record.load(RECORDS / "neural-sde.json").data["scores"]
    before = next(r["score"] for r in scores if r["model"] == "the years before")
    assert all(r["score"] < 0.7 * before for r in scores if r["model"] == "ReversibleHeun" and r["steps"] == 4)
