"""`compare`: errors are those of separate runs, evaluations are counted, the fine solution is fine enough."""

import json

import pytest
import torch

import fewstep as fs
from fewstep.distances import rmse
from fewstep_analysis.diffusion_problems import by_name
from fewstep_analysis.sampler_work import exact

F64 = torch.float64
RING, BUMPS = by_name("ring"), by_name("two_bumps")
FEW = dict(solvers=[fs.DDIM(), fs.UniPC(3), "dpm_solver:2"], spacings=["karras", "logsnr"])


def start(problem, n, seed=0):
    sigma = torch.tensor(problem.schedule.sigma_max, dtype=F64)
    return problem.noise(n, seed) * problem.schedule.alpha(sigma)


def classes(labels):
    spread = torch.tensor([0.2, 0.5], dtype=F64)[labels][:, None] ** 2
    return fs.DiffusionModel(lambda x, s: x * spread / (spread + s * s), fs.EDM(0.02, 40.0))


def test_errors_are_distances_of_separate_runs_to_the_exact_ode():
    noise = start(RING, 40)
    best = fs.compare(RING.problem, nfe=8, noise=noise, batch=16, **FEW)
    truth = exact(RING, RING.noise(40), steps=400)
    assert len(best.rows) == 6
    for row in best.rows:
        end = fs.sample(RING.problem, row.plan, noise=noise)
        assert row.errors.rmse == pytest.approx(rmse(end, truth) / 2**0.5, rel=0.02)
        each = (end - truth).square().mean(1).sqrt()
        assert row.errors.median == pytest.approx(float(each.quantile(0.5)), rel=0.05)
        assert row.errors.q90 == pytest.approx(float(each.quantile(0.9)), rel=0.05)
    errors = [row.errors.rmse for row in best.rows]
    assert errors == sorted(errors)
    assert best.fine_rmse < 0.1 * errors[0]
    again = fs.sample(RING.problem, best.solver, noise=noise, sigmas=best.grid)
    torch.testing.assert_close(again, fs.sample(RING.problem, best.plan, noise=noise))


def test_default_samplers_have_the_evaluations_or_the_next_fewer():
    calls = []

    def counted(x, sigma):
        calls.append(len(x))
        return BUMPS.mixture.denoiser(x, sigma)

    best = fs.compare(fs.DiffusionModel(counted, BUMPS.schedule), nfe=6, noise=start(BUMPS, 8), batch=8)
    assert {row.plan.name: row.plan.nfe for row in best.rows} | {"EDMHeun": 5, "UniPC(2)": 6, "DPMSolver(3S)": 4} == {
        row.plan.name: row.plan.nfe for row in best.rows
    }
    assert len(best.rows) == 13 * 4
    assert sum(calls) == 8 * best.evaluations
    # less the first one, which all share, in two predictions at one level
    alone = sum(row.plan.nfe for row in best.rows)
    assert best.evaluations <= alone - len(best.rows) + 2 + 64 + 32


def test_the_fine_solution_is_refined_until_it_can_judge():
    noise = start(BUMPS, 4)
    for tol in (1.0, 1e-2):
        best = fs.compare(BUMPS.problem, nfe=40, noise=noise, solvers=[fs.UniPC(3)], spacings=["logsnr"], tol=tol)
        assert best.fine_rmse <= tol * best.rows[0].errors.rmse
    assert best.fine != fs.compare(BUMPS.problem, nfe=5, noise=noise, **FEW).fine


def test_results_depend_neither_on_batches_nor_on_who_else_is_compared():
    noise, labels = 40 * torch.randn(24, 2, dtype=F64, generator=torch.Generator().manual_seed(0)), torch.arange(24) % 2
    one = fs.compare(classes, nfe=5, noise=noise, labels=labels, batch=24, **FEW)
    two = fs.compare(classes, nfe=5, noise=noise, labels=labels, batch=5, **FEW | dict(solvers=[fs.DDIM()]))
    known = {(r.plan.name, r.spacing): r.errors.rmse for r in one.rows}
    for row in two.rows:
        assert row.errors.rmse == pytest.approx(known[row.plan.name, row.spacing], rel=1e-3)


def test_levels_and_plans_of_ones_own_are_compared_too():
    noise = start(BUMPS, 32)
    levels = fs.fit_grid(BUMPS.problem, 5, noise=noise, solver=fs.UniPC(3), nodes=32, sweeps=1)
    table, _ = fs.fit_table(BUMPS.problem, nfe=5, noise=noise, starts=1, iterations=15, teacher_steps=60)
    best = fs.compare(BUMPS.problem, nfe=5, noise=start(BUMPS, 64, 1), solvers=[fs.UniPC(3)], plans=[table],
                      spacings=["karras", levels])  # fmt: skip
    assert [row.spacing for row in best.rows] == ["its own", "levels", "karras"]
    assert best.solver is best.plan is table


def test_rows_that_sampling_error_does_not_separate_are_tied():
    best = fs.compare(BUMPS.problem, nfe=6, noise=start(BUMPS, 64), spacings=["logsnr"],
                      solvers=[fs.UniPC(3), fs.UniPC(3), fs.DDIM()])  # fmt: skip
    assert [row.tied for row in best.rows] == [True, True, False]
    assert " =\n" in best.table()
    assert best.rows[0].errors.rmse_se < 0.5 * best.rows[0].errors.rmse


@pytest.mark.slow
def test_standard_errors_cover_the_spread_between_sets_of_start_states():
    """The RMSE of 40 sets of 64 states spreads as their errors state; 45 % are 4 sigma of a spread of 40 numbers."""
    options = dict(nfe=5, solvers=[fs.DDIM()], spacings=["logsnr"])
    found = [fs.compare(BUMPS.problem, noise=start(BUMPS, 64, seed), **options).rows[0].errors for seed in range(40)]
    spread = torch.tensor([e.rmse for e in found]).std()
    assert float(spread) == pytest.approx(sum(e.rmse_se for e in found) / len(found), rel=0.45)


def test_a_sampler_that_diverges_comes_last():
    bad = fs.sigma_grid(BUMPS.schedule, 4, "karras")[2]

    def model(x, sigma):
        return BUMPS.mixture.denoiser(x, sigma) / (sigma - bad.to(sigma)).abs().clamp(max=1).ceil()

    best = fs.compare(fs.DiffusionModel(model, BUMPS.schedule), nfe=4, noise=start(BUMPS, 8), **FEW)
    assert not best.rows[-1].tied
    assert best.rows[-1].errors.rmse == float("inf")
    assert best.rows[-1].spacing == "karras"
    assert "inf" in best.table()
    assert best.document()["rows"][-1]["rmse"] is None


def test_table_json_and_plot(tmp_path):
    plan = fs.DDIM().plan(fs.sigma_grid(RING.schedule, 5)).renamed("a plan with a very long name" * 3)
    best = fs.compare(RING.problem, nfe=5, noise=start(RING, 8), spacings=["linear_quadratic", "karras"], plans=[plan])
    for most in (1, 10, 100):
        lines = best.table(most).splitlines()
        assert max(map(len, lines)) <= 80
        assert len(lines) >= 4 + min(most, len(best.rows))
    assert str(best) == best.table()
    best.save(tmp_path / "best.json")
    found = json.loads((tmp_path / "best.json").read_text())
    assert [r["rmse"] for r in found["rows"]] == [r.errors.rmse for r in best.rows]
    assert found["rows"][0]["sigmas"] == best.grid.tolist()
    assert best.plot(tmp_path / "best.svg").read_text().count("linear_quadratic") == 1


BAD = {
    "nfe": (0, "integer of at least 1"), "tol": (0.0, "above 0"), "solvers": ([fs.DDPM()], "draws noise"),
    "spacings": (["leading"], "expected at most 4, from"), "plans": ([fs.DDIM().plan([40.0, 1.0, 0.0])], "from the"),
    "noise": (torch.ones(1, 1), "at least 2"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name):
    value, words = BAD[name]
    good = dict(nfe=4, noise=start(RING if name == "spacings" else BUMPS, 4), spacings=["karras"], solvers=[fs.DDIM()])
    problem = (RING if name == "spacings" else BUMPS).problem
    with pytest.raises(fs.InputError, match=f"^{name}.*{words}"):
        fs.compare(problem, **good | {name: value})


def test_more_evaluations_than_asked_for_are_refused():
    plan = fs.DDIM().plan(fs.sigma_grid(BUMPS.schedule, 5))
    with pytest.raises(fs.InputError, match="at most 4"):
        fs.compare(BUMPS.problem, nfe=4, noise=start(BUMPS, 4), plans=[plan], **FEW)
