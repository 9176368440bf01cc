"""Compiled programs and transforms of torch.func equal eager ones, with noise of the same numbers."""

from dataclasses import replace

import pytest
import torch
from torch.func import grad, jacfwd, jacrev, vmap

import fewstep as fs

SOLVERS = fs.solvers()
SAMPLERS = [name for name, s in SOLVERS.items() if isinstance(s, fs.DiffusionSolver)]
METHODS = [name for name, s in SOLVERS.items() if isinstance(s, fs.StochasticSolver)]
DIFFUSIONS = {
    "diagonal": lambda t, y: 0.3 * y.sin() + 0.1 * t,
    "additive": lambda t, y: (0.3 + 0.1 * t) * torch.ones_like(y),
    "scalar": lambda t, y: 0.3 * y.sin().unsqueeze(-1),
    "general": lambda t, y: torch.stack([0.3 * y.sin(), 0.2 * y.flip(-1).cos()], -1),
}
Y0 = torch.linspace(0.5, 1.5, 6).reshape(3, 2)
X = 10 * torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
SCHEDULE = fs.VPLinear()


def denoise(x, sigma):
    return x / (1 + sigma.reshape(-1, *[1] * (x.dim() - 1)) ** 2)


MODEL = fs.DiffusionModel(denoise, SCHEDULE)
DDIM, EULER, RK4, ODE = fs.DDIM(), fs.EulerMaruyama(), fs.RK4(), fs.ODE(lambda t, y: t - y)


def problem_of(solver):
    """The problem of the first noise type on the card."""
    noise = next(n for n in (*solver.card.noise_types, "none") if n in (*DIFFUSIONS, "underdamped", "none"))
    drift = lambda t, y: t.sin() - y  # noqa: E731
    if noise == "underdamped":
        return fs.UnderdampedLangevin(drift, 2.0)
    return fs.SDE(drift, DIFFUSIONS[noise], noise, solver.card.sde_types[0]) if noise != "none" else fs.ODE(drift)


def path_of(problem, levy, **options):
    """A path over [0, 1], with areas where the solver needs them."""
    shape = problem.noise_shape(Y0, problem.diffusion(torch.tensor(0.0), Y0))
    path = fs.BrownianPath(shape, seed=2, levy={"A": "H", "": "W"}.get(levy, levy), **options)
    return fs.AreaPath(path, 8) if levy == "A" else path


def solved(name, steps):
    """A solve with fresh noise and, for an SDE, one on a path, as functions of y0."""
    solver = SOLVERS[name]
    problem, grid = problem_of(solver), torch.linspace(0, 1, steps + 1)
    runs = [lambda y: fs.solve(problem, solver, y, grid, seed=3, save="all").ys]
    if problem.noise_type != "none":
        path = path_of(problem, solver.card.levy)
        runs.append(lambda y: fs.solve(problem, solver, y, grid, path=path).y)
    return runs


def sampled(name, steps):
    """Sampling from a given state and from the normals of a seed."""
    solver, sigmas = SOLVERS[name], fs.sigma_grid(SCHEDULE, steps, "karras")
    return [
        lambda x: fs.sample(MODEL, solver, noise=x, steps=steps, seed=3),
        lambda x: fs.sample(MODEL, solver, shape=(3, 2), sigmas=sigmas, seeds=[1, 2, 3]),
    ]


def check(run, argument, backend):
    """The compiled run is one graph whose result is the eager one, to the bit."""
    torch._dynamo.reset()
    found = torch.compile(run, fullgraph=True, backend=backend)(argument)
    torch.testing.assert_close(found, run(argument), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["EulerMaruyama", "Milstein", "RK4"])
def test_compiled_solve_equals_eager(name):
    for run in solved(name, 3):
        check(run, Y0, "eager")


@pytest.mark.parametrize("name", ["ShARK", "UniPC"])
def test_compiled_sample_equals_eager(name):
    for run in sampled(name, 3):
        check(run, X, "eager")


def with_backends(names, few):
    """All names with "eager", and a few with "aot_eager", which takes several times as long to compile."""
    return [*((name, "eager") for name in names), *((name, "aot_eager") for name in few)]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "backend"), with_backends(METHODS, ["EulerMaruyama", "Milstein", "LogODE"]))
def test_30_compiled_steps_of_each_method_equal_eager(name, backend):
    for run in solved(name, 30):
        check(run, Y0, backend)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "backend"), with_backends(SAMPLERS, ["DDIM", "UniPC", "ShARK"]))
def test_30_compiled_steps_of_each_sampler_equal_eager(name, backend):
    for run in sampled(name, 30):
        check(run, X, backend)


def test_compiled_solve_does_not_recompile_for_new_seeds():
    problem = problem_of(fs.EulerMaruyama())
    solve = lambda y, seed: fs.solve(problem, fs.EulerMaruyama(), y, [0.0, 0.5, 1.0], seed=seed).y  # noqa: E731
    torch._dynamo.reset()
    compiled = torch.compile(solve, fullgraph=True, backend="eager")
    for seed in (1, 2):
        compiled(Y0, seed)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in (3, -4, 2**62):
            assert torch.equal(compiled(Y0, seed), solve(Y0, seed))


@pytest.mark.parametrize("steps", [2, 12])
def test_compiled_run_is_one_graph_for_any_number_of_steps(steps):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for run, argument in ((solved("EulerMaruyama", steps)[0], Y0), (sampled("DDIM", steps)[0], X)):
        compiled = torch.compile(run, fullgraph=True, backend="eager")
        for _ in range(3):
            compiled(argument)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


def test_compiled_program_refuses_other_times_than_its_own():
    problem = problem_of(fs.EulerMaruyama())
    torch._dynamo.reset()
    compiled = torch.compile(lambda grid: fs.solve(problem, fs.EulerMaruyama(), Y0, grid).y, backend="eager")
    compiled(torch.linspace(0, 1, 3))
    with pytest.raises(RuntimeError, match="grid: got other numbers"):
        compiled(torch.linspace(0, 2, 3))


@pytest.mark.parametrize(("first", "second"), [
    (torch.tensor([80.0, 10.0, 1.0, 2e-3]), torch.tensor([80.0, 10.0, 1.0, 2.001e-3])),
    (torch.tensor([80.0, 10.0, 1.0, 0.5]).bfloat16(), torch.tensor([80.0, 9.0, 3.0, 2.0]).bfloat16()),
])  # fmt: skip
def test_a_compiled_sample_refuses_other_levels_of_any_size(first, second):
    torch._dynamo.reset()
    compiled = torch.compile(lambda levels: fs.sample(MODEL, DDIM, noise=Y0, sigmas=levels), backend="eager")
    compiled(first)
    with pytest.raises(RuntimeError, match="sigmas: got other numbers"):
        compiled(second)


MADE_INSIDE = {
    "path": lambda y: y + fs.BrownianPath((3, 2), seed=4, knots=[0.3]).increment(0.0, 0.5).W,
    "fresh path": lambda y: y + fs.FreshIncrements((3, 2), seed=4).increment(0.0, 0.5).W,
    "schedule": lambda y: y * fs.VPLinear(t_max=0.9).sigma(0.5).float(),
    "table": lambda y: y * fs.DiscreteVP(torch.linspace(0.9, 0.1, 5)).sigma(2).float(),
}


@pytest.mark.parametrize("name", MADE_INSIDE)
def test_fullgraph_refuses_what_is_made_in_the_compiled_function(name):
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"(path|schedule): got one made in the compiled function"):
        torch.compile(MADE_INSIDE[name], fullgraph=True, backend="eager")(Y0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Dynamo")
@pytest.mark.parametrize("name", MADE_INSIDE)
def test_what_is_made_in_a_compiled_function_breaks_the_graph(name):
    make = MADE_INSIDE[name]
    torch._dynamo.reset()
    assert torch.equal(torch.compile(make, backend="eager")(Y0), make(Y0))


class OwnPath:
    """A path of a class that the library does not know."""

    levy, area, t0, t1 = "W", False, 0.0, 1.0
    shape, dtype, device = (3, 2), torch.float32, torch.device("cpu")

    def __init__(self, seed):
        self.increments = fs.BrownianPath(self.shape, seed=seed).increments

    def increment(self, ta, tb):
        return next(self.increments([ta, tb]))


PATHS = {
    "arguments": [fs.BrownianPath((3, 2), seed=s, knots=k) for s, k in ((1, None), (2, None), (2, [0.3]), (2, [0.4]))],
    "generators": [fs.BrownianPath((3, 2), seeds=[1, 2, 3], generator=g) for g in ("torch", "counter")],
    "areas": [fs.AreaPath(fs.BrownianPath((3, 2), seed=s, levy="H"), 4) for s in (1, 2)],
    "own class": [OwnPath(1), OwnPath(2)],
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", PATHS)
@pytest.mark.parametrize("held", [False, True], ids=["argument", "attribute"])
def test_compiled_solve_follows_the_path_that_it_is_given(kind, held):
    """As an argument, and as an attribute that is set anew between calls."""
    problem, holder, grid = problem_of(EULER), type("Holder", (), {})(), torch.linspace(0, 1, 4)

    def run(y, path):
        return fs.solve(problem, EULER, y, grid, path=holder.path if held else path).y

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="eager")
    for path in [*PATHS[kind], PATHS[kind][0]]:
        holder.path = path
        assert torch.equal(compiled(Y0, None if held else path), run(Y0, path))


NUMBERS = {
    "steps": lambda x, n: fs.sample(MODEL, DDIM, noise=x, steps=n),
    "noisy steps": lambda x, n: fs.sample(MODEL, EULER, noise=x, steps=n),
    "grid": lambda x, n: fs.sample(MODEL, DDIM, noise=x, sigmas=fs.sigma_grid(SCHEDULE, n, "karras")),
    "times": lambda x, n: fs.solve(ODE, RK4, x, torch.linspace(0, 1, n + 1)).y,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NUMBERS)
def test_compiled_function_of_the_number_of_steps(name):
    run = NUMBERS[name]
    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="eager")
    for steps in (3, 4, 5):
        assert torch.equal(compiled(X, steps), run(X, steps))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["DDIM", "UniPC", "EulerMaruyama", "Milstein"])
def test_30_steps_by_inductor_equal_eager_to_rounding(name):
    """Inductor fuses operations; the largest difference seen is 1e-5, of states of size 20."""
    run, argument = (sampled(name, 30)[0], X) if name in ("DDIM", "UniPC") else (solved(name, 30)[0], Y0)
    torch._dynamo.reset()
    found = torch.compile(run, fullgraph=True, backend="inductor")(argument)
    torch.testing.assert_close(found, run(argument), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_inductor_takes_a_grid_that_is_computed_in_the_program():
    """Its linspace rounds in another way; the program keeps the eager numbers."""
    run = lambda y: fs.solve(ODE, EULER, y, torch.linspace(0, 1, 31)).y  # noqa: E731
    torch._dynamo.reset()
    found = torch.compile(run, fullgraph=True, backend="inductor")(Y0)
    torch.testing.assert_close(found, run(Y0), rtol=1e-6, atol=1e-6)


def marked(names, fast):
    return [pytest.param(name, marks=() if name in fast else pytest.mark.slow) for name in names]


def check_transforms(run, argument):
    """vmap, Jacobians in both modes and gradients per sample equal loops of plain runs, in float64."""
    argument = argument.double()
    many = torch.stack([argument, 1.1 * argument, 2 * argument])
    torch.testing.assert_close(vmap(run)(many), torch.stack([run(one) for one in many]))
    jacobian = torch.autograd.functional.jacobian(run, argument)
    torch.testing.assert_close(jacrev(run)(argument), jacobian)
    torch.testing.assert_close(jacfwd(run)(argument), jacobian)
    alone = torch.stack([torch.autograd.functional.jacobian(lambda x: run(x).sum(), one) for one in many])
    torch.testing.assert_close(vmap(grad(lambda x: run(x).sum()))(many), alone)


def check_parameter(run):
    """The same over a parameter, where neither state nor noise has the axis of the samples."""
    values = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    torch.testing.assert_close(vmap(run)(values), torch.stack([run(c) for c in values]))
    torch.testing.assert_close(jacfwd(run)(values[0]), jacrev(run)(values[0]))


@pytest.mark.parametrize("name", marked(METHODS, ("EulerMaruyama", "Milstein", "DerivativeFreeMilstein", "SRA1")))
def test_solve_under_transforms(name):
    solver, y0, grid = SOLVERS[name], Y0.double(), [0.0, 0.3, 0.7, 1.0]
    problem = problem_of(solver)
    check_transforms(lambda y: fs.solve(problem, solver, y, grid, seed=3).y, y0)
    drift = lambda c: replace(problem, drift=lambda t, y: c * problem.drift(t, y))  # noqa: E731
    check_parameter(lambda c: fs.solve(drift(c), solver, y0, grid, seed=3).y)
    if problem.noise_type != "none":
        path = path_of(problem, solver.card.levy, dtype=torch.float64)
        check_transforms(lambda y: fs.solve(problem, solver, y, grid, path=path).y, y0)
        diffusion = lambda c: replace(problem, diffusion=lambda t, y: c * problem.diffusion(t, y))  # noqa: E731
        check_parameter(lambda c: fs.solve(diffusion(c), solver, y0, grid, path=path).y)


@pytest.mark.parametrize("name", marked(SAMPLERS, ("DPMSolverPP", "ShARK", "PNDM")))
def test_sample_under_transforms(name):
    solver, x = SOLVERS[name], X.double()
    check_transforms(lambda x: fs.sample(MODEL, solver, noise=x, steps=3, seed=3), x)

    def scaled(c):
        model = fs.DiffusionModel(lambda x, sigma: c * denoise(x, sigma), SCHEDULE)
        return fs.sample(model, solver, shape=(3, 2), steps=3, seeds=[1, 2, 3], dtype=torch.float64)

    check_parameter(scaled)


def test_vmap_refuses_times_of_its_own():
    with pytest.raises(fs.InputError, match=r"vmap.*same"):
        vmap(lambda t: fs.solve(fs.ODE(lambda t, y: -y), fs.RK4(), Y0, t).y)(torch.tensor([[0.0, 1.0], [0.0, 2.0]]))
