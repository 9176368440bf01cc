"""Flow configurations in `FewStepScheduler`: the law of every stochastic solver, and the numbers of diffusers."""

import math

import pytest
import torch
from flow_cases import DETERMINISTIC, STOCHASTIC, V0, describe

import fewstep as fs
from fewstep.testing import _variance

df = pytest.importorskip("diffusers")
from fewstep.integrations.diffusers import FewStepScheduler  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # of diffusers about itself
SHIFT = 3.0
NOISE_FORM = [s for s in STOCHASTIC if isinstance(getattr(s, "solver", None), (fs.DPMSolver, fs.DEIS))]


def velocity(x, t):
    """Exact for data N(0, 1/4): noise - x0 at t = timestep / 1000."""
    s = float(t) / 1000
    return x * (s - (1 - s) * V0) / ((1 - s) ** 2 * V0 + s * s)


def run(scheduler, x, steps, model=velocity, generator=None, **grid):
    scheduler.set_timesteps(steps, **grid)
    options = {} if generator is None else {"generator": generator}
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t), t, x, **options, return_dict=False)[0]
    return x


def check_law(solver, steps, batch, options, **grid):
    """5 standard errors (false alarms: 6e-7 each) around the variance by the solver's own coefficients."""
    g = torch.Generator().manual_seed(steps)
    x = torch.randn(batch, 512, generator=g)
    stock = df.FlowMatchEulerDiscreteScheduler(**options)
    ours = FewStepScheduler.from_config(stock.config, solver=solver, exact=True)
    out = run(ours, x, steps, generator=g, **grid)
    stock.set_timesteps(steps, **grid)
    levels = stock.sigmas.double().clamp(max=1 - 1e-6)
    plan = solver.plan(levels / (1 - levels), fs.FlowMatching())
    exact = float(_variance(plan, plan.sigmas[:1], lambda x, s: V0 / (V0 + s * s) * x))
    if levels[-1] > 0:  # the pipeline's state is alpha x
        exact *= float(1 - levels[-1]) ** 2
    assert abs(out.double().square().mean() / exact - 1) < 5 * math.sqrt(2 / x.numel()), (steps, exact)


@pytest.mark.parametrize(
    ("counts", "batch"), [((10,), 16), pytest.param((5, 10, 30), 128, marks=pytest.mark.slow)], ids=["few", "many"]
)
@pytest.mark.parametrize("solver", [s for s in STOCHASTIC if s not in NOISE_FORM], ids=describe)
def test_samples_have_the_variance_of_the_solvers_own_recursion(solver, counts, batch):
    """Of 2^13 or 2^16 samples."""
    for steps in counts:
        check_law(solver, steps, batch, dict(shift=SHIFT))


@pytest.mark.parametrize("solver", [fs.ShARK(), fs.DPMSolverSDE(2), fs.ERSDE()], ids=describe)
@pytest.mark.parametrize("options", [dict(shift_terminal=0.1), dict(use_dynamic_shifting=True)], ids=["end", "mu"])
def test_shifted_grids_keep_the_law(solver, options):
    check_law(solver, 12, 16, options, **(dict(mu=0.8) if "use_dynamic_shifting" in options else {}))


@pytest.mark.parametrize("solver", [*DETERMINISTIC, fs.SASolver(tau=0), fs.PNDM()], ids=describe)
def test_deterministic_solvers_end_at_the_data(solver):
    """The exact map is x / 2; from float32 states, at 40 steps."""
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    out = run(FewStepScheduler(solver=solver, shift=SHIFT, exact=True), x, 40)
    assert (out / x - 0.5).abs().max() < 0.05
    assert (out / x).std() < 1e-3  # of rounding: DEIS extrapolates the noise


@pytest.mark.parametrize("steps", [1, 2, 5, 10])
def test_heun_equals_flow_match_heun(steps):
    """State, timesteps, sigmas and the addition of noise."""
    stock = df.FlowMatchHeunDiscreteScheduler(shift=SHIFT)
    ours = FewStepScheduler.from_config(stock.config, solver=fs.EDMHeun())
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    model = lambda x, t: torch.tanh(x) * float(t) / 1000 - 0.3 * x  # noqa: E731
    theirs = run(stock, x, steps, model)
    torch.testing.assert_close(run(ours, x, steps, model), theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.timesteps, stock.timesteps)
    torch.testing.assert_close(ours.sigmas, stock.sigmas)
    t = ours.timesteps[:1]
    s = t / 1000
    torch.testing.assert_close(ours.scale_noise(x, t, 0 * x + 1), (1 - s) * x + s)


def test_stochastic_sampling_equals_diffusers():
    stock = df.FlowMatchEulerDiscreteScheduler(shift=SHIFT, stochastic_sampling=True)
    ours = FewStepScheduler.from_config(stock.config, solver=fs.EDMEuler())
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    ends = []
    for scheduler in (stock, ours):
        torch.manual_seed(1)
        ends.append(run(scheduler, x, 6))
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-5)
    with pytest.raises(fs.InputError, match=r"stochastic_sampling=True.*EDMEuler\(\)"):
        FewStepScheduler.from_config(stock.config, solver=fs.UniPC(2)).set_timesteps(4)


EDGES = {
    "shift_terminal": dict(shift_terminal=0.1, shift=SHIFT),
    "sigma_min": dict(final_sigmas_type="sigma_min"),
}


@pytest.mark.parametrize("case", EDGES)
def test_one_step_without_a_way_names_what_the_user_gave(case):
    """diffusers' own levels are then [nan, 0] and twice the smallest one."""
    with pytest.raises(fs.InputError, match=rf"num_inference_steps: got 1; the levels of .*{case}"):
        FewStepScheduler(solver=fs.EDMEuler(), **EDGES[case]).set_timesteps(1)
    FewStepScheduler(solver=fs.EDMEuler(), **EDGES[case]).set_timesteps(2)


def test_one_step_of_a_flow_runs_or_names_the_option():
    """With shift_terminal the only level becomes the last, in diffusers by a division of 0 by 0."""
    ours = FewStepScheduler.from_config(df.FlowMatchEulerDiscreteScheduler(shift_terminal=0.1).config)
    with pytest.raises(fs.InputError, match="num_inference_steps: got 1; the levels.*shift_terminal"):
        ours.set_timesteps(1)
    flow = dict(use_flow_sigmas=True, prediction_type="flow_prediction", final_sigmas_type="sigma_min")
    stock = df.DPMSolverMultistepScheduler(**flow)
    for scheduler in (stock, FewStepScheduler.from_config(stock.config)):
        scheduler.set_timesteps(1)
        assert scheduler.step(torch.ones(1, 3), scheduler.timesteps[0], torch.ones(1, 3)).prev_sample.isfinite().all()
