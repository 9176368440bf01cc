"""The comparison of learned samplers: their tables at the start, and its smoke run."""

import pytest
import torch

import fewstep as fs
import learned_comparison
import learned_methods
from fewstep.learned.table.coefficients import Coefficients

EDM = fs.EDM(0.02, 40.0)


@pytest.mark.parametrize("nfe", [3, 5])
def test_methods_that_change_ipndm_begin_with_it(nfe):
    """Its weights on the same levels; its grid ends at 0, so the last level may lie above the smallest."""
    for name in ("LD3", "S4S-Alt", "GS", "BNS"):
        method = learned_methods.method(name, EDM, nfe, "logsnr")
        weights, levels = method.table(method.start)
        sigmas = torch.cat([levels.exp(), torch.zeros(1)]) if name != "BNS" else fs.sigma_grid(EDM, nfe)
        expected = Coefficients.of(fs.IPNDM(3).plan(sigmas, EDM))
        torch.testing.assert_close(weights, expected.weights, rtol=1e-9, atol=1e-9)
        assert levels[-1].exp() >= EDM.sigma_min * (1 - 1e-9)


def test_first_step_of_amed_begins_as_a_singlestep_solver_of_order_two():
    method = learned_methods.method("AMED", EDM, 8, "logsnr")
    weights, levels = method.table(method.start)
    sigmas = fs.sigma_grid(EDM, 4)
    plan = fs.DPMSolver(2).plan(torch.cat([sigmas[:2], sigmas[1:2] / 2]), EDM)
    expected = Coefficients.of(plan)
    torch.testing.assert_close(weights[:3, :3], expected.weights[:3, :3], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(levels[:2], expected.levels[:2], rtol=1e-6, atol=1e-9)
    assert learned_methods.method("AMED", EDM, 3, "logsnr") is None
    assert len(learned_methods.method("EPD", EDM, 4, "logsnr").table(torch.zeros(12).double())[1]) == 6


@pytest.mark.slow
def test_every_method_of_the_smoke_run_is_judged(run):
    records = run(learned_comparison)
    rows = {r["method"]: r for r in records["learned-comparison"].data["rows"]}
    assert set(rows) == set(learned_comparison.METHODS)
    assert rows["fit_table"]["rmse"] < rows["best untrained"]["rmse"]
    assert all(rows[m]["iterations"] > 0 for m in learned_comparison.ADAM)
    paths = {r["method"] for r in records["learned-comparison-paths"].data["rows"]}
    assert paths >= {
        "fine Euler-Maruyama",
        "table, W",
        "table, H",
        "table, K",
        "SigSampler, K",
        "SEA",
        "ShARK",
        "SASolver",
    }


def test_table_states_where_another_method_is_first():
    """Within two standard errors or behind, by name."""

    def cell(ours, other, error):
        rows = {"fit_table": ours, "LD3": other}
        return {m: {"rmse": r, "median": r, "rmse_se": error} for m, r in rows.items()}

    cells = {("a", 3): cell(1.0, 2.0, 0.1), ("b", 4): cell(1.0, 0.9, 0.1), ("c", 5): cell(1.0, 0.5, 0.1)}
    text = learned_comparison._first(cells, "fit_table")
    assert "smallest RMSE in 1 of 3 cells" in text
    assert "smaller one: b at 4 (LD3)." in text
    assert "Behind: c at 5 (LD3)." in text
