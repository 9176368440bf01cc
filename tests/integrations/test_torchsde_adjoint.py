"""`sdeint_adjoint`, `logqp` and `extra` of the torchsde integration: torchsde's numbers, exact gradients."""

import pytest
import torch
import torchsde
from torch import nn

import fewstep as fs
from fewstep.integrations.torchsde import BrownianView, sdeint, sdeint_adjoint

F64 = torch.float64
TS = torch.tensor([0.0, 0.5, 1.0], dtype=F64)
NOISES = {"diagonal": 3, "scalar": 1, "additive": 2, "general": 2}


class Latent(nn.Module):
    """A posterior f, a prior h, and a diffusion that both have."""

    def __init__(self, noise_type, sde_type):
        super().__init__()
        torch.manual_seed(0)
        self.noise_type, self.sde_type, self.m = noise_type, sde_type, NOISES[noise_type]
        self.net, self.prior = nn.Linear(3, 3), nn.Linear(3, 3)
        self.size = nn.Parameter(0.3 + torch.rand(3, self.m))
        self.double()

    def f(self, t, y):
        return torch.tanh(self.net(y)) - t * y

    def h(self, t, y):
        return -torch.tanh(self.prior(y))

    def g(self, t, y):
        if self.noise_type == "diagonal":
            return self.size[:, 0] * (1.5 + torch.cos(y))
        y = torch.zeros_like(y) if self.noise_type == "additive" else y
        return self.size * (1.5 + torch.cos(y)).unsqueeze(-1)


def path(noise_type, logqp=False):
    channels = NOISES[noise_type] + (logqp and noise_type == "diagonal")
    return fs.BrownianPath((8, channels), seed=5, levy="H", dtype=F64)


def gradients(integrate, sde, **options):
    y0 = torch.linspace(-1, 1, 24, dtype=F64).reshape(8, 3).requires_grad_()
    out = integrate(sde, y0, TS, dt=2**-5, **options)
    ys, *rest = out if isinstance(out, tuple) else (out,)
    loss = ys.square().mean() + sum(x.mean() for x in rest if torch.is_tensor(x))
    return [ys, *rest], torch.autograd.grad(loss, [y0, *sde.parameters()], allow_unused=True)


def close(got, expected, within):
    for a, b in zip(got, expected, strict=True):
        assert (a is None) == (b is None)
        assert a is None or (a - b).abs().max() <= within * b.abs().max()


METHODS = [
    (noise, calculus, method)
    for calculus, methods in {"ito": ["euler", "srk"], "stratonovich": ["midpoint", "reversible_heun"]}.items()
    for method in methods for noise in NOISES
    if (noise, method) != ("general", "srk")
]  # fmt: skip


@pytest.mark.parametrize(("noise", "calculus", "method"), METHODS)
def test_log_ratio_is_that_of_torchsde(noise, calculus, method):
    sde, bm = Latent(noise, calculus), path(noise, logqp=True)
    options = dict(method=method, logqp=True)
    (theirs, expected) = gradients(torchsde.sdeint, sde, bm=BrownianView(bm), **options)
    (ours, found) = gradients(sdeint, sde, bm=bm, **options)
    assert ours[1].shape == (2, 8)
    close(ours, theirs, 1e-10)
    close(found, expected, 1e-9)


@pytest.mark.parametrize("logqp", [False, True])
@pytest.mark.parametrize(("noise", "calculus", "method"), METHODS)
def test_adjoint_gives_the_gradients_of_sdeint(noise, calculus, method, logqp):
    sde, bm = Latent(noise, calculus), path(noise, logqp)
    options = dict(bm=bm, method=method, logqp=logqp)
    ours, found = gradients(sdeint_adjoint, sde, **options)
    direct, expected = gradients(sdeint, sde, **options)
    assert all(map(torch.equal, ours, direct))
    close(found, expected, 1e-10)


@pytest.mark.parametrize("noise", NOISES)
def test_adjoint_of_reversible_heun_is_that_of_torchsde(noise):
    sde, bm = Latent(noise, "stratonovich"), path(noise, logqp=True)
    options = dict(method="reversible_heun", adjoint_method="adjoint_reversible_heun", logqp=True)
    theirs, expected = gradients(torchsde.sdeint_adjoint, sde, bm=BrownianView(bm), **options)
    ours, found = gradients(sdeint_adjoint, sde, bm=bm, **options)
    close(ours, theirs, 1e-10)
    close(found, [torch.zeros_like(a) if b is None else b for a, b in zip(expected, expected)], 1e-8)


@pytest.mark.parametrize("integrate", [sdeint, sdeint_adjoint])
def test_extra_state_continues_a_solve_as_in_torchsde(integrate):
    sde, bm = Latent("general", "stratonovich"), path("general")
    y0 = torch.linspace(-1, 1, 24, dtype=F64).reshape(8, 3).requires_grad_()
    options = dict(method="reversible_heun", dt=2**-5, extra=True)
    theirs, state = torchsde.sdeint(sde, y0, TS, bm=BrownianView(bm), **options)
    ours, own = integrate(sde, y0, TS, bm=bm, **options)
    close([ours, *own], [theirs, *state], 1e-10)
    first, half = integrate(sde, y0, TS[:2], bm=bm, **options)
    rest, _ = integrate(sde, first[-1], TS[1:], bm=bm, extra_solver_state=half, **options)
    assert torch.equal(rest[-1], ours[-1])
    found, expected = (
        torch.autograd.grad(y[-1].square().sum(), [y0, sde.size], retain_graph=True) for y in (rest, ours)
    )
    close(found, expected, 1e-10)
    _, none = integrate(sde, y0, TS, bm=bm, method="midpoint", dt=2**-3, extra=True, extra_solver_state=())
    assert none == ()


def test_names_rename_the_prior_drift():
    class Renamed(Latent):
        other = Latent.h
        h = None

    sde, bm = Latent("diagonal", "ito"), path("diagonal", logqp=True)
    renamed = Renamed("diagonal", "ito")
    ratios = [
        sdeint(s, torch.ones(8, 3, dtype=F64), TS, bm=bm, dt=0.25, logqp=True, names=names)[1]
        for s, names in ((sde, None), (renamed, {"prior_drift": "other"}))
    ]
    assert torch.equal(*ratios)


def test_arguments_of_the_adjoint_are_accepted_or_refused():
    sde = Latent("diagonal", "ito")
    y0 = torch.ones(8, 3, dtype=F64)
    known = dict(adjoint_params=(sde.size,), adjoint_method="milstein", adjoint_adaptive=True, adjoint_rtol=1e-3,
                 adjoint_atol=1e-3, adjoint_options={"grad_free": True}, dt=0.25, seed=1)  # fmt: skip
    assert torch.equal(sdeint_adjoint(sde, y0, TS, **known), sdeint(sde, y0, TS, dt=0.25, seed=1))
    with pytest.raises(fs.InputError, match="adjoint_method: got 'adjoint_reversible_heun' for SRID2"):
        sdeint_adjoint(sde, y0, TS, adjoint_method="adjoint_reversible_heun")
    with pytest.raises(fs.InputError, match="Did you mean 'milstein'"):
        sdeint_adjoint(sde, y0, TS, adjoint_method="milstien")
    with pytest.warns(UserWarning, match="sdeint_adjoint: unexpected arguments"):
        sdeint_adjoint(sde, y0, TS, dt=0.25, adjoint_dt=0.1)
