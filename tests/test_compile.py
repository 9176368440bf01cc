"""Compiled programs equal eager ones: one graph for each solver, with noise of the same numbers."""

import pytest
import torch

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


def problem_of(solver):
    """The problem of the first noise type on the card."""
    noise = next(n for n in (*solver.card.noise_types, "none") if n in (*DIFFUSIONS, "none"))
    drift = lambda t, y: t.sin() - y  # noqa: E731
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


def check(run, argument, backend, exact=True):
    """The compiled run is one graph whose result is the eager one, to the bit unless kernels are fused."""
    torch._dynamo.reset()
    found = torch.compile(run, fullgraph=True, backend=backend)(argument)
    torch.testing.assert_close(
        found, run(argument), **({"rtol": 0, "atol": 0} if exact else {"rtol": 2e-5, "atol": 1e-5})
    )


@pytest.mark.parametrize("name", ["EulerMaruyama", "Milstein", "RK4"])
def test_compiled_solve_equals_eager(name):
    for run in solved(name, 3):
        check(run, Y0, "eager")


@pytest.mark.parametrize("name", ["ShARK", "UniPC"])
def test_compiled_sample_equals_eager(name):
    for run in sampled(name, 3):
        check(run, X, "eager")


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", METHODS)
def test_30_compiled_steps_of_each_method_equal_eager(name, backend):
    for run in solved(name, 30):
        check(run, Y0, backend)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_30_compiled_steps_of_each_sampler_equal_eager(name, backend):
    for run in sampled(name, 30):
        check(run, X, backend)
