"""Fitted tables: exact derivatives, what is free, the guard, files, and other runners of the result."""

import math

import pytest
import torch

import fewstep as fs
from fewstep.learned.table.coefficients import Coefficients
from fewstep.learned.table.families import Free
from fewstep.learned.table.unrolled import pulled_back, rollout

F64 = torch.float64
EDM = fs.EDM(0.02, 40.0)
VP = fs.DiscreteVP.named("linear")
SAMPLERS = [
    fs.DDIM(), fs.DPMSolverPP(2), fs.DPMSolverPP(3), fs.DPMSolverPP(2, multistep=False), fs.DPMSolver(3), fs.EDMHeun(),
    fs.UniPC(3), fs.PNDM(), fs.IPNDM(4), fs.DEIS(3), fs.UniPC(2, prediction="noise"),
]  # fmt: skip


def bumps(x, s):
    side = 0.8 * torch.tanh(0.8 * x / (0.09 + s * s))
    return side + 0.09 / (0.09 + s * s) * (x - side)


def classes(labels):
    spread = torch.tensor([0.2, 0.5], dtype=F64)[labels][:, None] ** 2
    return fs.DiffusionModel(lambda x, s: x * spread.to(x) / (spread.to(x) + s * s), EDM)


BUMPS = fs.DiffusionModel(bumps, EDM)
QUICK = dict(starts=1, iterations=20, teacher_steps=40)


def start(n, seed=0, dim=1):
    return 40 * torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=F64)


def distance(problem, solver, x, **grid):
    fine = fs.sample(problem, fs.UniPC(3), noise=x, steps=200)
    return float((fs.sample(problem, solver, noise=x, **grid) - fine).square().mean().sqrt())


def no_normals(x):
    return x.new_zeros(0, *x.shape)


@pytest.mark.parametrize("solver", SAMPLERS, ids=repr)
def test_unrolled_coefficients_are_the_plan(solver):
    plan, x = solver.plan(fs.sigma_grid(EDM, 6), EDM), start(16, dim=3)
    table, expected = Coefficients.of(plan), fs.sample(BUMPS, plan, noise=x)
    torch.testing.assert_close(rollout(table, bumps, x, no_normals(x)).end, expected, rtol=1e-9, atol=1e-11)
    again = table.plan("again", plan.sigmas)
    torch.testing.assert_close(fs.sample(BUMPS, again, noise=x), expected, rtol=1e-9, atol=1e-11)


def test_one_pass_back_gives_the_derivatives_by_all_coefficients():
    """Against central differences of the final state, at a table without structure."""
    generator = torch.Generator().manual_seed(1)
    table = Coefficients.of(fs.DPMSolverPP(3).plan(fs.sigma_grid(EDM, 4), EDM), letters=1)
    noisy = table.flat + 0.05 * torch.randn(len(table.flat), generator=generator, dtype=F64)
    weights = table.like(noisy).weights
    weights[:, 1:5] = weights[:, 1:5].tril(-1)
    weights[0] = torch.eye(len(weights[0]), dtype=F64)[0]
    table = Coefficients(weights, table.like(noisy).levels)
    x, z = start(5, dim=2), torch.randn(4, 5, 2, generator=generator, dtype=F64)
    made = rollout(table, bumps, x, z)
    unit = torch.eye(2, dtype=F64)[:, None].expand(2, 5, 2)
    found = pulled_back(table, bumps, made, unit)
    free = torch.cat(
        [torch.ones(5, 9, dtype=bool).index_fill(0, torch.tensor([0]), False).flatten(), torch.ones(4) > 0]
    )
    for i in range(1, 5):
        free[9 * i + 1 + i : 9 * i + 5] = False  # evaluations that are not made yet
    assert int(free.sum()) == 4 + 10 + 16 + 4
    for k in free.nonzero().flatten().tolist():
        shift = torch.zeros_like(table.flat).index_fill(0, torch.tensor([k]), 1e-6)
        high, low = (rollout(table.like(table.flat + s), bumps, x, z).end for s in (shift, -shift))
        torch.testing.assert_close(found[..., k].T, (high - low) / 2e-6, rtol=1e-4, atol=1e-5)


def test_a_fit_beats_every_start_on_fresh_states_and_reports_it():
    table, report = fs.fit_table(BUMPS, nfe=4, noise=start(128), **QUICK | dict(starts=2, teacher_steps=80))
    fresh = start(1024, seed=1)
    solvers = (fs.DDIM(), fs.DPMSolverPP(2), fs.UniPC(3), fs.IPNDM(3))
    untrained = min(distance(BUMPS, s, fresh, steps=4, spacing=p) for s in solvers for p in ("logsnr", "karras"))
    own = distance(BUMPS, table, fresh)
    assert own < 0.1 * untrained
    assert report.fallback == ""
    assert report.remarks == ()
    assert own == pytest.approx(report.student_errors.rmse, rel=0.6)
    assert report.student_errors.median < report.base_errors.median
    assert table.nfe == 4
    assert table.fit.notes["rmse"] == report.student_errors.rmse
    assert report.start in str(report)
    assert report.base in str(report)


def test_one_evaluation_is_enough_where_the_flow_is_linear_in_it():
    """Gaussian data of one variance: the end is a number times the start."""
    model = fs.DiffusionModel(lambda x, s: x * 0.25 / (0.25 + s * s), EDM)
    table, _ = fs.fit_table(model, nfe=1, noise=start(32), **QUICK | dict(teacher_steps=100))
    assert distance(model, table, start(64, seed=1)) < 1e-6


@pytest.mark.parametrize("free", ["levels", "weights", "scale", "given", ["weights", "given"], "all"], ids=str)
def test_only_what_is_free_moves(free):
    first = fs.DPMSolverPP(2)
    table, _ = fs.fit_table(BUMPS, nfe=3, noise=start(64), start=first, free=free, guard=False, **QUICK)
    if free == "levels":
        formula = Coefficients.of(first.plan(table.sigmas, EDM)).weights
        torch.testing.assert_close(Coefficients.of(table).weights, formula, rtol=1e-9, atol=1e-10)
        return
    plans = [first.plan(fs.sigma_grid(EDM, 3, spacing), EDM) for spacing in ("logsnr", "karras", "trailing", "uniform")]
    starts = [Coefficients.of(plan) for plan in plans]
    own, names = Coefficients.of(table), [free] if isinstance(free, str) else free
    if free == "all":
        assert all(not torch.allclose(own.weights, s.weights, rtol=1e-3) for s in starts)
        return
    if "given" not in names:
        assert min(float((own.levels - s.levels).abs().max()) for s in starts) < 1e-12
    if "weights" not in names:
        assert min(float((own.weights[:, 1:] - s.weights[:, 1:]).abs().max()) for s in starts) < 1e-12
    if "scale" not in names:
        sums = own.weights[:, 0], own.weights[:, 1:].sum(1)
        assert min(float((sums[0] - s.weights[:, 0]).abs().max()) for s in starts) < 1e-12
        assert min(float((sums[1] - s.weights[:, 1:].sum(1)).abs().max()) for s in starts) < 1e-9


def test_plans_are_starts_too():
    plan = fs.EDMHeun().plan(fs.sigma_grid(EDM, 3), EDM)
    _, report = fs.fit_table(BUMPS, nfe=5, noise=start(64), start=[plan, fs.UniPC(3)], **QUICK | dict(starts=2))
    assert plan.name in [name.split(",")[0] for name in report.candidates]
    assert report.student_errors.rmse < 0.2 * report.base_errors.rmse
    with pytest.raises(fs.InputError, match="5 evaluations"):
        fs.fit_table(BUMPS, nfe=4, noise=start(64), start=plan)


def test_a_fit_that_does_not_help_returns_the_untrained_sampler_with_the_reason():
    blind = dict(start=fs.DDIM(), decode=lambda x: 0 * x)
    table, report = fs.fit_table(BUMPS, nfe=3, noise=start(32), **blind, **QUICK)
    assert "RMSE" in report.fallback
    assert report.fallback in str(report)
    assert report.start == ""
    assert report.student_errors == report.base_errors
    plans = [fs.DDIM().plan(fs.sigma_grid(EDM, 3, p), EDM) for p in ("logsnr", "karras", "trailing", "uniform")]
    assert any(torch.equal(table.update_eval, p.update_eval) for p in plans)
    _, report = fs.fit_table(BUMPS, nfe=3, noise=start(32), guard=False, **blind, **QUICK)
    assert report.fallback == ""
    assert any("RMSE" in r for r in report.remarks)


def test_a_loss_of_ones_own_decides_and_distances_that_grow_are_remarked():
    fit = dict(nfe=2, noise=start(32), start=fs.DDIM(), **QUICK)
    table, report = fs.fit_table(BUMPS, loss=lambda a, b: a.square().sum(1), **fit)
    assert report.fallback == ""
    assert any("RMSE" in r for r in report.remarks)
    near = fs.fit_table(BUMPS, **fit)[0]
    fresh = start(256, 3)
    assert fs.sample(BUMPS, table, noise=fresh).norm() < 0.8 * fs.sample(BUMPS, near, noise=fresh).norm()


@pytest.mark.parametrize("loss", ["robust", lambda a, b: (a - b).square().sum(1)], ids=["robust", "function"])
def test_other_losses_and_decoders(loss):
    _, report = fs.fit_table(BUMPS, nfe=3, noise=start(64, dim=2), loss=loss, decode=lambda x: 3 * x.flip(1), **QUICK)
    assert report.fallback == ""
    assert report.student_errors.rmse < 0.3 * report.base_errors.rmse


def test_labels_batches_and_random_directions():
    """Batches change rounding only; a few random directions of a state of 24 numbers find the same optimum."""
    noise, labels = start(48, dim=24), torch.arange(48) % 2
    options = dict(nfe=2, noise=noise, labels=labels, start=fs.UniPC(2), starts=1, iterations=10, teacher_steps=40)
    fits = []
    for more in (dict(directions=24), dict(directions=24, batch=10), dict(directions=3)):
        _, report = fs.fit_table(classes, **options, **more)
        fits.append(report.student_errors.rmse)
    assert fits[1] == pytest.approx(fits[0], rel=1e-2)
    assert max(fits) < 1.3 * min(fits)
    assert max(fits) < 0.2 * report.base_errors.rmse


def path_ends(solver, problem, n, **grid):
    """Final states on one path, the same for all solvers."""
    noise = EDM.sigma_max * torch.randn(n, 1, generator=torch.Generator().manual_seed(7), dtype=F64)
    span = dict(t0=EDM.sigma_max**-2, t1=EDM.sigma_min**-2, clock="log", levy="K", dtype=F64)
    return fs.sample(problem, solver, noise=noise, path=fs.BrownianPath((n, 1), seed=8, **span), **grid)


def test_a_stochastic_table_follows_the_path_the_nearer_the_more_it_reads(tmp_path):
    """On fresh paths, through `sample`; rows that read less of a path are further from its fine solution."""
    fine = path_ends(fs.EulerMaruyama(), BUMPS, 1024, steps=200, final="sigma_min")
    distances = []
    for levy in ("W", "H", "K"):
        table, report = fs.fit_table(
            BUMPS, nfe=4, noise=start(1024), levy=levy, teacher_steps=200, starts=1, iterations=15
        )
        assert table.levy == levy
        assert report.fallback == ""
        own = (path_ends(table, BUMPS, 1024) - fine).square().mean().sqrt()
        assert own == pytest.approx(report.student_errors.rmse, rel=0.5)
        distances.append(float(own))
    untrained = (path_ends(fs.EulerMaruyama(), BUMPS, 1024, sigmas=table.sigmas) - fine).square().mean().sqrt()
    assert distances[0] < untrained
    assert distances[2] < 0.8 * distances[1] < 0.64 * distances[0]
    laws = report.laws
    assert list(laws) == ["fitted", "untrained", "deterministic", "teacher"]
    assert laws["teacher"].variance_ratio == 1
    # of 512 samples each, one of them has 2 % more in one of two modes
    assert laws["fitted"].distance < 0.5 * laws["untrained"].distance
    assert laws["deterministic"].distance < laws["untrained"].distance
    assert all(abs(laws[name].variance_ratio - 1) < 0.1 for name in ("fitted", "deterministic"))
    assert "deterministic" in str(report)
    table.save(tmp_path / "table.json")
    assert torch.equal(path_ends(fs.load(tmp_path / "table.json"), BUMPS, 16), path_ends(table, BUMPS, 16))


@pytest.mark.parametrize("count", [64, 512])
def test_evaluations_of_a_stochastic_fit_include_those_of_the_deterministic_table(count):
    calls = []
    problem = fs.DiffusionModel(lambda x, s: calls.append(len(x)) or BUMPS.denoiser(x, s), EDM)
    options = dict(nfe=2, levy="W", teacher_steps=20, starts=1, iterations=1)
    _, report = fs.fit_table(problem, noise=start(count), **options)
    # each of three tallies is rounded up
    assert 0 <= report.evaluations - sum(calls) / count < 3


def test_the_deterministic_table_of_a_stochastic_fit_has_its_options_and_its_failure_is_a_remark():
    seen = []

    def loss(ends, expected):
        seen.append(len(ends))
        return (ends - expected).abs().flatten(1).mean(1)

    options = dict(nfe=2, noise=start(64), levy="W", starts=1, iterations=0, loss=loss)
    fs.fit_table(BUMPS, **options, teacher_steps=20, sigmas=fs.sigma_grid(EDM, 2, final="sigma_min") / 2)
    alone = len(seen)
    fs.fit_table(BUMPS, **options, teacher_steps=20)
    assert len(seen) - alone > alone  # those of the stochastic table again, and some of the deterministic one

    level = fs.sigma_grid(EDM, 18)[1]  # of the deterministic teacher only
    fragile = fs.DiffusionModel(lambda x, s: bumps(x, s).where((s / level - 1).abs().amax() > 1e-6, math.nan), EDM)
    table, report = fs.fit_table(fragile, **options, teacher_steps=18)
    assert table.levy == "W"
    assert "deterministic" not in report.laws
    assert "no deterministic table to compare with: problem: " in " ".join(report.remarks)


def test_levels_and_starts_of_a_stochastic_table_are_checked():
    options = dict(nfe=3, noise=start(32), levy="W", teacher_steps=9, starts=1, iterations=1)
    grid = fs.sigma_grid(EDM, 3, "karras", final="sigma_min")
    table, _ = fs.fit_table(BUMPS, **options, sigmas=grid, ahead=False, start=fs.EulerMaruyama())
    assert torch.equal(table.sigmas, grid)
    _, late = fs.fit_table(BUMPS, **options, sigmas=grid / 2)
    assert "deterministic" not in late.laws
    assert "sigmas do not begin" in " ".join(late.remarks)
    with pytest.raises(fs.InputError, match="4, those between 3"):
        fs.fit_table(BUMPS, **options, sigmas=grid[1:])
    with pytest.raises(fs.InputError, match="start"):
        fs.fit_table(BUMPS, **options, start=fs.DDIM())
    with pytest.raises(fs.InputError, match="sigmas"):
        fs.fit_table(BUMPS, nfe=3, noise=start(32), sigmas=grid)
    with pytest.raises(fs.InputError, match="levy"):
        fs.fit_table(BUMPS, **options | dict(levy="A"))


@pytest.mark.parametrize("name", ["table.json", "table.safetensors"])
def test_files_and_the_model_that_a_table_belongs_to(name, tmp_path):
    model = fs.DiffusionModel(bumps, VP)
    noise = torch.randn(64, 1, generator=torch.Generator().manual_seed(0), dtype=F64)
    table, _ = fs.fit_table(model, nfe=2, noise=noise, notes={"by": "the test"}, start=fs.DDIM(), **QUICK)
    table.save(tmp_path / name)
    again = fs.load(tmp_path / name)
    assert torch.equal(fs.sample(model, again, noise=noise), fs.sample(model, table, noise=noise))
    assert again.fit.notes["by"] == "the test"
    with pytest.raises(fs.InputError, match="answers differently"):
        fs.sample(fs.DiffusionModel(lambda x, s: 0 * x, VP), again, noise=noise)


def test_bad_arguments_are_named():
    options = dict(nfe=3, noise=start(32), starts=1, iterations=0, teacher_steps=8)
    for name, value in dict(nfe=0, starts=0, iterations=-1, directions=0, teacher_steps=1, loss="l2", free="kappa",
                            start="DDIM", teacher=fs.EulerMaruyama(), batch=0, decode=3).items():  # fmt: skip
        with pytest.raises(fs.InputError, match=name):
            fs.fit_table(BUMPS, **options | {name: value})
    with pytest.raises(fs.InputError, match="noise"):
        fs.fit_table(BUMPS, **options | dict(noise=start(8)))
    with pytest.raises(fs.InputError, match="one number for each"):
        fs.fit_table(BUMPS, **options | dict(loss=lambda a, b: (a - b).square().mean()))


@pytest.mark.slow
def test_the_typical_sample_of_many_narrow_modes_is_not_harmed():
    """A kernel density of scikit-learn's digits at 5 evaluations: a few states jump between modes."""
    digits = pytest.importorskip("sklearn.datasets").load_digits
    means = torch.tensor(digits().data)[::2] / 8 - 1

    def kde(x, s):
        v = s.to(x) ** 2 + 0.01
        share = (-(torch.cdist(x, means).square()) / (2 * v)).softmax(1)
        return 0.01 / v * x + (1 - 0.01 / v) * (share @ means)

    model, fresh = fs.DiffusionModel(kde, EDM), start(512, 1, 64)
    table, report = fs.fit_table(model, nfe=5, noise=start(256, 0, 64))
    fine = fs.sample(model, fs.UniPC(3), noise=fresh, steps=200)
    each = (fs.sample(model, table, noise=fresh) - fine).square().mean(1)
    assert report.fallback == ""
    assert math.sqrt(each.mean()) < 0.15
    assert each.sqrt().median() < 0.028


def test_numbers_beyond_the_bounds_of_the_levels_are_moved_to_them():
    """The table does not change, and a second call changes nothing."""
    base = Coefficients.of(fs.UniPC().plan(fs.sigma_grid(EDM, 4)))
    free = Free.of(base, ["weights", "given"], (math.log(0.05), math.log(30.0)))
    numbers = torch.linspace(-3, 3, free.directions.shape[1], dtype=F64)
    inside = free.clamped(numbers)
    levels = (base.flat + free.directions @ inside)[-base.rows :]
    torch.testing.assert_close(levels, levels.clamp(*free.bounds))
    torch.testing.assert_close(free.table(inside).flat, free.table(numbers).flat)
    assert not torch.equal(inside, numbers)
