"""Solvers for stiff and superlinear drifts, and the messages that name them."""

import pytest
import torch

import fewstep as fs

F64 = torch.float64
IMPLICIT = (fs.ImplicitEuler, fs.ImplicitMilstein)
MATRIX = torch.tensor([[-300.0, 100.0], [90.0, -60.0]], dtype=F64)


def linear(t, y):
    return y @ MATRIX.mT


def small(t, y):
    return 0.1 * torch.ones_like(y)


@pytest.mark.parametrize("theta", [1.0, 0.5])
@pytest.mark.parametrize("kind", IMPLICIT)
def test_step_of_a_linear_drift_is_that_of_its_rational_function(kind, theta):
    """One step without noise is (1 - theta h A)^-1 (1 + (1 - theta) h A) y, at h |A| = 160."""
    y0, unit, h = torch.randn(5, 2, dtype=F64, generator=torch.Generator().manual_seed(0)), torch.eye(2, dtype=F64), 0.5
    expected = torch.linalg.solve(unit - theta * h * MATRIX, (unit + (1 - theta) * h * MATRIX) @ y0.mT).mT
    for shape in ((5, 2), (1, 5, 2)):
        y = fs.solve(fs.ODE(linear), kind(theta, iterations=1), y0.reshape(shape), [0.0, h]).y
        torch.testing.assert_close(y.reshape(5, 2), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", IMPLICIT)
def test_event_axes_and_a_solve_of_your_own_give_the_same_step(kind):
    """A drift of each entry has one root, whichever axes the Jacobian covers and whatever finds it."""
    sde = fs.SDE(lambda t, y: torch.sin(y) - y**3, lambda t, y: 0.3 * y)
    path = fs.BrownianPath((2, 3, 2), seed=0, dtype=F64)
    y0 = torch.linspace(-2, 2, 12, dtype=F64).reshape(2, 3, 2)

    def fixed_point(residual, x):
        for _ in range(300):
            x = x - 0.2 * residual(x)
        return x

    solvers = [kind(iterations=12, event_dims=n) for n in (0, 1, 2, 3)] + [kind(solve=fixed_point)]
    first, *others = (fs.solve(sde, s, y0, torch.linspace(0, 1, 6), path=path).y for s in solvers)
    for other in others:
        torch.testing.assert_close(other, first, rtol=1e-9, atol=1e-9)


def test_gradients_of_an_implicit_step_are_those_of_differences():
    y0, rate = torch.tensor([[0.5, -1.0]], dtype=F64, requires_grad=True), torch.tensor(3.0, dtype=F64).requires_grad_()

    def end(y0, rate):
        sde = fs.SDE(lambda t, y: -rate * y**3 + y.flip(-1), small, "additive")
        return fs.solve(sde, fs.ImplicitEuler(), y0, [0.0, 0.5, 1.0]).y

    assert torch.autograd.gradcheck(end, (y0, rate))


@pytest.mark.parametrize("solver", [fs.ImplicitEuler(), fs.ImplicitMilstein()], ids=repr)
def test_implicit_solvers_keep_the_law_of_a_stiff_ou_process(solver):
    """At h k = 50 the variance is that of the scheme, s^2 h / ((1 + k h)^2 - 1), within five standard errors."""
    k, h = 500.0, 0.1
    sde = fs.SDE(lambda t, y: -k * y, lambda t, y: torch.ones_like(y), "additive")
    y = fs.solve(sde, solver, torch.zeros(20000, 1, dtype=F64), torch.arange(11, dtype=F64) * h, seed=0).y
    assert abs(y.var() / (h / ((1 + k * h) ** 2 - 1)) - 1) < 5 * (2 / 20000) ** 0.5


@pytest.mark.parametrize("solver", [fs.TamedEuler(), fs.TamedMilstein(), fs.ImplicitEuler(), fs.ImplicitMilstein()])
def test_superlinear_drifts_stay_bounded(solver):
    sde = fs.SDE(lambda t, y: y - y**5, lambda t, y: 0.5 * y)
    y0 = torch.full((500, 1), 10.0)
    assert fs.solve(sde, solver, y0, torch.linspace(0, 20, 101)).y.abs().max() < 3
    with pytest.raises(fs.NonFiniteError, match=r"ImplicitEuler\(\).* faster than linearly: TamedEuler\(\)"):
        fs.solve(sde, fs.EulerMaruyama(), y0, torch.linspace(0, 20, 101))


MESSAGES = [
    (fs.SDE(linear, small, "additive"), r"ImplicitEuler\(\) is stable in longer ones"),
    (fs.SDE(linear, small, "diagonal", "stratonovich"), r"ImplicitMilstein\(\) is stable in longer ones"),
    (fs.ODE(linear), r"ImplicitEuler\(\) is stable in longer ones"),
    (fs.SDE(lambda t, y: -(y**3), small, "diagonal", "stratonovich"), r"TamedMilstein\(\)"),
]


@pytest.mark.parametrize(("sde", "message"), MESSAGES)
def test_a_solve_that_runs_away_names_the_solver_for_it(sde, message):
    with pytest.raises(fs.NonFiniteError, match=message):
        fs.solve(sde, fs.Heun(), torch.full((3, 2), 30.0, dtype=F64), torch.linspace(0, 40, 401))


@pytest.mark.parametrize("kind", IMPLICIT)
@pytest.mark.parametrize(
    "wrong", [dict(theta=0), dict(theta=1.5), dict(iterations=0), dict(event_dims=-1), dict(solve=3)]
)
def test_invalid_options_are_refused(kind, wrong):
    with pytest.raises(fs.InputError, match=next(iter(wrong))):
        kind(**wrong)
