"""Callers' functions that write their outputs to memory of their own, as CUDA graphs and other runtimes do."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fewstep as fs
from fewstep.integrations.k_diffusion import sampler
from fewstep.testing import cases, own_path

EVERY = fs.solvers()
SDE_SOLVERS = [n for n, s in EVERY.items() if isinstance(s, fs.StochasticSolver)]
SAMPLERS = [n for n, s in EVERY.items() if isinstance(s, fs.DiffusionSolver)]
DERIVED = ("Milstein", "GeneralMilstein", "LogODE", "Taylor15", "TamedMilstein")
IMPLICIT = ("ImplicitEuler", "ImplicitMilstein")  # differentiate the drift in any case
GRID, EDM = torch.linspace(0, 1, 5, dtype=torch.float64), fs.EDM(0.05, 10.0)
NOISE = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))


class Held:
    """Output number k goes to buffer `order[k]` of its shape, around and around; -1 is fresh memory."""

    def __init__(self, order):
        self.turns, self.buffers = itertools.cycle(order), {}

    def __call__(self, value):
        turn = next(self.turns)
        if turn < 0:
            return value
        return self.buffers.setdefault((turn, value.shape, value.dtype), torch.empty_like(value)).copy_(value)


class HeldByNumpy:
    """Each output is a new tensor, and a new storage, on the same memory."""

    def __init__(self):
        self.buffers = {}

    def __call__(self, value):
        array = self.buffers.setdefault((value.shape, value.dtype), value.numpy().copy())
        np.copyto(array, value.numpy())
        return torch.from_numpy(array)


HOLDERS = {"one": lambda: Held([0]), "two": lambda: Held([0, 1]), "numpy": HeldByNumpy}


def held(sde, drift, diffusion):
    fields = {"drift": lambda t, y: drift(sde.drift(t, y))}
    if sde.noise_type != "none":
        fields["diffusion"] = lambda t, y: diffusion(sde.diffusion(t, y))
    return replace(sde, **fields)


@pytest.mark.parametrize("name", SDE_SOLVERS)
def test_fields_that_reuse_their_memory_give_the_numbers_of_fresh_memory(name):
    """Separate buffers for drift and diffusion, or shared ones. Derivatives through a buffer are refused."""
    solver = EVERY[name]
    for sde, _ in cases(solver):
        y0 = torch.linspace(0.1, 1, 12, dtype=torch.float64).reshape(3, 4)
        noise = own_path(solver, y0, sde, len(GRID) - 1)
        want = fs.solve(sde, solver, y0, GRID, path=noise).y
        for make in HOLDERS.values():
            one = make()
            for static in (held(sde, make(), make()), held(sde, one, one)):
                if name in IMPLICIT or (name in DERIVED and sde.noise_type != "additive"):
                    with pytest.raises(fs.InputError, match=r"(drift|diffusion): .* new tensor.*needs no derivative"):
                        fs.solve(static, solver, y0, GRID, path=noise)
                elif name != "Taylor15":
                    assert torch.equal(fs.solve(static, solver, y0, GRID, path=noise).y, want)


orders = st.lists(st.integers(-1, 3), min_size=1, max_size=8)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from([n for n in SDE_SOLVERS if n not in (*DERIVED, *IMPLICIT)]), orders, orders)
def test_any_order_of_buffers_gives_the_numbers_of_fresh_memory(name, drift, diffusion):
    solver = EVERY[name]
    sde, _ = next(iter(cases(solver)))
    y0 = torch.linspace(0.1, 1, 6, dtype=torch.float64).reshape(3, 2)
    noise = own_path(solver, y0, sde, len(GRID) - 1)
    want = fs.solve(sde, solver, y0, GRID, path=noise, save="all").ys
    static = held(sde, Held(drift), Held(diffusion))
    assert torch.equal(fs.solve(static, solver, y0, GRID, path=noise, save="all").ys, want)


def test_expanded_constants_stay_expanded_and_are_read_when_evaluated():
    level, seen = torch.zeros(()), []

    class Spy(fs.EulerMaruyama):
        def step(self, sde, t0, t1, y, increment, carry):
            seen.append(sde.diffusion(t0, y))
            return super().step(sde, t0, t1, y, increment, carry)

    sde = fs.SDE(lambda t, y: -y, lambda t, y: level.fill_(float(t)).expand(y.shape), "additive")
    fs.solve(sde, Spy(), torch.ones(2, 3), [0.0, 0.25, 0.5])
    assert [g.stride() for g in seen] == [(0, 0)] * 2
    assert [float(g[0, 0]) for g in seen] == [0.0, 0.25]


def k_diffusion(solver, hold):
    seen = []
    model = lambda x, s: hold(torch.tanh(x))  # noqa: E731
    sigmas = fs.sigma_grid(EDM, 4)
    x = sampler(solver, schedule=fs.VPLinear())(
        model, 10 * NOISE, sigmas, seed=0, callback=lambda d: seen.append(d["denoised"])
    )
    return torch.stack([x, *seen])


@pytest.mark.parametrize("name", SAMPLERS)
def test_k_diffusion_networks_may_reuse_their_memory(name):
    want = k_diffusion(EVERY[name], torch.clone)
    for make in HOLDERS.values():
        assert torch.equal(k_diffusion(EVERY[name], make()), want)


def in_place(x, *_):
    return x.mul_(0.3)


CHANGED = {
    "sample": lambda: fs.sample(fs.DiffusionModel(in_place, EDM), fs.DDIM(), noise=NOISE.clone(), steps=3),
    "network": lambda: fs.sample(
        fs.DiffusionModel(fs.from_epsilon(in_place, EDM), EDM), fs.ShARK(), shape=(4, 3), steps=3
    ),
    "k-diffusion": lambda: sampler(fs.UniPC())(in_place, 10 * NOISE, fs.sigma_grid(EDM, 3)),
    "invert": lambda: fs.invert(fs.DiffusionModel(in_place, EDM), fs.DDIM(), NOISE.clone(), steps=3),
    "drift": lambda: fs.solve(fs.ODE(lambda t, y: in_place(y)), fs.RK4(), NOISE.clone(), GRID),
    "diffusion": lambda: fs.solve(
        fs.SDE(lambda t, y: -y, lambda t, y: in_place(y)), fs.SRID2(), NOISE.clone(), GRID
    ),
}  # fmt: skip


@pytest.mark.parametrize("call", CHANGED)
def test_functions_that_change_their_argument_in_place_are_refused(call):
    with pytest.raises(fs.InputError, match=r"changes [xy] in place.*Call it with [xy]\.clone\(\)"):
        CHANGED[call]()


def model(hold):
    return fs.DiffusionModel(lambda x, s: hold(torch.tanh(x).detach()), EDM)


FEW, SHORT = fs.TeacherOptions(trajectories=16), fs.TrainingOptions(iterations=2, batch_size=4)


def fit_dode(hold):
    noise = torch.randn(64, 3, generator=torch.Generator().manual_seed(3))
    table, _ = fs.distill_dode(model(hold), fs.DPMSolverPP(2), noise=noise, steps=4, teacher_substeps=3, terms=2)
    return table.update_eval


def trajectories(hold):
    made = fs.make_trajectories(model(hold), sigmas=[10.0, 1.0, 0.1], count=8, event_shape=(3,), substeps=2)
    return made.some_knots(8)


def fit_sigdeg(hold):
    student, _ = fs.distill_sigdeg(
        model(hold), event_shape=(3,), steps=2, teacher_steps=4, teacher_options=FEW, training=SHORT
    )
    return torch.cat([p.detach().flatten() for p in student.network.parameters()])


def fit_step(hold):
    sde = held(fs.SDE(lambda t, y: -torch.sin(y), lambda t, y: 0.3 + 0.1 * torch.cos(y)), hold, hold)
    few = replace(FEW, substeps=4)
    student, _ = fs.distill_sigdeg_step(sde, steps=2, y0=NOISE, teacher_options=few, training=SHORT)
    return torch.cat([p.detach().flatten() for p in student.network.parameters()])


@pytest.mark.parametrize("fit", [fit_dode, trajectories, fit_sigdeg, pytest.param(fit_step, marks=pytest.mark.slow)])
def test_teachers_may_reuse_their_memory(fit):
    want = fit(lambda v: v)
    for make in HOLDERS.values():
        assert torch.equal(fit(make()), want)
