"""`invert`: round trips with the solver's order, exact after corrections; closed forms on Gaussian data."""

import pytest
import torch

import fewstep as fs
from fewstep_analysis.diffusion_problems import by_name

SMOOTH = by_name("smooth")
SCHEDULES = [fs.VPLinear(), fs.VE(), fs.EDM(), fs.FlowMatching(), fs.DiscreteVP.named("linear")]
SOLVERS = [fs.DDIM(), fs.UniPC(2), fs.DPMSolverPP(3), fs.EDMHeun(), fs.DPMSolver(3), fs.IPNDM(4), fs.DEIS(3)]


def round_trip(model, solver, x0, steps, **options):
    noise = fs.invert(model, solver, x0, steps=steps, **options)
    options.pop("corrections", None)
    return float((fs.sample(model, solver, noise=noise, steps=steps, final="sigma_min", **options) - x0).abs().max())


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_each_correction_divides_what_is_left_of_a_round_trip(solver):
    x0 = SMOOTH.mixture.sample(4)
    errors = [round_trip(SMOOTH.problem, solver, x0, 40, corrections=k) for k in range(3)]
    assert errors[1] < 0.2 * errors[0]
    assert errors[2] < 0.2 * errors[1] + 1e-12
    assert round_trip(SMOOTH.problem, solver, x0, 40, corrections=6) < max(1e-11, 2 * errors[0] * 0.2**6)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_noise_of_gaussian_data_has_its_closed_form(schedule):
    """x_T / x_0 = ((v + sigma_max^2) / (v + sigma_min^2))^(1/2) in x0 + sigma n."""
    v, x0 = 0.3, torch.linspace(-2, 2, 5, dtype=torch.float64)[:, None]
    model = fs.DiffusionModel(lambda x, s: x * v / (v + s * s), schedule)
    ends = torch.tensor([schedule.sigma_max, schedule.sigma_min], dtype=torch.float64)
    first, last = schedule.alpha(ends)
    want = x0 / last * ((v + ends[0] ** 2) / (v + ends[1] ** 2)).sqrt() * first
    errors = [float((fs.invert(model, fs.EDMHeun(), x0, steps=n) / want - 1)[0].abs()) for n in (40, 80)]
    assert errors[1] < 0.01
    assert errors[1] < 0.3 * errors[0]  # order 2


def test_grids_of_other_spacings_are_inverted_too():
    x0 = SMOOTH.mixture.sample(8)
    for spacing in ("karras", [100.0, 20.0, 5.0, 2.0, 1.0, 0.5, 0.2, 0.05, 0.0]):
        assert round_trip(SMOOTH.problem, fs.UniPC(2), x0, 20, spacing=spacing, corrections=14) < 1e-6


@pytest.mark.parametrize("solver", [fs.DDPM(), fs.DDIM().plan([10.0, 1.0]), "ddim"], ids=["noise", "plan", "name"])
def test_what_cannot_be_inverted_is_refused(solver):
    with pytest.raises(fs.InputError, match="^solver"):
        fs.invert(SMOOTH.problem, solver, torch.zeros(2, 2))
