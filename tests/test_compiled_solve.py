"""`solve(compile=True)`: the numbers of an eager solve, to rounding, from programs that later solves use again."""

import functools
import gc
import weakref
from dataclasses import dataclass, field

import pytest
import torch

import fewstep as fs
from fewstep import compiled

DRIFT = lambda t, y: t.sin() - y  # noqa: E731
SDES = {
    "diagonal": fs.SDE(DRIFT, lambda t, y: 0.3 * y.sin() + 0.1 * t),
    "additive": fs.SDE(DRIFT, lambda t, y: torch.full_like(y, 0.3), "additive"),
    "general": fs.SDE(
        DRIFT, lambda t, y: torch.stack([0.3 * y.sin(), 0.2 * y.flip(-1)], -1), "general", "stratonovich"
    ),
}
Y0, GRID = torch.linspace(0.5, 1.5, 6).reshape(3, 2), torch.linspace(0, 1, 12)  # 11 steps: 1, a program of 8, 2
SLOW = pytest.mark.slow


@pytest.fixture
def compilations(monkeypatch):
    """The number of compiled programs; without inductor, whose compilers take longer than all these tests."""
    torch._dynamo.reset()
    compiled._program.cache_clear()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(compiled.torch, "compile", functools.partial(torch.compile, backend=backend))
    return graphs


def both(sde, solver, y0=Y0, **options):
    found, want = (fs.solve(sde, solver, y0, GRID, compile=c, **options) for c in (True, False))
    assert found.nfe == want.nfe
    return found, want


@pytest.mark.parametrize(
    ("noise", "solver"),
    [
        ("diagonal", fs.EulerMaruyama()), ("additive", fs.ShARK()), ("diagonal", fs.Milstein()),
        pytest.param("general", fs.LogODE(), marks=SLOW), pytest.param("diagonal", fs.SRID2(), marks=SLOW),
    ],
)  # fmt: skip
def test_compiled_solves_equal_eager_ones(noise, solver, compilations):
    options = {"save": "all", "seed": 3}
    found, want = both(SDES[noise], solver, **options)
    torch.testing.assert_close(found.ys, want.ys, rtol=1e-5, atol=1e-6)
    assert len(compilations) == 1
    # the same solver made again, another seed and grid, a path: no compilation
    again = type(solver)(**solver.options())
    later = fs.solve(SDES[noise], again, Y0, torch.linspace(0, 2, 21), seed=4, compile=True)
    torch.testing.assert_close(later.y, fs.solve(SDES[noise], solver, Y0, torch.linspace(0, 2, 21), seed=4).y)
    assert len(compilations) == 1


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # of torch, while it traces a state with a graph
def test_compiled_odes_gradients_and_half_precision(compilations):
    ode = fs.ODE(DRIFT)
    found, want = both(ode, fs.RK4())
    torch.testing.assert_close(found.y, want.y)
    grads = []
    for compile in (True, False):
        y0 = Y0.clone().requires_grad_()
        fs.solve(SDES["diagonal"], fs.EulerMaruyama(), y0, GRID, compile=compile).y.sum().backward()
        grads.append(y0.grad)
    torch.testing.assert_close(*grads)
    found, want = both(SDES["diagonal"], fs.EulerMaruyama(), Y0.bfloat16())
    assert found.y.dtype == torch.bfloat16
    torch.testing.assert_close(found.y, want.y)


def test_nan_in_a_compiled_solve_names_its_step(compilations):
    broken = fs.SDE(lambda t, y: torch.where(t > 0.5, torch.nan, -y), SDES["diagonal"].diffusion)
    with pytest.raises(fs.NonFiniteError, match="at step 6"):
        fs.solve(broken, fs.EulerMaruyama(), Y0, GRID, compile=True)
    with pytest.raises(fs.InputError, match="compile: got 7"):
        fs.solve(broken, fs.EulerMaruyama(), Y0, GRID, compile=7)


def test_memory_written_again_gives_eager_numbers(compilations):
    path = fs.brownian.FreshIncrements((3, 2), "W", 3, reuse=True)
    found, want = both(SDES["diagonal"], fs.EulerMaruyama(), path=path)
    torch.testing.assert_close(found.y, want.y)
    buffer = torch.empty(3, 2)
    found, want = both(fs.ODE(lambda t, y: buffer.copy_(-y * (1 + t))), fs.RK4())
    torch.testing.assert_close(found.y, want.y)


@pytest.mark.parametrize("change", [lambda f: f.sum(0, keepdim=True), lambda f: f.double()])
def test_a_value_that_changes_later_is_refused(change, compilations):
    changing = fs.SDE(lambda t, y: -y if t < 0.5 else change(-y), SDES["diagonal"].diffusion)
    with pytest.raises(fs.InputError, match="drift: got"):
        fs.solve(changing, fs.EulerMaruyama(), Y0, GRID, compile=True)


@dataclass(frozen=True)
class Named:
    name: str
    net: torch.nn.Module = field(compare=False)

    def drift(self, t, y):
        return self.net(y)

    __call__ = drift


@dataclass
class Unhashable:
    rate: float

    def __call__(self, t, y):
        return -self.rate * y


@torch.no_grad()
def test_programs_belong_to_objects_not_to_equal_ones(compilations):
    nets = [torch.nn.Linear(2, 2) for _ in range(2)]
    drifts = [f for net in nets for f in (Named("a", net), Named("a", net).drift)]
    for drift in [*drifts, Unhashable(1.0), Unhashable(2.0)]:
        found, want = both(fs.SDE(drift, SDES["diagonal"].diffusion), fs.EulerMaruyama())
        torch.testing.assert_close(found.y, want.y)


@torch.no_grad()
def test_methods_use_one_program_which_keeps_no_network_alive(compilations):
    owner = Named("a", torch.nn.Linear(2, 2))
    for _ in range(2):
        fs.solve(fs.SDE(owner.drift, SDES["diagonal"].diffusion), fs.EulerMaruyama(), Y0, GRID, compile=True)
    assert len(compilations) == 1
    left = [weakref.ref(owner), weakref.ref(owner.net), weakref.ref(owner.net.weight)]
    del owner
    gc.collect()
    assert [r() for r in left] == [None] * 3


COUNTERS = {
    "path": ((3, 2), {}), "span": ((3, 2), {"t0": -1.0}), "seeds": ((3, 2), {"seeds": [4, 5, 2**64 - 1]}),
    "numbers that share a block": ((3, 1), {"seeds": [4, 5, 6]}), "one number": ((1,), {}),
    "knots": ((3, 2), {"knots": torch.linspace(0, 1, 33).square()}), "float64": ((3, 2), {"dtype": torch.float64}),
    "H": ((3, 2), {"levy": "H"}), "seeds, K": ((3, 2), {"levy": "K", "seeds": [1, 2, 3]}),
}  # fmt: skip


FAST = ("path", "numbers that share a block", "knots", "H")


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=SLOW) for n in COUNTERS])
def test_noise_of_counters_is_drawn_in_the_program(name, compilations, monkeypatch):
    """One program with the normals of all cuts within it, and the numbers of the eager path; another seed uses it."""
    shape, options = COUNTERS[name]
    cells = []
    walk = compiled.Walk.subtree
    monkeypatch.setattr(compiled.Walk, "subtree", lambda self: cells.append(walk(self)) or cells[-1])
    y0 = torch.linspace(0.5, 1.5, 6, dtype=options.get("dtype"))[: max(1, torch.Size(shape).numel())].reshape(shape)
    grid = options.get("knots", torch.linspace(0, 1, 33))
    solver = fs.ShARK() if "levy" in options else fs.EulerMaruyama()
    sde = SDES["additive" if "levy" in options else "diagonal"]
    for seed in (1, 2):
        path = fs.BrownianPath(shape, seed=seed, generator="counter", **options)
        found, want = (fs.solve(sde, solver, y0, grid, path=path, save="all", compile=c) for c in (True, False))
        torch.testing.assert_close(found.ys, want.ys, rtol=1e-5, atol=2e-6)
        assert found.nfe == want.nfe
    assert [cell is not None for cell in cells] == [True] * 6
    assert len(compilations) == 1


@pytest.mark.parametrize(
    "grid", [torch.linspace(0, 1, 30), torch.linspace(0.03125, 0.9375, 30), torch.rand(19).cumsum(0) / 20]
)
def test_counters_on_other_grids_are_drawn_outside(grid, compilations):
    path = fs.BrownianPath((3, 2), seed=4, generator="counter")
    found, want = (
        fs.solve(SDES["diagonal"], fs.EulerMaruyama(), Y0, grid, path=path, compile=c, save="all")
        for c in (True, False)
    )
    torch.testing.assert_close(found.ys, want.ys, rtol=1e-5, atol=2e-6)
    assert len(compilations) == 1


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"seeds": [1, 2, 3]}], ids=str)
def test_inductor_draws_the_numbers_of_counters(options):
    path = fs.BrownianPath((3, 2), generator="counter", **options)
    grid = torch.linspace(0, 1, 17)
    found, want = (
        fs.solve(SDES["diagonal"], fs.EulerMaruyama(), Y0, grid, path=path, compile=c) for c in (True, False)
    )
    torch.testing.assert_close(found.y, want.y, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_inductor_gives_eager_numbers():
    found, want = both(SDES["diagonal"], fs.Milstein())
    torch.testing.assert_close(found.y, want.y, rtol=1e-5, atol=1e-6)
