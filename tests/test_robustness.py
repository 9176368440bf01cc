"""Bad values for every argument of every public function: one clear error that names it, nothing deeper."""

import inspect
import math
import types

import fewstep as fs
import numpy as np
import pytest
import torch
from  import fewstep_analysis as analysis
from fewstep.integrations import dpm_solver, k_diffusion
from fewstep.integrations import torchsde as theirs
from fewstep_analysis import datasets, images, problems, teachers, volatility
from fewstep import distances
from fewstep.brownian import partial_signature_covariance
from fewstep.learned.sigdeg.networks import DenoisingMLP
from fewstep.testing import check_solver
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

Y = torch.ones(2, 3)
TIMES, SIGMAS = torch.linspace(0, 1, 4), torch.tensor([10.0, 1.0, 0.1], dtype=torch.float64)
SDE = fs.SDE(lambda t, y: 0.1 * y, lambda t, y: 0.2 * y)
NET = DenoisingMLP((3,), 8, 1).eval().requires_grad_(False)
THEIRS = types.SimpleNamespace(f=SDE.drift, g=SDE.diffusion, noise_type="diagonal", sde_type="ito")
PROBLEM, TABLE = fs.DiffusionModel(NET, fs.EDM(0.1, 10.0)), fs.DiscreteVP.named(steps=20)
PATH, AREA = fs.BrownianPath((2, 3)), fs.AreaPath(fs.BrownianPath((2, 3), levy="H"), 4)
PROCESS, NOISE = fs.StudentProcess(TABLE, torch.tensor([3, 9, 19])), torch.randn(64, 3)
INCREMENT = fs.Increment(1.0, Y, Y)
STUDENT = fs.SFDDM(NET, PROCESS)
TRAJECTORIES = fs.make_trajectories(PROBLEM, SIGMAS, count=8, event_shape=(3,), substeps=2)

strange = st.sampled_from([object(), lambda x: x, [], {}, b"x", fs.DDIM, torch.nn.Module])
words = st.text("abcxyz", min_size=1, max_size=4).map(lambda s: s + "?")
fractions = st.floats(-9, 9).filter(lambda x: not x.is_integer())
meta, inf = torch.ones(2, 3, device="meta"), math.inf


def tensors(*values):
    """These as tensors, and what is none."""
    return st.sampled_from([torch.tensor(v) for v in values] + ["ab", 1j, object(), [0.5, "a"]])


# for each kind of argument values that are wrong, whatever the function
BAD = {
    "shape": st.sampled_from([3, "ab", (2.5, 3), (-1, 3), (2, None), ["a"], True]),
    "dtype": st.sampled_from([torch.int64, torch.complex64, "float32", torch.bool, 7]),
    "device": st.sampled_from(["nonsense", "cuda:99", 7.5, [1], "meta:x"]) | words,
    "seed": fractions | words | st.sampled_from([torch.ones(2), [1], math.nan, True, 1j]),
    "count": st.integers(-9, 0) | fractions | words | st.sampled_from([True, math.nan, "3", [1]]),
    "steps": st.integers(10**9, 10**30) | st.integers(-9, 0) | fractions | words |
                    st.sampled_from([True, "3"]),
    "number": words | st.sampled_from([math.nan, "1", [1], 1j, -inf, True]),
    "word": words | strange | st.integers(5, 9),
    "flag": words | st.integers(5, 9),
    "times": tensors([0, math.nan, 1], [0.0], 0.5, [1.0, 0.0], [0.0, 0.0, 1.0], [[0.0, 1.0]], [0.0, inf],
                     [0.0, 1j], [True, False]),
    "knots": tensors([0, math.nan, 1], 0.5, [1.0, 0.0], [0.0, 0.0, 1.0], [[0.0, 1.0]], [0.0, inf], [0.0, 1j]),
    "sigmas": tensors([3, math.nan, 1], [3.0], 0.5, [0.0, 1.0], [3.0, 3.0, 1.0], [[3.0, 1.0]], [3.0, -1.0],
                      [inf, 1.0], [3.0, 1j]),
    "state": st.sampled_from([[1.0], np.ones((2, 3)), Y.long(), Y.to(torch.complex64), torch.tensor(1.0),
                              Y * math.nan, Y * inf, "a", meta, Y.bool()]),
    "function": st.sampled_from([3, "a", Y, []]),
    "object": strange | words | st.integers(),
    "module": st.sampled_from([3, "a", Y, [], object(), lambda x: x, torch.nn.Module]),
    "tensor": st.sampled_from([3, "a", [1], np.ones(3)]),
    "mapping": st.sampled_from([3, "a", Y, [1]]),
    "labels": st.sampled_from([3, "a", torch.tensor(1), torch.tensor([], dtype=torch.long)]),
    "path": st.sampled_from([3, "a", object(), fs.BrownianPath((9, 9)), fs.EulerMaruyama()]),
    "file": st.sampled_from(["", 3, b"\0x", "a\0b", 1.5, ["x"]]),
    "pair": st.sampled_from([3, "ab", (1,), (2, None), (2.0, 1.0)]),
}  # fmt: skip


def kinds(text):
    """`"a b:kind c:kind"`: arguments and the kind of each."""
    found, waiting = {}, []
    for piece in text.split():
        name, _, kind = piece.partition(":")
        waiting.append(name)
        if kind:
            found |= dict.fromkeys(waiting, kind)
            waiting = []
    return found


SAMPLE = dict(problem=PROBLEM, solver=fs.DDIM(), shape=(2, 3), steps=3)
STRONG = dict(problem=problems.sine(), levels=range(2, 5), paths=16, reference="levels")
DODE = dict(problem=PROBLEM, base=fs.DDIM(), noise=NOISE, steps=3, teacher_substeps=2)
SIG = dict(
    problem=PROBLEM, event_shape=(3,), steps=2, teacher_steps=4, trajectories=16, iterations=1, batch=4
)
STEP = dict(problem=SDE, steps=2, y0=Y, teacher_steps=4, trajectories=16, iterations=1, batch=4)
FOLD = dict(teacher=NET, schedule=TABLE, steps=3, data=NOISE[:32], iterations=1, batch=4)
FREE = dict(teacher=NET, schedule=TABLE, steps=3, event_shape=(3,), samples=16, iterations=1, batch=4)
MADE = dict(problem=PROBLEM, sigmas=SIGMAS, count=8, event_shape=(3,), substeps=2)
ROUGH = dict(paths=4, steps=8, hurst=0.1, eta=1.9, rho=-0.9, variance=0.04, horizon=1.0)
PLAN = fs.DDIM().plan(SIGMAS)
TIMED = "t_min t_max:number"
GROWTH = fs.EulerMaruyama().plan(SIGMAS)

# what is called, with good arguments, and the kinds of the arguments that are then made bad
CASES = {
    "BrownianPath": (fs.BrownianPath, dict(shape=(2, 3)),
                     "shape:shape t0 t1:number seed:seed levy clock:word dtype:dtype device:device "
                     "knots:knots "
                     "cache:number seeds:labels"),
    "BrownianPath.increment": (PATH.increment, dict(ta=0.1, tb=0.5), "ta tb:number"),
    "BrownianPath.increments": (PATH.increments, dict(grid=TIMES), "grid:times"),
    "AreaPath": (fs.AreaPath, dict(path=AREA.path, cells=4), "path:object cells:steps terms:count "
                                                             "method:word "
                                                             "seed:seed"),
    "AreaPath.increments": (AREA.increments, dict(grid=TIMES), "grid:times"),
    "FreshIncrements": (fs.FreshIncrements, dict(shape=(2, 3)),
                        "shape:shape levy:word seed:seed dtype:dtype device:device"),
    "FreshIncrements.increments": (fs.FreshIncrements((2, 3)).increments, dict(grid=TIMES), "grid:times"),
    "FreshIncrements.increment": (fs.FreshIncrements((2, 3)).increment, dict(t0=0, t1=1), "t0 t1:number"),
    "Increment": (fs.Increment, dict(h=1.0, W=Y), "h:number W H K A:tensor"),
    "Increment.join": (INCREMENT.join, dict(later=INCREMENT), "later:object"),
    "Increment.to": (INCREMENT.to, {}, "dtype:dtype device:device"),
    "Increment.partial_signature": (INCREMENT.partial_signature, {}, "depth:seed"),
    "partial_signature_covariance": (partial_signature_covariance, dict(depth=1, h=1.0),
                                     "depth:seed h:number"),
    "levy_area": (fs.levy_area, dict(increment=INCREMENT, method="legendre"),
                  "increment:object method:word seed:seed tol:number terms:count"),
    "SDE": (fs.SDE, vars(SDE), "drift diffusion:function noise_type sde_type:word"),
    "SDE.from_torchsde": (fs.SDE.from_torchsde, {}, "sde:object"),
    "ODE": (fs.ODE, {}, "drift:function"),
    "DiffusionModel": (fs.DiffusionModel, vars(PROBLEM), "denoiser:function schedule:object"),
    "solve": (fs.solve, dict(sde=SDE, solver=fs.Milstein(), y0=Y, grid=TIMES),
              "sde solver:object y0:state grid:times seed:seed save:word"),
    "solve along": (fs.solve, dict(sde=SDE, solver=fs.EulerMaruyama(), y0=Y, grid=TIMES), "path:path"),
    "sigma_grid": (fs.sigma_grid, dict(schedule=TABLE, steps=4),
                   "schedule:object steps:steps spacing final:word rho:number timesteps:times offset:seed"),
    "sample": (fs.sample, SAMPLE, "problem solver:object shape:shape steps:steps sigmas:sigmas spacing "
                                  "final:word "
                                  "seed:seed seeds:labels dtype:dtype device:device callback:function"),
    "sample from": (fs.sample, SAMPLE | dict(shape=None), "noise:state timesteps:times"),
    "sample along": (fs.sample, SAMPLE | dict(solver=fs.EulerMaruyama()), "path:path"),
    "from_edm": (fs.from_edm, dict(net=NET), "net:function class_labels:labels dtype:dtype"),
    "clip": (fs.clip, dict(denoiser=NET), "denoiser:function low high:number"),
    "dynamic_thresholding": (fs.dynamic_thresholding, dict(denoiser=NET),
                             "denoiser:function quantile most:number"),
    "classifier_free_guidance": (fs.classifier_free_guidance, dict(model=NET, condition=Y, unconditional=Y),
                                 "model:function condition unconditional:labels scale:number"),
    "check_prediction": (fs.check_prediction, dict(denoiser=NET, schedule=fs.EDM(), like=Y),
                         "denoiser:function schedule:object like:state seed:seed"),
    "VPLinear": (fs.VPLinear, {}, "b0 b1:number " + TIMED), "SubVP": (fs.SubVP, {}, "b0 b1:number " + TIMED),
    "VPScaledLinear": (fs.VPScaledLinear, {}, "b0 b1:number " + TIMED),
    "VPCosine": (fs.VPCosine, {}, "s:number " + TIMED),
    "VPSigmoid": (fs.VPSigmoid, {}, "start end tau:number " + TIMED),
    "FlowMatching": (fs.FlowMatching, {}, "shift:number " + TIMED),
    "VE": (fs.VE, {}, "sigma_min sigma_max:number"), "EDM": (fs.EDM, {}, "sigma_min sigma_max:number"),
    "DiscreteVP": (fs.DiscreteVP, {}, "alphas_cumprod:times"),
    "DiscreteVP.named": (fs.DiscreteVP.named, {}, "name:word steps:steps beta_start beta_end:number"),
    "zero_terminal_snr": (fs.zero_terminal_snr, dict(alphas_cumprod=torch.linspace(0.9, 0.1, 5)),
                          "alphas_cumprod:times last:number"),
    "DDIM": (fs.DDIM, {}, "eta:number form:word"), "DDPM": (fs.DDPM, {}, "variance:word"),
    "DEIS": (fs.DEIS, {}, "order:count variable form:word"),
    "DPMSolver": (fs.DPMSolver, {}, "order:count multistep:flag solver_type form nodes:word"),
    "DPMSolverPP": (fs.DPMSolverPP, {}, "order:count multistep:flag solver_type form nodes:word"),
    "DPMSolverSDE": (fs.DPMSolverSDE, {}, "order:count eta:number solver_type form:word"),
    "EDMEuler": (fs.EDMEuler, {}, "churn churn_min noise:number"),
    "EDMHeun": (fs.EDMHeun, {}, "churn churn_min noise:number"),
    "IPNDM": (fs.IPNDM, {}, "order:count"), "PNDM": (fs.PNDM, {}, "warm_up form combine:word"),
    "SASolver": (fs.SASolver, {}, "order:count corrector:flag tau:number between:pair"),
    "SEEDS": (fs.SEEDS, {}, "order:count"),
    "UniPC": (fs.UniPC, {}, "order:count variant prediction form:word corrector predictor:flag"),
    "PlanBuilder": (fs.PlanBuilder, dict(name="x", sigmas=SIGMAS), "sigmas:sigmas prediction levy:word"),
    "Plan": (fs.Plan, dict(name="x", prediction="data", **PLAN.tensors()),
             "prediction:word sigmas:sigmas sigma c b m noise:tensor"),
    "Plan.save": (PLAN.save, {}, "path:file"), "load": (fs.load, {}, "path:file"),
    "solvers": (fs.solvers, {}, "noise_type:word"),
    "check_solver": (check_solver, {}, "solver:object"),
    "distill_dode": (fs.distill_dode, DODE,
                     "problem base teacher:object noise:state labels:labels steps:steps sigmas:sigmas "
                     "spacing final alignment:word terms teacher_substeps batch:count note:mapping"),
    "distill_dode refined": (fs.distill_dode, DODE | dict(refine="global"),
                             "iterations minibatch:count rate:number seed:seed"),
    "regrid": (fs.regrid, DODE | dict(student=fs.distill_dode(**DODE)[0], steps=4),
               "problem base teacher:object noise:state labels:labels steps:steps sigmas:sigmas "
               "spacing:word teacher_substeps batch:count"),
    "subsequence": (fs.subsequence, dict(teacher=TABLE, steps=3), "teacher:object steps:steps spacing:word"),
    "distill_sigdeg": (fs.distill_sigdeg, SIG,
                       "event_shape:shape steps:steps teacher_steps trajectories batch iterations "
                       "every:count "
                       "problem teacher parent data:object network:module levy head spacing:word "
                       "labels:labels "
                       "sigmas:sigmas forcing rate average:number folder:file device:device seed:seed"),
    "distill_sigdeg of an SDE": (fs.distill_sigdeg, STEP,
                                 "steps teacher_steps trajectories batch iterations:count y0:state t0 "
                                 "t1:number "
                                 "teacher:object network:module folder:file seed:seed"),
    "distill_sfddm": (fs.distill_sfddm, FOLD,
                      "teacher schedule:object steps:steps spacing target loss start features:word "
                      "data:state "
                      "substeps iterations batch:count hidden rate:number labels:labels folder:file "
                      "device:device "
                      "seed:seed"),
    "distill_sfddm without data": (fs.distill_sfddm, FREE, "samples:count event_shape:shape labels:labels"),
    "StudentProcess": (fs.StudentProcess, dict(teacher=TABLE, phi=torch.tensor([3, 9, 19])),
                       "teacher:object phi:times"),
    "SFDDM": (fs.SFDDM, dict(network=NET, process=PROCESS), "network:module process plan:object"),
    "SFDDM.at": (STUDENT.at, {}, "labels:labels"), "SFDDM.save": (STUDENT.save, {}, "path:file"),
    "SigStep": (fs.SigStep, dict(network=NET), "network:module parent:object"),
    "SigSampler": (fs.SigSampler, dict(plan=GROWTH, network=NET), "plan:object network:module levy:word"),
    "SigUNet": (fs.SigUNet.of, dict(unet=NET, schedule=TABLE), "unet:object"),
    "make_trajectories": (fs.make_trajectories, MADE,
                          "problem teacher:object sigmas:sigmas count substeps:count event_shape:shape "
                          "levy:word "
                          "labels:labels seed:seed folder:file device:device"),
    "Trajectories.coarsen": (TRAJECTORIES.coarsen, {}, "keep:count"),
    "Trajectories.pick": (TRAJECTORIES.pick, {}, "index:labels"),
    "strong_order": (analysis.strong_order, STRONG | dict(solver=fs.EulerMaruyama()),
                     "solver problem:object y0:state t0 t1:number paths block:count levels:times "
                     "reference:word "
                     "device:device dtype:dtype seed:seed"),
    "weak_order": (analysis.weak_order, STRONG | dict(solver=fs.EulerMaruyama()), "test:flag"),
    "strong_orders": (analysis.strong_orders, STRONG, "solvers:object"),
    "work_precision": (analysis.work_precision, dict(problem="sine", levels=range(2, 4), paths=8, repeats=1),
                       "problem solvers:object levels:times paths repeats:count device:device seed:seed"),
    "work_precision of samplers": (analysis.work_precision, dict(problem="ring", nfe=[5], samples=8),
                                   "solvers spacings:object nfe:times samples:count seed:seed"),
    "Record.load": (analysis.Record.load, {}, "path:file"),
    "Record.save": (analysis.Record("k", {}, 0, {}).save, {}, "path:file"),
    "teachers.load": (teachers.load, {}, "path:file"),
    "teachers.train": (teachers.train, dict(name="digits", path="x"), "name:word path:file"),
    "teachers.mnist": (teachers.mnist, {}, "label:state guidance:number"),
    "datasets.digits": (datasets.digits, {}, "seed:seed"), "datasets.mnist": (datasets.mnist, {},
                    "folder:file"),
    "problems.by_name": (lambda problem: problems.by_name(problem), {}, "problem:word"),
    "problems.judge": (problems.judge, dict(noise_type="diagonal"), "noise_type sde_type:word"),
    "sliced_w2": (distances.sliced_w2, dict(a=NOISE, b=NOISE), "a b:state projections:count seed:seed"),
    "mmd": (distances.mmd, dict(a=NOISE, b=NOISE), "a b:state bandwidth:number"),
    "energy_distance": (distances.energy_distance, dict(a=NOISE, b=NOISE), "a b:state"),
    "frechet_distance": (images.frechet_distance, dict(a=NOISE, b=NOISE), "a b:state features:function"),
    "kernel_distance": (images.kernel_distance, dict(a=NOISE, b=NOISE), "a b:state features:function"),
    "class_score": (images.class_score, dict(a=NOISE), "a:state logits:function"),
    "rough_bergomi": (volatility.rough_bergomi, ROUGH,
                      "paths steps:count hurst eta rho variance horizon:number seed:seed dtype:dtype"),
    "statistics": (volatility.statistics, dict(log_price=torch.randn(8, 17), groups=2),
                   "log_price variance:state lags:times groups:count"),
    "sdeint": (theirs.sdeint, dict(sde=THEIRS, y0=Y, ts=TIMES),
               "sde method:object y0:state ts:times bm:path dt:number options names:mapping seed:seed"),
    "TorchsdePath": (theirs.TorchsdePath, {}, "interval:object"),
    "BrownianView": (theirs.BrownianView, {}, "path:object"),
    "sampler": (k_diffusion.sampler, dict(solver=fs.DDIM()), "solver schedule:object"),
    "sampler called": (k_diffusion.sampler(fs.EulerMaruyama()), dict(model=NET, x=Y, sigmas=SIGMAS),
                       "model callback:function x:state sigmas:sigmas extra_args:mapping noise_sampler:path"),
    "as_denoiser": (k_diffusion.as_denoiser, dict(wrapper=NET, sigma_min=0.1, sigma_max=10.0),
                    "wrapper:function sigma_min sigma_max:number extra_args:mapping dtype:dtype"),
    "as_wrapper": (k_diffusion.as_wrapper, {}, "problem:object"),
    "register": (k_diffusion.register, dict(name="x", solver=fs.DDIM()), "name:word comfy:mapping"),
    "BrownianNoiseSampler": (k_diffusion.BrownianNoiseSampler, dict(x=Y, sigma_min=0.1, sigma_max=10.0),
                             "x:state sigma_min sigma_max:number"),
    "from_model_fn": (dpm_solver.from_model_fn, dict(model_fn=NET), "noise_schedule:object"),
}  # fmt: skip
CASES |= {
    name: (getattr(fs, name), dict(model=NET, schedule=TABLE), "model:function schedule:object rounding:word "
                                                              "dtype:dtype")
    for name in ("from_epsilon", "from_v", "from_score", "from_sample", "from_flow")
}  # fmt: skip
CASES |= {
    f"{name}.plan": (solver().plan, dict(sigmas=SIGMAS), "sigmas:sigmas")
    for name, solver in fs.solvers().items()
    if hasattr(solver, "plan") and name not in ("PNDM", "SigStep")
}
# what a message may say in place of the argument's own name: what it is a part of, or who refuses it
ALIAS = {"bm": "path", "ta": "grid", "tb": "grid", "seeds": "seed"}

# public names that no row begins with
EXEMPT = {
    "InputError": "an error", "NonFiniteError": "an error", "Card": "data; check_solver refuses bad ones",
    "Schedule": "abstract", "Solver": "abstract", "DiffusionSolver": "abstract",
    "ScheduledSolver": "abstract", "StochasticSolver": "abstract", "Solution": "data that solve returns",
    "DODE": "made by distill_dode and load; its file is in test_robustness_files.py",
}  # fmt: skip


def test_every_public_name_has_a_row():
    public = {k for k, v in vars(fs).items() if not k.startswith("_") and not isinstance(v, types.ModuleType)}
    public -= {"annotations"}
    plain = {n for n, c in fs.solvers().items() if not inspect.signature(c).parameters}  # solve's rows
    rows = {name.split(".")[0].split()[0] for name in CASES}
    assert not public - rows - plain - EXEMPT.keys()
    assert not EXEMPT.keys() - public


@pytest.mark.parametrize("case", CASES)
def test_a_bad_value_is_refused_by_name(case):
    """Each argument in turn, the others good: InputError, and it begins with what is wrong."""
    call, good, text = CASES[case]
    asked = kinds(text)

    @settings(
        max_examples=8 * len(asked), deadline=None, derandomize=True, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.data())
    def run(data):
        argument = data.draw(st.sampled_from(sorted(asked)), label="argument")
        value = data.draw(BAD[asked[argument]], label="value")
        with pytest.raises(fs.InputError) as refused:
            call(**{k: v for k, v in good.items() if k != argument}, **{argument: value})
        said = str(refused.value)
        assert argument in said or ALIAS.get(argument, argument) in said
        assert len(said) < 900

    run()


def test_an_empty_batch_is_a_batch():
    empty = torch.ones(0, 3)
    assert fs.solve(SDE, fs.EulerMaruyama(), empty, TIMES).y.shape == (0, 3)
    assert fs.solve(SDE, fs.Milstein(), empty, TIMES, path=fs.BrownianPath((0, 3))).y.shape == (0, 3)
    for solver in (fs.DDIM(), fs.ShARK()):
        assert fs.sample(PROBLEM, solver, shape=(0, 3), steps=2).shape == (0, 3)
