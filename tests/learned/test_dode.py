"""D-ODE: the closed form, its population optimum, the guard, refinement, processes, the file."""

import math

import pytest
import torch

import fewstep as fs
from fewstep.learned.dode.fitting_state import Walk, apply, weight, widened
from fewstep.learned.training import held_out

DIM = 64
VARIANCE = torch.logspace(-2, 0, DIM, dtype=torch.float64)
EDM = fs.EDM(0.02, 40.0)
LINEAR = fs.DiffusionModel(lambda x, s: x * VARIANCE.to(x) / (VARIANCE.to(x) + s * s), EDM)


def start(n, seed=0, dim=DIM):
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 40.0


def ring(x, s):
    angles = torch.arange(8) * math.pi / 4
    mu, v = torch.stack([angles.cos(), angles.sin()], 1).to(x), 0.15**2
    gap = x[:, None, :] - mu
    w = torch.softmax(-gap.square().sum(-1) / (2 * (v + s * s)), 1)[..., None]
    return (w * (mu + v / (v + s * s) * gap)).sum(1)


RING = fs.DiffusionModel(ring, fs.EDM(0.01, 157.41))


def ring_start(n, seed):
    return torch.randn(n, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 157.41


BASES = [fs.DDIM(), fs.DPMSolverPP(2), fs.DPMSolverPP(2, multistep=False), fs.EDMHeun(), fs.UniPC(2)]


@pytest.mark.parametrize(
    ("base", "rtol"), [(fs.DDIM(), 1e-9), (fs.DPMSolverPP(2, multistep=False), 1e-7)], ids=["DDIM", "2S"]
)
def test_kappa_is_the_least_squares_solution(base, rtol):
    """Row by row against torch.linalg.lstsq on the student's own states.

    2S has inner rows, whose outcome is the next row's input, and directions that are nearly parallel.
    """
    noise = start(80)
    kept = noise[held_out(80)[0]]
    student, _ = fs.distill_dode(
        LINEAR, base, noise=noise, steps=6, terms=2, teacher=fs.DDIM(), guard=False, final="sigma_min"
    )
    plan = base.plan(fs.sigma_grid(EDM, 6, final="sigma_min"))
    levels = torch.cat([plan.sigma, plan.sigmas[-1:]])
    pad = torch.nn.functional.pad
    plan = plan.__class__(
        **(
            vars(plan)
            | {"update_eval": pad(plan.update_eval, (0, 2)), "stage_eval": pad(plan.stage_eval, (0, 2))}
        )
    )
    walk = Walk(LINEAR, plan, kept)
    for i in range(plan.nfe):
        target = fine_ddim(kept, levels[: i + 2])
        walk.evaluate(i)
        before = walk.x
        walk.go(i)
        outcome = walk.x
        if i + 1 < plan.nfe:
            outcome = plan.stage_x[i + 1] * walk.x + sum(
                d * D for d, D in zip(plan.stage_eval[i + 1], walk.history)
            )
        r, (new, *old) = (target - outcome).flatten(), walk.history
        walk.x = before
        if i:
            g = torch.stack([((new - D) * weight(plan, i)).flatten() for D in old[: min(2, i)]], 1)
            exact = torch.linalg.lstsq(g, r[:, None]).solution[:, 0]
            torch.testing.assert_close(student.kappa[i, : len(exact)], exact, rtol=rtol, atol=rtol)
            apply(plan, i, exact)
        walk.go(i)


def fine_ddim(x, sigmas, substeps=10):
    """The teacher of the test: DDIM on ten steps even in log sigma between levels."""
    for s, t in zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True):
        levels = [s * (t / s) ** (k / substeps) for k in range(substeps + 1)]
        for a, b in zip(levels[:-1], levels[1:], strict=True):
            D = LINEAR.denoiser(x, torch.tensor(a, dtype=torch.float64))
            x = b / a * x + (1 - b / a) * D
    return x


def population(steps):
    """kappa of DDIM with a DDIM teacher in closed form: each state is a number a mode times x_T's mode."""
    sigmas, out = fs.sigma_grid(EDM, steps, final="sigma_min"), [0.0]
    x, target, before = torch.ones(DIM).double(), torch.ones(1, DIM).double(), None
    for i in range(steps):
        target = fine_ddim(target, sigmas[i : i + 2])
        d = x * VARIANCE / (VARIANCE + sigmas[i] ** 2)
        c = 1 - sigmas[i + 1] / sigmas[i]
        x = (1 - c) * x + c * d
        if before is not None:
            g, r = c * (d - before), target[0] - x
            out.append(float(g @ r / (g @ g)))
            x = x + out[-1] * g
        before = d
    return torch.tensor(out, dtype=torch.float64)


def test_one_term_is_the_ratio_of_products_and_tends_to_the_population_optimum():
    """On Gaussian data every state is a number times x_T: the optimum is sum g r / sum g g over modes."""
    exact, gaps = population(8), []
    one_each = torch.zeros(8 * DIM, DIM, dtype=torch.float64)
    for part in held_out(8 * DIM):  # both parts have every mode equally often
        one_each[part] = 40.0 * torch.eye(DIM, dtype=torch.float64).repeat(len(part) // DIM, 1)
    for noise in (one_each, start(32), start(2048)):
        fitted, _ = fs.distill_dode(
            LINEAR, fs.DDIM(), noise=noise, steps=8, guard=False, teacher=fs.DDIM(), final="sigma_min"
        )
        gaps.append((fitted.kappa[:, 0] - exact)[1:].abs().div(exact[1:].abs()).median())
    assert gaps.pop(0) < 1e-9  # start states with exactly the population's moments
    assert gaps[1] < 0.02
    assert gaps[1] < 0.5 * gaps[0]


@pytest.mark.parametrize("base", BASES, ids=lambda b: b.plan(torch.tensor([2.0, 1.0, 0.5]).double()).name)
def test_streaming_is_full_batch(base):
    a, report = fs.distill_dode(LINEAR, base, noise=start(128), steps=6, batch=10, guard=False)
    b, _ = fs.distill_dode(LINEAR, base, noise=start(128), steps=6, batch=128, guard=False)
    torch.testing.assert_close(a.kappa, b.kappa, rtol=1e-9, atol=1e-12)
    assert a.kappa[1:].abs().min() > 0
    assert all(0 <= r <= 1 + 1e-12 for r in report.r2)


def test_evaluations_are_counted_as_they_are_made():
    calls = []

    def counted(x, s):
        calls.append(len(x))
        return LINEAR.denoiser(x, s)

    problem = fs.DiffusionModel(counted, EDM)
    for base in (fs.DDIM(), fs.EDMHeun()):
        calls.clear()
        _, report = fs.distill_dode(problem, base, noise=start(64), steps=4, batch=64)
        made = sum(n for n in calls if n > 1)  # all but the fingerprint's
        assert report.evaluations == math.ceil(made / 64)


STAGED = (fs.EDMHeun(), fs.DPMSolver(2), fs.DPMSolver(3), fs.DPMSolverPP(2, False), fs.UniPC(2), fs.UniPC(3))


@pytest.mark.parametrize("terms", [1, 2, 3])
@pytest.mark.parametrize("base", [*BASES, *STAGED], ids=lambda b: repr(b))
def test_a_fit_walks_the_table_that_it_makes(base, terms):
    """Rows are fitted to the states that sampling with the finished table has, whatever is let go."""
    problem, noise = RING, ring_start(48, 0)
    student, _ = fs.distill_dode(problem, base, noise=noise, steps=6, terms=terms, guard=False)
    walk = Walk(problem, widened(base.plan(student.plan.sigmas), terms), noise, terms)
    walk.plan = student.plan
    for i in range(student.plan.nfe):
        walk.row(i)
    torch.testing.assert_close(walk.x, fs.sample(problem, student.plan, noise=noise), rtol=1e-9, atol=1e-9)


def final_rmse(solver, **kw):
    x, exact = start(512, seed=7), None
    exact = x * torch.sqrt((VARIANCE + EDM.sigma_min**2) / (VARIANCE + EDM.sigma_max**2))
    return float((fs.sample(LINEAR, solver, noise=x, **kw) - exact).square().mean().sqrt())


def test_aligned_ddim_gains_at_least_two_and_a_half_times_and_the_official_alignment_does_not():
    base = final_rmse(fs.DDIM(), steps=10, final="sigma_min")
    found = {}
    for alignment in ("exact", "official"):
        student, _ = fs.distill_dode(LINEAR, fs.DDIM(), noise=start(112), steps=10, final="sigma_min",
                                     teacher=fs.DDIM(), alignment=alignment, guard=False)  # fmt: skip
        found[alignment] = final_rmse(student)
    assert base > 2.5 * found["exact"]
    assert base < 2.5 * found["official"]


def test_kappa_nought_is_the_base_to_the_bit():
    student, _ = fs.distill_dode(LINEAR, fs.DPMSolverPP(2), noise=start(16), steps=5)
    plan = fs.DPMSolverPP(2).plan(fs.sigma_grid(EDM, 5))
    noughts = fs.DODE(plan, torch.zeros_like(student.kappa), student.fitted_to)
    assert torch.equal(fs.sample(LINEAR, noughts, noise=start(4)), fs.sample(LINEAR, plan, noise=start(4)))


@pytest.mark.parametrize("base", [fs.DPMSolverPP(2), fs.UniPC(2)])
def test_the_guard_falls_back_where_fitting_hurts(base):
    """A strong base at six steps: each row's fit helps its own outcome, and the end is worse for it."""
    student, report = fs.distill_dode(LINEAR, base, noise=start(128), steps=6)
    _, hurt = fs.distill_dode(LINEAR, base, noise=start(128), steps=6, guard=False)
    assert hurt.student_rmse > hurt.base_rmse  # it does hurt
    assert "with the base" in report.fallback
    assert not student.kappa.any()
    plan = base.plan(fs.sigma_grid(EDM, 6))
    assert torch.equal(fs.sample(LINEAR, student, noise=start(4)), fs.sample(LINEAR, plan, noise=start(4)))


def test_global_refinement_with_a_learned_grid():
    noise, test = ring_start(2048, 0), ring_start(512, 5)
    exact = fs.sample(RING, fs.UniPC(3), noise=test, steps=500)
    rmse = {}
    for name, kw in {"greedy": {}, "global": {"refine": "global", "learn_grid": True, "iterations": 600,
                                              "rate": 0.03}}.items():  # fmt: skip
        student, _ = fs.distill_dode(RING, fs.DPMSolverPP(2), noise=noise, steps=6, **kw)
        with torch.no_grad():
            rmse[name] = float((fs.sample(RING, student, noise=test) - exact).square().mean().sqrt())
    base = float((fs.sample(RING, fs.DPMSolverPP(2), noise=test, steps=6) - exact).square().mean().sqrt())
    assert rmse["greedy"] < 0.7 * base
    assert rmse["global"] < 0.4 * rmse["greedy"]
    plan = student.plan
    torch.testing.assert_close(
        plan.update_x + plan.update_eval.sum(1), torch.ones(6, dtype=torch.float64)
    )  # D = const is exact
    assert plan.sigmas[0] == RING.schedule.sigma_max
    assert (plan.sigmas.diff() < 0).all()


def test_kappa_only_refinement_lowers_the_final_error():
    noise = ring_start(1024, 0)
    _, greedy = fs.distill_dode(RING, fs.DPMSolverPP(2), noise=noise, steps=8, final="sigma_min")
    _, better = fs.distill_dode(
        RING, fs.DPMSolverPP(2), noise=noise, steps=8, final="sigma_min", refine="global", iterations=200
    )
    assert better.student_rmse < greedy.student_rmse


def test_the_table_survives_its_file_and_refuses_strangers(tmp_path):
    student, _ = fs.distill_dode(LINEAR, fs.DDIM(), noise=start(32), steps=4)
    student.save(tmp_path / "t.safetensors")
    back = fs.load(tmp_path / "t.safetensors")
    assert torch.equal(fs.sample(LINEAR, student, noise=start(4)), fs.sample(LINEAR, back, noise=start(4)))
    assert "kappa" in str(back)
    assert repr(back) == f"<DODE(DDIM(eta=0)): 4 evaluations of {LINEAR.schedule!r}>"
    for stranger in (lambda x, s: 0.9 * LINEAR.denoiser(x, s), lambda x, s: -LINEAR.denoiser(x, s),
                     lambda x, s: LINEAR.denoiser(x, s).flip(-1)):  # fmt: skip
        with pytest.raises(fs.InputError, match="answers differently"):
            fs.sample(fs.DiffusionModel(stranger, EDM), back, noise=start(4))
    with pytest.raises(fs.InputError, match="schedule: .* was fitted to"):
        fs.sample(fs.DiffusionModel(LINEAR.denoiser, fs.EDM(0.02, 80.0)), back, noise=start(4))
    with pytest.raises(fs.InputError, match="event"):
        fs.sample(fs.DiffusionModel(ring, EDM), back, noise=start(4, dim=2))


BAD = {
    "noise": (dict(base=fs.DDIM(1.0)), "draws noise"),
    "few": (dict(noise=start(8)), "at least 16"),
    "steps": (dict(steps=None), "steps"),
    "terms": (dict(terms=0), "terms"),
    "teacher": (dict(teacher=fs.UniPC(2)), "one evaluation a step"),
    "alignment": (dict(alignment="offical"), "Did you mean 'official'"),
    "refine": (dict(refine="local"), "refine"),
    "iterations without refine": (dict(iterations=5), "refine"),
    "substeps": (dict(teacher_substeps=0), "at least 1"),
    "batch": (dict(batch=0), "at least 1"),
    "grid": (dict(base=fs.EDMHeun(), refine="global", learn_grid=True), "learn_grid"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused(case):
    changes, words = BAD[case]
    with pytest.raises(fs.InputError, match=words):
        fs.distill_dode(**(dict(problem=LINEAR, base=fs.DDIM(), noise=start(32), steps=4) | changes))


def worker(rank, world, file, out):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
    student, _ = fs.distill_dode(LINEAR, fs.DPMSolverPP(2), noise=start(128), steps=5, batch=8, guard=False)
    if rank == 0:
        torch.save(student.kappa, out)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("world", [2, 3])
def test_processes_give_the_same_table(world, tmp_path):
    alone, _ = fs.distill_dode(LINEAR, fs.DPMSolverPP(2), noise=start(128), steps=5, batch=8, guard=False)
    torch.multiprocessing.spawn(worker, (world, tmp_path / "store", tmp_path / "kappa.pt"), nprocs=world)
    assert alone.kappa[1:].abs().min() > 1e-3
    shared = torch.load(tmp_path / "kappa.pt", weights_only=True)
    torch.testing.assert_close(shared, alone.kappa, rtol=1e-9, atol=1e-12)
