"""Following the advice of an error makes the call succeed."""

import types

import pytest
import torch

import fewstep as fs
from fewstep import distances
from fewstep.brownian.levy_area import levy_area
from fewstep.integrations import k_diffusion as kd
from fewstep.integrations.torchsde import BrownianView, sdeint
from fewstep.learned.sfddm.process import StudentProcess

F64, HALF = torch.float64, torch.bfloat16
Y, X = torch.full((4, 2), 0.4), torch.ones(4, 2)
GRID = torch.linspace(0, 1, 5)
f, g = lambda t, y: -y, lambda t, y: 0.2 * y
GBM, MATRIX = fs.SDE(f, g), lambda t, y: torch.diag_embed(0.2 * y)
GENERAL = fs.SDE(f, MATRIX, "general")
EDM, VP = fs.EDM(0.05, 10.0), fs.VPLinear()
MODEL = fs.DiffusionModel(lambda x, s: x / (1 + s * s), EDM)
THEIRS = types.SimpleNamespace(f=f, g=g, noise_type="diagonal", sde_type="ito")
SIGMAS = torch.tensor([10.0, 3.0, 1.0, 0.1], dtype=F64)
GRAPH = SIGMAS.clone().requires_grad_()
PLAN = fs.DDIM().plan(SIGMAS)
BUFFER = torch.empty(4, 2)
TABLE = torch.linspace(0.99, 0.0, 50, dtype=F64)
INCREMENT = fs.BrownianPath((4, 2), levy="H").increment(0, 1)
WRAPPED = lambda x, s: x / (1 + s[:, None] ** 2)  # noqa: E731


def solve(sde=GBM, solver=None, y0=Y, grid=GRID, **kw):
    return fs.solve(sde, solver or fs.EulerMaruyama(), y0, grid, **kw)


def sample(model=MODEL, solver=None, **kw):
    kw = kw or dict(shape=(4, 2), steps=4)
    return fs.sample(model, solver or fs.DDIM(), **kw)


def path(levy="W", shape=(4, 2), **kw):
    return fs.BrownianPath(shape, levy=levy, **kw)


# (a call that is refused, words of its advice, the call after following it)
ADVICE = {
    "class": (lambda: solve(solver=fs.Milstein), "Call a class first", lambda: solve(solver=fs.Milstein())),
    "sampler's class": (lambda: sample(solver=fs.DDIM), r"an instance, DDIM\(\)", lambda: sample(solver=fs.DDIM())),
    "spacing of a plan": (
        lambda: sample(solver=PLAN, shape=(4, 2), spacing="karras"), "Omit the grid",
        lambda: sample(solver=PLAN, shape=(4, 2)),
    ),
    "0-d": (lambda: solve(y0=torch.tensor(1.0)), r"reshape\(1\)", lambda: solve(y0=torch.tensor(1.0).reshape(1))),
    "integers": (lambda: solve(y0=Y.long()), r"to\(torch.float32\)", lambda: solve(y0=Y.long().to(torch.float32))),
    "close times": (
        lambda: solve(grid=1.7e9 + GRID), "pass them in float64", lambda: solve(grid=1.7e9 + GRID.double()),
    ),
    "converted, then guided": (
        lambda: fs.classifier_free_guidance(fs.from_epsilon(lambda x, t, c=0: x, VP), Y, Y, 2.0), "convert it then",
        lambda: fs.from_epsilon(fs.classifier_free_guidance(lambda x, t, c: x, Y, Y, 2.0), VP),
    ),
    "module": (lambda: fs.SDE(THEIRS), "SDE.from_module", lambda: solve(fs.SDE.from_module(THEIRS))),
    "module to solve": (lambda: solve(THEIRS), "SDE.from_module", lambda: solve(fs.SDE.from_module(THEIRS))),
    "drift alone": (lambda: fs.SDE(f), r"fewstep.ODE\(drift\)", lambda: solve(fs.ODE(f))),
    "none with diffusion": (lambda: fs.SDE(f, g, "none"), r"Use fewstep.ODE\(drift\)", lambda: solve(fs.ODE(f))),
    "word": (lambda: fs.SDE(f, g, "diagonl"), "mean 'diagonal'", lambda: solve(fs.SDE(f, g, "diagonal"))),
    "matrix for diagonal": (lambda: solve(fs.SDE(f, MATRIX)), "noise_type='general'", lambda: solve(GENERAL)),
    "vector for general": (lambda: solve(fs.SDE(f, g, "general")), "noise_type='diagonal'", solve),
    "constant drift": (
        lambda: solve(fs.SDE(lambda t, y: torch.zeros(()), g)), "torch.full_like",
        lambda: solve(fs.SDE(lambda t, y: torch.full_like(y, 0.0), g)),
    ),
    "noise type": (
        lambda: solve(GENERAL, fs.Milstein()), r"fewstep.solvers\('general'\) lists",
        lambda: [solve(GENERAL, s) for s in fs.solvers("general").values() if "ito" in s.card.sde_types],
    ),
    "buffer": (
        lambda: solve(fs.SDE(f, lambda t, y: BUFFER.copy_(g(t, y))), fs.Milstein()), "DerivativeFreeMilstein",
        lambda: solve(fs.SDE(f, lambda t, y: BUFFER.copy_(g(t, y))), fs.DerivativeFreeMilstein()),
    ),
    "reverse time": (
        lambda: solve(grid=GRID.flip(0)), "or an ODE", lambda: solve(fs.ODE(f), fs.RK4(), grid=GRID.flip(0))
    ),
    "list of y0": (
        lambda: solve(y0=[[1.0, 2.0]]), "torch.as_tensor",
        lambda: solve(y0=torch.as_tensor([[1, 2]], dtype=torch.float32)),
    ),
    "levy of a path": (
        lambda: solve(solver=fs.SRID2(), path=path("W")), "levy='H'", lambda: solve(solver=fs.SRID2(), path=path("H"))
    ),
    "area": (
        lambda: solve(GENERAL, fs.LogODE(), path=path("H")), r"AreaPath\(BrownianPath",
        lambda: solve(GENERAL, fs.LogODE(), path=fs.AreaPath(path("H"), 8)),
    ),
    "dtype of a path": (
        lambda: solve(y0=Y.to(HALF), path=path(dtype=F64)), "dtype=torch.float32",
        lambda: solve(y0=Y.to(HALF), path=path(dtype=torch.float32)),
    ),
    "short path": (lambda: solve(path=path(t1=0.5)), "at least this interval", lambda: solve(path=path(t1=1.0))),
    "graph of times": (
        lambda: solve(grid=GRID.clone().requires_grad_()), r"tensor.detach\(\)",
        lambda: solve(grid=GRID.clone().requires_grad_().detach()),
    ),
    "graphs in a list": (
        lambda: sample(shape=(4, 2), sigmas=[*GRAPH]), r"tensor.detach\(\)",
        lambda: sample(shape=(4, 2), sigmas=[s.detach() for s in GRAPH]),
    ),
    "graph of samples": (
        lambda: distances.sliced_w2(X.clone().requires_grad_(), X), r"tensor.detach\(\)",
        lambda: distances.sliced_w2(X.clone().requires_grad_().detach(), X),
    ),
    "no diffusion solver": (
        lambda: sample(solver=fs.Milstein()), "EulerMaruyama, SEA, ShARK, SRA1 and SOSRA",
        lambda: [sample(solver=s()) for s in (fs.EulerMaruyama, fs.SEA, fs.ShARK, fs.SRA1, fs.SOSRA)],
    ),
    "grid of a plan": (
        lambda: sample(solver=PLAN, shape=(4, 2), steps=3), "Omit the grid", lambda: sample(solver=PLAN, shape=(4, 2))
    ),
    "no grid": (lambda: sample(shape=(4, 2)), "steps=...", lambda: sample(shape=(4, 2), steps=3)),
    "rising sigmas": (
        lambda: sample(solver=fs.ShARK(), shape=(4, 2), sigmas=SIGMAS.tolist()[::-1]), "Reverse increasing",
        lambda: sample(solver=fs.ShARK(), shape=(4, 2), sigmas=SIGMAS.tolist()),
    ),
    "rising timesteps": (
        lambda: fs.sigma_grid(VP, 2, timesteps=[0.1, 0.9]), "Reverse increasing",
        lambda: fs.sigma_grid(VP, 2, timesteps=[0.9, 0.1]),
    ),
    "tiny sigma": (
        lambda: sample(shape=(4, 2), sigmas=[10.0, 1.0, 1e-200]), "or end at 0",
        lambda: sample(shape=(4, 2), sigmas=[10.0, 1.0, 0.0]),
    ),
    "path of a sampler": (
        lambda: sample(solver=fs.ShARK(), shape=(4, 2), sigmas=SIGMAS, path=path("H")),
        r"expected a path over .* Make it in the clock tau = 1/sigma\^2 .* clock='log'",
        lambda: sample(solver=fs.ShARK(), shape=(4, 2), sigmas=SIGMAS, path=path("H", t0=0.01, t1=100.0, clock="log")),
    ),
    "no schedule": (lambda: fs.PNDM().plan(SIGMAS), r"plan\(sigmas, schedule\)", lambda: fs.PNDM().plan(SIGMAS, VP)),
    "zero terminal SNR": (
        lambda: fs.DiscreteVP(TABLE), "zero_terminal_snr", lambda: fs.DiscreteVP(fs.zero_terminal_snr(TABLE))
    ),
    "diffusers output": (
        lambda: sample(fs.DiffusionModel(fs.from_epsilon(lambda x, t: types.SimpleNamespace(sample=x), VP), VP)),
        r"net\(x, t\).sample",
        lambda: sample(fs.DiffusionModel(fs.from_epsilon(lambda x, t: types.SimpleNamespace(sample=x).sample, VP), VP)),
    ),
    "weak with tol": (
        lambda: levy_area(INCREMENT, method="foster", tol=0.1), "method='legendre'",
        lambda: levy_area(INCREMENT, method="legendre", tol=0.1),
    ),
    "conditioned area": (
        lambda: levy_area(INCREMENT, method="wiktorsson"), "Use 'legendre'",
        lambda: levy_area(INCREMENT, method="legendre"),
    ),
    "half path": (lambda: path(dtype=HALF), r"Convert increments with .to", lambda: INCREMENT.to(HALF)),
    "view without H": (
        lambda: BrownianView(path("W"))(0.0, 0.5, return_U=True), "levy='H'",
        lambda: BrownianView(path("H"))(0.0, 0.5, return_U=True),
    ),
    "options of a method": (
        lambda: kd.sampler(fs.DDIM())(WRAPPED, X, SIGMAS, eta=1.0), r"sampler\(fewstep.DDIM\(eta=1.0\)\)",
        lambda: kd.sampler(fs.DDIM(eta=1.0))(WRAPPED, X, SIGMAS),
    ),
    "noise sampler": (
        lambda: kd.sampler(fs.ShARK())(WRAPPED, X, SIGMAS, noise_sampler=kd.BrownianNoiseSampler(X, 0.1, 10.0)),
        "transform=snr",
        lambda: kd.sampler(fs.ShARK())(
            WRAPPED, X, SIGMAS, noise_sampler=kd.BrownianNoiseSampler(X, 0.1, 10.0, transform=kd.snr)
        ),
    ),
    "wrapper without levels": (
        lambda: kd.as_denoiser(WRAPPED), "sigma_min=", lambda: kd.as_denoiser(WRAPPED, sigma_min=0.1, sigma_max=10.0)
    ),
    "middle of a step": (
        lambda: fs.EDMHeun().plan(SIGMAS).tail(1), "a solver of one evaluation per step", lambda: PLAN.tail(1)
    ),
    "name of a sampler": (
        lambda: sample(solver="dpm_solver_pp(3)"), r"Write fewstep.DPMSolverPP\(order=3\)",
        lambda: sample(solver=fs.DPMSolverPP(order=3)),
    ),
    "name of a solver": (
        lambda: solve(solver="srid2"), r"Write fewstep.SRID2\(\)\.", lambda: solve(solver=fs.SRID2())
    ),
    "misspelt option": (
        lambda: sample(shape=(4, 2), step=4), "Did you mean 'steps'", lambda: sample(shape=(4, 2), steps=4)
    ),
    "misspelt option of solve": (lambda: solve(seeds=1), "Did you mean 'seed'", lambda: solve(seed=1)),
    "empty t0": (
        lambda: path(clock="log"), "first time above 0", lambda: path(clock="log", t0=0.01)
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ADVICE)
def test_following_the_advice_of_an_error_makes_the_call_succeed(case):
    wrong, advice, cured = ADVICE[case]
    with pytest.raises(fs.InputError, match=advice):
        wrong()
    cured()


BETAS = torch.linspace(1e-4, 0.02, 1000, dtype=F64)
DEEP = fs.BrownianPath((4, 2), 0.0, 1.3)
WORDS = "float64|grew|cuts|unstable|unexpected|betas|x0 is left"
WARNINGS = {
    "equal times": lambda: fs.solve(fs.ODE(f), fs.RK4(), Y, [1.7e9, 1.7e9 + 1]),
    "growth": lambda: fs.solve(fs.ODE(lambda t, y: 60 * y), fs.RK4(), Y, GRID),
    "grid": lambda: list(DEEP.increments(torch.linspace(0, 1, 101))),
    "grid of a solve": lambda: fs.solve(GBM, fs.EulerMaruyama(), Y, torch.linspace(0, 1, 101), path=DEEP),
    "plan": lambda: fs.SEEDS().plan(SIGMAS),
    "sample": lambda: fs.sample(MODEL, fs.SEEDS(), shape=(4, 2), steps=4),
    "sampler": lambda: kd.sampler(fs.SEEDS())(WRAPPED, X, SIGMAS),
    "sdeint": lambda: sdeint(THEIRS, Y, [0.0, 1.0], dt=0.5, rtoll=1),
    "table": lambda: fs.DiscreteVP(1 - BETAS),
    "levels": lambda: StudentProcess(fs.DiscreteVP.named(), torch.arange(0, 500, 100)),
}


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("case", WARNINGS)
def test_warnings_name_the_users_line(case):
    call = WARNINGS[case]
    with pytest.warns(UserWarning, match=WORDS) as caught:
        call()
    assert [(w.filename, w.lineno) for w in caught] == [(__file__, call.__code__.co_firstlineno)]


@pytest.mark.parametrize("name", ["linear", "scaled_linear"])
def test_tables_of_one_minus_beta_are_warned_of(name):
    """Of diffusers' tables; the tables themselves and parts of them are accepted, and betas refused."""
    good = 1 / (1 + torch.exp(2 * fs.DiscreteVP.named(name).log_sigmas))
    betas = 1 - good / torch.cat([torch.ones(1), good[:-1]])
    with pytest.warns(UserWarning, match=r"If it is 1 - betas, pass torch.cumprod\(1 - betas, 0\)"):
        fs.DiscreteVP(1 - betas)
    with pytest.raises(fs.InputError, match=r"torch.cumprod\(1 - betas, 0\)"):
        fs.DiscreteVP(betas)
    for table in (good, good[:300], good[::7], fs.zero_terminal_snr(good)):
        fs.DiscreteVP(table)  # a warning is an error here
