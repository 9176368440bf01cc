"""Milstein's derivatives are those of the diffusion, in every mode in which torch computes them."""

import contextlib
from dataclasses import replace

import pytest
import torch
from torch.autograd import forward_ad

import fewstep as fs

Y0 = torch.linspace(0.5, 1.5, 6, dtype=torch.float64).reshape(3, 2)
GRID = [0.0, 0.3, 0.7, 1.0]
SLOPE = 0.4


def diffusion(t, y):
    return (SLOPE * y + t).sin() + 0.5


def drift(t, y):
    return -y


DIAGONAL = fs.SDE(drift, diffusion)
# D g_j g_i with columns that neither commute nor have symmetric Jacobians
MIX = torch.tensor([[0.2, 0.7], [-0.3, 0.1]], dtype=torch.float64)


def matrix(t, y):
    return torch.stack([(y @ MIX).sin(), 0.3 * y.flip(-1).cos()], -1)


def path(shape=(3, 2), **options):
    return fs.BrownianPath(shape, seed=1, dtype=torch.float64, **options)


def solved(sde, y0=Y0, **options):
    return fs.solve(sde, fs.Milstein(), y0, GRID, path=path(), **options).y


def by_hand(y, calculus="ito"):
    for inc, t in zip(path().increments(GRID), GRID):
        g, slope = diffusion(t, y), SLOPE * (SLOPE * y + t).cos()
        square = inc.W**2 - (inc.h if calculus == "ito" else 0)
        y = y + inc.h * drift(t, y) + g * inc.W + 0.5 * g * slope * square
    return y


@pytest.mark.parametrize("calculus", ["ito", "stratonovich"])
@pytest.mark.parametrize("mode", [contextlib.nullcontext, torch.no_grad, torch.inference_mode])
def test_milstein_equals_its_formula(mode, calculus):
    with mode():
        torch.testing.assert_close(solved(replace(DIAGONAL, sde_type=calculus)), by_hand(Y0, calculus))


def test_matrix_noise_equals_jacobians_times_columns():
    """GeneralMilstein and LogODE: sum_ij D g_j g_i w_ij from full Jacobians."""
    sde = fs.SDE(drift, matrix, "general")
    noise = fs.AreaPath(path(levy="H"), 8)
    (inc,) = noise.increments([0.0, 1.0])
    g, jacobian = matrix(0, Y0), torch.func.vmap(torch.func.jacrev(lambda y: matrix(0, y)))(Y0)
    integrals = 0.5 * (inc.W.unsqueeze(-1) * inc.W.unsqueeze(-2) - torch.eye(2)) + inc.A
    euler = Y0 + drift(0, Y0) + (g @ inc.W.unsqueeze(-1)).squeeze(-1)
    want = euler + torch.einsum("bdjk,bki,bij->bd", jacobian, g, integrals)
    found = fs.solve(sde, fs.GeneralMilstein(), Y0, [0.0, 1.0], path=noise).y
    torch.testing.assert_close(found, want)
    want = torch.einsum("bdjk,bki,bij->bd", jacobian, g, inc.A - 0.5 * torch.eye(2))
    half = Y0 + 0.5 * (euler - Y0)
    want = want + Y0 + drift(0.5, half) + (matrix(0.5, half) @ inc.W.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(fs.solve(sde, fs.LogODE(), Y0, [0.0, 1.0], path=noise).y, want)


@pytest.mark.parametrize("noise", ["diagonal", "scalar"])
def test_gradients_and_second_gradients_pass_through_derivatives(noise):
    scale = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    y0 = Y0[:2, :1].clone().requires_grad_()

    def end(scale, y0):
        own = lambda t, y: (scale * y).sin() + 0.5  # noqa: E731
        sde = fs.SDE(drift, own if noise == "diagonal" else lambda t, y: own(t, y).unsqueeze(-1), noise)
        return fs.solve(sde, fs.Milstein(), y0, GRID, path=path((2, 1))).y

    assert torch.autograd.gradcheck(end, (scale, y0))
    assert torch.autograd.gradgradcheck(end, (scale, y0))
    if noise == "scalar":  # torch has no nested forward mode
        return
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(y0.detach(), torch.ones_like(y0.detach()))
        tangent = forward_ad.unpack_dual(end(scale, dual)).tangent
    (slope,) = torch.autograd.grad(end(scale, y0).sum(), y0)
    torch.testing.assert_close(tangent, slope)


def test_derivative_counts_the_argument_alone():
    """A diffusion that also uses the initial state, and one that is a constant or has a constant derivative."""
    y0 = Y0.clone().requires_grad_()
    shifted = fs.SDE(drift, lambda t, y: 0.3 * y + 0.2 * y0)
    exact = replace(shifted, derivative=lambda t, y: torch.full_like(y, 0.3))
    (a,), (b,) = (torch.autograd.grad(solved(sde, y0).sum(), y0) for sde in (shifted, exact))
    torch.testing.assert_close(a, b)
    constant = fs.SDE(drift, lambda t, y: torch.full_like(y, 0.3))
    torch.testing.assert_close(solved(constant), fs.solve(constant, fs.EulerMaruyama(), Y0, GRID, path=path()).y)


def test_a_given_derivative_takes_the_place_of_autograd():
    class NoBackward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.sin()

    given = fs.SDE(
        drift, lambda t, y: NoBackward.apply(SLOPE * y + t) + 0.5, derivative=lambda t, y: SLOPE * (SLOPE * y + t).cos()
    )
    torch.testing.assert_close(solved(given), by_hand(Y0))
    half = fs.solve(given, fs.Milstein(), Y0.bfloat16(), GRID, path=fs.BrownianPath((3, 2), seed=1)).y
    torch.testing.assert_close(half.double(), by_hand(Y0), rtol=0.1, atol=0.1)
    with pytest.raises(fs.InputError, match="derivative: got torch.float64 of shape"):
        solved(replace(given, derivative=lambda t, y: y[0]))
    with pytest.raises(fs.InputError, match="derivative: got one for 'general' noise"):
        fs.SDE(drift, matrix, "general", derivative=diffusion)


def test_a_step_without_gradients_returns_a_state_without_a_graph():
    t0, t1 = (torch.tensor(t, dtype=torch.float64) for t in (0.0, 0.3))
    inc = path().increment(0.0, 0.3)
    assert not fs.Milstein().step(DIAGONAL, t0, t1, Y0, inc, None).y.requires_grad
    scalar = fs.SDE(drift, lambda t, y: y.sin().unsqueeze(-1), "scalar")
    assert not fs.Milstein().step(scalar, t0, t1, Y0, fs.Increment(0.3, inc.W[:, :1]), None).y.requires_grad


class Sine(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.sin()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0])
        ctx.save_for_forward(inputs[0])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return g * ctx.saved_tensors[0].cos()

    @staticmethod
    def jvp(ctx, tangent):
        return tangent * ctx.saved_tensors[0].cos()


def test_diffusion_without_a_second_derivative_keeps_its_bracket():
    y0, grid = torch.full((2, 2), 0.4, dtype=torch.float64), torch.linspace(0, 1, 5)
    ends = []
    for f in (torch.sin, Sine.apply):
        sde = fs.SDE(lambda t, y: -y, lambda t, y, f=f: torch.diag_embed(f(y)), "commutative")
        ends.append(fs.solve(sde, fs.Milstein(), y0, grid, seed=1).y)
    euler = fs.solve(fs.SDE(lambda t, y: -y, lambda t, y: torch.diag_embed(y.sin()), "general"), fs.EulerMaruyama(), y0, grid, seed=1).y  # fmt: skip  # noqa: E501
    assert not torch.allclose(ends[0], euler)
    torch.testing.assert_close(*ends)


def test_forward_mode_derivative_by_a_parameter_is_that_of_differences():
    y0, grid = torch.full((2, 2), 0.4, dtype=torch.float64), torch.linspace(0, 1, 5)

    def end(p):
        return fs.solve(fs.SDE(lambda t, y: -y, lambda t, y: p * y), fs.Milstein(), y0, grid, seed=1).y

    p = torch.tensor(0.3, dtype=torch.float64)
    with torch.autograd.forward_ad.dual_level():
        tangent = torch.autograd.forward_ad.unpack_dual(
            end(torch.autograd.forward_ad.make_dual(p, torch.ones_like(p)))
        ).tangent
    torch.testing.assert_close(tangent, (end(p + 1e-6) - end(p - 1e-6)) / 2e-6, rtol=1e-6, atol=1e-8)
