"""Adaptive steps, outputs at chosen times, dense solutions and events, against closed forms, scipy and fixed steps."""

import contextlib
import math

import pytest
import torch
from scipy.integrate import solve_ivp

import fewstep as fs

F64 = torch.float64
PAIRS = [fs.Bosh3(), fs.Dopri5(), fs.Tsit5()]
ODES = [*PAIRS, fs.RK4(), fs.Heun(), fs.ReversibleHeun(), fs.ShARK()]
DECAY = fs.ODE(lambda t, y: -y)
TURN = fs.ODE(lambda t, y: torch.stack([y[:, 1], -y[:, 0]], -1))


def name(value):
    return type(value).__name__


def bump(t):
    return 150 * torch.exp(-(((t - 0.5) / 0.02) ** 2))


SDES = {
    "additive": (fs.SDE(lambda t, y: -2 * y.sin(), lambda t, y: 0.7 + 0 * y, "additive"), fs.ShARK()),
    "in time": (fs.SDE(lambda t, y: -y, lambda t, y: (1 + (5 * t).sin()) * torch.ones_like(y), "additive"), fs.SRA1()),
    "ito": (fs.SDE(lambda t, y: -2 * y.sin(), lambda t, y: 0.8 + 0.6 * y.cos()), fs.SRID2()),
    "stratonovich": (
        fs.SDE(lambda t, y: -2 * y.sin(), lambda t, y: 0.8 + 0.6 * y.cos(), sde_type="stratonovich"), fs.SlowRK(),
    ),
    "doubling": (fs.SDE(lambda t, y: -2 * y.sin(), lambda t, y: 0.8 + 0.6 * y.cos()), fs.Milstein()),
    "rough": (fs.SDE(lambda t, y: -y + bump(t) * (1 - y**2), lambda t, y: 0.3 + 0 * y, "additive"), fs.SOSRA()),
    "spark": (fs.SDE(lambda t, y: -y, lambda t, y: 0.3 * y.sin() + 1, sde_type="stratonovich"), fs.SPaRK()),
}  # fmt: skip


def path_of(count=64, seed=0, **options):
    return fs.BrownianPath((count, 1), 0.0, 1.0, seed=seed, levy="H", dtype=F64, **options)


@pytest.mark.parametrize("solver", ODES, ids=name)
def test_error_of_an_ode_follows_the_tolerance(solver):
    errors = []
    for tol in (1e-3, 1e-5):
        sol = fs.solve(DECAY, solver, torch.ones(3, 2, dtype=F64), [0.0, 3.0], steps=fs.Adaptive(tol, tol))
        errors.append(abs(float(sol.y[0, 0]) - math.exp(-3)))
        assert sol.accepted == len(sol.grid) - 1
    assert errors[0] < 2e-3
    assert errors[1] < 5e-5


def test_van_der_pol_agrees_with_scipy_in_both_directions():
    def field(t, y):
        return torch.stack([y[..., 1], 5 * (1 - y[..., 0] ** 2) * y[..., 1] - y[..., 0]], -1)

    at = [4.0, 9.0, 12.0]
    y0 = torch.tensor([[2.0, 0.0]], dtype=F64)
    sol = fs.solve(fs.ODE(field), fs.Tsit5(), y0, [0.0, 12.0], ts=at, steps=fs.Adaptive(1e-8, 1e-10))
    known = solve_ivp(
        lambda t, y: field(t, torch.as_tensor(y)).numpy(), (0, 12), [2, 0], "DOP853", at, rtol=1e-11, atol=1e-12
    )
    assert torch.allclose(sol.ys[:, 0], torch.from_numpy(known.y.T.copy()), atol=1e-5)
    assert sol.ts.tolist() == at
    back = fs.solve(DECAY, fs.Tsit5(), torch.ones(1, 1, dtype=F64), [2.0, 0.0], steps=fs.Adaptive(1e-8, 1e-10))
    assert back.y.item() == pytest.approx(math.exp(2), rel=1e-6)


@pytest.mark.parametrize("kind", SDES)
def test_strong_error_follows_the_tolerance_to_the_limit_of_fixed_steps(kind):
    sde, solver = SDES[kind]
    path, y0 = path_of(), torch.full((64, 1), 0.4, dtype=F64)
    fine = fs.solve(sde, solver, y0, torch.linspace(0, 1, 2**12 + 1), path=path).y
    errors = []
    for tol in (1e-1, 1e-3):
        sol = fs.solve(sde, solver, y0, [0.0, 1.0], path=path, steps=fs.Adaptive(tol, tol))
        errors.append(float((sol.y - fine).square().mean().sqrt()))
    assert errors[1] < 0.25 * errors[0]
    assert errors[1] < 4e-3


class Logged:
    """A path that remembers the times it was asked for."""

    def __init__(self, path):
        self.path, self.asked = path, set()

    def __getattr__(self, name):
        return getattr(self.path, name)

    def increment(self, ta, tb):
        self.asked |= {ta, tb}
        return self.path.increment(ta, tb)


@pytest.mark.parametrize("solver", [fs.SRID2(), fs.Milstein()], ids=name)
def test_no_information_of_a_rejected_step_is_skipped(solver):
    sde = fs.SDE(lambda t, y: 0 * y, lambda t, y: 1.5 * y)
    logged, rejected = Logged(path_of(1)), 0
    for seed in range(3):
        logged.path, logged.asked = path_of(1, seed), set()
        control = fs.Adaptive(0.02, 0.0, first=0.5, pcoeff=0.0, icoeff=1.0, safety=0.99, largest=20.0)
        sol = fs.solve(sde, solver, torch.ones(1, 1, dtype=F64), [0.0, 1.0], path=logged, steps=control)
        rejected += sol.rejected
        ends = set(sol.grid.tolist())
        ends |= {a + (b - a) / 2 for a, b in zip(sol.grid[:-1].tolist(), sol.grid[1:].tolist())}  # of doubled steps
        assert logged.asked <= ends
    assert rejected > 3


def test_steps_are_those_of_a_fixed_solve_on_the_accepted_times():
    sde, solver = SDES["ito"]
    path, y0 = path_of(), torch.full((64, 1), 0.4, dtype=F64)
    sol = fs.solve(sde, solver, y0, [0.0, 1.0], path=path, steps=fs.Adaptive(1e-2, 1e-2))
    with pytest.warns(UserWarning, match="cuts") if len(sol.grid) > 64 else contextlib.nullcontext():
        fixed = fs.solve(sde, solver, y0, sol.grid, path=path)
    assert torch.allclose(sol.y, fixed.y, rtol=1e-9)


def test_localised_roughness_takes_a_fifth_of_the_evaluations_of_fixed_steps():
    sde = SDES["rough"][0]
    path, y0 = path_of(128), torch.zeros(128, 1, dtype=F64)
    grids = {n: torch.linspace(0, 1, n + 1, dtype=F64) for n in (512, 2**13)}
    fine = fs.solve(sde, fs.ShARK(), y0, grids[2**13], path=path, save=[2**12]).ys[0]
    fixed = fs.solve(sde, fs.ShARK(), y0, grids[512], path=path, save=[256, 512])
    sol = fs.solve(sde, fs.ShARK(), y0, [0.0, 1.0], ts=[0.5, 1.0], path=path, steps=fs.Adaptive(0.005, 0.005))
    errors = [float((s.ys[0] - fine).square().mean().sqrt()) for s in (sol, fixed)]  # within the rough part
    assert errors[0] < errors[1]
    assert sol.nfe < fixed.nfe / 5


def test_noise_without_a_path_is_that_of_the_seed():
    sde, y0 = SDES["additive"][0], torch.zeros(500, 1)
    run = lambda seed: fs.solve(sde, fs.SRA1(), y0, [0.0, 1.0], seed=seed, steps=fs.Adaptive(0.1, 0.1)).y  # noqa: E731
    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))


def test_gradients_flow_through_accepted_steps():
    rate = torch.tensor(0.5, dtype=F64, requires_grad=True)
    ode = fs.ODE(lambda t, y: rate * y)
    sol = fs.solve(ode, fs.Tsit5(), torch.ones(1, 1, dtype=F64), [0.0, 2.0], steps=fs.Adaptive(1e-8, 1e-10))
    sol.y.sum().backward()
    assert rate.grad.item() == pytest.approx(2 * math.exp(1), rel=1e-6)


@pytest.mark.parametrize("adaptive", [True, False])
def test_events_stop_each_sample_at_its_root(adaptive):
    start = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8], [-1.0, 0.0]], dtype=F64)
    roots = [math.pi / 2, math.pi, math.pi / 2 + math.atan2(0.8, 0.6), math.pi / 2]
    more = {"steps": fs.Adaptive(1e-9, 1e-11)} if adaptive else {}
    grid = [0.0, 10.0] if adaptive else torch.linspace(0, 10, 801, dtype=F64)
    sol = fs.solve(TURN, fs.Tsit5(), start, grid, event=lambda t, y: y[..., 0], **more)
    assert sol.event_t.tolist() == pytest.approx(roots, abs=1e-7)
    assert torch.allclose(sol.y[:, 0], torch.zeros(4, dtype=F64), atol=1e-7)
    assert float(sol.grid[-1]) < 4.0  # ends when all have stopped
    never = fs.solve(DECAY, fs.Tsit5(), start, [0.0, 1.0], event=lambda t, y: y[..., 0] + 5, steps=fs.Adaptive())
    assert never.event_t.isnan().all()


def test_states_after_an_event_remain_and_a_later_root_does_not_count():
    start = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=F64)
    sol = fs.solve(
        TURN, fs.Tsit5(), start, [0.0, 8.0], ts=[1.0, 2.0, 7.0], steps=fs.Adaptive(1e-8, 1e-10),
        event=lambda t, y: y[..., 0],
    )  # fmt: skip
    assert sol.ys.shape == (3, 2, 2)
    assert torch.allclose(sol.ys[1:, 0], torch.tensor([0.0, -1.0], dtype=F64), atol=1e-6)
    assert torch.equal(sol.ys[2], sol.y)


def test_event_of_an_sde_stops_at_the_step_after_the_crossing():
    sde = fs.SDE(lambda t, y: 0 * y, lambda t, y: torch.ones_like(y), "additive")
    grid = torch.linspace(0, 1, 101, dtype=F64)
    plain = fs.solve(sde, fs.EulerMaruyama(), torch.zeros(50, 1, dtype=F64), grid, save="all").ys[..., 0]
    sol = fs.solve(sde, fs.EulerMaruyama(), torch.zeros(50, 1, dtype=F64), grid, event=lambda t, y: y[..., 0] - 0.5)
    above = plain > 0.5
    first = above.double().argmax(0)
    expected = torch.where(above.any(0), grid[first], torch.nan)
    assert torch.allclose(sol.event_t, expected, equal_nan=True)
    hit = above.any(0)
    assert torch.equal(sol.y[hit, 0], plain.gather(0, first[None])[0][hit])


@pytest.mark.parametrize("adaptive", [True, False])
def test_dense_solution_is_the_solvers_own(adaptive):
    more = {"steps": fs.Adaptive(1e-7, 1e-9)} if adaptive else {}
    grid = [0.0, 3.0] if adaptive else torch.linspace(0, 3, 61, dtype=F64)
    sol = fs.solve(DECAY, fs.Tsit5(), torch.ones(2, 1, dtype=F64), grid, dense=True, **more)
    times = torch.linspace(0, 3, 40, dtype=F64)
    assert torch.allclose(sol(times)[:, 0, 0], (-times).exp(), atol=1e-6)
    assert torch.equal(sol(3.0), sol.y)
    sde, solver = SDES["additive"]
    path, y0 = path_of(), torch.full((64, 1), 0.4, dtype=F64)
    fine = fs.solve(sde, solver, y0, torch.linspace(0, 1, 1025), path=path, save=[410])
    grid = [0.0, 1.0] if adaptive else torch.linspace(0, 1, 129, dtype=F64)
    more = {"steps": fs.Adaptive(1e-3, 1e-3)} if adaptive else {}
    sol = fs.solve(sde, solver, y0, grid, path=path, dense=True, **more)
    assert (sol(410 / 1024) - fine.ys[0]).abs().max() < 2e-3


def test_outputs_that_are_not_in_the_grid_become_steps():
    grid = torch.linspace(0, 1, 5, dtype=F64)
    sol = fs.solve(DECAY, fs.RK4(), torch.ones(1, 1, dtype=F64), grid, ts=[0.25, 0.3, 1.0])
    assert sol.grid.tolist() == [0.0, 0.25, 0.3, 0.5, 0.75, 1.0]
    assert torch.allclose(sol.ys[:, 0, 0], torch.tensor([-0.25, -0.3, -1.0], dtype=F64).exp(), atol=1e-4)
    one = fs.solve(DECAY, fs.RK4(), torch.ones(1, 1), torch.linspace(0, 1, 5), ts=torch.tensor([0.5]))
    assert len(one.grid) == 5


def test_an_error_carries_the_solution_up_to_there():
    explode = fs.ODE(lambda t, y: y**2)
    with pytest.raises(fs.StepSizeError, match="t = 1") as error:
        fs.solve(explode, fs.Tsit5(), torch.ones(1, 1, dtype=F64), [0.0, 2.0], ts=[0.5, 1.5], steps=fs.Adaptive())
    part = error.value.solution
    assert part.ts.tolist() == [0.5]
    assert part.ys[0].item() == pytest.approx(2.0, rel=1e-2)
    assert part.grid[-1].item() == error.value.t < 1.01
    for control in (fs.Adaptive(max_steps=3), fs.Adaptive(1e-9, 1e-9, min_step=0.1)):
        with pytest.raises(fs.StepSizeError, match="max_steps|min_step"):
            fs.solve(explode, fs.Tsit5(), torch.ones(1, 1, dtype=F64), [0.0, 0.9], steps=control)
    forced = fs.Adaptive(1e-9, 1e-9, min_step=0.05, force=True)
    assert fs.solve(DECAY, fs.Heun(), torch.ones(1, 1, dtype=F64), [0.0, 1.0], steps=forced).y.isfinite()


WRONG = {
    "rtol": (dict(rtol=-1.0), "rtol"), "both": (dict(rtol=0.0, atol=0.0), "rtol, atol"),
    "first": (dict(first=0.0), "first"), "limits": (dict(min_step=1.0, max_step=0.5), "max_step"),
    "force": (dict(force=True), "force"), "safety": (dict(safety=1.5), "safety"),
    "count": (dict(max_steps=0), "max_steps"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_controllers_out_of_range_are_refused(case):
    options, argument = WRONG[case]
    with pytest.raises(fs.InputError, match=f"^{argument}"):
        fs.Adaptive(**options)


def test_combinations_that_cannot_be_are_refused():
    sde, y0, grid = SDES["additive"][0], torch.ones(64, 1, dtype=F64), [0.0, 1.0]
    step, fresh = fs.Adaptive(), fs.FreshIncrements((64, 1), levy="H", dtype=F64)
    timed = torch.tensor(grid, dtype=F64, requires_grad=True)
    for options, argument in (
        (dict(steps=1e-3), "steps"), (dict(steps=step, compile=True), "steps"), (dict(dense=True), "dense"),
        (dict(steps=step, gradient="checkpoint"), "steps"), (dict(steps=step, path=fresh), "steps"),
        (dict(event=3), "event"), (dict(event=lambda t, y: y), "event"), (dict(ts=[0.5, 2.0]), "ts"),
        (dict(ts=[0.5], save="all"), "ts"), (dict(ts=[0.5, 0.5]), "ts"),
    ):  # fmt: skip
        with pytest.raises(fs.InputError, match=f"^{argument}"):
            fs.solve(sde, fs.SRA1(), y0, grid, **options)
    with pytest.raises(fs.InputError, match=r"^(steps|grid)"):
        fs.solve(DECAY, fs.Tsit5(), y0, timed, steps=step)
    with pytest.raises(fs.InputError, match="^t: "):
        fs.solve(DECAY, fs.Tsit5(), y0, grid)(0.5)
    dense = fs.solve(DECAY, fs.Tsit5(), y0, grid, dense=True)
    with pytest.raises(fs.InputError, match="^t: "):
        dense(1.5)
    noisy = fs.SDE(lambda t, y: -y, lambda t, y: y)
    with pytest.warns(UserWarning, match="another limit"):
        fs.solve(noisy, fs.EulerMaruyama(), y0, grid, steps=fs.Adaptive(0.5, 0.5))
