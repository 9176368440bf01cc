"""Run diffusers' own scheduler tests with `FewStepScheduler` in place of each scheduler, and write the outcomes.

    python tests/integrations/diffusers_suite.py PATH/TO/diffusers

PATH is a checkout of diffusers with its folder `tests`; nothing of it is copied. The table of outcomes is
`tests/integrations/diffusers_suite.json`: test, outcome, and the reason of each test that does not pass.
"""

import inspect
import json
import os
import sys
from collections import Counter
from pathlib import Path

import diffusers
import pytest

import fewstep as fs
from fewstep.integrations.diffusers import FewStepScheduler

TABLE = Path(__file__).with_suffix(".json")
NOISE = {"dpmsolver": fs.DPMSolver, "dpmsolver++": fs.DPMSolverPP, "sde-dpmsolver": fs.DPMSolverSDE}


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
NO_FILES = "needs files of the hub"


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


class Swap:
    """A plugin of pytest: puts the stand-ins into the test modules and keeps the outcomes."""

    def __init__(self):
        self.classes = {name: stand_in(name) for name in SOLVERS}
        self.outcomes = {}

    def pytest_collection_finish(self, session):
        for name, module in list(sys.modules.items()):
            if ".test_scheduler" in name:
                for word in self.classes.keys() & vars(module).keys():
                    setattr(module, word, self.classes[word])
        for item in session.items:
            used = getattr(item.cls, "scheduler_classes", ())
            item.cls.scheduler_classes = tuple(self.classes.get(c.__name__, c) for c in used)

    def pytest_runtest_logreport(self, report):
        test = report.nodeid.partition("test_scheduler_")[2]
        if report.when == "call" or report.outcome != "passed":
            reason = "" if report.passed else reason_of(report)
            self.outcomes[test] = (report.outcome, reason)


def reason_of(report):
    if report.skipped:
        return report.longrepr[2].removeprefix("Skipped: ")
    text = getattr(report.longrepr, "reprcrash", None)
    return (text.message if text else str(report.longrepr)).split("\n")[0][:300]


def run(checkout):
    """The outcome of each test, as {test: (outcome, reason)}."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    sys.path.insert(0, str(checkout))
    plugin = Swap()
    folder = Path(checkout) / "tests" / "schedulers"
    files = [str(folder / f"test_scheduler_{m}.py") for m in MODULES]
    quiet = [
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:warnings",
        "--tb=short",
        "--no-header",
        "-rN",
        "--show-capture=no",
    ]
    pytest.main([*quiet, "-o", "addopts=", "-c", os.devnull, "--rootdir", str(checkout), *files], plugins=[plugin])
    return plugin.outcomes


if __name__ == "__main__":
    found = run(Path(sys.argv[1]).resolve())
    counts = Counter(outcome for outcome, _ in found.values())
    table = {
        "diffusers": diffusers.__version__,
        "tests": len(found),
        **counts,
        "not passed": {
            test: f"{outcome}: {why}" for test, (outcome, why) in sorted(found.items()) if outcome != "passed"
        },
    }
    out = Path(sys.argv[2]) if len(sys.argv) > 2 else TABLE
    out.write_text(json.dumps(table, indent=1) + "\n")
    print(dict(counts))
