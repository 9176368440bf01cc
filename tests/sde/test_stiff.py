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


def amplification(solver, p, q):
    """The mean square of one step of length 1 from y = 1 with dy = p y dt + q y dW, which is linear in W."""
    sde, one = fs.SDE(lambda t, y: p * y, lambda t, y: q * y), torch.ones_like(p)
    times = torch.tensor([0.0, 1.0], dtype=F64)
    rest, moved = (solver.step(sde, *times, one, fs.Increment(1.0, w * one), None).y for w in (0, 1))
    return rest**2 + (moved - rest) ** 2


@pytest.mark.parametrize("stages", [1, 2, 3, 5, 10, 50, 200])
def test_skrock_is_stable_in_mean_square_wherever_the_test_equation_is(stages):
    """Along q^2 = -2p, the border of p + q^2/2 < 0, for p down to -1.93 s^2; and no further than 2 s^2."""
    longest = (2 - 4 / 3 * 0.05) * stages**2
    p = -torch.logspace(-6, 0, 20001, dtype=F64) * longest
    p = torch.cat([p, -torch.linspace(0, longest, 20001, dtype=F64)[1:]])
    for share in (0.0, 0.5, 1.0):
        assert amplification(fs.SKROCK(stages), p, (-2 * share * p).sqrt()).max() < 1 + 1e-9
    beyond = torch.tensor(-2.0 * stages**2 - 1e-3, dtype=F64)
    assert amplification(fs.SKROCK(stages), beyond, 0 * beyond) > 1


def test_exponential_and_implicit_euler_are_stable_in_mean_square_in_steps_of_any_length():
    for p in -torch.logspace(-3, 6, 200, dtype=F64):
        for solver in (fs.ExponentialEuler(float(p)), fs.ImplicitEuler(event_dims=0)):
            assert amplification(solver, p[None], (-2 * p).sqrt()[None]) < 1


def test_euler_is_not():
    assert amplification(fs.EulerMaruyama(), torch.tensor(-1.0, dtype=F64), torch.tensor(1.2, dtype=F64)) > 1


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("linear", [MATRIX, MATRIX.tolist(), MATRIX.float(), [-300.0, -60.0], -90.0])
def test_exponential_euler_is_exact_for_linear_drifts_and_constants(linear, dtype):
    """With -b in addition: y -> e^{hA} y - h phi_1(hA) b in uneven steps, h |A| up to 160."""
    A = torch.as_tensor(linear, dtype=F64)
    A = A if A.dim() == 2 else torch.diag(A.expand(2))
    y0 = torch.randn(5, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    b, flow = torch.tensor([1.0, -2.0], dtype=F64), torch.linalg.matrix_exp(0.7 * A)
    expected = y0 @ flow.mT - torch.linalg.solve(A, (flow - torch.eye(2, dtype=F64)) @ b)
    ode = fs.ODE(lambda t, y: y @ A.mT.to(dtype) - b.to(dtype))
    y = fs.solve(ode, fs.ExponentialEuler(linear), y0.to(dtype), [0.0, 0.1, 0.15, 0.7]).y
    tol = 1e-10 if dtype == F64 else 1e-4
    torch.testing.assert_close(y.double(), expected, rtol=tol, atol=tol)


def test_exponential_euler_has_the_stated_stationary_variance():
    k, h = 500.0, 0.1
    sde = fs.SDE(lambda t, y: -k * y, lambda t, y: torch.ones_like(y), "additive")
    y = fs.solve(sde, fs.ExponentialEuler(-k), torch.zeros(20000, 1, dtype=F64), torch.arange(4) * h, seed=0).y
    z = torch.tensor(k * h, dtype=F64)
    assert abs(y.var() * 2 * k / (torch.tanh(z / 2) / (z / 2)) - 1) < 5 * (2 / 20000) ** 0.5


def test_exponential_euler_computes_once_per_step_size(monkeypatch):
    from fewstep.sde import exponential_euler

    made, phi1 = [], exponential_euler.phi1
    monkeypatch.setattr(exponential_euler, "phi1", lambda z: made.append(z) or phi1(z))
    solver = fs.ExponentialEuler(MATRIX)
    for grid in (torch.linspace(0, 1, 31, dtype=F64), torch.linspace(1, 2, 31, dtype=F64), [0.0, 1 / 30, 0.1]):
        fs.solve(fs.ODE(linear), solver, torch.ones(3, 2, dtype=F64), grid)
    assert len(made) == 2
    fs.solve(fs.ODE(linear), solver, torch.ones(3, 2, dtype=F64), torch.linspace(0, 1, 1001))
    assert len(made) < 20  # differences of float32 times are of a few lengths


def test_exponential_euler_under_transforms_and_checkpoints():
    """phi_1 is made outside of vmap and grad, and is the same for a later solve."""
    sde, solver, grid = fs.SDE(linear, small, "additive"), fs.ExponentialEuler(MATRIX), torch.linspace(0, 1, 9)
    y0 = torch.linspace(-1, 1, 6, dtype=F64).reshape(3, 2)
    end = lambda y: fs.solve(sde, solver, y, grid).y  # noqa: E731
    with torch.inference_mode():
        end(y0)
    grads = [torch.func.grad(lambda y: end(y).square().sum())(y0)]
    for gradient in ("direct", "checkpoint"):
        y = y0.clone().requires_grad_()
        fs.solve(sde, solver, y, grid, gradient=gradient).y.square().sum().backward()
        grads.append(y.grad)
    for other in grads[1:]:
        torch.testing.assert_close(other, grads[0])
    torch.testing.assert_close(torch.func.vmap(end)(y0[None]), end(y0)[None])


def test_truncated_euler_keeps_superlinear_noise_bounded_where_others_run_away():
    """dy = (y - 6 y^3) dt + 2 y^2 dW, with moments up to p < 4, from a start in its bulk and from far away."""
    sde = fs.SDE(lambda t, y: y - 6 * y**3, lambda t, y: 2 * y**2)
    grid = torch.linspace(0, 10, 101, dtype=F64)
    for start in (0.5, 40.0):
        y0 = torch.full((2000, 1), start, dtype=F64)
        y = fs.solve(sde, fs.TruncatedEuler(radius=1.5), y0, grid, seed=0).y
        assert y.square().mean().sqrt() < 2
        with pytest.raises(fs.NonFiniteError, match=r"TruncatedEuler\(\) bounds"):
            fs.solve(sde, fs.EulerMaruyama(), 100 * y0, grid, seed=0)
    with pytest.raises(fs.NonFiniteError):
        fs.solve(sde, fs.TamedEuler(), 100 * y0, grid, seed=0)


def test_the_stages_that_a_message_names_are_enough():
    sde, y0 = fs.SDE(linear, small, "additive"), torch.full((3, 2), 30.0, dtype=F64)
    with pytest.raises(fs.NonFiniteError, match=r"without Jacobians, SKROCK\(5\)") as caught:
        fs.solve(sde, fs.EulerMaruyama(), y0, torch.linspace(0, 40, 301))
    assert "SKROCK" in str(caught.value)
    assert fs.solve(sde, fs.SKROCK(5), y0, torch.linspace(0, 40, 301)).y.abs().max() < 2


WRONG = [
    (lambda: fs.SKROCK(0), "stages"), (lambda: fs.SKROCK(2.5), "stages"), (lambda: fs.TruncatedEuler(0), "radius"),
    (lambda: fs.TruncatedEuler(growth=-1), "growth"), (lambda: fs.ExponentialEuler("a"), "linear"),
    (lambda: fs.ExponentialEuler(torch.ones(2, 3)), "linear"),
    (lambda: fs.ExponentialEuler([float("nan")]), "linear"),
    (lambda: fs.ExponentialEuler(torch.ones(2, requires_grad=True)), "linear"),
    (lambda: fs.solve(fs.ODE(linear), fs.ExponentialEuler([1.0] * 3), torch.ones(4, 2).double(), [0, 1]), "linear"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "argument"), WRONG)
def test_invalid_options_of_explicit_solvers_are_refused(call, argument):
    with pytest.raises(fs.InputError, match=argument):
        call()


@pytest.mark.parametrize(("noise", "order"), [("diagonal", 0.5), ("additive", 1.0)])
def test_exponential_euler_of_a_matrix_has_the_orders_of_its_card(noise, order):
    """The slope of E|difference| between 16, 32, 64 and 128 steps with A = [[-3, 1], [0.5, -2]], within 0.15."""
    A, g = torch.tensor([[-3.0, 1.0], [0.5, -2.0]], dtype=F64), {"diagonal": lambda y: 0.9 + 0.5 * torch.cos(2 * y)}
    sde = fs.SDE(lambda t, y: y @ A.mT + torch.sin(2 * y + t), lambda t, y: g.get(noise, torch.ones_like)(y), noise)
    path, y0 = fs.BrownianPath((2000, 2), seed=0, dtype=F64), torch.full((2000, 2), 0.4, dtype=F64)
    steps = (16, 32, 64, 128)
    ends = [fs.solve(sde, fs.ExponentialEuler(A), y0, torch.linspace(0, 1, n + 1), path=path).y for n in steps]
    gaps = [(a - b).abs().mean() for a, b in zip(ends[:-1], ends[1:])]
    assert abs(torch.log2(gaps[0] / gaps[2]) / 2 - order) < 0.15


def test_exponential_euler_of_a_matrix_compiles_to_its_eager_numbers():
    sde, solver, grid = fs.SDE(linear, small, "additive"), fs.ExponentialEuler(MATRIX), torch.linspace(0, 1, 12)
    y0 = torch.ones(3, 2, dtype=F64)
    torch._dynamo.reset()
    program = torch.compile(lambda y: fs.solve(sde, solver, y, grid).y, fullgraph=True, backend="eager")
    torch.testing.assert_close(program(y0), fs.solve(sde, solver, y0, grid).y)
    lengths = [fs.Increment(h, torch.zeros(3, 2, dtype=F64)) for h in (0.5, torch.tensor(0.5, dtype=F64))]
    number, tensor = (solver.step(sde, *torch.tensor([0.0, 0.5], dtype=F64), y0, i, None).y for i in lengths)
    torch.testing.assert_close(number, tensor)
