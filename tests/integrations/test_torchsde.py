"""The torchsde integration: same numbers along the same path, same signature, same gradients."""

import contextlib
import functools
import inspect

import pytest
import torch
import torchsde

import fewstep as fs
from fewstep.integrations.torchsde import BrownianView, TorchsdePath, sdeint
from fewstep.integrations.torchsde_problem import THEIR_METHODS


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
def test_same_method_on_same_path_gives_same_numbers(method, calculus):
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


def test_own_path_takes_any_times_and_is_fixed_by_seed():
    ts = torch.tensor([0.0, 0.33, 0.4, 1.1])
    a, b, c = (sdeint(Theirs(), Y0, ts, method="srid2", dt=0.1, seed=s) for s in (1, 1, 2))
    assert a.shape == (4, 8, 3)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    torch.testing.assert_close(a[0], Y0)
    path = fs.BrownianPath((8, 3), 0.0, 1.1, seed=4, levy="H", dtype=torch.float64)
    assert sdeint(Theirs(), Y0, ts, bm=path, dt=0.1).isfinite().all()


def test_renamed_methods_and_solver_objects_are_accepted():
    class Other(Theirs):
        def drift(self, t, y):
            return self.f(t, y)

    bm = interval()
    a = sdeint(Other(), Y0, TS, bm=bm, method=fs.Milstein(), dt=0.25, names={"drift": "drift"})
    assert torch.equal(a, sdeint(Theirs(), Y0, TS, bm=bm, method="milstein", dt=0.25))


def test_signature_extends_that_of_torchsde():
    theirs, ours = (inspect.signature(s).parameters for s in (torchsde.sdeint, sdeint))
    named = [n for n, p in theirs.items() if p.kind is not p.VAR_KEYWORD]
    assert list(ours)[: len(named)] == named
    assert [ours[n].default for n in named] == [theirs[n].default for n in named]
    assert list(ours)[len(named) :] == ["seed", "unused_kwargs"]
    with pytest.warns(UserWarning, match="unexpected arguments {'rtoll': 1}"):
        sdeint(Theirs(), Y0, TS, dt=0.5, rtoll=1)


class Neural(torch.nn.Module):
    """The network of torchsde's README with time in its drift; diagonal noise acts on each component."""

    def __init__(self, noise_type, sde_type, dtype):
        super().__init__()
        self.noise_type, self.sde_type = noise_type, sde_type
        d, self.m = 3, {"scalar": 1}.get(noise_type, 2)
        rows = {"diagonal": (1, 1), "additive": (1, d * self.m)}.get(noise_type, (d, d * self.m))
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.mu = torch.nn.Sequential(torch.nn.Linear(d + 1, 8), torch.nn.Tanh(), torch.nn.Linear(8, d))
            self.sigma = torch.nn.Sequential(torch.nn.Linear(*rows), torch.nn.Sigmoid())
        self.to(dtype)

    def f(self, t, y):
        return self.mu(torch.cat([y, t.to(y).expand(len(y), 1)], 1))

    def g(self, t, y):
        if self.noise_type == "diagonal":
            return self.sigma(y.unsqueeze(-1)).squeeze(-1)
        of = torch.ones_like(y[:, :1]) if self.noise_type == "additive" else y
        return self.sigma(of).view(*y.shape, self.m)


# methods that agree with torchsde's; not "milstein" for scalar noise, where torchsde sums wrongly
SAME = {
    ("diagonal", "ito"): ["euler", "milstein", "grad_free", "srk"],
    ("diagonal", "stratonovich"): ["euler_heun", "heun", "midpoint", "milstein", "reversible_heun", "log_ode"],
    ("scalar", "ito"): ["euler", "grad_free", "srk"],
    ("scalar", "stratonovich"): ["midpoint", "reversible_heun"],
    ("additive", "ito"): ["euler", "milstein", "srk"],
    ("additive", "stratonovich"): ["heun", "log_ode"],
    ("general", "ito"): ["euler"],
    ("general", "stratonovich"): ["euler_heun", "heun", "midpoint", "reversible_heun"],
}
TWINS = [(*kind, method) for kind, methods in SAME.items() for method in methods]


def gradients(integrate, sde, y0, bm, method):
    """(states, gradients of y0 and of all parameters) of a loss of all saved states."""
    y0 = y0.clone().requires_grad_()
    words = dict(method="milstein", options={"grad_free": True}) if method == "grad_free" else {"method": method}
    ys = integrate(sde, y0, torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64), bm=bm, dt=2**-4, **words)
    return ys, torch.autograd.grad(ys.square().mean(), [y0, *sde.parameters()])


@pytest.mark.parametrize(("dtype", "within"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize(("noise_type", "sde_type", "method"), TWINS)
def test_gradients_of_neural_sde_equal_those_of_torchsde(noise_type, sde_type, method, dtype, within):
    """Relative to the largest entry of each gradient: 1e-12 in float64, 1e-5 in float32."""
    sde = Neural(noise_type, sde_type, dtype)
    m = 3 if noise_type == "diagonal" else sde.m
    bm = torchsde.BrownianInterval(0.0, 1.0, size=(8, m), dtype=dtype, entropy=3, dt=2**-4,
                                   levy_area_approximation="foster")  # fmt: skip
    y0 = torch.linspace(-1, 1, 24, dtype=dtype).reshape(8, 3)
    (theirs, want), (ours, got) = (gradients(s, sde, y0, bm, method) for s in (torchsde.sdeint, sdeint))
    assert (ours - theirs).abs().max() <= within * theirs.abs().max()
    for a, b in zip(got, want):
        assert (a - b).abs().max() <= within * b.abs().max()


@pytest.mark.parametrize(("noise_type", "sde_type", "method"), TWINS)
def test_torchsde_along_a_view_equals_our_solve(noise_type, sde_type, method):
    sde = Neural(noise_type, sde_type, torch.float64)
    shape = (8, 3 if noise_type == "diagonal" else sde.m)
    path = fs.AreaPath(fs.BrownianPath(shape, seed=5, levy="H", dtype=torch.float64), cells=16)
    (theirs, want), (ours, got) = (
        gradients(s, sde, Y0, bm, method)
        for s, bm in ((torchsde.sdeint, BrownianView(path)), (sdeint, path))
    )  # fmt: skip
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


class Heisenberg:
    """Two channels and their area: order 1 needs the area of the path itself."""

    noise_type, sde_type = "general", "stratonovich"

    def f(self, t, y):
        return torch.zeros_like(y)

    def g(self, t, y):
        a, b = y[:, 0], y[:, 1]
        rows = [torch.ones_like(a), 0 * a], [0 * a, torch.ones_like(a)], [torch.sin(a) - b / 2, a / 2]
        return torch.stack([torch.stack(row, -1) for row in rows], 1)


def test_view_of_an_area_path_raises_the_order_of_torchsdes_log_ode():
    """A quarter of the step: a quarter of the error along areas of the path, half along torchsde's own."""
    y0, ts = torch.zeros(200, 3, dtype=torch.float64), torch.tensor([0.0, 1.0], dtype=torch.float64)
    path = fs.AreaPath(fs.BrownianPath((200, 2), seed=5, levy="H", dtype=torch.float64), cells=256)
    own = torchsde.BrownianInterval(0.0, 1.0, size=(200, 2), dtype=torch.float64, entropy=3, cache_size=None,
                                    levy_area_approximation="foster")  # fmt: skip
    falls = []
    with torch.no_grad():
        for bm in (BrownianView(path), own):
            coarse, half, fine = (
                torchsde.sdeint(Heisenberg(), y0, ts, bm=bm, method="log_ode", dt=2.0**-k)[-1] for k in (2, 4, 7)
            )
            falls.append((coarse - fine).square().mean().sqrt() / (half - fine).square().mean().sqrt())
            if bm is not own:
                twin = sdeint(Heisenberg(), y0, ts, bm=path, method="log_ode", dt=2**-7)[-1]
                assert (twin - fine).square().mean().sqrt() < 5e-3
    assert falls[0] > 3.5
    assert falls[1] < 2.8


def test_adjoint_of_torchsde_runs_along_a_view():
    sde = Neural("general", "stratonovich", torch.float64)
    path = fs.BrownianPath((8, 2), seed=5, dtype=torch.float64)
    adjoint = functools.partial(torchsde.sdeint_adjoint, adjoint_method="adjoint_reversible_heun")
    _, want = gradients(sdeint, sde, Y0, path, "reversible_heun")
    _, got = gradients(adjoint, sde, Y0, BrownianView(path), "reversible_heun")
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("levy", ["W", "H", "K"])
def test_view_and_torchsde_path_are_inverse(levy):
    path = fs.BrownianPath((8, 3), 0.25, 2.0, seed=1, levy=levy, dtype=torch.float64)
    view = BrownianView(path)
    assert isinstance(view, torchsde.BaseBrownian)
    assert view.shape == view.size() == torch.Size((8, 3))
    assert (view.dtype, view.device) == (torch.float64, torch.device("cpu"))
    assert view.levy_area_approximation == ("none" if levy == "W" else "space-time")
    back = TorchsdePath(view)
    assert back.levy == ("W" if levy == "W" else "H")
    grid = torch.tensor([0.25, 0.3, 1.0, 1.7, 2.0], dtype=torch.float64)
    for a, b in zip(back.increments(grid), path.increments(grid)):
        assert a.h == pytest.approx(b.h, rel=1e-12)
        assert torch.equal(a.W, b.W)
        if levy != "W":
            torch.testing.assert_close(a.H, b.H, rtol=1e-12, atol=1e-14)


def test_view_returns_what_an_interval_does():
    path = fs.AreaPath(fs.BrownianPath((4, 2), seed=1, levy="H", dtype=torch.float64), cells=8)
    view, inc = BrownianView(path), path.increment(0.25, 0.75)
    assert view.levy_area_approximation == "foster"
    for got, want in (
        (view(0.25, torch.tensor(0.75), return_U=True, return_A=True), (inc.W, inc.U, inc.A)),
        (view(0.25, 0.75, return_A=True), (inc.W, inc.A)), (view(0.25, 0.75, True), (inc.W, inc.U)),
        ((view(0.25, 0.75), view(0.5)), (inc.W, path.increment(0, 0.5).W)),
        (view(0.5, 0.5, True, True), (0 * inc.W, 0 * inc.W, 0 * inc.A)),
    ):  # fmt: skip
        torch.testing.assert_close(tuple(got), tuple(want), rtol=0, atol=0)
    torch.testing.assert_close(view(-1e-9, 1 + 1e-7), path.increment(0, 1).W, rtol=0, atol=0)


VIEWS = {
    "path": (lambda: BrownianView(torch.zeros(2)), "path: got Tensor"),
    "fresh": (lambda: BrownianView(fs.FreshIncrements((2, 2))), "path: got FreshIncrements"),
    "U": (lambda: BrownianView(fs.BrownianPath((2, 2)))(0, 1, return_U=True), "levy='H'"),
    "A": (lambda: BrownianView(fs.BrownianPath((2, 2), levy="H"))(0, 1, return_A=True), "AreaPath"),
    "outside": (lambda: BrownianView(fs.BrownianPath((2, 2)))(0.5, 1.5), "1.5"),
    "backwards": (lambda: BrownianView(fs.BrownianPath((2, 2)))(0.75, 0.5), "increasing"),
}


@pytest.mark.parametrize("case", VIEWS)
def test_view_rejects_bad_input(case):
    call, words = VIEWS[case]
    with pytest.raises(fs.InputError, match=words):
        call()


class Parts:
    """The same SDE with any of torchsde's five methods, under any names."""

    def __init__(self, noise_type, **methods):
        self.noise_type, self.sde_type = noise_type, "ito"
        full = Neural(noise_type, "ito", torch.float64)
        of = {
            "f": full.f, "g": full.g, "f_and_g": lambda t, y: (full.f(t, y), full.g(t, y)),
            "g_prod": lambda t, y, v: fs.problem.diffuse(full.g(t, y), v),
            "f_and_g_prod": lambda t, y, v: (full.f(t, y), fs.problem.diffuse(full.g(t, y), v)),
        }  # fmt: skip
        vars(self).update({mine: of[theirs] for mine, theirs in methods.items()})


SETS = [["f", "g"], ["f_and_g"], ["f", "g_prod"], ["f_and_g_prod"], ["f", "f_and_g"], ["g", "f_and_g_prod"]]


@pytest.mark.parametrize("noise_type", ["diagonal", "scalar", "additive", "general"])
@pytest.mark.parametrize("methods", SETS, ids="+".join)
def test_any_set_of_methods_defines_the_sde(noise_type, methods):
    path = fs.BrownianPath((8, {"diagonal": 3, "scalar": 1}.get(noise_type, 2)), dtype=torch.float64, levy="H")
    sde = Parts(noise_type, **{n: n for n in methods})
    kw = dict(bm=path, dt=0.25)
    want = sdeint(Neural(noise_type, "ito", torch.float64), Y0, TS, **kw)
    torch.testing.assert_close(sdeint(sde, Y0, TS, **kw), want, rtol=1e-12, atol=1e-12)
    keys = {own: key for key, own in THEIR_METHODS.items()}
    renamed = Parts(noise_type, **{f"my_{n}": n for n in methods})
    names = {keys[n]: f"my_{n}" for n in methods}
    torch.testing.assert_close(sdeint(renamed, Y0, TS, **kw, names=names), want, rtol=1e-12, atol=1e-12)


def test_each_call_has_its_own_noise_fixed_by_torchs_seed():
    def ends(**kw):
        return sdeint(Theirs(), Y0, [0.0, 1.0], dt=0.25, **kw)[-1]

    torch.manual_seed(0)
    a, b = ends(), ends()
    torch.manual_seed(0)
    assert torch.equal(a, ends())
    assert not torch.equal(a, b)
    assert torch.equal(ends(seed=3), ends(seed=3))


@pytest.mark.parametrize(
    ("noise_type", "solver"),
    [("diagonal", "SRID2"), ("scalar", "SRID2"), ("additive", "SRA1"), ("general", "EulerMaruyama")],
)
def test_default_method_is_that_of_torchsde(noise_type, solver):
    sde = Neural(noise_type, "ito", torch.float64)
    a, b = (sdeint(sde, Y0, TS, dt=0.25, seed=1, method=m) for m in (None, getattr(fs, solver)()))
    assert torch.equal(a, b)


def test_milstein_of_torchsde_is_wrong_for_scalar_noise():
    """It multiplies by the transposed Jacobian: order 0.5 where ours (and its grad_free) have 1."""
    mix = torch.tensor([[0.1, 0.9], [0.0, -0.3]], dtype=torch.float64)

    class Scalar:
        noise_type, sde_type = "scalar", "ito"

        def f(self, t, y):
            return -0.5 * y

        def g(self, t, y):
            return (torch.sin(y) @ mix.T + 0.5).unsqueeze(-1)

    y0, view = torch.full((400, 2), 0.7).double(), BrownianView(
        fs.BrownianPath((400, 1), seed=2, levy="H", dtype=torch.float64))  # fmt: skip
    with torch.no_grad():
        fine = sdeint(Scalar(), y0, TS, bm=view, dt=2**-9)[-1]
        theirs, ours = (s(Scalar(), y0, TS, bm=view, method="milstein", dt=2**-5)[-1] - fine
                        for s in (torchsde.sdeint, sdeint))  # fmt: skip
    assert theirs.square().mean() > 25 * ours.square().mean()


def test_tree_of_torchsde_is_a_path():
    tree = torchsde.BrownianTree(0.0, torch.zeros(8, 3).double(), 1.0, entropy=1)
    theirs, ours = (s(Theirs(), Y0, TS, bm=tree, method="euler", dt=2**-4) for s in (torchsde.sdeint, sdeint))
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("method", ["srk", "milstein", "euler"])
def test_adaptive_steps_follow_the_tolerance_on_the_same_path(method):
    bm = interval()
    fine = sdeint(Theirs(), Y0, TS, bm=bm, method="srk", dt=2**-9)
    with pytest.warns(UserWarning, match="another limit") if method == "euler" else contextlib.nullcontext():
        ys = sdeint(Theirs(), Y0, TS, bm=bm, method=method, adaptive=True, rtol=1e-2, atol=1e-2, dt=2**-4)
    assert ys.shape == fine.shape
    assert (ys - fine).square().mean().sqrt() < {"srk": 5e-3, "milstein": 3e-2, "euler": 0.2}[method]


BAD = {
    "method": (dict(method="srkk"), "Did you mean 'srk'"),
    "method's class": (dict(method=fs.Milstein), r"method: got Milstein, expected a name .* Milstein\(\)"),
    "adjoint": (dict(method="adjoint_reversible_heun"), "Did you mean 'reversible_heun'"),
    "adaptive": (dict(adaptive="yes"), "adaptive: got 'yes'"),
    "tolerance": (dict(adaptive=True, rtol=-1.0), "rtol: got -1"),
    "options": (dict(options={"step": 1}), "options: got 'step', expected one of 'grad_free'"),
    "logqp": (dict(logqp=True), "logqp: got Theirs without a prior drift h"),
    "extra state": (dict(extra_solver_state=(Y0,)), "extra_solver_state: got tuple of 1 tensors, .* of 0 tensors"),
    "calculus": (dict(method="heun"), r"method: got 'heun' for a 'ito' SDE, .* fewstep\.Heun\(\)"),
    "dt": (dict(dt=0.0), "dt: got 0.0"),
    "ts": (dict(ts=[0.0, 1.0, 1.0]), "ts: got .* strictly increasing"),
    "one time": (dict(ts=[0.0]), "ts: got .* at least two"),
    "gradient of ts": (dict(ts=TS.clone().requires_grad_()), "ts: .* requires grad"),
    "y0": (dict(y0=[1.0]), "y0: got list"),
    "noise": (dict(method="shark"), "ShARK for 'diagonal'"),
    "sde": (dict(sde=object()), "without f, g"),
    "names' key": (dict(names={"drft": "f"}), "Did you mean 'drift'"),
    "names' value": (dict(names={"drift": "mu"}), "'mu', expected a method that Theirs has"),
    "channels": (dict(sde=Parts("general", f="f", g_prod="g_prod")), "bm: got None .* channels"),
    "bm": (dict(bm=torch.zeros(2)), r"torchsde\.BrownianInterval"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_rejected(case):
    changes, words = BAD[case]
    with pytest.raises(fs.InputError, match=words):
        sdeint(**(dict(sde=Theirs(), y0=Y0, ts=TS, dt=0.1) | changes))
    with pytest.raises(fs.InputError, match=r"torchsde\.BrownianInterval"):
        TorchsdePath(object())
