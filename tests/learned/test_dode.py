"""D-ODE: the closed form, its population optimum, the guard, other grids."""

import math
from dataclasses import replace

import pytest
import torch

import fewstep as fs
from fewstep.compat import MisalignedTeacher
from fewstep.executor import State, stage, update
from fewstep.learned.dode.correction import corrected
from fewstep.learned.training import held_out

DIM = 64
VARIANCE = torch.logspace(-2, 0, DIM, dtype=torch.float64)
EDM = fs.EDM(0.02, 40.0)
LINEAR = fs.DiffusionModel(lambda x, s: x * VARIANCE.to(x) / (VARIANCE.to(x) + s * s), EDM)


def normals(n, dim, seed):
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def start(n, seed=0, dim=DIM):
    return 40.0 * normals(n, dim, seed)


def ring(x, s):
    angles = torch.arange(8) * math.pi / 4
    mu, v = torch.stack([angles.cos(), angles.sin()], 1).to(x), 0.15**2
    gap = x[:, None, :] - mu
    w = torch.softmax(-gap.square().sum(-1) / (2 * (v + s * s)), 1)[..., None]
    return (w * (mu + v / (v + s * s) * gap)).sum(1)


RING = fs.DiffusionModel(ring, fs.EDM(0.01, 157.41))
VP = fs.DiscreteVP.named("linear")


def bumps(x, s):
    side = 0.8 * torch.tanh(0.8 * x / (0.09 + s * s))
    return side + 0.09 / (0.09 + s * s) * (x - side)


BUMPS = fs.DiffusionModel(bumps, VP)
BASES = [
    fs.DDIM(), fs.DPMSolverPP(2), fs.DPMSolverPP(2, multistep=False), fs.DPMSolver(3), fs.EDMHeun(),
    fs.UniPC(2), fs.UniPC(3), fs.PNDM(), fs.PNDM("plms"), fs.IPNDM(4), fs.DEIS(3),
    fs.UniPC(2, prediction="noise"),
]  # fmt: skip


def ddim_path(x, levels, substeps=10):
    """The state of a DDIM teacher at the last level, with ten steps even in log sigma between levels."""
    for s, t in zip(levels[:-1].tolist(), levels[1:].tolist(), strict=True):
        nodes = [s * (t / s) ** (k / substeps) for k in range(substeps + 1)] if t < s else []
        for a, b in zip(nodes[:-1], nodes[1:], strict=True):
            D = LINEAR.denoiser(x, torch.tensor(a, dtype=torch.float64))
            x = b / a * x + (1 - b / a) * D
    return x


@pytest.mark.parametrize("terms", [1, 2, 3])
@pytest.mark.parametrize("base", BASES, ids=repr)
def test_each_row_solves_least_squares_at_the_states_of_the_finished_table(base, terms):
    """The residual that kappa leaves is orthogonal to every direction; kappa is lstsq's where it is unique.

    Stages within a step have the next input as their outcome.
    """
    noise = start(80)
    table, _ = fs.distill_dode(
        LINEAR, base, noise=noise, steps=6, terms=terms, teacher=fs.DDIM(), guard=False, final="sigma_min"
    )
    plan = base.plan(table.sigmas, EDM)
    levels, kept = torch.cat([plan.sigma, plan.sigmas[-1:]]), noise[held_out(80)[0]]
    state = State(kept)
    for i, row in enumerate(table.rows):
        at = stage(row, state)
        D = LINEAR.denoiser(at, table.sigma[i])
        D = D if plan.prediction == "data" else (at - D) / table.sigma[i]

        inner = i + 1 < plan.nfe and plan.rows[i + 1].stage.evaluations  # kappa enters the next stage only
        plain = update(row._replace(update=plan.rows[i].update), state, D)

        def outcome(new, i=i, row=row, state=state, inner=inner, plain=plain):
            after = update(row._replace(update=plan.rows[i].update), state, new)
            if inner:
                return stage(plan.rows[i + 1], plain._replace(evaluations=after.evaluations)).flatten()
            return after.x.flatten()

        r = ddim_path(kept, levels[: i + 2]).flatten() - outcome(D)
        directions = [outcome(2 * D - d) - outcome(D) for d in state.evaluations[:terms]]
        if directions:
            g, kappa = torch.stack(directions, 1), table.fit.kappa[i, : len(directions)]
            left = r - g @ kappa
            assert ((g.T @ left).abs() <= 2e-6 * g.norm() * r.norm()).all()
            if torch.linalg.cond(g) < 1e3:
                exact = torch.linalg.lstsq(g, r[:, None]).solution[:, 0]
                torch.testing.assert_close(kappa, exact, rtol=1e-7, atol=1e-7)
        state = update(row, state, D)


def population(steps):
    """kappa of DDIM with a DDIM teacher in closed form: each state is a number per mode times x_T's mode."""
    sigmas, out = fs.sigma_grid(EDM, steps, final="sigma_min"), [0.0]
    x, target, before = torch.ones(DIM).double(), torch.ones(1, DIM).double(), None
    for i in range(steps):
        target = ddim_path(target, sigmas[i : i + 2])
        d = x * VARIANCE / (VARIANCE + sigmas[i] ** 2)
        c = 1 - sigmas[i + 1] / sigmas[i]
        x = (1 - c) * x + c * d
        if before is not None:
            g, r = c * (d - before), target[0] - x
            out.append(float(g @ r / (g @ g)))
            x = x + out[-1] * g
        before = d
    return torch.tensor(out, dtype=torch.float64)


def test_kappa_tends_to_its_population_optimum():
    """On Gaussian data every state is a number times x_T: the optimum is sum g r / sum g g over modes."""
    exact, gaps = population(8), []
    one_each = torch.zeros(8 * DIM, DIM, dtype=torch.float64)
    for part in held_out(8 * DIM):  # both parts have every mode equally often
        one_each[part] = 40.0 * torch.eye(DIM, dtype=torch.float64).repeat(len(part) // DIM, 1)
    for noise in (one_each, start(32), start(2048)):
        table, _ = fs.distill_dode(
            LINEAR, fs.DDIM(), noise=noise, steps=8, guard=False, teacher=fs.DDIM(), final="sigma_min"
        )
        gaps.append((table.fit.kappa[:, 0] - exact)[1:].abs().div(exact[1:].abs()).median())
    assert gaps.pop(0) < 1e-9  # start states with exactly the population's moments
    assert gaps[1] < 0.02
    assert gaps[1] < 0.5 * gaps[0]


@pytest.mark.parametrize("base", BASES[:6], ids=repr)
def test_batch_size_does_not_change_the_table(base):
    a, report = fs.distill_dode(LINEAR, base, noise=start(128), steps=6, batch=10, guard=False)
    b, _ = fs.distill_dode(LINEAR, base, noise=start(128), steps=6, batch=128, guard=False)
    torch.testing.assert_close(a.fit.kappa, b.fit.kappa, rtol=1e-9, atol=1e-12)
    assert a.fit.kappa[1:].abs().min() > 0
    assert all(0 <= r <= 1 + 1e-12 for r in report.r2)


@pytest.mark.parametrize("base", [fs.DDIM(), fs.EDMHeun()], ids=repr)
def test_report_counts_the_evaluations_made(base):
    calls = []

    def counted(x, s):
        calls.append(len(x))
        return LINEAR.denoiser(x, s)

    _, report = fs.distill_dode(fs.DiffusionModel(counted, EDM), base, noise=start(64), steps=4, batch=64)
    made = sum(n for n in calls if n > 1)  # all but the fingerprint's
    assert report.evaluations == math.ceil(made / 64)


def test_report_of_another_grid_counts_the_evaluations_made():
    """With a refit: its own, and the distances that are measured before it."""
    calls, table = [], fs.distill_dode(LINEAR, fs.DDIM(), noise=start(64), steps=4, batch=64)[0]

    def counted(x, s):
        calls.append(len(x))
        return LINEAR.denoiser(x, s)

    model = fs.DiffusionModel(counted, EDM)
    _, report = fs.regrid(table, model, fs.DDIM(), noise=start(64), steps=5, refit=True, batch=64)
    made = sum(n for n in calls if n > 1) / 64
    assert made <= report.evaluations < made + 2  # each part is rounded up


def test_aligned_targets_gain_and_those_of_the_authors_code_do_not():
    x = start(512, seed=7)
    exact = x * torch.sqrt((VARIANCE + EDM.sigma_min**2) / (VARIANCE + EDM.sigma_max**2))

    def error(solver, **grid):
        return float((fs.sample(LINEAR, solver, noise=x, **grid) - exact).square().mean().sqrt())

    grid = dict(steps=10, final="sigma_min")
    aligned, misaligned = (
        error(fs.distill_dode(LINEAR, fs.DDIM(), noise=start(112), teacher=t, guard=False, **grid)[0])
        for t in (fs.DDIM(), MisalignedTeacher(fs.DDIM()))
    )
    base = error(fs.DDIM(), **grid)
    assert base > 2.5 * aligned
    assert base < 2.5 * misaligned


CASES = [(b, "x0") for b in BASES] + [(b, "sigma_min") for b in BASES[:4]]


@pytest.mark.parametrize(("base", "final"), CASES, ids=str)
def test_every_base_is_wrapped(base, final):
    """Zero kappa is bitwise the base; fitted, the table is closer to the exact ODE on fresh noise."""
    noise, grid = normals(64, 2, 1), dict(steps=6, final=final)
    table, _ = fs.distill_dode(BUMPS, base, noise=noise, terms=2, **grid)
    plan = base.plan(table.sigmas, VP)
    zero = corrected(plan, torch.zeros(plan.nfe, 3, dtype=torch.float64))
    assert torch.equal(fs.sample(BUMPS, zero, noise=noise), fs.sample(BUMPS, base, noise=noise, **grid))
    fresh = normals(256, 2, 9)
    exact = fs.sample(BUMPS, fs.UniPC(3), noise=fresh, steps=400, final=final)
    student, own = ((fs.sample(BUMPS, p, noise=fresh) - exact).norm() for p in (table, plan))
    assert student <= 1.1 * own
    assert table.nfe == plan.nfe


@pytest.mark.parametrize("base", [fs.DPMSolverPP(2), fs.UniPC(2)], ids=repr)
def test_guard_returns_the_base_where_fitting_hurts(base):
    """Each row's fit helps its own outcome, and the final state is worse for it."""
    table, report = fs.distill_dode(LINEAR, base, noise=start(128), steps=6)
    _, unguarded = fs.distill_dode(LINEAR, base, noise=start(128), steps=6, guard=False)
    assert unguarded.student_rmse > unguarded.base_rmse
    assert "with the base" in report.fallback
    assert not table.fit.kappa.any()
    plan = base.plan(fs.sigma_grid(EDM, 6))
    assert torch.equal(fs.sample(LINEAR, table, noise=start(4)), fs.sample(LINEAR, plan, noise=start(4)))


BAD = {
    "stochastic base": (dict(base=fs.DDIM(1.0)), "draws noise"),
    "few": (dict(noise=start(8)), "at least 16"),
    "steps": (dict(steps=None), "steps"),
    "terms": (dict(terms=0), "terms"),
    "teacher": (dict(teacher=fs.UniPC(2)), "one evaluation per step"),
    "refine": (dict(refine="global"), "refine: got 'global', .* use fewstep.fit_table"),
    "learn_grid": (dict(learn_grid=True), "learn_grid: got True, .* use fewstep.fit_table"),
    "training": (dict(training=fs.TrainingOptions()), "training: got TrainingOptions.* use fewstep.fit_table"),
    "substeps": (dict(teacher_substeps=0), "at least 1"),
    "batch": (dict(batch=0), "at least 1"),
    "misspelt": (dict(term=2), "Did you mean 'terms'"),
    "notes": (dict(notes={"x": torch.ones(1)}), "notes: "),
    "noise of another process": (dict(noise=100 * start(32)), "noise: got states of size"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused(case):
    changes, words = BAD[case]
    with pytest.raises(fs.InputError, match=words):
        fs.distill_dode(**(dict(problem=LINEAR, base=fs.DDIM(), noise=start(32), steps=4) | changes))


class TestRegrid:
    """`fs.regrid`: kappa is interpolated and measured, and used only where it helps."""

    noise = normals(256, 2, 1)

    def fit(self, base, **options):
        return fs.distill_dode(BUMPS, base, noise=self.noise, **(dict(steps=10) | options))[0]

    @pytest.mark.parametrize("steps", [7, 12])
    def test_nearby_step_counts_gain(self, steps):
        made, report = fs.regrid(
            self.fit(fs.DDIM()), BUMPS, fs.DDIM(), noise=normals(256, 2, 2), steps=steps, refit=True
        )
        assert report.fallback == ""
        assert made.nfe == steps
        assert report.refit_rmse <= report.student_rmse * 1.2
        assert report.student_rmse < 0.7 * report.base_rmse
        assert made.fit.notes["fit"] == "interpolated from 10 evaluations"
        fs.sample(BUMPS, made, noise=self.noise)

    @pytest.mark.parametrize("base", [fs.DDIM(), fs.DPMSolver(2), fs.EDMHeun(), fs.UniPC(2)], ids=repr)
    def test_own_grid_reproduces_the_table(self, base):
        table = self.fit(base, guard=False, steps=6)
        made, report = fs.regrid(table, BUMPS, base, noise=self.noise, steps=6)
        assert not report.fallback
        torch.testing.assert_close(made.fit.kappa, table.fit.kappa, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(made.update_eval, table.update_eval, rtol=1e-9, atol=1e-12)

    def test_base_and_reason_are_returned_where_kappa_hurts(self):
        table = self.fit(fs.DDIM(), guard=False, steps=3)
        table = replace(table, fit=replace(table.fit, kappa=torch.full_like(table.fit.kappa, 3.0)))
        made, report = fs.regrid(table, BUMPS, fs.DDIM(), noise=self.noise, steps=8)
        assert "with the base" in report.fallback
        own = fs.sample(BUMPS, fs.DDIM(), noise=self.noise, steps=8)
        assert torch.equal(fs.sample(BUMPS, made, noise=self.noise), own)

    def test_bad_input_is_refused(self):
        table = self.fit(fs.DDIM())
        other = fs.DiffusionModel(lambda x, s: 0.5 * bumps(x, s), VP)
        # of earlier versions, whose fit of levels and weights left no kappa
        unknown = replace(table, fit=replace(table.fit, kappa=torch.full_like(table.fit.kappa, math.nan)))
        for case in (
            (table, other, fs.DDIM(), "answers differently"), (table, BUMPS, fs.UniPC(2), "base: got"),
            (unknown, BUMPS, fs.DDIM(), "no kappa"),
            (fs.DDIM().plan(table.sigmas), BUMPS, fs.DDIM(), "no kappa"),
        ):  # fmt: skip
            *arguments, words = case
            with pytest.raises(fs.InputError, match=words):
                fs.regrid(*arguments, noise=self.noise, steps=8)
        with pytest.raises(fs.InputError, match="steps: got None"):
            fs.regrid(table, BUMPS, fs.DDIM(), noise=self.noise)
