"""Conversions between the calculi, and correlated channels."""

import math

import pytest
import torch

import fewstep as fs

F64 = torch.float64
T = torch.tensor(0.4, dtype=F64)


def state(*shape, seed=0):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def drift(t, y):
    return -torch.sin(y) + t


def matrix(t, y):
    a, b = y[..., 0], y[..., 1]
    rows = [[0.8 + 0.3 * torch.sin(b), 0.5 * torch.cos(a + t)], [0.6 * torch.sin(a * b), 0.7 + 0.2 * b * b]]
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


DIFFUSIONS = {
    "diagonal": lambda t, y: 0.9 + 0.5 * torch.cos(1.5 * y + 3 * t),
    "scalar": lambda t, y: matrix(t, y)[..., :1],
    "commutative": lambda t, y: torch.sin(y.sum(-1))[..., None, None] * y.new_tensor([[0.8, 0.6], [0.4, 0.3]]),
    "general": matrix,
}


@pytest.mark.parametrize("kind", DIFFUSIONS)
@pytest.mark.parametrize("grad", [True, False])
def test_corrections_equal_those_of_the_jacobian(kind, grad):
    """sum_j D g_j g_j from Jacobians in reverse mode, sample by sample; the noise type and the diffusion stay."""
    sde, y = fs.SDE(drift, DIFFUSIONS[kind], kind), state(5, 2)
    with torch.set_grad_enabled(grad):
        other = sde.to_stratonovich()
        found = 2 * (sde.drift(T, y) - other.drift(T, y))
    columns = lambda x: torch.diag(sde.diffusion(T, x)) if kind == "diagonal" else sde.diffusion(T, x)  # noqa: E731
    for sample, got in zip(y, found):
        jacobian = torch.func.jacrev(columns)(sample)  # d, m, d
        torch.testing.assert_close(got, torch.einsum("imk,km->i", jacobian, columns(sample)), rtol=1e-12, atol=1e-12)
    assert (other.noise_type, other.sde_type, other.diffusion) == (kind, "stratonovich", sde.diffusion)
    assert other.to_ito() == sde
    assert other.to_stratonovich() == other
    back = fs.SDE(other.drift, sde.diffusion, kind, "stratonovich").to_ito()
    torch.testing.assert_close(back.drift(T, y), sde.drift(T, y))


def test_geometric_brownian_motion_has_its_known_drifts():
    """mu y in Ito's calculus is (mu - sigma^2/2) y in Stratonovich's, with and without `derivative`."""
    y = state(4, 3)
    for derivative in (None, lambda t, y: torch.full_like(y, 0.6)):
        sde = fs.SDE(lambda t, y: 0.5 * y, lambda t, y: 0.6 * y, derivative=derivative)
        other = sde.to_stratonovich()
        torch.testing.assert_close(other.drift(T, y), (0.5 - 0.18) * y)
        assert other.derivative is derivative


def test_noise_without_a_state_needs_no_correction():
    for sde in (fs.SDE(drift, lambda t, y: t, "additive"), fs.ODE(drift)):
        other = sde.to_stratonovich()
        assert other.drift is drift
        assert other.sde_type == "stratonovich"
        assert other.to_ito() == sde


PAIRS = [
    ("diagonal", fs.Milstein(), fs.Heun()), ("scalar", fs.SRID2(), fs.SlowRK()),
    ("commutative", fs.Milstein(), fs.SPaRK()), ("general", fs.GeneralMilstein(), fs.LogODE()),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "ito", "stratonovich"), PAIRS, ids=[pair[0] for pair in PAIRS])
def test_both_forms_have_one_solution(kind, ito, stratonovich):
    """Along one path the two solutions approach each other: a quarter of the step, at most 0.4 of the distance."""
    y0, sde = state(400, 2, seed=1), fs.SDE(drift, DIFFUSIONS[kind], kind)
    other, shape = sde.to_stratonovich(), {"scalar": (400, 1)}.get(kind, (400, 2))
    path = fs.BrownianPath(shape, levy="H", seed=2, dtype=F64)
    path = fs.AreaPath(path, 512) if kind == "general" else path
    gaps = []
    for n in (16, 64):
        grid = torch.linspace(0, 1, n + 1, dtype=F64)
        ends = [fs.solve(p, s, y0, grid, path=path).y for p, s in ((sde, ito), (other, stratonovich))]
        gaps.append((ends[0] - ends[1]).square().mean().sqrt())
    assert gaps[1] < 0.4 * gaps[0], gaps
    wrong = fs.solve(fs.SDE(drift, DIFFUSIONS[kind], kind, "stratonovich"), stratonovich, y0, grid, path=path).y
    assert (ends[0] - wrong).square().mean().sqrt() > 3 * gaps[1]


class Module(torch.nn.Module):
    noise_type, sde_type = "general", "stratonovich"

    def __init__(self):
        super().__init__()
        self.size = torch.nn.Parameter(torch.tensor(0.7, dtype=F64))

    def drift(self, t, y):
        return -self.size * y

    def diffusion(self, t, y):
        return self.size * matrix(t, y)


def test_conversions_have_gradients_and_work_under_transforms():
    """Backpropagated, checkpointed, under vmap and compiled (eager backend): the same numbers."""
    module, y0, grid = Module(), state(3, 2), torch.linspace(0, 1, 5, dtype=F64)
    sde = fs.SDE.from_module(module).to_ito()

    def loss(y0, **options):
        return fs.solve(sde, fs.EulerMaruyama(), y0, grid, seed=1, **options).y.square().sum()

    first = torch.autograd.grad(loss(y0), module.size)[0]
    assert first.abs() > 0
    torch.testing.assert_close(torch.autograd.grad(loss(y0, gradient="checkpoint"), module.size)[0], first)
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(y0), loss(y0))
    both = torch.func.vmap(lambda y: loss(y))(torch.stack([y0, 2 * y0]))
    torch.testing.assert_close(both, torch.stack([loss(y0), loss(2 * y0)]))
    with torch.inference_mode():
        torch.testing.assert_close(loss(y0), loss(y0.clone()))


def test_a_diffusion_outside_of_torch_is_refused():
    sde = fs.SDE(drift, lambda t, y: torch.from_numpy(y.numpy() * 0.3)).to_stratonovich()
    with pytest.raises(fs.InputError, match="diffusion: got a function that torch.func cannot transform"):
        fs.solve(sde, fs.Heun(), state(3, 2), [0.0, 1.0])


def test_wrong_calculus_names_the_conversion():
    with pytest.raises(fs.InputError, match=r"Solve sde.to_stratonovich\(\)"):
        fs.solve(fs.SDE(drift, DIFFUSIONS["diagonal"]), fs.Heun(), state(3, 2), [0.0, 1.0])


RHO = 0.6
R = torch.tensor([[1.0, RHO], [RHO, 1.0]], dtype=F64)


def test_correlated_prices_have_their_product():
    """E[S_1 S_2] = exp(rho sigma_1 sigma_2) of two correlated geometric Brownian motions, within 4 standard errors."""
    sigma = torch.tensor([0.4, 0.5], dtype=F64)
    sde = fs.SDE(lambda t, y: 0 * y, lambda t, y: sigma * y).correlated(R)
    assert (sde.noise_type, sde.sde_type) == ("commutative", "ito")
    y = fs.solve(sde, fs.Milstein(), torch.ones(100_000, 2, dtype=F64), torch.linspace(0, 1, 9), seed=0).y
    product = y.prod(-1)
    assert abs(product.mean() - math.exp(RHO * 0.2)) < 4 * product.std() / 100_000**0.5
    assert abs(product.mean() - 1) > 20 * product.std() / 100_000**0.5


@pytest.mark.parametrize("kind", ["additive", "commutative", "general"])
def test_columns_have_the_covariance_g_R_g(kind):
    diffusion = {"additive": lambda t, y: matrix(t, 0 * y)}.get(kind, DIFFUSIONS.get(kind))
    sde, y = fs.SDE(drift, diffusion, kind), state(5, 2)
    other, factor = sde.correlated(R), torch.tensor([[1.0, 0.0, 0.0], [RHO, 0.0, 0.8]], dtype=F64)
    wide = sde.correlated(factor=factor)
    g = sde.diffusion(T, y)
    assert other.noise_type == kind
    assert wide.diffusion(T, y).shape == (5, 2, 3)
    for found in (other.diffusion(T, y), wide.diffusion(T, y)):
        torch.testing.assert_close(found @ found.mT, g @ R @ g.mT)
    assert fs.solve(wide, fs.EulerMaruyama(), y, [0.0, 1.0]).y.shape == (5, 2)


def test_singular_correlations_and_elementwise_noise():
    ones = torch.ones(3, 3)
    sde = fs.SDE(drift, lambda t, y: torch.full_like(y, 2.0), "additive").correlated(ones)
    y = fs.solve(sde, fs.EulerMaruyama(), torch.zeros(4, 3), [0.0, 1.0], seed=0).y
    torch.testing.assert_close(y, y[:, :1].expand(4, 3), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(), "either a correlation"),
        (dict(correlation=R, factor=R), "either a correlation"),
        (dict(correlation=torch.ones(2)), "expected a matrix"),
        (dict(correlation=2 * R), "ones on its diagonal"),
        (dict(correlation=[[1.0, 0.5], [0.4, 1.0]]), "symmetric"),
        (dict(correlation=[[1.0, 1.5], [1.5, 1.0]]), "least eigenvalue -0.5"),
        (dict(correlation="x"), "correlation: got"),
        (dict(factor=R), "squared norms"),
        (dict(factor=torch.ones(2, 0)), "squared norms"),
    ],
)
def test_invalid_matrices_are_refused(arguments, message):
    with pytest.raises(fs.InputError, match=message):
        fs.SDE(drift, matrix, "general").correlated(**arguments)


def test_channels_must_fit_and_one_channel_has_nothing_to_correlate_with():
    sde = fs.SDE(drift, matrix, "general").correlated(torch.eye(3))
    with pytest.raises(fs.InputError, match="3 rows for 2 channels"):
        fs.solve(sde, fs.EulerMaruyama(), state(3, 2), [0.0, 1.0])
    for one in (fs.ODE(drift), fs.SDE(drift, DIFFUSIONS["scalar"], "scalar")):
        with pytest.raises(fs.InputError, match="two channels or more"):
            one.correlated(torch.eye(1))
