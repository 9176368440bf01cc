"""Solvers for underdamped Langevin dynamics."""

import math

import pytest
import torch

import fewstep as fs
from fewstep.sde.phi import phi_functions
from fewstep_analysis import problems, strong_order

F64 = torch.float64
ORDERS = {fs.QUICSORT: 3.0, fs.ShOULD: 3.0, fs.ShiftedODE: 3.0, fs.ALIGN: 2.0}
EXPONENTIAL = (fs.QUICSORT, fs.ShOULD, fs.ALIGN)


def order(solver, friction=1.0):
    langevin = problems.underdamped_langevin(friction)
    return strong_order(solver, langevin, levels=range(3, 7), paths=400, reference="levels").order


@pytest.mark.parametrize("friction", [0.01, 1.0, 8.0])
@pytest.mark.parametrize("kind", ORDERS)
def test_orders_are_those_of_the_cards(kind, friction):
    """The fitted slope over 8 to 64 steps of [0, 1]; within 0.3 for the strong friction, whose h gamma begins at 1."""
    assert kind().card.strong_order["underdamped"] == ORDERS[kind]
    assert abs(order(kind(), friction) - ORDERS[kind]) < (0.15 if friction <= 1 else 0.3)


@pytest.mark.parametrize("kind", [fs.QUICSORT, fs.ShOULD, fs.ShiftedODE])
def test_order_three_needs_k(kind):
    class WithoutK(kind):
        def step(self, sde, t0, t1, y, increment, carry):
            flat = fs.Increment(increment.h, increment.W, increment.H, torch.zeros_like(increment.K))
            return super().step(sde, t0, t1, y, flat, carry)

    assert abs(order(WithoutK()) - 2.0) < 0.15


@pytest.mark.parametrize("z", [0.0, -1e-12, -1e-3, -0.5, -0.999, -1.0, -1.001, -7.0, -50.0])
def test_phi_functions_are_their_integrals(z):
    """phi_k(z) is the integral of e^{(1-s) z} s^{k-1} / (k-1)! over [0, 1], here by Simpson's rule."""
    s = torch.linspace(0, 1, 20001, dtype=F64)
    weights = torch.full_like(s, 2.0)
    weights[1::2], weights[0], weights[-1] = 4.0, 1.0, 1.0
    numbers = phi_functions(z, 4)
    assert numbers[0] == pytest.approx(math.exp(z), rel=1e-14)
    for k in range(1, 5):
        expected = ((1 - s) * z).exp() * s ** (k - 1) / math.factorial(k - 1) @ weights / 60000
        assert numbers[k] == pytest.approx(float(expected), rel=1e-11)
    tensors = phi_functions(torch.tensor([z, -3.0], dtype=F64), 4)
    for k in range(5):
        assert float(tensors[k][0]) == pytest.approx(numbers[k], rel=1e-13)


@pytest.mark.parametrize(("kind", "levy"), [(fs.ShOULD, "K"), (fs.ALIGN, "H")])
def test_a_free_particle_is_the_mean_of_fine_steps_given_the_path(kind, levy):
    """Without a force one long step is the conditional mean of many short ones that have the same W, H (and K)."""
    free = fs.UnderdampedLangevin(lambda t, x: 0 * x, 3.0, 0.8)
    n, y0 = 4000, torch.tensor([[0.3, -1.0]], dtype=F64)
    path = fs.BrownianPath((n, 1), seed=0, levy=levy, dtype=F64)
    fine = fs.solve(free, kind(), y0.expand(n, 2), torch.linspace(0, 1, 65), path=path).y
    coarse = fs.solve(free, kind(), y0.expand(n, 2), [0.0, 1.0], path=path).y
    error = fine - coarse
    increment = path.increment(0.0, 1.0)
    for part in [increment.W, increment.H, increment.K][: 3 if levy == "K" else 2]:
        for component in error.unbind(-1):
            z = (component * part[:, 0]).mean() / (component.std() * part.std()) * n**0.5
            assert abs(z) < 4.5
    assert (error.mean(0).abs() < 4.5 * error.std(0) / n**0.5 + 1e-6).all()


@pytest.mark.parametrize("kind", EXPONENTIAL)
@pytest.mark.parametrize("friction", [0.2, 1.0])
def test_the_stationary_law_of_an_oscillator_has_its_temperature(kind, friction):
    """Var x and Var v stay T over 50 steps of 0.1, within 5 standard errors and 1 %."""
    n, T = 20000, 0.7
    oscillator = fs.UnderdampedLangevin(lambda t, x: -x, friction, T)
    y0 = T**0.5 * torch.randn(n, 2, dtype=F64, generator=torch.Generator().manual_seed(1))
    y = fs.solve(oscillator, kind(), y0, torch.linspace(0, 5, 51), seed=2).y
    for variance in y.var(0):
        assert abs(variance / T - 1) < 5 * (2 / n) ** 0.5 + 0.01


@pytest.mark.parametrize("kind", EXPONENTIAL)
def test_strong_friction_does_not_limit_the_step(kind):
    """At gamma h = 100 states stay bounded where an explicit method of the same order runs away."""
    strong = fs.UnderdampedLangevin(lambda t, x: -x, 1000.0, 1.0)
    y0 = torch.ones(100, 2, dtype=F64)
    assert fs.solve(strong, kind(), y0, torch.linspace(0, 5, 51)).y.abs().max() < 30
    with pytest.raises(fs.NonFiniteError, match="ALIGN"):
        fs.solve(strong, fs.ShiftedODE(), y0, torch.linspace(0, 10, 101))


@pytest.mark.parametrize("kind", EXPONENTIAL)
def test_without_friction_energy_is_that_of_the_start(kind):
    pendulum = fs.UnderdampedLangevin(lambda t, x: -torch.sin(x), 0.0)
    y = fs.solve(pendulum, kind(), torch.tensor([[1.0, 0.2]], dtype=F64), torch.linspace(0, 10, 401)).y
    energy = lambda y: y[0, 1] ** 2 / 2 - torch.cos(y[0, 0])  # noqa: E731
    assert abs(energy(y) - energy(torch.tensor([[1.0, 0.2]], dtype=F64))) < 1e-3


def test_additive_solvers_solve_it_and_others_do_not():
    langevin = problems.underdamped_langevin()
    names = fs.solvers("underdamped")
    assert {"QUICSORT", "ShOULD", "ALIGN", "ShiftedODE", "ShARK", "EulerMaruyama"} <= set(names)
    assert not {"LogODE", "SlowRK", "DDIM"} & set(names) - {n for n, s in names.items() if s.card.strong_order}
    y0 = langevin.y0.expand(300, 2)
    path = fs.BrownianPath((300, 1), seed=0, levy="K", dtype=F64)
    ends = [fs.solve(langevin.sde, names[n], y0, torch.linspace(0, 1, 129), path=path).y for n in ("QUICSORT", "ShARK")]
    assert (ends[0] - ends[1]).abs().max() < 1e-3
    additive = fs.SDE(lambda t, y: -y, lambda t, y: torch.ones_like(y), "additive")
    with pytest.raises(fs.InputError, match="'additive' noise; it solves underdamped"):
        fs.solve(additive, fs.QUICSORT(), torch.ones(3, 2), [0.0, 1.0])


def test_adaptive_steps_of_align_follow_the_tolerance():
    langevin = problems.underdamped_langevin()
    y0 = langevin.y0.expand(200, 2)
    path = fs.BrownianPath((200, 1), seed=0, levy="K", dtype=F64)
    fine = fs.solve(langevin.sde, fs.QUICSORT(), y0, torch.linspace(0, 1, 257), path=path).y
    errors = []
    for tol in (1e-2, 1e-3, 1e-4):
        sol = fs.solve(langevin.sde, fs.ALIGN(), y0, [0.0, 1.0], path=path, steps=fs.Adaptive(tol, tol))
        errors.append(float((sol.y - fine).square().mean().sqrt()))
    assert errors[0] > 2 * errors[1] > 4 * errors[2]
    assert errors[2] < 1e-3


@pytest.mark.parametrize("kind", EXPONENTIAL)
def test_transforms_compiled_lengths_and_gradients(kind):
    langevin = fs.UnderdampedLangevin(lambda t, x: -x - torch.sin(2 * x), 0.5)
    y0 = torch.linspace(-1, 1, 12, dtype=F64).reshape(3, 4)
    end = lambda y: fs.solve(langevin, kind(), y, [0.0, 0.3, 1.0], seed=3).y  # noqa: E731
    torch.testing.assert_close(torch.func.vmap(end)(y0[None])[0], end(y0))
    x = y0.clone().requires_grad_()
    end(x).square().sum().backward()
    torch.testing.assert_close(torch.func.grad(lambda y: end(y).square().sum())(y0), x.grad)
    part = fs.FreshIncrements((3, 2), "K", dtype=F64).increment(0.0, 0.4)
    times = torch.tensor([0.0, 0.4], dtype=F64)
    ends = []
    for h in (0.4, torch.tensor(0.4, dtype=F64)):
        increment = fs.Increment(h, part.W, part.H, part.K)
        ends.append(kind().step(langevin, *times, y0, increment, kind().init(langevin, times[0], y0)).y)
    torch.testing.assert_close(*ends)


def test_correlated_channels_are_additive_noise():
    pair = fs.UnderdampedLangevin(lambda t, x: -x, 1.0).correlated([[1.0, 0.5], [0.5, 1.0]])
    assert (pair.noise_type, pair.langevin) == ("additive", None)
    assert fs.solve(pair, fs.ShARK(), torch.ones(3, 4), [0.0, 0.5, 1.0]).y.isfinite().all()


WRONG = [
    (lambda: fs.UnderdampedLangevin(3), "force"), (lambda: fs.UnderdampedLangevin(torch.sin, -1), "friction"),
    (lambda: fs.UnderdampedLangevin(torch.sin, 1, float("nan")), "temperature"),
    (lambda: fs.SDE(torch.add, torch.add, "underdamped"), "langevin: got None"),
    (lambda: fs.SDE(torch.add, torch.add, langevin=(1.0, 1.0)), "langevin: got"),
    (lambda: fs.solve(problems.underdamped_langevin().sde, fs.ALIGN(), torch.ones(2, 3), [0.0, 1.0]), "velocities"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "message"), WRONG)
def test_invalid_problems_are_refused(call, message):
    with pytest.raises(fs.InputError, match=message):
        call()
