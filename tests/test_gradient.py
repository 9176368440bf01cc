"""Gradients of a solve in less memory: the same solution, the same gradients, clear refusals."""

import pytest
import torch
from torch import nn

import fewstep as fs

F64 = torch.float64
SHAPES = {"diagonal": (3,), "additive": (3, 2), "scalar": (3, 1), "general": (3, 2), "none": ()}


class Fields(nn.Module):
    """A drift and a diffusion with parameters, of any noise type, that depend on time."""

    def __init__(self, noise_type, sde_type="stratonovich"):
        super().__init__()
        self.noise_type, self.sde_type, self.shape = noise_type, sde_type, SHAPES[noise_type]
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3))
        self.size = nn.Parameter(0.3 * torch.rand(self.shape))
        self.double()

    def drift(self, t, y):
        return self.net(y) - y * t

    def diffusion(self, t, y):
        if self.noise_type == "additive":
            return self.size * torch.cos(t) + torch.zeros_like(y).unsqueeze(-1)
        y = y if self.noise_type == "diagonal" else y.unsqueeze(-1)
        return self.size * torch.cos(y + t)


def problem(noise_type, sde_type="stratonovich"):
    fields = Fields(noise_type, sde_type)
    return fields, fs.ODE(fields.drift) if noise_type == "none" else fs.SDE.from_module(fields)


def gradients(sde, solver, parameters, gradient, path=None, grid=None, dtype=F64, **options):
    y0 = torch.linspace(-1, 1, 15, dtype=dtype).reshape(5, 3).requires_grad_()
    grid = torch.linspace(0, 1, 38, dtype=F64) if grid is None else grid
    options = {"save": [0, 7, 37], "seed": 3} | options
    sol = fs.solve(sde, solver, y0, grid, path=path, gradient=gradient, **options)
    weights = torch.arange(1.0, len(sol.ys) + 1, dtype=dtype).reshape(-1, 1, 1)
    loss = (weights * sol.ys).sin().sum() + sol.y.square().sum()
    return sol, torch.autograd.grad(loss, [y0, *parameters], allow_unused=True)


def close(got, expected, tolerance=1e-6):
    for a, b in zip(got, expected, strict=True):
        assert (a is None) == (b is None)
        assert a is None or (a - b).abs().max() <= tolerance * b.abs().max()


H, A = "H", "A"
CASES = [
    (fs.ReversibleHeun(), "diagonal", None), (fs.ReversibleHeun(), "additive", None),
    (fs.ReversibleHeun(), "scalar", H), (fs.ReversibleHeun(), "general", None), (fs.ReversibleHeun(), "general", H),
    (fs.ReversibleHeun(), "none", None),
    (fs.Reversible(), "general", H), (fs.Reversible(fs.SPaRK()), "diagonal", None),
    (fs.Reversible(fs.ShARK(), 0.99), "additive", H), (fs.Reversible(fs.RK4()), "none", None),
    (fs.Reversible(fs.LogODE()), "general", None), (fs.Reversible(fs.LogODE()), "general", A),
    (fs.Milstein(), "diagonal", None), (fs.SRID2(), "diagonal", H), (fs.LogODE(), "general", None),
    (fs.LogODE(), "general", A), (fs.ShiftedODE(), "additive", None), (fs.RK4(), "none", None),
]  # fmt: skip


@pytest.mark.parametrize(("solver", "noise", "path"), CASES, ids=lambda x: f"{x}")
def test_each_gradient_is_that_of_the_graph_and_changes_no_number(solver, noise, path):
    calculus = "ito" if isinstance(solver, fs.SRID2) else "stratonovich"
    fields, sde = problem(noise, calculus)
    if path is not None:
        shape = (5, {"scalar": 1, "diagonal": 3}.get(noise, 2))
        path = fs.BrownianPath(shape, levy=H, seed=4, dtype=F64)
        path = fs.AreaPath(path, 64) if solver.card.levy == "A" else path
    reference, expected = gradients(sde, solver, list(fields.parameters()), "direct", path)
    modes = ["checkpoint", "reversible"] if hasattr(solver, "undo") else ["checkpoint"]
    for gradient in modes:
        sol, found = gradients(sde, solver, list(fields.parameters()), gradient, path)
        assert torch.equal(sol.ys, reference.ys)
        assert torch.equal(sol.y, reference.y)
        assert sol.nfe == reference.nfe
        close(found, expected)


@pytest.mark.parametrize("gradient", ["checkpoint", "reversible"])
def test_times_of_an_ode_get_gradients(gradient):
    rate = torch.tensor(0.4, dtype=F64, requires_grad=True)
    times = torch.linspace(0, 1, 38, dtype=F64, requires_grad=True)
    ode = fs.ODE(lambda t, y: rate * y * torch.sin(3 * t))
    for solver in (fs.ReversibleHeun(), fs.Reversible(fs.RK4())):
        for grid in (times, -times):
            found = [gradients(ode, solver, [rate, times], g, grid=grid, save="all")[1] for g in (gradient, "direct")]
            close(*found)


@pytest.mark.parametrize("gradient", ["checkpoint", "reversible"])
def test_tensors_computed_before_the_solve_get_gradients(gradient):
    """They need not be leaves, and may be used elsewhere too."""
    log = torch.tensor([0.1, -0.4, 0.3], dtype=F64, requires_grad=True)

    def loss(gradient):
        rate, size = log.exp(), torch.stack([log.sin(), log.cos()], -1)  # not leaves
        sde = fs.SDE(lambda t, y: -rate * y, lambda t, y: size * torch.cos(y).unsqueeze(-1), "general", "stratonovich")
        sol = fs.solve(sde, fs.ReversibleHeun(), log.expand(5, 3), torch.linspace(0, 1, 38), gradient=gradient)
        return (sol.y.square() * rate).sum()

    close(torch.autograd.grad(loss(gradient), log), torch.autograd.grad(loss("direct"), log))


@pytest.mark.parametrize("gradient", ["checkpoint", "reversible"])
def test_drifts_that_differentiate_get_gradients(gradient):
    """As the gradient of an energy does, with respect to a leaf of its own."""
    width = torch.tensor(0.7, dtype=F64, requires_grad=True)

    def drift(t, y):
        with torch.enable_grad():
            x = y if y.requires_grad else y.detach().requires_grad_()
            inner = torch.zeros_like(y).requires_grad_()
            energy = torch.cos(width * (x + inner)).sum()
        return torch.autograd.grad(energy, inner, create_graph=torch.is_grad_enabled() and y.requires_grad)[0]

    found = [gradients(fs.ODE(drift), fs.ReversibleHeun(), [width], g)[1] for g in (gradient, "direct")]
    close(*found)


def test_modules_whose_parameters_come_into_use_later_get_gradients():
    class Later(nn.Module):
        def __init__(self):
            super().__init__()
            self.rates = nn.ParameterList(torch.tensor(v, dtype=F64) for v in (0.3, 0.7, 1.1))

        def drift(self, t, y):
            return -self.rates[int(3 * t) % 3] * y

    later = Later()
    found = [
        gradients(fs.ODE(f), fs.ReversibleHeun(), list(later.parameters()), gradient)[1]
        for f, gradient in ((later.drift, "reversible"), (later.drift, "direct"))
    ]
    close(*found)
    with pytest.raises(fs.InputError, match="at later times"):  # a function hides its module
        gradients(fs.ODE(lambda t, y: later.drift(t, y)), fs.ReversibleHeun(), later.parameters(), "reversible")


@pytest.mark.parametrize("solver", [fs.ReversibleHeun(), fs.Reversible()], ids=repr)
def test_a_solve_goes_on_from_its_carry(solver):
    fields, sde = problem("diagonal")
    path = fs.BrownianPath((5, 3), seed=1, dtype=F64)
    grid, y0 = torch.linspace(0, 1, 33, dtype=F64), torch.linspace(-1, 1, 15, dtype=F64).reshape(5, 3)
    once = fs.solve(sde, solver, y0, grid, path=path)

    def parts(gradient):
        first = fs.solve(sde, solver, y0, grid[:17], path=path, gradient=gradient)
        return fs.solve(sde, solver, first.y, grid[16:], path=path, gradient=gradient, carry=first.carry).y

    found = []
    for gradient in ("direct", "checkpoint", "reversible"):
        y = parts(gradient)
        assert torch.equal(y, once.y)
        found.append(torch.autograd.grad(y.sin().sum(), list(fields.parameters())))
    close(found[1], found[0])
    close(found[2], found[0])


def test_half_precision_and_autocast_recompute_in_the_same_precision():
    fields, sde = problem("diagonal")
    fields.float()
    with torch.autocast("cpu", torch.bfloat16):
        y0 = torch.linspace(-1, 1, 15).reshape(5, 3).requires_grad_()
        run = {
            g: fs.solve(sde, fs.ReversibleHeun(), y0, [0.0, 0.1, 0.2], gradient=g).y for g in ("direct", "reversible")
        }
    assert torch.equal(run["direct"], run["reversible"])
    found = [torch.autograd.grad(run[g].sum(), list(fields.parameters())) for g in ("reversible", "direct")]
    close(*found, tolerance=1e-2)
    y0 = y0.detach().bfloat16().requires_grad_()
    fields.bfloat16()
    (slope,) = torch.autograd.grad(
        fs.solve(sde, fs.ReversibleHeun(), y0, [0.0, 0.1], gradient="reversible").y.sum(), y0
    )
    assert slope.dtype == torch.bfloat16


def test_float32_error_is_that_of_rounding():
    """The reconstruction of 500 steps costs digits: relative errors in float32, measured 2e-6 and 3e-5."""
    fields, sde = problem("diagonal")
    fields.float()
    grid = torch.linspace(0, 1, 501)
    for solver, tolerance in ((fs.ReversibleHeun(), 2e-5), (fs.Reversible(), 3e-4)):
        found = [
            gradients(sde, solver, list(fields.parameters()), g, grid=grid, dtype=torch.float32, save=[0, 250])[1]
            for g in ("reversible", "direct")
        ]
        close(*found, tolerance)


ODE = fs.ODE(lambda t, y: -y)
REFUSED = {
    "of Milstein": (fs.Milstein(), dict(gradient="reversible"), "Milstein, whose steps cannot be undone"),
    "unknown": (fs.Heun(), dict(gradient="adjoint"), "gradient: got 'adjoint'"),
    "compiled": (fs.Heun(), dict(gradient="checkpoint", compile=True), "within compile=True"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused(case):
    solver, options, message = REFUSED[case]
    with pytest.raises(fs.InputError, match=message):
        fs.solve(ODE, solver, torch.ones(2, requires_grad=True), [0.0, 1.0], **options)


def test_transforms_and_dependent_tensors_are_refused():
    run = lambda y: fs.solve(ODE, fs.ReversibleHeun(), y, [0.0, 1.0], gradient="reversible").y.sum()  # noqa: E731
    with pytest.raises(fs.InputError, match=r"within torch\.func"):
        torch.func.grad(run)(torch.ones(2))
    a = torch.ones(2, requires_grad=True)
    b = a.exp()
    both = fs.ODE(lambda t, y: a * y + b)
    with pytest.raises(fs.InputError, match="another one computed from it"):
        fs.solve(both, fs.ReversibleHeun(), torch.ones(2), [0.0, 1.0], gradient="reversible")


@pytest.mark.parametrize(("base", "coupling", "message"), [
    (fs.KloedenPlaten15(), 0.99, "Ito SDEs alone"), (fs.ReversibleHeun(), 0.99, "reversible itself"),
    (fs.DDIM(), 0.99, "base: got"), (fs.Midpoint(), 0.0, r"coupling: got 0\.0"),
])  # fmt: skip
def test_bases_that_cannot_be_reversed_are_refused(base, coupling, message):
    with pytest.raises(fs.InputError, match=message):
        fs.Reversible(base, coupling)


def test_checkpoints_have_second_derivatives():
    rate = torch.tensor(0.5, dtype=F64, requires_grad=True)
    ode = fs.ODE(lambda t, y: torch.sin(rate * y))

    def second(gradient):
        y = fs.solve(ode, fs.RK4(), torch.ones(3, dtype=F64), torch.linspace(0, 1, 10), gradient=gradient).y.sum()
        (slope,) = torch.autograd.grad(y, rate, create_graph=True)
        return torch.autograd.grad(slope, rate)

    close(second("checkpoint"), second("direct"))


def test_reversed_increments_undo_the_path():
    path = fs.BrownianPath((4, 2), levy="K", seed=2, dtype=F64)
    first, both = path.increment(0.0, 0.25), path.increment(0.0, 0.5)
    later = path.increment(0.25, 0.5)
    rest = both.join(later.reversed())
    for name in ("W", "H", "K"):
        torch.testing.assert_close(getattr(rest, name), getattr(first, name), rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_steps():
    """Peak memory beyond that of 16 steps, in processes of their own: 2,000 steps against 100."""
    from peak_memory import numbers_of

    code = """
import sys, torch, fewstep as fs
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Tanh(), torch.nn.Linear(32, 16))
sde = fs.SDE(lambda t, y: net(y), lambda t, y: 0.1 * torch.cos(y), "diagonal", "stratonovich")
def run(steps):
    y0 = torch.ones(8192, 16, requires_grad=True)
    fs.solve(sde, {solver}, y0, torch.linspace(0, 1, steps + 1), gradient={gradient!r}).y.square().sum().backward()
run(4)
start = peak()
run({steps})
print(peak(), start)
"""
    for solver, gradient, most in (
        ("fs.ReversibleHeun()", "reversible", 1.1), ("fs.Reversible()", "reversible", 1.1),
        ("fs.Heun()", "checkpoint", 20**0.5 * 1.2),
    ):  # fmt: skip
        short, long = (numbers_of(code.format(solver=solver, gradient=gradient, steps=n)) for n in (100, 2000))
        assert long[0] <= most * short[0], (solver, short, long)
