"""Numbers on record (`recorded_numbers.py`) of what no device test makes: plans, grids, paths, reports, messages."""

import contextlib
import dataclasses
import inspect
import itertools
import re
import warnings

import pytest
import torch
from mixture_cases import GRID, MIXTURE, shifted
from recorded_numbers import check_number

import fewstep as fs
from fewstep import distances
from fewstep.brownian.levy_area import METHODS, terms_for
from fewstep.catalog import solver_named
from fewstep.compat import (
    DiffusersDDIM,
    DiffusersDPM,
    DiffusersHeun,
    DiffusersLCM,
    DiffusersPNDM,
    DiffusersRenoised,
    Ending,
    OfficialDPM,
)
from fewstep.fingerprint import Fingerprint
from fewstep.grid import spacing_names
from fewstep.integrations.k_diffusion import SAMPLERS
from fewstep.learned.labelled_model import Model
from fewstep.learned.sfddm.distill import LOSSES
from fewstep.learned.sigdeg.networks import Coefficients, DenoisingMLP
from fewstep.plan import COLUMNS
from fewstep.untrained import untrained

NOISE = 10 * torch.randn(32, 2, generator=torch.Generator().manual_seed(0))
TABLE = fs.DiscreteVP.named("scaled_linear", 1000)
OPTIONS = (
    "DDIM(0.5)", "DEIS(2, variable=log_rho)", "DPMSolver(3)", "DPMSolver(2, r=0.3)", "DPMSolverPP(1)", "DPMSolverPP(3)",
    "DPMSolverPP(3, multistep=False)", "DPMSolverSDE(2, eta=0.5)", "EDMEuler(churn=4)", "EDMHeun(churn=4)", "ERSDE(2)",
    "IPNDM(2)", "SASolver(2, 1)", "TCD(0.5)", "UniPC(1)", "UniPC(2)",
)  # fmt: skip
RHO, EULER, FULL = {"variable": "log_rho"}, Ending(euler=True), Ending(lower=False)
AS_ELSEWHERE = (
    DiffusersDPM(fs.DPMSolverPP(3)), DiffusersDPM(fs.DPMSolver(2), FULL), DiffusersDPM(fs.UniPC(3), EULER),
    DiffusersDPM(fs.DPMSolverPP(3, multistep=False)), DiffusersDPM(fs.DPMSolver(3, multistep=False), FULL),
    DiffusersDPM(fs.DPMSolverSDE(2)), DiffusersDPM(fs.DEIS(2, **RHO)), DiffusersDPM(fs.DEIS(3, **RHO)),
    DiffusersDDIM(0.5), DiffusersPNDM(), DiffusersPNDM("plms"), DiffusersPNDM(combine="v_prediction"),
    DiffusersPNDM(begin=3), DiffusersHeun(), DiffusersRenoised(), DiffusersLCM(), OfficialDPM(fs.DPMSolver(3)),
    OfficialDPM(fs.DPMSolverPP(3)), OfficialDPM(fs.DPMSolverSDE(3)), fs.Restart(fs.EDMHeun()),
)  # fmt: skip
SOLVERS = {n: s for n, s in {**fs.solvers(), **SAMPLERS}.items() if isinstance(s, fs.DiffusionSolver)}
SOLVERS |= {text: solver_named(text) for text in OPTIONS} | {f"compat {k}": s for k, s in enumerate(AS_ELSEWHERE)}
# to 0 or to sigma_min, few steps, and first steps over factors on both sides of the one from which they have order 1
GRIDS = {
    "20": fs.sigma_grid(TABLE, 20, "trailing"),
    "2": fs.sigma_grid(TABLE, 2, "trailing"),
    "to sigma_min": fs.sigma_grid(TABLE, 7, "linspace", "sigma_min"),
    **{f"{k}": torch.tensor([5.0 * k, 5, 2, 1, 0.5, 0.2, 0], dtype=torch.float64) for k in (80, 120)},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SOLVERS)
def test_plans(name):
    for grid in GRIDS.values():
        with contextlib.suppress(fs.InputError):  # grids that are not of integer labels
            plan = SOLVERS[name].plan(grid, TABLE)
            check_number(torch.cat([getattr(plan, key).flatten().nan_to_num(-1.0) for key in COLUMNS]))


SCHEDULES = {name: getattr(fs, name) for name in fs.__all__}
SCHEDULES = {n: s for n, s in SCHEDULES.items() if inspect.isclass(s) and issubclass(s, fs.Schedule)}
SCHEDULES = {n: s for n, s in SCHEDULES.items() if not inspect.isabstract(s)} | {"DiscreteVP": lambda: TABLE}


@pytest.mark.parametrize("name", SCHEDULES)
def test_grids(name):
    schedule = SCHEDULES[name]()
    for spacing, final in itertools.product(spacing_names(), ("x0", "sigma_min")):
        with contextlib.suppress(fs.InputError):  # published spacings that are for flows, or not for flows
            check_number(torch.cat([fs.sigma_grid(schedule, n, spacing, final) for n in (3, 12)]).log1p())
    check_number(fs.sigma_grid(schedule, 6, "karras", rho=3.0))
    check_number(fs.sigma_grid(schedule, 6, "leading", offset=1))


PATHS = {
    "W": lambda: fs.BrownianPath((5, 2), seed=3),
    "H": lambda: fs.BrownianPath((5, 2), 1.0, 3.0, seed=3, levy="H", knots=[1.5, 2.0]),
    "K": lambda: fs.BrownianPath((5, 2), seed=3, levy="K", dtype=torch.float64),
    "log": lambda: fs.BrownianPath((5, 2), 0.1, 20.0, seed=3, levy="H", clock="log"),
    "seeds": lambda: fs.BrownianPath((5, 2), seeds=[3, 4, 5, 6, 7], levy="H"),
    "portable": lambda: fs.BrownianPath((5, 2), seed=3, portable=True),
    "fresh": lambda: fs.FreshIncrements((5, 2), "K", seed=3),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", PATHS)
def test_paths(name):
    for times in ([1.0, 1.25, 1.5, 3.0], [1.1, 1.37, 2.9]):
        if name in ("W", "K", "seeds", "portable"):
            times = [(t - 1) / 2 for t in times]
        for increment in PATHS[name]().increments(times):
            check_number(torch.cat([part.flatten() for part in increment.coordinates()]))


def test_fingerprints():
    check_number(torch.tensor(Fingerprint.of_model(Model.of(MIXTURE, None, NOISE), NOISE).answers))
    for labels in (torch.arange(32) % 3, torch.linspace(0, 1, 32)):
        check_number(torch.tensor(Fingerprint.of_model(Model.of(shifted, labels, NOISE), NOISE).answers))
    own, other = (Fingerprint.of_model(Model.of(m, None, NOISE), NOISE) for m in (MIXTURE, shifted(torch.ones(32))))
    check_number(torch.tensor(own.miss(other)))


@pytest.mark.parametrize("name", fs.solvers())
def test_cards(name):
    for part in numbers_in(fs.solvers()[name].card):
        check_number(part)


@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("davie", "foster")])
def test_terms_of_areas(method):
    terms = [terms_for(method, h, m, tol) for h in (1e-3, 0.5) for m in (2, 5) for tol in (None, 1e-2, 10.0)]
    check_number(torch.tensor(terms, dtype=torch.float64))


def test_solvers_that_are_compared():
    text = repr([(found.solver, found.spacing, found.plan.nfe) for found in untrained(MIXTURE.schedule, 6)])
    check_number(torch.tensor(list(text.encode())))


def test_distances():
    a, b = NOISE, NOISE.flip(0).mul(1.5) + 1
    for name in ("rmse", "w1", "sliced_w2", "mmd", "energy_distance"):
        x, y = (a[:, :1], b[:, :1]) if name == "w1" else (a, b)
        check_number(torch.tensor(getattr(distances, name)(x, y)))


GUIDANCE = {
    "plain": {},
    "rescale": {"rescale": 0.7}, "APG": {"parallel": 0.2, "norm": 2.0}, "interval": {"interval": (0.3, 3.0)},
    "per sample": {"scale": torch.linspace(1, 5, 32)}, "per level": {"scale": lambda sigma: 1 + sigma},
}  # fmt: skip


@pytest.mark.parametrize("name", GUIDANCE)
def test_guidance(name):
    network = lambda x, t, c: 0.5 * x + 0.01 * t.reshape(-1, 1) + c  # noqa: E731
    guided = fs.classifier_free_guidance(network, torch.full((32, 2), 0.3), torch.zeros(32, 2), **GUIDANCE[name])
    model = fs.DiffusionModel(fs.from_epsilon(guided, TABLE), TABLE)
    check_number(fs.sample(model, fs.DPMSolverPP(2), noise=NOISE / 10, steps=5))
    if name in ("plain", "interval"):
        check_number(fs.sample(model, fs.DPMSolverPP(2), noise=NOISE / 10, steps=5, cfg_pp=True))


def numbers_in(value):
    """All numbers of a result, but for seconds: of tensors, networks, and what holds them."""
    if torch.is_tensor(value):
        return [value.detach().double().flatten().nan_to_num(-1.0)]
    if isinstance(value, torch.nn.Module):
        value = value.state_dict()
    if dataclasses.is_dataclass(value):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        value = [v for k, v in value.items() if k != "seconds"]
    if isinstance(value, (list, tuple)):
        return [part for v in value for part in numbers_in(v)]
    return [torch.tensor([float(value)])] if isinstance(value, (int, float)) else []


def network(letters=0):
    made = DenoisingMLP((2,), 8, 1).requires_grad_(False)
    return made.with_signature(letters) if letters else made


class Labelled(torch.nn.Module):
    """A network that takes labels."""

    labelled = True

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x, sigma, labels):
        return self.inner(x, sigma) + 0.1 * labels.reshape(-1, 1)


SHORT, FEW = fs.TrainingOptions(iterations=3, batch_size=8), fs.TeacherOptions(trajectories=16)
PATIENT = fs.TrainingOptions(
    iterations=12, batch_size=8, checkpoint_every=2, early_stopping_patience=1, learning_rate=0.1
)
SFDDM = dict(start="random", schedule=fs.DiscreteVP.named(steps=20), steps=3, data=NOISE / 10, training=SHORT)
SIGDEG = dict(event_shape=(2,), steps=2, teacher_steps=4, teacher_options=FEW, training=SHORT)
GBM = fs.SDE(lambda t, y: 0.3 * y - 0.1 * t, lambda t, y: 0.2 * y + 0.1 * t)
FITS = {
    **{f"sfddm {loss}": lambda loss=loss: fs.distill_sfddm(teacher=network(), loss=loss, **SFDDM) for loss in LOSSES},
    "sfddm labels": lambda: fs.distill_sfddm(teacher=Labelled(network()), labels=torch.arange(32) % 3, **SFDDM),
    "sfddm published": lambda: fs.distill_sfddm(teacher=network(), target="published", hidden=0.1, **SFDDM),
    **{f"sigdeg {levy}": lambda levy=levy: fs.distill_sigdeg(MIXTURE, levy=levy, **SIGDEG) for levy in "WHK"},
    "sigdeg forcing": lambda: fs.distill_sigdeg(MIXTURE, forcing=0.5, **SIGDEG),
    "sigdeg patience": lambda: fs.distill_sigdeg(MIXTURE, **SIGDEG | {"training": PATIENT}),
    "sigdeg step": lambda: fs.distill_sigdeg_step(
        GBM, steps=2, y0=torch.ones(1, 1), teacher_options=dataclasses.replace(FEW, substeps=2), training=SHORT,
        network=Coefficients(1, 5, width=4),
    ),
    "dode": lambda: fs.distill_dode(MIXTURE, fs.DDIM(), noise=NOISE, steps=3, teacher_substeps=2),
    "dode terms": lambda: fs.distill_dode(MIXTURE, fs.IPNDM(2), noise=NOISE, steps=3, teacher_substeps=2, terms=2),
    "table": lambda: fs.fit_table(MIXTURE, nfe=3, noise=NOISE, iterations=2, starts=2, teacher_steps=8),
    **{f"table {levy}": lambda levy=levy: fs.fit_table(
        MIXTURE, nfe=2, noise=NOISE, iterations=2, starts=1, teacher_steps=8, levy=levy) for levy in "WHK"},
    "grid": lambda: fs.fit_grid(MIXTURE, 3, noise=NOISE, nodes=8, sweeps=1),
    "compare": lambda: fs.compare(MIXTURE, 4, noise=NOISE, solvers=["ddim", fs.UniPC(3)], spacings=["karras"], tol=1.0),
    "trajectories": lambda: fs.make_trajectories(MIXTURE, GRID, count=8, event_shape=(2,), substeps=2),
    "invert": lambda: fs.invert(MIXTURE, fs.DPMSolverPP(2), NOISE / 10, steps=6),
    "likelihood": lambda: fs.log_likelihood(MIXTURE, NOISE / 10, steps=6),
    "likelihood probes": lambda: fs.log_likelihood(MIXTURE, NOISE / 10, steps=6, probes=2),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FITS)
def test_fits(name):
    """What a fit returns and reports; a training's numbers are those of a few iterations."""
    torch.manual_seed(0)  # of weights
    for part in numbers_in(FITS[name]()):
        check_number(part)


DRIFT = lambda t, y: -900 * y - 100 * y.abs() * y  # noqa: E731
UNSTABLE = {
    "additive": fs.SDE(DRIFT, lambda t, y: 0.1 + 0 * y, "additive"),
    "diagonal": fs.SDE(DRIFT, lambda t, y: 0.1 * y),
    "growth": fs.SDE(lambda t, y: 9000 * y, lambda t, y: 0.1 * y),
    "ode": fs.ODE(DRIFT),
    "curved": fs.ODE(lambda t, y: -900 * y - 1e6 * y**3),
}


@pytest.mark.parametrize("steps", [8, 100])
@pytest.mark.parametrize("name", UNSTABLE)
def test_advice(name, steps):
    """The numbers in the warning about a state that has grown, and in the error about one that is not finite."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        try:
            fs.solve(UNSTABLE[name], fs.EulerMaruyama(), torch.ones(4, 2), torch.linspace(0, 1, steps + 1), seed=0)
        except fs.NonFiniteError as error:
            warnings.warn(str(error), stacklevel=1)
    numbers = re.findall(r"\d+\.?\d*(?:e[-+]?\d+)?", str(seen[-1].message))
    for number in numbers:
        check_number(torch.tensor([float(number)], dtype=torch.float64))
