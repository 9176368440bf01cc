"""Plans are kept between runs on the same levels, and only where they follow from numbers and words."""

import pytest
import torch

import fewstep as fs
from fewstep.resolve import resolve

SIGMAS = torch.tensor([10.0, 3.0, 1.0, 0.0], dtype=torch.float64)


def plan(solver, sigmas=SIGMAS, schedule=None, keep=True):
    return resolve(solver, schedule, sigmas=sigmas, keep=keep)[0]


def test_equal_solvers_on_equal_levels_share_a_plan():
    assert plan(fs.DPMSolverPP(2)) is plan(fs.DPMSolverPP(2), SIGMAS.tolist())
    assert plan(fs.DEIS(2), schedule=fs.VPLinear()) is plan(fs.DEIS(2), schedule=fs.VPLinear())
    table = fs.DiscreteVP.named("linear")
    assert plan(fs.DEIS(2), schedule=table) is plan(fs.DEIS(2), schedule=table)
    assert plan(fs.DPMSolverPP(2), keep=False) is not plan(fs.DPMSolverPP(2), keep=False)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (dict(solver=fs.DPMSolverPP(2)), dict(solver=fs.DPMSolverPP(3))),
        (dict(solver=fs.DDIM()), dict(solver=fs.DDIM(eta=0.5))),
        (dict(solver=fs.DDIM()), dict(solver=fs.DDIM(), sigmas=SIGMAS[:3])),
        (dict(solver=fs.DEIS(2), schedule=fs.VPLinear()), dict(solver=fs.DEIS(2), schedule=fs.VPCosine())),
    ],
)
def test_other_options_levels_and_schedules_have_other_plans(a, b):
    assert plan(**a) is not plan(**b)
    for options in (a, b):
        kept, made = plan(**options), options["solver"].plan(options.get("sigmas", SIGMAS), options.get("schedule"))
        assert kept.name == made.name
        torch.testing.assert_close(kept.update_eval, made.update_eval, rtol=0, atol=0)


def test_plans_that_warn_or_belong_to_others_are_made_anew():
    class Own(fs.DDIM):
        pass

    assert plan(Own()) is not plan(Own())
    for _ in range(2):
        with pytest.warns(UserWarning, match="SEEDS is unstable"):
            plan(fs.SEEDS(1))
