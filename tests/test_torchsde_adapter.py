"""torchsde by changing one import: the same numbers along the same path, the same shape, gradients."""

import fewstep as fs
import pytest
import torch
import torchsde
from fewstep.adapters.torchsde import TorchsdePath, sdeint


class Theirs(torch.nn.Module):
    noise_type, sde_type = "diagonal", "ito"

    def __init__(self, sde_type="ito"):
        super().__init__()
        self.sde_type = sde_type
        self.a = torch.nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

    def f(self, t, y):
        return -torch.sin(y)

    def g(self, t, y):
        return 0.3 + self.a * torch.cos(y)


Y0, TS = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(8, 3), torch.tensor([0.0, 0.5, 1.0]).double()


def interval():
    return torchsde.BrownianInterval(0.0, 1.0, size=(8, 3), dtype=torch.float64, entropy=3,
                                     levy_area_approximation="space-time")  # fmt: skip


@pytest.mark.parametrize(
    ("method", "calculus"),
    [("euler", "ito"), ("milstein", "ito"), ("srk", "ito"), ("euler_heun", "stratonovich"),
     ("heun", "stratonovich"), ("midpoint", "stratonovich"), ("milstein", "stratonovich")],
)  # fmt: skip
def test_the_same_method_on_the_same_path_gives_the_same_numbers(method, calculus):
    sde, bm = Theirs(calculus), interval()
    theirs = torchsde.sdeint(sde, Y0, TS, bm=bm, method=method, dt=2**-5)
    ours = sdeint(sde, Y0, TS, bm=bm, method=method, dt=2**-5)
    assert ours.shape == theirs.shape == (3, 8, 3)
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


def test_gradients_reach_the_parameters():
    sde, bm = Theirs(), interval()
    grads = []
    for integrate in (torchsde.sdeint, sdeint):
        sde.zero_grad()
        integrate(sde, Y0, TS, bm=bm, method="milstein", dt=2**-4)[-1].sum().backward()
        grads.append(sde.a.grad.clone())
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-10, atol=1e-10)


def test_without_a_path_times_need_not_be_dyadic_and_the_seed_decides():
    ts = torch.tensor([0.0, 0.33, 0.4, 1.1])
    a, b, c = (sdeint(Theirs(), Y0, ts, method="srid2", dt=0.1, seed=s) for s in (1, 1, 2))
    assert a.shape == (4, 8, 3)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    torch.testing.assert_close(a[0], Y0)
    path = fs.BrownianPath((8, 3), 0.0, 1.1, seed=4, levy="H", dtype=torch.float64)
    assert sdeint(Theirs(), Y0, ts, bm=path, dt=0.1).isfinite().all()


def test_names_and_a_solver_object():
    class Other(Theirs):
        def drift(self, t, y):
            return self.f(t, y)

    bm = interval()
    a = sdeint(Other(), Y0, TS, bm=bm, method=fs.Milstein(), dt=0.25, names={"drift": "drift"})
    assert torch.equal(a, sdeint(Theirs(), Y0, TS, bm=bm, method="milstein", dt=0.25))


BAD = {
    "method": (dict(method="srkk"), "Did you mean 'srk'"),
    "adaptive": (dict(adaptive=True), "adaptive"),
    "dt": (dict(dt=0.0), "dt: got 0.0"),
    "noise": (dict(method="shark"), "ShARK for 'diagonal'"),
    "sde": (dict(sde=object()), "without f, g"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused(case):
    changes, words = BAD[case]
    with pytest.raises(fs.InputError, match=words):
        sdeint(**(dict(sde=Theirs(), y0=Y0, ts=TS, dt=0.1) | changes))
    with pytest.raises(fs.InputError, match=r"torchsde\.BrownianInterval"):
        TorchsdePath(object())
