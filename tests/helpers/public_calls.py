"""A valid call of every public function, and wrong values for its arguments."""

import math
import types
from dataclasses import replace
from functools import partial

import numpy as np
import torch

import fewstep as fs
import fewstep_analysis as analysis
from fewstep import compat, distances
from fewstep.integrations import dpm_solver, k_diffusion
from fewstep.integrations import torchsde as theirs
from fewstep.integrations.diffusers import FewStepScheduler, pipeline
from fewstep.learned.sfddm.process import StudentProcess, subsequence
from fewstep.learned.sigdeg.networks import Coefficients, DenoisingMLP
from fewstep.testing import check_solver
from fewstep_analysis import datasets, diffusion_problems, problems, teachers

Y = torch.ones(2, 3)
TIMES, SIGMAS = torch.linspace(0, 1, 4), torch.tensor([10.0, 1.0, 0.1], dtype=torch.float64)
SDE = fs.SDE(lambda t, y: 0.1 * y, lambda t, y: 0.2 * y)
THEIRS = types.SimpleNamespace(f=SDE.drift, g=SDE.diffusion, noise_type="diagonal", sde_type="ito")
NET = DenoisingMLP((3,), 8, 1).eval().requires_grad_(False)
MODEL, TABLE = fs.DiffusionModel(NET, fs.EDM(0.1, 10.0)), fs.DiscreteVP.named(steps=20)
PATH, PLAN, NOISE = fs.BrownianPath((2, 3), levy="H"), fs.DDIM().plan(SIGMAS), torch.randn(64, 3)
AREAS, FRESH, INCREMENT = fs.AreaPath(PATH, 4), fs.FreshIncrements((2, 3)), fs.Increment(1.0, Y, Y)
PROCESS = StudentProcess(TABLE, torch.tensor([3, 9, 19]))
STUDENT = fs.SFDDM(NET, PROCESS)
SHORT, FEW = fs.TrainingOptions(iterations=1, batch_size=4), fs.TeacherOptions(trajectories=16)

# values that are wrong for every argument of a kind
OBJECT = [object(), "x?", 3, fs.DDIM, torch.nn.Module]
WORD = ["x?", object(), 7, fs.DDIM]
SHAPE = [3, "ab", (2.5, 3), (-1, 3), (2, None)]
DTYPE = [torch.int64, torch.complex64, "float32", 7]
DEVICE = ["nonsense", "cuda:99", 7.5, "meta:x"]
SEED = [1.5, "x?", True, math.nan, [1], 1j]
COUNT = [0, -3, 2.5, "3", True, math.nan, [1]]
STEPS = [*COUNT, 10**12]
GRAPH = torch.linspace(1, 0.1, 4, requires_grad=True)
NUMBER = ["1", math.nan, -math.inf, [1], 1j, True]
FLAG = ["x?", 7]
SCHEDULE = [*OBJECT, {}, lambda t: t, fs.VPLinear, Y, types.SimpleNamespace(sigma_min=0.1, sigma_max=9.0)]
FUNCTION = [3, "a", Y]
MODULE = [3, "a", Y, object(), lambda x: x, torch.nn.Module]
TENSOR = [3, "a", [1], np.ones(3)]
MAPPING = [3, "a", [1]]
LABELS = [3, "a", torch.tensor(1), torch.tensor([], dtype=torch.long)]
STATE = [[1.0], Y.long(), torch.tensor(1.0), Y * math.nan, "a", torch.ones(2, 3, device="meta")]
SAMPLES = [*STATE, Y.clone().requires_grad_()]
SOURCE = [3, object(), fs.BrownianPath((9, 9)), fs.EulerMaruyama()]  # paths
FILE = ["", 3, b"\0x", "a\0b"]
NOT_NUMBERS = ["ab", 1j, object(), [0.5, "a"], [math.nan, 0.5], [[0.0, 1.0]], [0.0, math.inf]]
INCREASING = [*NOT_NUMBERS, 0.5, [1.0, 0.0], [0.0, 0.0, 1.0]]
DECREASING = [*NOT_NUMBERS, 0.5, [0.0, 1.0], [3.0, 3.0, 1.0], [3.0, -1.0]]

SAMPLE = dict(problem=MODEL, solver=fs.DDIM(), shape=(2, 3), steps=3)
SOLVE = dict(sde=SDE, solver=fs.EulerMaruyama(), y0=Y, grid=TIMES)
ORDERS = dict(problem=problems.sine(), levels=range(2, 5), paths=16, reference="levels")
EXPECTED = dict(
    sde=problems.sine().sde,
    solver=fs.EulerMaruyama(),
    y0=problems.sine().y0,
    span=(0.0, 1.0),
    payoff=lambda y: y[:, 0],
    tolerance=1.0,
)
DODE = dict(problem=MODEL, base=fs.DDIM(), noise=NOISE, steps=3, teacher_substeps=2)
TABLE_FIT = dict(problem=MODEL, nfe=2, noise=NOISE, start=fs.DDIM(), starts=1, iterations=1, teacher_steps=2)
COMPARED = dict(problem=MODEL, nfe=2, noise=NOISE[:4], solvers=[fs.DDIM()], spacings=["karras"])
GRID = dict(steps=STEPS, sigmas=DECREASING, spacing=WORD)
SIGDEG = dict(problem=MODEL, event_shape=(3,), steps=2, teacher_steps=4, teacher_options=FEW, training=SHORT)
NARROW = Coefficients(3, 5, width=4)  # the least squares of the default network take ten seconds
STEP = dict(
    sde=SDE, steps=2, y0=Y, teacher_options=replace(FEW, substeps=2), training=SHORT, network=NARROW
)  # fmt: skip
SFDDM = dict(teacher=NET, schedule=TABLE, steps=3, data=NOISE[:32], training=SHORT)
MADE = dict(problem=MODEL, sigmas=SIGMAS, count=8, event_shape=(3,), substeps=2)
NETWORK = dict(model=NET, schedule=TABLE)

PLANNED = [s for s in fs.solvers().values() if isinstance(s, fs.DiffusionSolver)] + [
    fs.DEIS(variable="t"), fs.TCD(0.0), compat.DiffusersDDIM(), compat.DiffusersPNDM(), compat.DiffusersLCM(),
    compat.HeunPP2(), compat.DiffusersHeun(),
]  # fmt: skip

# (function, good arguments, wrong values of each argument, which are passed in turn)
ROWS = [
    # Brownian motion
    (fs.BrownianPath, dict(shape=(2, 3)), dict(shape=SHAPE, t0=NUMBER, t1=NUMBER, seed=SEED, levy=WORD,
                                               clock=WORD, dtype=DTYPE, device=DEVICE, knots=INCREASING,
                                               cache=NUMBER, seeds=LABELS, generator=WORD)),
    (PATH.increment, dict(ta=0.1, tb=0.5), dict(ta=NUMBER, tb=NUMBER)),
    (PATH.increments, {}, dict(grid=INCREASING)),
    (fs.AreaPath, dict(path=PATH, cells=4),
     dict(path=OBJECT, cells=STEPS, terms=COUNT, method=WORD, seed=SEED)),
    (AREAS.increments, {}, dict(grid=INCREASING)),
    (fs.FreshIncrements, dict(shape=(2, 3)),
     dict(shape=SHAPE, levy=WORD, seed=SEED, dtype=DTYPE, device=DEVICE)),
    (FRESH.increments, {}, dict(grid=INCREASING)),
    (FRESH.increment, dict(t0=0, t1=1), dict(t0=NUMBER, t1=NUMBER)),
    (fs.Increment, dict(h=1.0, W=Y), dict(h=NUMBER, W=TENSOR, H=TENSOR, K=TENSOR, A=TENSOR)),
    (INCREMENT.join, {}, dict(later=OBJECT)),
    (INCREMENT.to, {}, dict(dtype=DTYPE, device=DEVICE)),
    (fs.levy_area, dict(increment=INCREMENT, method="legendre"),
     dict(increment=OBJECT, method=WORD, seed=SEED, tol=NUMBER, terms=COUNT)),
    # problems, SDE solves
    (fs.SDE, vars(SDE), dict(drift=FUNCTION, diffusion=FUNCTION, noise_type=WORD, sde_type=WORD, derivative=FUNCTION)),
    (fs.SDE.from_torchsde, {}, dict(sde=OBJECT)),
    (fs.SDE.from_module, dict(module=THEIRS), dict(module=OBJECT, noise_type=WORD, sde_type=WORD)),
    (SDE.correlated, dict(correlation=[[1.0, 0.5], [0.5, 1.0]]), dict(correlation=["a", 1j, [1.0], [[2.0]]])),
    (fs.ODE, {}, dict(drift=FUNCTION)),
    (fs.UnderdampedLangevin, dict(force=SDE.drift), dict(force=FUNCTION, friction=NUMBER, temperature=NUMBER)),
    (fs.SKROCK, {}, dict(stages=COUNT)), (fs.TruncatedEuler, {}, dict(radius=NUMBER, growth=NUMBER)),
    (fs.ExponentialEuler, {}, dict(linear=NOT_NUMBERS[:3])),
    (fs.DiffusionModel, vars(MODEL), dict(denoiser=FUNCTION, schedule=SCHEDULE)),
    (fs.solve, SOLVE,
     dict(sde=OBJECT, solver=OBJECT, y0=STATE, grid=INCREASING, seed=SEED, save=WORD, path=SOURCE, compile=FLAG,
          gradient=WORD)),
    (fs.solve, SOLVE | dict(solver=fs.SRID2(), steps=fs.Adaptive(0.1, 0.1)),
     dict(steps=OBJECT, ts=INCREASING, dense=FLAG)),
    (fs.Adaptive, {},
     dict(max_steps=COUNT, force=FLAG) | dict.fromkeys(
         ("rtol", "atol", "first", "min_step", "pcoeff", "icoeff", "dcoeff", "safety", "smallest", "largest"), NUMBER)),
    (fs.solvers, {}, dict(noise_type=WORD)),
    (check_solver, {}, dict(solver=OBJECT)),
    (theirs.sdeint, dict(sde=THEIRS, y0=Y, ts=TIMES), dict(sde=OBJECT, method=OBJECT, y0=STATE, ts=INCREASING,
                                                           bm=SOURCE, dt=NUMBER, options=MAPPING,
                                                           names=MAPPING, seed=SEED)),
    (theirs.sdeint_adjoint, dict(sde=THEIRS, y0=Y, ts=TIMES),
     dict(sde=OBJECT, method=OBJECT, y0=STATE, ts=INCREASING, bm=SOURCE, dt=NUMBER, options=MAPPING, names=MAPPING,
          seed=SEED, adjoint_options=MAPPING, adjoint_method=WORD)),
    (theirs.TorchsdePath, {}, dict(interval=OBJECT)),
    (theirs.BrownianView, {}, dict(path=OBJECT)),
    # schedules, grids, denoisers
    *((kind, {}, dict(t_min=NUMBER, t_max=NUMBER, **more)) for kind, more in [
        (fs.VPLinear, dict(b0=NUMBER, b1=NUMBER)), (fs.SubVP, dict(b0=NUMBER, b1=NUMBER)),
        (fs.VPScaledLinear, dict(b0=NUMBER, b1=NUMBER)), (fs.VPCosine, dict(s=NUMBER)),
        (fs.VPSigmoid, dict(start=NUMBER, end=NUMBER, tau=NUMBER)), (fs.FlowMatching, dict(shift=NUMBER)),
    ]),
    *((kind, {}, dict(sigma_min=NUMBER, sigma_max=NUMBER)) for kind in (fs.VE, fs.EDM)),
    (fs.DiscreteVP, {}, dict(alphas_cumprod=INCREASING)),
    (fs.DiscreteVP.named, {}, dict(name=WORD, steps=STEPS, beta_start=NUMBER, beta_end=NUMBER)),
    (fs.zero_terminal_snr, dict(alphas_cumprod=torch.linspace(0.9, 0.1, 5)),
     dict(alphas_cumprod=INCREASING, last=NUMBER)),
    (fs.sigma_grid, dict(schedule=TABLE, steps=4),
     dict(schedule=SCHEDULE, steps=STEPS, spacing=WORD, final=WORD, rho=NUMBER, timesteps=INCREASING,
          offset=SEED)),
    *((function, NETWORK, dict(model=FUNCTION, schedule=SCHEDULE, rounding=WORD, dtype=DTYPE))
      for function in (fs.from_epsilon, fs.from_v, fs.from_score, fs.from_sample, fs.from_flow)),
    (fs.from_edm, dict(net=NET), dict(net=FUNCTION, class_labels=LABELS, dtype=DTYPE)),
    (fs.clip, dict(denoiser=NET), dict(denoiser=FUNCTION, low=NUMBER, high=NUMBER)),
    (fs.dynamic_thresholding, dict(denoiser=NET), dict(denoiser=FUNCTION, quantile=NUMBER, most=NUMBER)),
    (fs.classifier_free_guidance, dict(model=NET, condition=Y, unconditional=Y),
     dict(model=FUNCTION, condition=LABELS, unconditional=LABELS, scale=NUMBER, rescale=NUMBER, parallel=NUMBER,
          interval=["ab", 3, (3.0, 2.0), (1.0,), [(1, 2), 3], (None, 1.0)], norm=NUMBER)),
    (fs.check_prediction, dict(denoiser=lambda x, sigma: x / (1 + sigma**2), schedule=fs.EDM(), like=Y),
     dict(denoiser=FUNCTION, schedule=SCHEDULE, like=STATE, seed=SEED)),
    # samplers and plans
    (fs.sample, SAMPLE,
     GRID | dict(problem=OBJECT, solver=OBJECT, shape=SHAPE, final=WORD, seed=SEED, seeds=LABELS, dtype=DTYPE,
                 device=DEVICE, callback=FUNCTION, cfg_pp=FLAG)),
    (fs.sample, SAMPLE | dict(shape=None), dict(noise=STATE, timesteps=INCREASING)),
    (fs.sample, SAMPLE | dict(solver=fs.EulerMaruyama()), dict(path=SOURCE)),
    (fs.DDIM, {}, dict(eta=NUMBER)), (fs.DDPM, {}, dict(variance=WORD)),
    (fs.DEIS, {}, dict(order=COUNT, variable=WORD)),
    *((kind, {}, dict(order=COUNT, multistep=FLAG)) for kind in (fs.DPMSolver, fs.DPMSolverPP)),
    (fs.DPMSolverSDE, {}, dict(order=COUNT, eta=NUMBER)),
    *((kind, {}, dict(churn=NUMBER, churn_min=NUMBER, noise=NUMBER)) for kind in (fs.EDMEuler, fs.EDMHeun)),
    (fs.GradientEstimation, {}, dict(gamma=NUMBER)),
    (fs.IPNDM, {}, dict(order=COUNT)), (fs.PNDM, {}, dict(warm_up=WORD)), (fs.SEEDS, {}, dict(order=COUNT)),
    (fs.SASolver, {}, dict(order=COUNT, corrector=FLAG, tau=NUMBER)),
    (fs.UniPC, {}, dict(order=COUNT, variant=WORD, prediction=WORD, corrector=FLAG, predictor=FLAG)),
    *((solver.plan, dict(sigmas=SIGMAS, schedule=TABLE), dict(sigmas=DECREASING, schedule=SCHEDULE))
      for solver in PLANNED),
    (fs.PlanBuilder, dict(name="x", sigmas=SIGMAS), dict(sigmas=DECREASING, prediction=WORD, levy=WORD)),
    (fs.Plan, dict(name="x", prediction="data", **PLAN.tensors()),
     dict(prediction=WORD, sigmas=DECREASING, sigma=TENSOR, stage_x=TENSOR, update_eval=TENSOR,
          noise=TENSOR)),
    (PLAN.save, {}, dict(path=FILE)), (fs.load, {}, dict(path=FILE)),
    (fs.compare, COMPARED,
     dict(problem=OBJECT, nfe=COUNT, noise=STATE, labels=LABELS, solvers=OBJECT,
          spacings=[3, object(), ["x?"], [], [3]], plans=[3, object(), ["x?"], [], [3]],
          tol=[*NUMBER, 0.0], batch=STEPS)),
    (fs.compare(**COMPARED).table, {}, dict(most=COUNT)), (fs.compare(**COMPARED).save, {}, dict(path=FILE)),
    (fs.compare(**COMPARED).plot, dict(path="x.svg"), dict(path=[*FILE, "x", "x.txt"])),
    (fs.invert, dict(problem=MODEL, solver=fs.DDIM(), x0=Y, steps=2),
     dict(problem=OBJECT, solver=[*OBJECT, fs.DDPM(), PLAN], x0=STATE, steps=STEPS, spacing=WORD,
          corrections=COUNT[1:])),
    (fs.log_likelihood, dict(problem=MODEL, x0=Y, steps=2, probes=2),
     dict(problem=OBJECT, x0=STATE, steps=STEPS, probes=[1, *COUNT], seed=SEED, batch=COUNT)),
    # learned solvers
    (fs.TrainingOptions, {}, dict(iterations=[-1, "3", 2.5], batch_size=COUNT, learning_rate=NUMBER,
                                  ema_decay=NUMBER, early_stopping_patience=COUNT[1:],
                                  checkpoint_every=COUNT)),
    (fs.TeacherOptions, {}, dict(substeps=COUNT, trajectories=COUNT)),
    (fs.distill_dode, DODE,
     GRID | dict(problem=OBJECT, base=OBJECT, teacher=OBJECT, noise=STATE, labels=LABELS, final=WORD,
                 terms=COUNT, teacher_substeps=COUNT, batch=COUNT,
                 notes=MAPPING)),
    (fs.fit_table, TABLE_FIT,
     dict(problem=OBJECT, nfe=COUNT, noise=STATE, labels=LABELS, free=WORD, start=OBJECT, starts=COUNT, teacher=OBJECT,
          teacher_steps=STEPS, loss=WORD, iterations=COUNT[1:], directions=COUNT, batch=COUNT, seed=SEED,
          notes=MAPPING)),
    (fs.fit_grid, dict(problem=MODEL, steps=2, noise=NOISE, nodes=4, sweeps=0),
     dict(problem=OBJECT, steps=STEPS, noise=STATE, labels=LABELS, solver=OBJECT, final=WORD, nodes=STEPS,
          sweeps=NUMBER, batch=STEPS)),
    (fs.regrid, DODE | dict(table=fs.distill_dode(**DODE)[0], steps=4),
     GRID | dict(table=OBJECT, problem=OBJECT, base=OBJECT, teacher=OBJECT, noise=STATE, labels=LABELS,
                 teacher_substeps=COUNT, batch=COUNT)),
    (fs.make_trajectories, MADE,
     dict(problem=OBJECT, teacher=OBJECT, sigmas=DECREASING, count=COUNT, substeps=COUNT, event_shape=SHAPE,
          levy=WORD, labels=LABELS, seed=SEED, folder=FILE, device=DEVICE)),
    (fs.make_trajectories(**MADE).coarsen, {}, dict(keep=COUNT)),
    (fs.make_trajectories(**MADE).pick, {}, dict(index=LABELS)),
    (fs.distill_sigdeg, SIGDEG,
     GRID | dict(problem=OBJECT, event_shape=SHAPE, teacher_steps=STEPS, levy=WORD, labels=LABELS,
                 data=OBJECT, network=MODULE, head=WORD, parent=OBJECT, forcing=NUMBER,
                 teacher_options=OBJECT, training=OBJECT, folder=FILE, device=DEVICE, seed=SEED)),
    (fs.distill_sigdeg_step, STEP,
     dict(sde=OBJECT, steps=STEPS, y0=STATE, t0=NUMBER, t1=NUMBER, network=MODULE, teacher_options=OBJECT,
          training=OBJECT, folder=FILE, seed=SEED)),
    (fs.distill_sfddm, SFDDM, dict(teacher=OBJECT, schedule=SCHEDULE, steps=STEPS, spacing=WORD, data=STATE,
                                   target=WORD, loss=WORD, hidden=NUMBER, start=WORD,
                                   labels=LABELS, teacher_options=OBJECT, training=OBJECT, folder=FILE,
                                   device=DEVICE, seed=SEED)),
    (fs.distill_sfddm, SFDDM | dict(target="published"), dict(features=WORD)),
    (fs.distill_sfddm, SFDDM | dict(data=None, event_shape=(3,), teacher_options=FEW),
     dict(event_shape=SHAPE)),
    (subsequence, dict(teacher=TABLE, steps=3), dict(teacher=OBJECT, steps=STEPS, spacing=WORD)),
    (StudentProcess, dict(teacher=TABLE, phi=[3, 9, 19]), dict(teacher=OBJECT, phi=INCREASING)),
    (fs.SFDDM, dict(network=NET, process=PROCESS), dict(network=MODULE, process=OBJECT, plan=OBJECT)),
    (STUDENT.at, {}, dict(labels=LABELS)), (STUDENT.save, {}, dict(path=FILE)),
    (fs.SigStep, dict(network=NET), dict(network=MODULE, parent=OBJECT)),
    (fs.SigSampler, dict(plan=fs.EulerMaruyama().plan(SIGMAS), network=NET),
     dict(plan=OBJECT, network=MODULE, levy=WORD)),
    (fs.SigUNet.of, dict(schedule=TABLE), dict(unet=OBJECT)),
    # integrations
    (k_diffusion.sampler, dict(solver=fs.DDIM()), dict(solver=OBJECT, schedule=SCHEDULE, flow=FLAG, cfg_pp=FLAG,
                                                        s_noise=NUMBER)),
    (k_diffusion.sampler(fs.EulerMaruyama()), dict(model=NET, x=Y, sigmas=SIGMAS),
     dict(model=FUNCTION, callback=FUNCTION, x=STATE, sigmas=DECREASING, extra_args=MAPPING,
          noise_sampler=SOURCE)),
    (k_diffusion.as_denoiser, dict(wrapper=NET, sigma_min=0.1, sigma_max=10.0),
     dict(wrapper=FUNCTION, sigma_min=NUMBER, sigma_max=NUMBER, extra_args=MAPPING, dtype=DTYPE)),
    (k_diffusion.as_wrapper, {}, dict(problem=OBJECT)),
    (k_diffusion.register, dict(name="x", solver=fs.DDIM()), dict(name=WORD, comfy=MAPPING)),
    (k_diffusion.BrownianNoiseSampler, dict(x=Y, sigma_min=0.1, sigma_max=10.0),
     dict(x=STATE, sigma_min=NUMBER, sigma_max=NUMBER)),
    (dpm_solver.from_model_fn, dict(model_fn=NET), dict(noise_schedule=SCHEDULE)),
    # measuring
    (analysis.strong_order, ORDERS | dict(solver=fs.EulerMaruyama()),
     dict(solver=OBJECT, problem=OBJECT, y0=STATE, t0=NUMBER, t1=NUMBER, paths=COUNT, block=COUNT,
          levels=INCREASING, reference=WORD, device=DEVICE, dtype=DTYPE, seed=SEED)),
    (analysis.weak_order, ORDERS | dict(solver=fs.EulerMaruyama()), dict(test=FLAG)),
    (analysis.strong_orders, ORDERS, dict(solvers=OBJECT)),
    (analysis.expectation, EXPECTED, dict(sde=OBJECT, solver=OBJECT, y0=STATE, span=INCREASING, payoff=FUNCTION,
                                          tolerance=NUMBER, confidence=NUMBER, antithetic=FLAG, coarsest=COUNT[1:],
                                          finest=COUNT, seed=SEED)),
    (analysis.work_precision, dict(problem="sine", levels=range(2, 4), paths=8, repeats=1),
     dict(problem=OBJECT, solvers=OBJECT, levels=INCREASING, paths=COUNT, repeats=COUNT, device=DEVICE,
          seed=SEED)),
    (analysis.work_precision, dict(problem="ring", nfe=[5], samples=8),
     dict(solvers=OBJECT, spacings=OBJECT, nfe=INCREASING, samples=COUNT, seed=SEED)),
    (analysis.Record.load, {}, dict(path=FILE)), (analysis.Record("k", {}, 0, {}).save, {}, dict(path=FILE)),
    (teachers.load, {}, dict(path=FILE)), (datasets.digits, {}, dict(seed=SEED)),
    (problems.judge, dict(noise_type="diagonal"), dict(noise_type=WORD, sde_type=WORD)),
    (distances.sliced_w2, dict(a=NOISE, b=NOISE), dict(a=SAMPLES, b=SAMPLES, projections=COUNT, seed=SEED)),
    (distances.mmd, dict(a=NOISE, b=NOISE), dict(a=SAMPLES, b=SAMPLES, bandwidth=NUMBER)),
    (distances.energy_distance, dict(a=NOISE, b=NOISE), dict(a=SAMPLES, b=SAMPLES)),
    (distances.rmse, dict(a=NOISE, b=NOISE), dict(a=SAMPLES, b=SAMPLES)),
    (distances.w1, dict(a=NOISE[:, 0], b=NOISE[:, 0]), dict(a=[*SAMPLES, GRAPH], b=[*SAMPLES, GRAPH])),
    (distances.median_distance, {}, dict(x=SAMPLES)),
]  # fmt: skip

# messages that name a related argument: what the argument becomes part of
ALIAS = {"bm": "path", "ta": "grid", "tb": "grid", "seeds": "seed"}


def name_of(row):
    return getattr(row[0], "__qualname__", type(row[0]).__name__)


class VPSchedule:
    """The interface of DPM-Solver's NoiseScheduleVP, linear betas."""

    T, total_N = 1.0, 1000
    marginal_lambda = staticmethod(lambda t: -fs.VPLinear().sigma(t).log())
    inverse_lambda = staticmethod(lambda v: fs.VPLinear().time(torch.exp(-v)))
    marginal_alpha = staticmethod(lambda t: fs.VPLinear().alpha(fs.VPLinear().sigma(t)))
    marginal_std = staticmethod(lambda t: fs.VPLinear().sigma(t) * fs.VPLinear().alpha(fs.VPLinear().sigma(t)))


def stepped(**arguments):
    """The first step of a run of the scheduler."""
    scheduler = FewStepScheduler(num_train_timesteps=20, solver=fs.EulerMaruyama())
    scheduler.set_timesteps(4)
    first = dict(model_output=Y, timestep=scheduler.timesteps[0], sample=Y)
    return scheduler.step(**(first | arguments))


def built(method, **arguments):
    """A method of a fresh builder; `x` is its state unless given."""
    builder = fs.PlanBuilder("x", SIGMAS)
    if method != "noise":
        arguments.setdefault("x", builder.x)
    return getattr(builder, method)(**arguments)


SCHEDULER = FewStepScheduler(num_train_timesteps=20, solver=fs.DDIM())
SCHEDULER.set_timesteps(4)
ONE_ORDER = analysis.strong_order(fs.EulerMaruyama(), **ORDERS)
SCHEDULES = [
    fs.VPLinear(), fs.VPScaledLinear(), fs.SubVP(), fs.VPCosine(), fs.VPSigmoid(), fs.VE(), fs.EDM(),
    fs.FlowMatching(shift=3.0), k_diffusion.ScaledFlow(), TABLE, PROCESS, dpm_solver.DPMSolverSchedule(VPSchedule()),
]  # fmt: skip


def any_network(x, t, *condition):
    """A network of states of any shape."""
    return x / (2 + t.reshape(-1, *[1] * (x.dim() - 1)))


GUIDED = fs.classifier_free_guidance(any_network, Y, Y)
EPSILON = fs.from_epsilon(any_network, fs.VPLinear())
STEERED = fs.classifier_free_guidance(any_network, Y, Y, interval=(0.1, 9.0), rescale=0.5, parallel=0.0, norm=2.0)
DENOISERS = [
    EPSILON, fs.from_epsilon(any_network, TABLE, rounding="nearest"), fs.from_v(any_network, fs.VPCosine()),
    fs.from_score(any_network, fs.SubVP()), fs.from_sample(any_network, fs.VE()), fs.from_edm(any_network),
    fs.from_edm(any_network, class_labels=Y), fs.from_flow(any_network, fs.FlowMatching()),
    fs.from_epsilon(any_network, fs.VPLinear(), dtype=torch.bfloat16), fs.clip(EPSILON), fs.clip(any_network),
    fs.dynamic_thresholding(EPSILON), fs.from_epsilon(GUIDED, fs.VPLinear()), fs.from_v(STEERED, fs.VPLinear()),
    k_diffusion.as_denoiser(any_network, sigma_min=0.1, sigma_max=10.0).denoiser,
    k_diffusion.as_wrapper(fs.DiffusionModel(EPSILON, fs.VPLinear())),
    dpm_solver.from_model_fn(any_network, VPSchedule()).denoiser,
]  # fmt: skip


class Network(torch.nn.Module):
    """A network with the interface of diffusers' ones."""

    config = types.SimpleNamespace(sample_size=2, in_channels=1)

    def forward(self, sample, timestep, return_dict=True):
        return (any_network(sample, timestep),)


PIPE = types.SimpleNamespace(unet=Network(), scheduler=SCHEDULER)
LABELS_OF_TWO = torch.tensor([3, 4])

# valid calls of what has no row above: (function, good arguments, other arguments to vary)
CALLS = [
    *((type(s), {}) for s in fs.solvers().values()),
    (fs.LogLikelihood, dict(value=Y[:, 0], error=Y[:, 0], size=3)),
    (fs.Card, dict(summary="x", reference="y")), (fs.Step, dict(y=Y)), (fs.Solution, dict(y=Y, nfe=3, grid=TIMES)),
    (fs.NonFiniteError, dict(message="x", step=0, paths=1)),
    (PLAN.tail, dict(row=1)), (PLAN.renamed, dict(name="x")),
    (partial(built, "evaluate"), dict(x=None, sigma=1.0)), (partial(built, "advance"), dict(x=None)),
    (partial(built, "noise"), dict(tau0=1.0, tau1=2.0)), (partial(built, "finish"), {}),
    (fs.make_trajectories(**MADE).some_knots, dict(count=3)),
    (fs.SigSampler(fs.EulerMaruyama().plan(SIGMAS), NET.with_signature(2)).save, dict(path="x")),
    (fs.SigStep(NET).save, dict(path="x")), (fs.load, dict(path="x.safetensors", network=NET)),
    (FewStepScheduler, {}), (FewStepScheduler.from_config, dict(config=dict(SCHEDULER.config))),
    (SCHEDULER.set_timesteps, dict(num_inference_steps=4)), (SCHEDULER.set_begin_index, dict(begin_index=0)),
    (stepped, dict(model_output=Y, timestep=19, sample=Y, eta=0.0, generator=None, variance_noise=None)),
    (SCHEDULER.add_noise, dict(original_samples=Y, noise=Y, timesteps=LABELS_OF_TWO)),
    (SCHEDULER.scale_noise, dict(sample=Y, timestep=LABELS_OF_TWO, noise=Y)),
    (SCHEDULER.get_velocity, dict(sample=Y, noise=Y, timesteps=LABELS_OF_TWO)),
    (SCHEDULER.scale_model_input, dict(sample=Y, timestep=torch.tensor(3))),
    (k_diffusion.BrownianNoiseSampler(Y, 0.1, 10.0), dict(sigma=1.0, sigma_next=0.5)),
    (theirs.BrownianView(PATH), dict(ta=0.1, tb=0.5)),
    (dpm_solver.DPMSolverSchedule, dict(noise_schedule=VPSchedule())),
    (dpm_solver.from_model_fn, dict(model_fn=NET, noise_schedule=VPSchedule())),
    (analysis.order_figure, dict(records=[ONE_ORDER], path="x.svg")),
    (analysis.Record, dict(kind="k", data={}, seed=0)), (ONE_ORDER.save, dict(path="x.json")),
    (analysis.weak_orders, ORDERS | dict(solvers=[fs.EulerMaruyama()])),
    (SDE.to_ito, {}), (SDE.to_stratonovich, {}), (analysis.expectation(**EXPECTED).save, dict(path="x.json")),
    (problems.by_name, dict(name="sine")), (diffusion_problems.by_name, dict(name="ring")),
    (teachers.save, dict(network=NET, path="net")),
    # what they return
    *((getattr(schedule, method), {argument: torch.tensor([0.5, 0.1], dtype=torch.float64)})
      for schedule in SCHEDULES
      for method, argument in (("sigma", "t"), ("time", "sigma"), ("label", "sigma"), ("alpha", "sigma"))),
    *((denoiser, dict(x=Y, sigma=torch.tensor(1.0))) for denoiser in DENOISERS),
    (pipeline.denoising(PIPE).denoiser, dict(x=torch.ones(2, 1, 2, 2), sigma=torch.tensor(1.0))),
    (pipeline.denoising, dict(pipe=PIPE)),
    (pipeline.distill_dode, dict(pipe=PIPE, base=fs.DDIM(), samples=16, steps=2, teacher_substeps=2)),
    (GUIDED, dict(x=Y, t=torch.tensor([1.0, 2.0]))),
]  # fmt: skip
