"""Run diffusers' own scheduler tests with `FewStepScheduler` in place of each scheduler, and write the outcomes.

    python tests/integrations/diffusers_suite.py PATH/TO/diffusers [COMMIT]

PATH is a checkout of diffusers with its folder `tests`; nothing of it is copied. The table of outcomes, with the
reason of each test that does not pass, is `tests/integrations/diffusers_suite.json`.
"""

import inspect
import os
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "helpers"))

import diffusers
from other_suites import Suite, write

import fewstep as fs
from fewstep.integrations.diffusers import FewStepScheduler


def multistep(config):
    kind = config["algorithm_type"]
    if kind == "dpmsolver":
        return fs.DPMSolver(config["solver_order"], multistep=True, solver_type=solver_type(config))
    cls = fs.DPMSolverSDE if kind.startswith("sde") else fs.DPMSolverPP
    return cls(config["solver_order"], solver_type=solver_type(config))


def singlestep(config):
    kind = config["algorithm_type"]
    if kind.startswith("sde"):
        return fs.DPMSolverSDE(config["solver_order"], solver_type=solver_type(config))
    cls = fs.DPMSolver if kind == "dpmsolver" else fs.DPMSolverPP
    return cls(config["solver_order"], multistep=False, solver_type=solver_type(config))


def solver_type(config):
    return config["solver_type"] if config["solver_type"] in ("midpoint", "heun") else "midpoint"


SOLVERS = {
    "DDIMScheduler": lambda c: fs.DDIM(),
    "DDPMScheduler": lambda c: fs.DDPM(),
    "DEISMultistepScheduler": lambda c: fs.DEIS(c["solver_order"]),
    "DPMSolverMultistepScheduler": multistep,
    "DPMSolverSinglestepScheduler": singlestep,
    "DPMSolverSDEScheduler": lambda c: fs.Ancestral(fs.EDMEuler()),  # the nearest
    "EDMDPMSolverMultistepScheduler": multistep,
    "EDMEulerScheduler": lambda c: fs.EDMEuler(),
    "EulerDiscreteScheduler": lambda c: fs.EDMEuler(),
    "EulerAncestralDiscreteScheduler": lambda c: fs.Ancestral(fs.EDMEuler()),
    "HeunDiscreteScheduler": lambda c: fs.EDMHeun(),
    "IPNDMScheduler": lambda c: fs.IPNDM(4),
    "PNDMScheduler": lambda c: fs.PNDM("plms" if c["skip_prk_steps"] else "runge_kutta"),
    "SASolverScheduler": lambda c: fs.SASolver(),
    "UniPCMultistepScheduler": lambda c: fs.UniPC(
        c["solver_order"], c["solver_type"] if c["solver_type"] in ("bh1", "bh2") else "bh2"
    ),
}
"""The solver of this library that stands for each scheduler under its configuration."""

MODULES = (
    "ddim", "ddpm", "deis", "dpm_multi", "dpm_single", "dpm_sde", "edm_dpmsolver_multistep", "edm_euler", "euler",
    "euler_ancestral", "heun", "ipndm", "pndm", "sasolver", "unipc",
)  # fmt: skip


def stand_in(name):
    """A class of the scheduler's name whose constructor is `FewStepScheduler.from_config` of its configuration."""
    stock = getattr(diffusers, name)

    def __init__(self, *args, **options):
        if "solver" not in options:
            names = stock._get_init_keys(stock)
            own = stock(*args, **{k: v for k, v in options.items() if k in names}).config
            options = {**own, **options, "solver": SOLVERS[name](own)}
        FewStepScheduler.__init__(self, **options)

    __init__.__signature__ = inspect.signature(FewStepScheduler.__init__)
    of = {"__init__": __init__, "__module__": FewStepScheduler.__module__, "_compatibles": [*stock._compatibles, name]}
    if name == "PNDMScheduler":  # its tests call its inner parts, which are steps of one run here
        of |= {"step_prk": FewStepScheduler.step, "step_plms": FewStepScheduler.step}
        of |= {
            "prk_timesteps": property(lambda s: s.timesteps[:12]),
            "plms_timesteps": property(lambda s: s.timesteps[12:]),
        }
    return type(name, (FewStepScheduler,), of)


REASONS = {
    "test_rescale_betas_zero_snr": "the stock levels do not decrease (4096, then 25610); rejected",
    "_get_variance|previous_timestep": "calls an internal method of the stock scheduler",
    "data_prediction is not implemented|unsupported operand type|final_sigmas_type. zero": (
        "constructs a stock scheduler from a configuration that it rejects itself"
    ),
    "alphas_cumprod: got": "betas above 1: the cumulative product changes sign; rejected",
    "num_train_timesteps: got 1": "a schedule of one level; rejected",
    "levels repeat|levels, the last >= 0": "grids with a level twice; rejected",
    "expected one of scheduler.timesteps": "steps at a timestep that set_timesteps did not give; rejected",
    "is in a run at": "steps one sampler with history through two runs at once; rejected",
    "dpm_sde|sasolver": "numbers of the stock scheduler's own noise",
    "ipndm.py.*test_full_loop_no_noise": "goes through a run twice without set_timesteps",
    "expected result sum": "another order of rounding, 5e-7 to 5e-5 relative",
}

if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    root = Path(sys.argv[1]).resolve()
    classes = {name: stand_in(name) for name in SOLVERS}

    def swap(items):
        for name, module in list(sys.modules.items()):
            if ".test_scheduler" in name:
                for word in classes.keys() & vars(module).keys():
                    setattr(module, word, classes[word])
        for item in items:
            used = getattr(item.cls, "scheduler_classes", ())
            item.cls.scheduler_classes = tuple(classes.get(c.__name__, c) for c in used)

    files = [root / "tests" / "schedulers" / f"test_scheduler_{name}.py" for name in MODULES]
    suite = Suite(files, root, swap, REASONS)
    write(suite, "diffusers", Path(__file__).with_suffix(".json"), *sys.argv[2:] or ["unknown commit"])
