"""Plans: every kind of solver as one table, orders by algebra, gradients, files."""

import json
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file

import fewstep as fs
from fewstep._serialization import write
from fewstep.executor import run
from fewstep.plan import COLUMNS, LEARNED

DATA = Path(__file__).parent / "data"  # files that version 0.1 wrote

SIGMAS = torch.tensor([10.0, 5.0, 2.0, 1.0, 0.4, 0.0], dtype=torch.float64)

# kind -> solver, evaluations on SIGMAS, evaluations kept, normals per interval
SHAPES = {
    "single-step": (fs.DDIM(), 5, 1, 0),
    "multistep": (fs.DPMSolverPP(2), 5, 2, 0),
    "singlestep of two stages": (fs.DPMSolverPP(2, multistep=False), 9, 1, 0),
    "predictor-corrector": (fs.UniPC(2), 5, 3, 0),
    "Runge-Kutta": (fs.EDMHeun(), 9, 2, 0),
    "stochastic": (fs.EulerMaruyama(), 5, 1, 1),
    "stochastic Runge-Kutta": (fs.ShARK(), 9, 2, 2),
    "churned": (fs.EDMHeun(churn=5), 9, 2, 1),
}


@pytest.mark.parametrize("kind", SHAPES)
def test_every_kind_of_solver_is_a_table(kind):
    solver, rows, window, letters = SHAPES[kind]
    plan = solver.plan(SIGMAS)
    assert plan.nfe == rows
    assert plan.update_eval.shape == (rows, window)
    assert plan.stage_noise.shape == (rows, 1, max(letters, 1))
    assert plan.levy == ["", "W", "H"][letters]
    for column in plan.tensors().values():
        assert column.dtype == torch.float64
        assert column[~column.isnan()].isfinite().all()
    assert plan.name in str(plan)
    assert len(str(plan).splitlines()) == rows + 2


@pytest.mark.parametrize("kind", SHAPES)
def test_constants_are_reproduced_exactly(kind):
    """D = const: x_t = x0 + t/s (x_s - x0) for every deterministic solver, on any grid."""
    solver = SHAPES[kind][0]
    generator = torch.Generator().manual_seed(0)
    sigmas = torch.rand(7, generator=generator, dtype=torch.float64).sort(descending=True).values * 5
    problem = fs.DiffusionModel(lambda x, s: torch.full_like(x, 0.3), fs.EDM(0.001, 10.0))
    start = torch.randn(50, 2, generator=generator, dtype=torch.float64)
    got = fs.sample(problem, solver, noise=start, sigmas=sigmas)
    if SHAPES[kind][3] == 0:
        torch.testing.assert_close(got, 0.3 + sigmas[-1] / sigmas[0] * (start - 0.3))
    else:
        assert got.isfinite().all()


# solver, order, whether the flow is exact where D is a polynomial of degree < order in lambda. 2M and
# UniC-1 replace an exponential weight by 1/2: their conditions hold to leading order in h only
ALGEBRA = [
    (fs.DDIM(), 1, True),
    (fs.DPMSolverPP(2), 2, False),
    (fs.UniPC(1), 2, False),
    (fs.UniPC(2), 3, True),
    (fs.UniPC(3), 4, True),
]


@pytest.mark.parametrize(("solver", "order", "exact"), ALGEBRA, ids=lambda v: getattr(v, "order", v))
@pytest.mark.parametrize("seed", range(3))
def test_order_by_algebra(solver, order, exact, seed):
    """One step on a random grid against x_t = (t/s) x_s + t int e^lambda D dlambda for D = lambda^k.

    The defect vanishes for k < order, or falls by 2^(order + 1) as the grid is halved where the weights
    are only right to leading order; for k = order it does not vanish.
    """
    generator = torch.Generator().manual_seed(seed)
    gaps = 0.2 + torch.rand(7, generator=generator, dtype=torch.float64)
    defects = torch.tensor([[defect(solver, gaps * h, k) for k in range(order + 1)] for h in (0.02, 0.01)])
    if exact:
        assert defects[:, :order].max() < 1e-13
    else:
        rates = torch.log2(defects[0] / defects[1])[1:order]
        assert (rates > order + 0.8).all()
        assert defects[0, 0] < 1e-13
    assert defects[0, order] > 1e-11


def defect(solver, gaps, degree):
    """The local defect of the step into node 5 (the last one is not corrected)."""
    k, lam = 5, torch.cat([gaps.new_zeros(1), gaps]).cumsum(0)
    sigmas, states = torch.exp(-lam), []
    # powers of lambda about the node itself, which keeps rounding small
    problem = fs.DiffusionModel(lambda x, s: ((-torch.log(s) - lam[k]) ** degree).expand_as(x), fs.EDM(1e-3, 10.0))
    fs.sample(problem, solver.plan(sigmas), noise=torch.zeros(1, 1, dtype=torch.float64),
              callback=lambda i, x, D: states.append(x))  # fmt: skip
    # row k of a corrector leaves the state at node k, that of the others at node k + 1
    x_s, x_t = states[k - 1 : k + 1] if isinstance(solver, fs.UniPC) else states[k - 2 : k]
    # int_0^h e^(u - h) (u - h)^k du = sum by parts, here by Gauss's rule of 20 points
    nodes, weights = numpy.polynomial.legendre.leggauss(20)
    h = float(gaps[k - 1])
    u = h * (nodes - 1) / 2
    integral = h / 2 * float((weights * numpy.exp(u) * u**degree).sum())
    return float((x_t - sigmas[k] / sigmas[k - 1] * x_s - integral).abs())


def test_executor_reads_no_tensor_back():
    """No `.item()` and no Python float of a tensor between the first row and the last."""
    problem = fs.DiffusionModel(lambda x, s: x / (1 + s * s), fs.EDM(0.01, 10.0))
    plan = fs.UniPC(3).plan(fs.sigma_grid(problem.schedule, 20))
    x, levels = torch.randn(2, 3), plan.sigma.float().unbind()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run(plan, x, lambda i, x, z: problem.denoiser(x, levels[i]), lambda *_: ())
    # the table itself is read once by tolist(), before the loop
    names = [e.key for e in profile.key_averages()]
    assert "aten::_local_scalar_dense" not in names
    assert "aten::item" not in names


@pytest.mark.parametrize("solver", [fs.DPMSolverPP(2), fs.EDMHeun(), fs.UniPC(2)], ids=repr)
def test_gradients_flow_to_columns_with_a_graph(solver):
    """Against finite differences, and entries that are zero now get a gradient too."""
    plan = solver.plan(SIGMAS[:4])
    x = torch.tensor([[0.3, -1.0]], dtype=torch.float64)

    def end(update, stage, scale):
        made = replace(plan, update_eval=update, stage_eval=stage, update_x=scale)
        return run(made, x, lambda i, x, z: torch.tanh(x), lambda *_: ())

    columns = [c.clone().requires_grad_() for c in (plan.update_eval, plan.stage_eval, plan.update_x)]
    torch.testing.assert_close(end(*columns), end(*(c.detach() for c in columns)), rtol=1e-14, atol=1e-14)
    missing = torch.tensor([[j > i for j in range(plan.update_eval.shape[1])] for i in range(plan.nfe)])
    before = missing.clone().fill_diagonal_(True) | missing  # a stage has no evaluation of its own row
    known = [(~missing).double(), (~before).double(), torch.ones(plan.nfe)]
    assert torch.autograd.gradcheck(lambda *c: end(*(a * b for a, b in zip(c, known, strict=True))), columns)
    (gradient,) = torch.autograd.grad(end(*columns).sum(), columns[0])
    assert not gradient[missing].any()  # evaluations that do not exist yet
    assert gradient[~missing].all()


def with_entry(plan, key, index, value):
    column = getattr(plan, key).clone()
    column[index] = value
    return {key: column}


MULTISTEP, STOCHASTIC = fs.DPMSolverPP(3).plan(SIGMAS), fs.ShARK().plan(SIGMAS)
ENTRIES = {  # column, index, value, of which plan
    "evaluation not made": ("update_eval", (0, 1), 0.1, MULTISTEP),
    "evaluation not made, later row": ("update_eval", (1, 2), -1e-9, MULTISTEP),
    "own evaluation in its stage": ("stage_eval", (0, 0), 0.1, MULTISTEP),
    "normal of no interval": ("update_noise", (0, 0, 0), 0.1, MULTISTEP),
    "too large": ("update_eval", (2, 0), 1e300, MULTISTEP), "too large scale": ("update_x", 1, -1e39, MULTISTEP),
    "not finite": ("stage_x", 1, torch.inf, MULTISTEP), "nan": ("update_x", 1, torch.nan, MULTISTEP),
    "subnormal level": ("sigma", 2, 1e-310, MULTISTEP), "negative level": ("sigma", 2, -1.0, MULTISTEP),
    "too large level": ("sigma", 0, 1e200, MULTISTEP), "too large grid": ("sigmas", 0, 1e200, MULTISTEP),
    "infinite interval": ("noise", (2, 1), torch.inf, STOCHASTIC),
    "half an interval": ("noise", (2, 1), torch.nan, STOCHASTIC),
    "before the path": ("noise", (0, 0), 0.0, STOCHASTIC), "negative": ("noise", (0, 0), -1.0, STOCHASTIC),
}  # fmt: skip


@pytest.mark.parametrize("case", ENTRIES)
def test_entry_that_cannot_be_run_is_refused_with_column_and_row(case, tmp_path):
    key, index, value, plan = ENTRIES[case]
    wrong = with_entry(plan, key, index, value)
    row = index[0] if isinstance(index, tuple) else index
    with pytest.raises(fs.InputError, match=rf"plan.({key}): .* in row {row}"):
        replace(plan, **wrong)
    for file in ("plan.safetensors", "plan.json"):
        write(tmp_path / file, {"format": "fewstep-plan-2"} | plan.meta(), plan.tensors() | wrong)
        with pytest.raises(fs.InputError):
            fs.load(tmp_path / file)


@pytest.mark.parametrize("order", [[0, 0], [1, 0]])
def test_noise_intervals_that_repeat_or_go_back_are_refused(order):
    opens = STOCHASTIC.on_path.nonzero().flatten()[:2]
    noise = STOCHASTIC.noise.clone()
    noise[opens] = noise[opens[order]]
    with pytest.raises(fs.InputError, match=f"plan.noise: .* in row {opens[1]}"):
        replace(STOCHASTIC, noise=noise)
    with pytest.raises(fs.InputError, match=f"plan.noise: .* in row {opens[0]}"):
        replace(STOCHASTIC, noise=STOCHASTIC.noise.flip(1))


@pytest.mark.parametrize("file", ["plan.safetensors", "plan.json"])
def test_plan_survives_its_file(file, tmp_path):
    plan = fs.ShARK().plan(SIGMAS)
    plan.save(tmp_path / file)
    back = fs.load(tmp_path / file)
    assert (back.name, back.prediction, back.fit) == (plan.name, plan.prediction, None)
    torch.testing.assert_close(back.tensors(), plan.tensors(), rtol=0, atol=0, equal_nan=True)
    problem = fs.DiffusionModel(lambda x, s: x / (1 + s * s), fs.EDM(0.1, 10.0))
    assert torch.equal(fs.sample(problem, plan, shape=(4, 2)), fs.sample(problem, back, shape=(4, 2)))


def test_plan_of_version_0_1_loads():
    back, plan = fs.load(DATA / "plan-1.safetensors"), fs.ShARK().plan(fs.sigma_grid(fs.EDM(0.1, 10.0), 3))
    torch.testing.assert_close(back.tensors(), plan.tensors(), rtol=1e-14, atol=1e-14, equal_nan=True)


GOOD = {"format": "fewstep-plan-2", "name": "x", "prediction": "data"}
# what is done to the metadata and the columns of a good file
BROKEN = {
    "format of the future": (GOOD | {"format": "fewstep-plan-999"}, {}),
    "no metadata": (None, {}),
    "metadata not an object": ([1], {}),
    "metadata of a table without its parts": (GOOD | {"format": "fewstep-dode-1"}, {}),
    "fit without its parts": (GOOD | {"fit": {}}, {}),
    "column missing": (GOOD, {"update_x": None}),
    "column unknown": (GOOD, {"update_y": torch.ones(5)}),
    "wrong shape": (GOOD, {"update_x": torch.ones(2)}),
    "integers": (GOOD, {"update_x": torch.ones(5, dtype=torch.long)}),
    "kappa of another size": (GOOD, {"kappa": torch.ones(3, 1)}),
}


@pytest.mark.parametrize("case", BROKEN)
def test_damaged_tables_are_refused(case, tmp_path):
    meta, changes = BROKEN[case]
    file = tmp_path / "plan.safetensors"
    fs.DDIM().plan(SIGMAS).save(file)
    if case == "kappa of another size":
        fit = json.loads((DATA / "dode-1.json").read_text())
        meta = meta | {"fit": {k: fit[k] for k in ("schedule", "event", "answers")}}
    columns = {k: v for k, v in (load_file(file) | changes).items() if v is not None}
    save_file(columns, file, None if meta is None else {"fewstep": json.dumps(meta)})
    with pytest.raises(fs.InputError):
        fs.load(file)


@pytest.mark.parametrize("content", [b"hello", b"", None])
def test_other_files_are_refused(content, tmp_path):
    if content is not None:
        (tmp_path / "plan.safetensors").write_bytes(content)
    with pytest.raises(fs.InputError, match="path: "):
        fs.load(tmp_path / "plan.safetensors")


def test_builder_refuses_states_before_the_current_one():
    builder = fs.PlanBuilder("stale", SIGMAS)
    x = builder.x
    D = builder.evaluate(x, 10.0)
    builder.advance(0.5 * x + 0.5 * D)
    with pytest.raises(ValueError, match="advanced past"):
        builder.evaluate(x, 5.0)


@pytest.mark.parametrize("solver", [fs.DDIM(), fs.EDMHeun(churn=10), fs.DPMSolver(3)], ids=lambda s: type(s).__name__)
def test_tails_begin_at_the_level_of_their_step(solver):
    """With churn the level of a row is above that of the grid, and levels may be close; the graph is kept."""
    sigmas = torch.tensor([10.0, 5.0, 2.0, 2.0 - 1e-12, 0.5], dtype=torch.float64)
    plan = solver.plan(sigmas)
    per_step = plan.nfe // 4
    for step in range(1, 4):
        assert torch.equal(plan.tail(per_step * step).sigmas, sigmas[step:])
    learned = replace(plan, update_x=plan.update_x.clone().requires_grad_())
    assert learned.tail(per_step).update_x.requires_grad


def test_gradients_to_columns_flow_or_are_refused():
    """Levels, noise intervals and weights of normals are read as Python numbers."""
    problem = fs.DiffusionModel(lambda x, s: 0.3 * x, fs.EDM())
    plan = fs.EDMHeun(churn=10).plan(fs.sigma_grid(fs.EDM(), 3))
    for key in COLUMNS:
        column = getattr(plan, key).clone().requires_grad_()
        if key in LEARNED:
            fs.sample(problem, replace(plan, **{key: column}), shape=(2, 3)).sum().backward()
            assert column.grad.abs().sum() > 0
        else:
            with pytest.raises(fs.InputError, match=f"plan.{key}: got a tensor that requires grad"):
                replace(plan, **{key: column})
