"""What holds on a CUDA device: the numbers of the CPU along one path, no waiting per step, states that stay there."""

import pytest
import torch

import fewstep as fs
from fewstep_analysis import devices

pytestmark = pytest.mark.cuda
if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

DEVICE = "cuda"
CASES = [(name, case, run) for name, solver in fs.solvers().items() for case, run in devices.cases_of(solver)]
EVERY = pytest.mark.parametrize("run", [pytest.param(run, id=f"{name}, {case}") for name, case, run in CASES])
SDE = fs.SDE(lambda t, y: torch.sin(y), lambda t, y: 0.5 + 0.2 * torch.cos(y))
GRID = torch.linspace(0, 1, 9, dtype=torch.float64)
MODEL = devices.MODEL


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_solver_gives_the_numbers_of_the_cpu(run, dtype):
    there = run(DEVICE, dtype, 8, True)
    assert there.device.type == DEVICE
    assert there.dtype == dtype
    assert devices.distance(run("cpu", dtype, 8, True), there) < 1000  # units of rounding


@EVERY
def test_no_solver_waits_for_the_device_in_a_step(run):
    found = devices.synchronisations_of(run, DEVICE)
    assert not found["more"], found


def test_solve_reads_the_device_at_most_twice():
    y0 = torch.ones(64, 2, device=DEVICE)
    found = devices.synchronisations(lambda: fs.solve(SDE, fs.Milstein(), y0, GRID))
    assert sum(found.values()) <= 2, found


def test_sample_reads_the_device_at_most_twice():
    def run():
        fs.sample(MODEL, fs.UniPC(), shape=(8, 3), steps=6, device=DEVICE)

    found = devices.synchronisations(run)
    assert sum(found.values()) <= 2, found


@pytest.mark.parametrize("levy", ["W", "H", "K"])
def test_walk_and_queries_of_a_device_path_agree(levy):
    path = fs.BrownianPath((64, 2), levy=levy, device=DEVICE)
    for k, walked in enumerate(path.increments(GRID)):
        asked = path.increment(float(GRID[k]), float(GRID[k + 1]))
        assert walked.W.device.type == DEVICE
        torch.testing.assert_close(walked.W, asked.W, rtol=1e-5, atol=1e-6)


def test_seeds_are_reproducible_on_the_device():
    y0 = torch.zeros(4096, 1, device=DEVICE)
    a, b, c = (fs.solve(SDE, fs.Milstein(), y0, GRID, seed=s).y for s in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_fresh_increments_have_their_variances():
    """At a level of 1e-6 per quantity: five standard errors of a variance, 5 sqrt(2/n)."""
    n, h = 1 << 20, 0.25
    increment = fs.FreshIncrements((n,), levy="K", seed=3, device=DEVICE).increment(0.0, h)
    for field, variance in ((increment.W, h), (increment.H, h / 12), (increment.K, h / 720)):
        assert field.var().item() == pytest.approx(variance, rel=5 * (2 / n) ** 0.5)


def test_gradients_are_those_of_the_cpu():
    found = []
    for device in ("cpu", DEVICE):
        y0 = torch.full((4, 2), 0.3, dtype=torch.float64).to(device).requires_grad_()
        path = fs.BrownianPath((4, 2), levy="H", dtype=torch.float64, device=device, portable=True)
        fs.solve(SDE, fs.SRID2(), y0, GRID, path=path).y.square().sum().backward()
        found.append(y0.grad.cpu())
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)


def test_steps_are_captured_and_replayed():
    """Solver steps alone, on increments of torch's own generator, fit into a CUDA graph."""
    y, h = torch.ones(1024, 2, device=DEVICE), 0.125
    t0, t1 = y.new_full((), 0.0), y.new_full((), h)
    out = torch.empty_like(y)

    def step():
        W = torch.empty_like(y).normal_(0, h**0.5)
        out.copy_(fs.Milstein().step(SDE, t0, t1, y, fs.Increment(h, W), None).y)

    replay = devices.captured(step)
    ends = []
    for _ in range(2):
        replay()
        ends.append(out.clone())
    assert not torch.equal(*ends)  # each replay draws again
    assert all(end.isfinite().all() for end in ends)


CAPTURED = {
    "sample": lambda y: fs.sample(MODEL, fs.UniPC(), noise=y, steps=6),
    "solve": lambda y: fs.solve(fs.ODE(lambda t, y: torch.sin(y + t)), fs.RK4(), y, GRID).y,
}


@pytest.mark.parametrize("name", CAPTURED)
def test_a_graph_of_a_whole_run_equals_eager(name):
    y, later = torch.randn(2, 64, 3, generator=torch.Generator().manual_seed(0)).to(DEVICE).unbind()
    out = torch.empty_like(y)
    replay = devices.captured(lambda: out.copy_(CAPTURED[name](y)))
    for state in (y.clone(), later):
        y.copy_(state)
        replay()
        torch.testing.assert_close(out, CAPTURED[name](state))


def test_a_graph_of_noise_of_a_seed_is_refused():
    y0 = torch.ones(32, 2, device=DEVICE)
    with pytest.raises(fs.InputError, match="seed"):
        devices.captured(lambda: fs.solve(SDE, fs.Milstein(), y0, GRID))


def test_compiled_solve_equals_eager():
    y0 = torch.linspace(0.1, 1, 64, device=DEVICE).reshape(32, 2)
    path = fs.BrownianPath((32, 2), levy="H", device=DEVICE)

    def run(y):
        return fs.solve(SDE, fs.Milstein(), y, GRID[:4], path=path).y

    with torch.no_grad():
        torch.testing.assert_close(torch.compile(run)(y0), run(y0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("state", "path"), [("cpu", DEVICE), (DEVICE, "cpu")])
def test_path_on_another_device_is_refused(state, path):
    y0 = torch.ones(4, 2, device=state)
    with pytest.raises(fs.InputError, match="path"):
        fs.solve(SDE, fs.Milstein(), y0, GRID, path=fs.BrownianPath((4, 2), device=path))


def test_learned_step_is_fitted_on_the_device():
    y0 = torch.linspace(-1, 1, 64, dtype=torch.float64, device=DEVICE).unsqueeze(1)
    step, report = fs.distill_sigdeg_step(
        SDE, steps=4, y0=y0, teacher_options=fs.TeacherOptions(trajectories=256),
        training=fs.TrainingOptions(iterations=30),
    )  # fmt: skip
    assert next(step.network.parameters()).device.type == DEVICE
    assert report.student_rmse < report.parent_rmse


def test_table_fitted_on_the_device_is_that_of_the_cpu():
    noise = torch.randn(32, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    first, second = (
        fs.distill_dode(MODEL, fs.DDIM(), steps=4, noise=noise.to(d), teacher_substeps=4)[0] for d in ("cpu", DEVICE)
    )
    torch.testing.assert_close(second.update_eval.cpu(), first.update_eval.cpu(), rtol=1e-8, atol=1e-10)
