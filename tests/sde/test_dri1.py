"""The weak order of DRI1: expectations over its noise are sums over the nodes of Gauss' rules, so they are exact."""

import math
from itertools import product

import pytest
import torch

import fewstep as fs

F64 = torch.float64
GAUSS3 = ((-math.sqrt(3), 1 / 6), (0.0, 2 / 3), (math.sqrt(3), 1 / 6))  # moments of N(0, 1) up to the fifth
GAUSS2 = ((-1.0, 0.5), (1.0, 0.5))  # up to the third


def nodes(channels, h):
    """The increments over h at all nodes, and their weights: moments that weak order 2 needs are those of a path."""
    points = list(product(*[GAUSS3] * channels, *[GAUSS2] * channels))
    x, p = (torch.tensor([[pair[i] for pair in point] for point in points], dtype=F64) for i in (0, 1))
    W, H = x[:, :channels] * h**0.5, x[:, channels:] * (h / 12) ** 0.5
    return fs.Increment(h, W, H), p.prod(1)


def after(sde, y, h, channels):
    """The states after a step from y (d,) along the increments of `nodes`, and their weights."""
    increment, weights = nodes(channels, h)
    times = (torch.tensor(t, dtype=F64) for t in (0.3, 0.3 + h))
    return fs.DRI1().step(sde, *times, y.expand(len(weights), -1), increment, None).y, weights


A = torch.tensor([[-0.5, 0.3], [0.2, -0.7]], dtype=F64)
B = torch.tensor([[[0.4, 0.1], [0.2, 0.3]], [[0.0, 0.5], [-0.4, 0.0]]], dtype=F64)
LINEAR = fs.SDE(lambda t, y: y @ A.T, lambda t, y: torch.einsum("kij,...j->...ik", B, y), "general")
Y0 = torch.tensor([1.0, 0.6], dtype=F64)
# dE[y y']/dt = A E + E A' + sum_k B_k E B_k', with B_1 B_2 != B_2 B_1
EYE = torch.eye(2, dtype=F64)
MOMENTS = torch.kron(A, EYE) + torch.kron(EYE, A) + sum(torch.kron(b, b) for b in B)
EXACT = torch.linalg.matrix_exp(MOMENTS) @ torch.kron(Y0, Y0)


def test_second_moments_have_weak_order_two():
    """Slopes of the error of E[y y'] at t = 1, which a step multiplies by a matrix: no sampling, so 0.05 is margin."""
    errors = []
    for steps in (4, 8, 16, 32):
        flows = [after(LINEAR, e, 1 / steps, 2) for e in EYE]
        flow, weights = torch.stack([y for y, _ in flows], -1), flows[0][1]
        step = torch.einsum("n,nij,nkl->ikjl", weights, flow, flow).reshape(4, 4)
        errors.append((torch.linalg.matrix_power(step, steps) @ torch.kron(Y0, Y0) - EXACT).norm())
    slopes = torch.stack(errors).log2().diff().neg()
    assert (slopes - 2).abs().max() < 0.05, slopes


def curved(channels):
    """Quadratic columns that do not commute, and depend on time."""
    scale = torch.linspace(0.5, 0.9, channels, dtype=F64)

    def columns(t, y):
        a, b = y[..., :1], y[..., 1:]
        first = scale * (1 + a * a - t * b) + 0.3 * a * b
        return torch.stack([first, scale.flip(0) * (b + t * a * a) - scale.square() * a], -2)

    return columns


NOISE = {
    "general": (2, curved(2)),
    "three channels": (3, curved(3)),
    "commutative": (2, lambda t, y: torch.tensor([[1.0, 0.5], [0.6, 0.3]], dtype=F64) * (t + y[..., :1, None] ** 2)),
    "scalar": (1, curved(1)),
    "diagonal": (2, lambda t, y: 0.6 + t * y * y),
    "additive": (2, lambda t, y: (1 + t * t) * torch.tensor([[0.7, 0.2], [-0.3, 0.5]], dtype=F64).expand(*y.shape, 2)),
}


@pytest.mark.parametrize("kind", NOISE)
def test_a_step_has_the_first_moments_of_the_generator(kind):
    """E phi(y_1) = phi + h L phi + h^2/2 L^2 phi + O(h^3): slopes of the difference within 0.15 of 3, exact sums."""
    channels, diffusion = NOISE[kind]
    sde = fs.SDE(
        lambda t, y: torch.stack([y[..., 1] - t * y[..., 0] ** 2, -y[..., 0] * y[..., 1] + t], -1),
        diffusion,
        "general" if kind not in fs.problem.NOISE_TYPES else kind,
    )

    def generator(phi):
        def applied(t, y):
            g = sde.diffusion(t, y)
            g = torch.diag(g) if kind == "diagonal" else g
            hessian = torch.func.hessian(phi, 1)(t, y)
            along = torch.func.jvp(phi, (t, y), (torch.ones_like(t), sde.drift(t, y)))[1]
            return along + 0.5 * torch.trace(g.T @ hessian @ g)

        return applied

    def phi(t, y):
        return y[..., 0] ** 3 + y[..., 0] * y[..., 1] ** 2 - y[..., 1] ** 4 / 2

    t, y, gaps = torch.tensor(0.3, dtype=F64), torch.tensor([0.6, -0.4], dtype=F64), []
    once = generator(phi)
    first, second = once(t, y), generator(once)(t, y)
    for h in (2**-6, 2**-7, 2**-8):
        ends, weights = after(sde, y, h, channels)
        gaps.append(weights @ phi(t, ends) - (phi(t, y) + h * first + h * h / 2 * second))
    slopes = torch.stack(gaps).abs().log2().diff().neg()
    assert (slopes - 3).abs().max() < 0.15, slopes


def test_samples_of_paths_have_the_exact_moments():
    """E|y|^2 from 200,000 paths in 4 steps is within 4 standard errors (level 6e-5); Euler's is at least 8 off."""
    y0, grid = Y0.expand(200_000, 2), torch.linspace(0, 1, 5)
    distance = {}
    for solver in (fs.DRI1(), fs.EulerMaruyama()):
        squares = fs.solve(LINEAR, solver, y0, grid, seed=3).y.square().sum(-1)
        distance[type(solver)] = (squares.mean() - EXACT[0] - EXACT[3]) / squares.std() * len(y0) ** 0.5
    assert abs(distance[fs.DRI1]) < 4
    assert abs(distance[fs.EulerMaruyama]) > 8, distance
