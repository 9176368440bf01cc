"""`fit_grid`: the dynamic programming is optimal, and the levels beat the usual spacings on other start states."""

import itertools

import pytest
import torch

import fewstep as fs
from fewstep.learned.fit_grid import shortest
from fewstep_analysis.diffusion_problems import by_name

EDM = fs.EDM(0.02, 20.0)
VARIANCE = torch.tensor([0.04, 0.3, 1.0], dtype=torch.float64)
LINEAR = fs.DiffusionModel(lambda x, s: x * VARIANCE.to(x) / (VARIANCE.to(x) + s * s), EDM)
USUAL = ("logsnr", "karras", "uniform", "trailing", "kl_optimal", "beta")


def normals(n, seed=0):
    return 20 * torch.randn(n, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("growth", [1.0, 1.3])
def test_the_dynamic_programming_finds_the_best_of_all_paths(growth):
    generator = torch.Generator().manual_seed(0)
    costs, last = torch.rand(9, 9, generator=generator), torch.rand(9, generator=generator)
    costs = torch.where(torch.ones(9, 9).triu(1) > 0, costs, torch.inf)

    def total(path):
        parts = [costs[a, b] for a, b in itertools.pairwise(path)] + [last[path[-1]]]
        return float(sum(growth**k * part for k, part in enumerate(parts)))

    for steps in (1, 2, 4, 9):
        every = [[0, *rest] for rest in itertools.combinations(range(1, 9), steps - 1)]
        assert shortest(costs, last, steps, growth) == min(every, key=total)


def test_one_free_level_is_where_brute_force_has_it():
    """DDIM on Gaussian data is linear: the error of each grid of two steps is known."""
    levels = fs.sigma_grid(EDM, 39, "logsnr", "sigma_min")
    decays = VARIANCE / (VARIANCE + levels[:, None] ** 2)  # D = decay x
    first = (levels[1:, None] / 20) * (1 - decays[0]) + decays[0]
    exact = torch.sqrt((VARIANCE + levels[-1] ** 2) / (VARIANCE + 400)) * decays[-1]
    errors = (first * decays[1:] - exact).square().sum(1)
    best = levels[1 + int(errors.argmin())]
    grid = fs.fit_grid(LINEAR, 2, noise=normals(2048), solver=fs.DDIM(), nodes=40)
    assert abs(float(torch.log(grid[1] / best))) < 1.5 * float(torch.log(levels[0] / levels[1]))
    assert grid.tolist() == [pytest.approx(20.0), float(grid[1]), 0.0]


@pytest.mark.parametrize(("solver", "steps", "least"), [
    (fs.DPMSolverPP(2), 5, 1.8), (fs.EDMHeun(), 4, 1.2), pytest.param(fs.DDIM(), 6, 1.4, marks=pytest.mark.slow),
    pytest.param(fs.UniPC(2), 8, 6.0, marks=pytest.mark.slow),
])  # fmt: skip
def test_the_levels_beat_the_usual_spacings_on_other_start_states(solver, steps, least):
    """Measured on three sets of start states: 1.6 to 1.7, 2.5 to 3.7, 12 to 15 and 1.5 times."""
    ring = by_name("ring")
    alpha = float(ring.schedule.alpha(torch.tensor(ring.schedule.sigma_max, dtype=torch.float64)))
    start, others = (alpha * ring.noise(n, seed) for n, seed in ((64, 0), (256, 1)))
    truth = fs.sample(ring.problem, fs.UniPC(3), noise=others, steps=200)

    def rmse(**grid):
        return float((fs.sample(ring.problem, solver, noise=others, **grid) - truth).square().mean().sqrt())

    fitted = fs.fit_grid(ring.problem, steps, noise=start, solver=solver)
    usual = min(rmse(steps=steps, spacing=spacing) for spacing in USUAL)
    assert rmse(sigmas=fitted) * least < usual
    torch.testing.assert_close(fs.sigma_grid(ring.schedule, steps, spacing=fitted), fitted)


def test_moves_do_not_increase_the_error_and_batches_do_not_matter():
    noise = normals(24)
    truth = fs.sample(LINEAR, fs.UniPC(3), noise=noise, steps=200)
    grids = [fs.fit_grid(LINEAR, 4, noise=noise, nodes=32, **o) for o in (dict(sweeps=0), {}, dict(batch=5))]
    errors = [
        float((fs.sample(LINEAR, fs.DPMSolverPP(2), noise=noise, sigmas=grid) - truth).square().mean())
        for grid in grids
    ]
    assert errors[1] < errors[0]
    assert torch.equal(grids[1], grids[2])


def test_a_grid_that_ends_at_sigma_min():
    grid = fs.fit_grid(LINEAR, 4, noise=normals(16), final="sigma_min", nodes=16)
    assert grid.dtype == torch.float64
    assert (grid.diff() < 0).all()
    assert grid[[0, -1]].tolist() == pytest.approx([20.0, 0.02])
    tight = fs.fit_grid(LINEAR, 4, noise=normals(16), final="sigma_min", nodes=5)
    torch.testing.assert_close(tight, fs.sigma_grid(EDM, 4, "logsnr", "sigma_min"))


def test_a_family_of_models_with_labels():
    def family(labels):
        shift = labels[:, None].double()
        return fs.DiffusionModel(lambda x, s: (x - shift) * VARIANCE / (VARIANCE + s * s) + shift, EDM)

    noise, labels = normals(16), torch.arange(16) % 2
    grid = fs.fit_grid(family, 3, noise=noise, labels=labels, nodes=24)
    assert torch.equal(grid, fs.fit_grid(family(labels), 3, noise=noise, nodes=24, batch=16))


@pytest.mark.parametrize(("wrong", "words"), [
    (dict(solver=fs.DDPM()), "DDPM.*draws noise"), (dict(nodes=4), "nodes: got 4"), (dict(steps=0), "steps: got 0"),
    (dict(noise=normals(4)), "at least 16"), (dict(solver=fs.Milstein()), "solver"), (dict(final="zero"), "final"),
    (dict(sweeps=-1), "sweeps"), (dict(labels=torch.zeros(16)), "labels"), (dict(node=3), "Did you mean 'nodes'"),
])  # fmt: skip
def test_wrong_arguments_are_rejected(wrong, words):
    with pytest.raises(fs.InputError, match=words):
        fs.fit_grid(**dict(problem=LINEAR, steps=4, noise=normals(16)) | wrong)
