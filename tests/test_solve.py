"""`solve`: what it rejects before the first step, what it returns, and problems without noise."""

import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

import fewstep as fs
from fewstep.testing import cases, own_path

GBM = fs.SDE(lambda t, y: 0.05 * y, lambda t, y: 0.2 * y)
ADDITIVE = fs.SDE(lambda t, y: -y, lambda t, y: torch.ones_like(y), noise_type="additive")
Y0, GRID = torch.ones(8, 3), torch.linspace(0, 1, 9)


def path(levy="W", shape=(8, 3), t1=1.0, **kw):
    return fs.BrownianPath(shape=shape, t0=0.0, t1=t1, seed=0, levy=levy, **kw)


class Undeclared(fs.EulerMaruyama):
    card = fs.Card(summary="x", reference="x", levy="W", sde_types=("ito",), strong_order={"diagonal": 0.5})


def general(t, y):
    return y.unsqueeze(-1).expand(*y.shape, 2)


# case: (changed arguments, parts of the error message)
BAD = {
    "one-point grid": (dict(grid=torch.zeros(1)), ["grid", "at least two"]),
    "falling grid": (dict(grid=GRID.flip(0)), ["grid", "decreasing", "reverse time", "ODE"]),
    "repeated time": (dict(grid=torch.tensor([0.0, 0.5, 0.5, 1.0])), ["grid", "0.5, 0.5"]),
    "nan in grid": (dict(grid=torch.tensor([0.0, float("nan")])), ["grid", "finite"]),
    "words for grid": (dict(grid=["a"]), ["grid", "tensor of numbers"]),
    "integer y0": (dict(y0=torch.ones(8, 3, dtype=torch.int64)), ["y0", "int64", "floating-point"]),
    "0-d y0": (dict(y0=torch.tensor(1.0)), ["y0", "shape ()", "(*batch, *event)"]),
    "nan in y0": (dict(y0=torch.full((8, 3), float("nan"))), ["y0", "24 values"]),
    "drift shape": (dict(sde=fs.SDE(lambda t, y: y.sum(-1), GBM.diffusion)), ["drift", "(8,)", "(8, 3)"]),
    "drift dtype": (
        dict(sde=fs.SDE(lambda t, y: y.double(), GBM.diffusion)), ["drift", "float64", "float32"],
    ),
    "diffusion shape": (
        dict(sde=fs.SDE(GBM.drift, lambda t, y: y[..., :2])), ["diffusion", "(8, 2)", "(8, 3)"],
    ),
    "matrix for diagonal": (dict(sde=fs.SDE(GBM.drift, general)), ["diffusion", "'diagonal'", "'general'"]),
    "vector for general": (
        dict(sde=fs.SDE(GBM.drift, GBM.diffusion, "general"), solver=fs.EulerMaruyama()),
        ["diffusion", "'general'", "'diagonal'"],
    ),
    "two channels for scalar": (
        dict(sde=fs.SDE(GBM.drift, general, "scalar")), ["diffusion", "'scalar'", "(8, 3, 1)"],
    ),
    "path shape": (dict(path=path(shape=(8, 2))), ["path", "(8, 2)", "(8, 3)"]),
    "path too short": (dict(path=path(t1=0.5)), ["path", "[0, 0.5]", "[0, 1]"]),
    "path dtype": (dict(path=path(dtype=torch.float64)), ["path", "float64", "float32"]),
    "path without H": (dict(sde=ADDITIVE, solver=fs.ShARK(), path=path("W")), ["path", "'W'", "'H'"]),
    "path without area": (
        dict(sde=fs.SDE(GBM.drift, general, "general"), solver=fs.LogODE(), path=path("H", (8, 2))),
        ["path", "area", "AreaPath"],
    ),
    "solver cannot": (dict(solver=fs.ShARK()), ["ShARK", "'diagonal'", "additive"]),
    "calculus": (
        dict(sde=fs.SDE(GBM.drift, GBM.diffusion, sde_type="stratonovich"), solver=fs.EulerMaruyama()),
        ["EulerMaruyama", "'stratonovich'", "ito"],
    ),
    "class for object": (dict(solver=fs.Milstein), ["solver", "Milstein", "Call a class first"]),
    "diffusion solver": (dict(solver=fs.DDIM()), ["solver", "DDIM", "fewstep.sample"]),
    "no SDE": (dict(sde="gbm"), ["sde", "gbm"]),
    "save": (dict(save="some"), ["save", "'some'"]),
    "save, index": (dict(save=[0, 99]), ["save", "99", "indices"]),
    "solver without an order for ODEs": (
        dict(sde=fs.ODE(GBM.drift), solver=Undeclared()), ["Undeclared", "'none'"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_rejected_before_the_first_step(case):
    changes, words = BAD[case]
    steps = []

    class Spy(fs.Milstein):
        def step(self, *args):
            steps.append(args)
            return super().step(*args)

    call = dict(sde=GBM, solver=Spy(), y0=Y0, grid=GRID) | changes
    with pytest.raises(fs.InputError) as error:
        fs.solve(**call)
    assert not steps
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(("argument", "got"), [("noise_type", "diagonl"), ("sde_type", "itoo")])
def test_unknown_choice_suggests_the_closest(argument, got):
    with pytest.raises(fs.InputError, match=f"{argument}: got '{got}'.*Did you mean"):
        fs.SDE(GBM.drift, GBM.diffusion, **{argument: got})


def test_grid_may_be_a_list_an_array_or_a_tensor():
    grids = [0, 0.25, 1], np.array([0, 0.25, 1]), torch.tensor([0, 0.25, 1])
    a, b, c = (fs.solve(GBM, fs.Milstein(), Y0, grid).y for grid in grids)
    assert torch.equal(a, b)
    assert torch.equal(a, c)


def test_non_finite_error_names_the_step_and_counts_the_paths():
    cubic = fs.SDE(lambda t, y: y**3, lambda t, y: torch.zeros_like(y))
    y0 = torch.cat([torch.full((3, 2), 50.0), torch.zeros(5, 2)])
    with pytest.raises(fs.NonFiniteError, match=r"non-finite values at step \d+ .* for 3 of 8 paths") as error:
        fs.solve(cubic, fs.EulerMaruyama(), y0, torch.linspace(0, 10, 21))
    # the exact step: all values are finite before it
    short = torch.linspace(0, 10, 21)[: error.value.step + 1]
    with pytest.warns(UserWarning, match="grew"):
        assert fs.solve(cubic, fs.EulerMaruyama(), y0, short).y.isfinite().all()
    assert error.value.paths == 3


EVERY = {n: s for n, s in fs.solvers().items() if isinstance(s, fs.StochasticSolver)}


@pytest.mark.parametrize("name", EVERY)
def test_solve_in_two_parts_equals_one_solve(name):
    """The second part starts from the state and the carry of the first one."""
    solver = EVERY[name]
    for sde, _ in cases(solver):
        y0 = torch.linspace(0.1, 1, 12, dtype=torch.float64).reshape(3, 4)
        noise = own_path(solver, y0, sde)
        full = fs.solve(sde, solver, y0, GRID, path=noise).y
        half = fs.solve(sde, solver, y0, GRID[:5], path=noise)
        rest = fs.solve(sde, solver, half.y, GRID[4:], path=noise, carry=half.carry).y
        torch.testing.assert_close(rest, full)


DIFFERENTIABLE = [fs.EulerMaruyama, fs.Milstein, fs.DerivativeFreeMilstein, fs.SRID2, fs.Taylor15]


@pytest.mark.parametrize("solver", [c() for c in DIFFERENTIABLE])
def test_gradients_flow_to_parameters_and_state(solver):
    sigma = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    y0 = torch.ones(2, 1, dtype=torch.float64, requires_grad=True)

    def end(sigma, y0):
        sde = fs.SDE(lambda t, y: 0.1 * y, lambda t, y: sigma * torch.sin(y))
        return fs.solve(sde, solver, y0, torch.linspace(0, 1, 3), seed=3).y

    assert torch.autograd.gradcheck(end, (sigma, y0))
    with torch.no_grad():
        assert not end(sigma, y0).requires_grad
    assert not end(sigma.detach(), y0.detach()).requires_grad


@pytest.mark.parametrize("name", [n for n, s in EVERY.items() if s.card.deterministic_order])
@pytest.mark.parametrize("shape", [(2,), (2, 3), (2, 1, 2)])
def test_every_solver_with_a_deterministic_order_solves_odes(name, shape):
    """y' = -y to y(1) = y0/e; the bound is ten times the error constant of each order. No noise is drawn."""
    y0 = torch.linspace(0.5, 1, 2, dtype=torch.float64).reshape(2, *[1] * (len(shape) - 1)).expand(shape)
    state = torch.random.get_rng_state()
    sol = fs.solve(fs.ODE(lambda t, y: -y), EVERY[name], y0, torch.linspace(0, 1, 33))
    assert torch.equal(state, torch.random.get_rng_state())
    assert (sol.y - y0 / math.e).abs().max() < 2 * 32.0 ** -EVERY[name].card.deterministic_order
    assert not fs.ODE(lambda t, y: -y).diffusion(None, y0).any()


@pytest.mark.parametrize("name", [n for n, s in EVERY.items() if s.card.deterministic_order])
def test_odes_run_backward_and_have_derivatives_with_respect_to_times(name):
    """y' = -t y to y(s) = exp(-s^2/2), forward from 0 to 1 and backward; in reverse and in forward mode."""
    sde, y0 = fs.ODE(lambda t, y: -t * y), torch.ones(2, 1, dtype=torch.float64)
    order = EVERY[name].card.deterministic_order

    def end(s):
        return fs.solve(sde, EVERY[name], y0, torch.linspace(0, 1, 33, dtype=torch.float64) * s).y[0, 0]

    s = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(end(s), s)
    assert abs(slope + math.exp(-0.5)) < 2 * 32.0**-order
    assert torch.func.jvp(end, (s.detach(),), (torch.ones_like(s),))[1] == pytest.approx(float(slope), rel=1e-12)
    back = fs.solve(sde, EVERY[name], y0 * math.exp(-0.5), torch.linspace(1, 0, 33)).y
    assert (back - 1).abs().max() < 4 * 32.0**-order


def test_gradients_to_times_flow_from_lists_and_are_refused_for_sdes():
    t1 = torch.tensor(1.0, requires_grad=True)
    for grid in ([0.0, 0.5, t1], torch.stack([torch.tensor(0.0), t1])):
        (slope,) = torch.autograd.grad(fs.solve(fs.ODE(lambda t, y: -y), fs.RK4(), Y0[:1, :1], grid).y.sum(), t1)
        assert float(slope) == pytest.approx(-math.exp(-1), abs=0.04)
        with pytest.raises(fs.InputError, match=r"grid: .* requires grad.*tensor\.detach"):
            fs.solve(GBM, fs.Milstein(), Y0, grid)
        with torch.no_grad():
            fs.solve(GBM, fs.Milstein(), Y0, grid)


@pytest.mark.parametrize("solver", [fs.Heun(), fs.SlowRK(), fs.SRA1(), fs.Taylor15()])
@pytest.mark.parametrize("y_dtype", [torch.float32, torch.float64])
def test_times_reach_drift_and_diffusion_in_the_more_precise_dtype(solver, y_dtype):
    """At 1.7e9, where float32 has a resolution of 128 seconds; inner stages are the exact ones, rounded once."""
    exact = [1.7e9 + 128 * k for k in range(3)]
    for grid in (exact, torch.tensor(exact), torch.tensor(exact, dtype=torch.float64)):
        seen = []

        def see(t, y, seen=seen):
            seen.append(torch.as_tensor(t).clone())
            return torch.ones_like(y)

        sde = fs.SDE(see, see, "additive", "ito" if isinstance(solver, fs.Taylor15) else "stratonovich")
        fs.solve(sde, solver, Y0.to(y_dtype), grid)
        precise = y_dtype == torch.float64 or (torch.is_tensor(grid) and grid.dtype == torch.float64)
        dtype = torch.float64 if precise else torch.float32
        assert {t.dtype for t in seen} == {dtype}
        shares = {0, 1 / 2, 3 / 4, 1}
        allowed = {float(torch.tensor(1.7e9 + 128 * (k + c), dtype=dtype)) for k in range(2) for c in shares}
        assert {float(t) for t in seen if t.dim() == 0} <= allowed


def test_none_is_the_noise_type_of_odes_alone():
    assert fs.ODE(GBM.drift).noise_type == "none"
    with pytest.raises(fs.InputError, match=r"fewstep\.ODE"):
        fs.SDE(GBM.drift, GBM.diffusion, noise_type="none")


def test_seed_fixes_the_noise_without_a_path():
    a, b, c = (fs.solve(GBM, fs.Milstein(), Y0, GRID, seed=s).y for s in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_milstein_with_and_without_derivative_agree_for_linear_diffusion():
    sde = fs.SDE(lambda t, y: 0 * y, lambda t, y: 0.4 * y, sde_type="ito")
    grid, p = torch.linspace(0, 1, 17), path(dtype=torch.float64)
    y0 = Y0.double()
    a = fs.solve(sde, fs.Milstein(), y0, grid, path=p).y
    b = fs.solve(sde, fs.DerivativeFreeMilstein(), y0, grid, path=p).y
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_ito_and_stratonovich_milstein_agree_on_the_same_equation():
    """dy = g o dW is dy = g'g/2 dt + g dW; both measured against the exact exp(sigma W)."""
    s, y0, grid = 0.5, torch.ones(2000, 1, dtype=torch.float64), torch.linspace(0, 1, 129)
    p = path(shape=(2000, 1), dtype=torch.float64)
    exact = torch.exp(s * p.increment(0.0, 1.0).W)
    strat = fs.SDE(lambda t, y: 0 * y, lambda t, y: s * y, sde_type="stratonovich")
    ito = fs.SDE(lambda t, y: s * s / 2 * y, lambda t, y: s * y, sde_type="ito")
    for sde in (strat, ito):
        error = (fs.solve(sde, fs.Milstein(), y0, grid, path=p).y - exact).square().mean().sqrt()
        assert error < 4e-3


def test_torchsde_objects_are_accepted():
    class Theirs(torch.nn.Module):
        noise_type, sde_type = "diagonal", "ito"

        def f(self, t, y):
            return 0.05 * y

        def g(self, t, y):
            return 0.2 * y

    a = fs.solve(fs.SDE.from_torchsde(Theirs()), fs.Milstein(), Y0, GRID).y
    assert torch.equal(a, fs.solve(GBM, fs.Milstein(), Y0, GRID).y)
    with pytest.raises(fs.InputError, match="without f, g"):
        fs.SDE.from_torchsde(object())


def test_modules_are_problems():
    """Methods drift and diffusion, or f and g; the attributes noise_type and sde_type, or the arguments."""

    class Neural(torch.nn.Module):
        def drift(self, t, y):
            return 0.05 * y

        def diffusion(self, t, y):
            return 0.2 * y

    class Theirs(Neural):
        noise_type, sde_type = "scalar", "stratonovich"
        drift = diffusion = None

        def f(self, t, y):
            return 0.05 * y

        def g(self, t, y):
            return 0.2 * y

    want = fs.solve(GBM, fs.Milstein(), Y0, GRID).y
    assert torch.equal(fs.solve(fs.SDE.from_module(Neural()), fs.Milstein(), Y0, GRID).y, want)
    theirs = fs.SDE.from_module(Theirs())
    assert (theirs.noise_type, theirs.sde_type) == ("scalar", "stratonovich")
    theirs = fs.SDE.from_module(Theirs(), noise_type="diagonal", sde_type="ito")
    assert torch.equal(fs.solve(theirs, fs.Milstein(), Y0, GRID).y, want)
    with pytest.raises(fs.InputError, match=r"diffusion: got None.*SDE.from_module\(module\)"):
        fs.SDE(Neural())
    with pytest.raises(fs.InputError, match=r"diffusion: got None.*fewstep.ODE\(drift\)"):
        fs.SDE(GBM.drift)
    for bad in (torch.nn.Linear(1, 1), Neural, None):
        with pytest.raises(fs.InputError, match="module: got .* drift and diffusion, or f and g"):
            fs.SDE.from_module(bad)


@pytest.mark.parametrize("indices", [[0], [0, 3, 8], [8], list(range(9))])
def test_states_at_indices_are_those_of_all(indices):
    grid = torch.linspace(0, 1, 9)
    every = fs.solve(GBM, fs.Milstein(), Y0, grid, save="all").ys
    some = fs.solve(GBM, fs.Milstein(), Y0, grid, save=indices).ys
    assert torch.equal(some, every[indices])


def test_fresh_areas_are_independent_of_a_start_drawn_from_the_same_seed():
    """Correlation of Foster's residual with the normals of `manual_seed(seed)`: 5 standard errors, 6e-7."""
    n, drawn = 20000, []

    class Spy(fs.LogODE):
        def step(self, sde, t0, t1, y, increment, carry):
            drawn.append(increment)
            return super().step(sde, t0, t1, y, increment, carry)

    g = torch.eye(2, dtype=torch.float64).expand(n, 2, 2)
    sde = fs.SDE(lambda t, y: -y, lambda t, y: g + 0 * y[..., None], "general", "stratonovich")
    y0 = torch.randn(n, 2, generator=torch.Generator().manual_seed(0)).double()  # areas draw in float32
    fs.solve(sde, Spy(), y0, torch.linspace(0, 1, 2), seed=0)
    inc = drawn[0]
    known = inc.H[:, 0] * inc.W[:, 1] - inc.W[:, 0] * inc.H[:, 1]
    rest = inc.A[:, 0, 1] - known
    wedge = [inc.H[:, 0] * y0[:, 1] - inc.H[:, 1] * y0[:, 0], y0[:, 0], y0[:, 1]]
    for other in wedge:
        assert abs(torch.corrcoef(torch.stack([rest, other]))[0, 1]) < 5 / n**0.5


LATER = {
    "None": lambda v: None, "tuple": lambda v: (v,), "float64": lambda v: v.double(), "shape": lambda v: v[..., :1],
    "sparse": lambda v: v.to_sparse(), "float8": lambda v: v.to(torch.float8_e5m2),
}  # fmt: skip


@pytest.mark.parametrize("part", ["drift", "diffusion"])
@pytest.mark.parametrize("wrong", LATER)
def test_each_value_of_drift_and_diffusion_is_checked(part, wrong):
    field = getattr(GBM, part)
    sde = replace(GBM, **{part: lambda t, y: field(t, y) if t < 0.4 else LATER[wrong](field(t, y))})
    with pytest.raises(fs.InputError, match=rf"{part}: got .* at t = 0.5, expected"):
        fs.solve(sde, fs.EulerMaruyama(), Y0, GRID)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_values_and_states_are_kept_in_float32(dtype):
    want = fs.solve(GBM, fs.Milstein(), Y0, GRID, path=path()).y
    half = fs.SDE(lambda t, y: (0.05 * y).to(dtype), lambda t, y: (0.2 * y).to(dtype))
    got = fs.solve(half, fs.Milstein(), Y0, GRID, path=path()).y
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=0.02, atol=0)
    sol = fs.solve(GBM, fs.Milstein(), Y0.to(dtype), GRID, path=path(), save="all")
    assert sol.y.dtype == sol.ys.dtype == dtype
    torch.testing.assert_close(sol.y.float(), want, rtol=0.02, atol=0)


ROOT = lambda t, y: y.clamp(min=0).sqrt()  # noqa: E731
PARTS = {
    "drift": (fs.SDE(lambda t, y: y / (y - y), GBM.diffusion), fs.EulerMaruyama(), "The drift is not finite"),
    "diffusion": (fs.SDE(GBM.drift, lambda t, y: y / (y - y)), fs.EulerMaruyama(), "The diffusion is not finite"),
    "differentiated": (fs.SDE(GBM.drift, lambda t, y: y / (y - y)), fs.Milstein(), "The diffusion is not finite"),
    "derivative": (fs.SDE(lambda t, y: 0 * y, ROOT), fs.Milstein(), r"derivative of the diffusion .*DerivativeFree"),
    "columns": (
        fs.SDE(lambda t, y: 0 * y, lambda t, y: torch.diag_embed(ROOT(t, y)), "general"), fs.LogODE(),
        r"derivative of the diffusion .* EulerMaruyama\(\) needs no",
    ),
}  # fmt: skip


@pytest.mark.parametrize("part", PARTS)
def test_non_finite_results_name_the_part(part):
    sde, solver, words = PARTS[part]
    with pytest.raises(fs.NonFiniteError, match=words):
        fs.solve(sde, solver, torch.zeros(4, 3), GRID)


@pytest.mark.parametrize(
    ("noise", "calculus", "first"),
    [("diagonal", "ito", fs.EulerMaruyama()), ("additive", "ito", fs.EulerMaruyama()), ("none", "ito", fs.RK4()),
     ("diagonal", "stratonovich", fs.Heun()), ("general", "ito", fs.EulerMaruyama())],
)  # fmt: skip
def test_growth_is_reported_with_a_solver_and_a_step_that_are_stable(noise, calculus, first):
    """As a warning, and in more steps, when values overflow, in the error. The advice is followed."""
    shape = {"diagonal": lambda y: 0.1 * y, "additive": lambda y: 0.1 + 0 * y,
             "general": lambda y: torch.diag_embed(0.1 * y)}  # fmt: skip
    drift = lambda t, y: -1000 * y  # noqa: E731
    stiff = fs.ODE(drift) if noise == "none" else fs.SDE(drift, lambda t, y: shape[noise](y), noise, calculus)
    words = r"slope is -1e.03, and a step is (0.1|0.01) long. (\w+)\(\) is stable in steps of up to ([\d.e-]+)\."
    with pytest.warns(UserWarning, match="grew by more than 1e.10.*" + words):
        fs.solve(stiff, first, Y0.double(), torch.linspace(0, 0.7, 8))
    with pytest.raises(fs.NonFiniteError, match=words) as error:
        fs.solve(stiff, first, Y0, torch.linspace(0, 1, 101))
    _, name, longest = re.search(words, str(error.value)).groups()
    steps = math.ceil(1 / float(longest))
    assert steps < 600
    assert fs.solve(stiff, EVERY[name], Y0, torch.linspace(0, 1, steps + 1)).y.abs().max() < 1


def test_growth_of_a_solution_is_not_called_stiffness():
    with pytest.warns(UserWarning, match=r"grew by more than 1e\+10. If the solution does not grow like this"):
        fs.solve(fs.ODE(lambda t, y: 30 * y), fs.RK4(), Y0, torch.linspace(0, 1, 65))


def test_times_of_a_list_that_are_equal_in_the_states_dtype_are_warned_of():
    """At unix seconds float32 has steps of 128 s; drift and diffusion receive a list's times in y0's dtype."""
    problem, times = fs.ODE(lambda t, y: torch.cos(t).expand_as(y).to(y.dtype)), [1.7e9 + k for k in range(4)]
    with pytest.warns(UserWarning, match="torch.float64"):
        fs.solve(problem, fs.RK4(), torch.zeros(1), times)
    fs.solve(problem, fs.RK4(), torch.zeros(1), torch.tensor(times, dtype=torch.float64))  # a warning is an error here
    fs.solve(problem, fs.RK4(), torch.zeros(1, dtype=torch.float64), times)
