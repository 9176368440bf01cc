"""Every way to run a plan goes through `executor.combine`: a wrong sign there makes all of them wrong."""

import pytest
import torch

import fewstep as fs
from fewstep import executor
from fewstep.integrations.k_diffusion import sampler

SCHEDULE = fs.DiscreteVP.named("linear")
SIGMAS = fs.sigma_grid(SCHEDULE, 5)
NOISE = torch.randn(32, 3, generator=torch.Generator().manual_seed(0))


def denoise(x, sigma):
    """The posterior mean of data N(0, 1/4)."""
    return x * 0.25 / (0.25 + sigma.reshape(-1, 1) ** 2)


PROBLEM = fs.DiffusionModel(denoise, SCHEDULE)


def by_sample():
    return fs.sample(PROBLEM, fs.DPMSolverPP(2), noise=NOISE, sigmas=SIGMAS)


def by_diffusers():
    pytest.importorskip("diffusers")
    from fewstep.integrations.diffusers import FewStepScheduler

    scheduler = FewStepScheduler(solver=fs.DPMSolverPP(2), prediction_type="sample", exact=True)
    scheduler.set_timesteps(5)
    x = NOISE
    for t in scheduler.timesteps:
        sigma = SCHEDULE.sigma(t.double().reshape(1)).float()
        x = scheduler.step(denoise(x / SCHEDULE.alpha(sigma), sigma), t, x).prev_sample
    return x


def by_k_diffusion():
    start = NOISE * float(SIGMAS[0])
    return sampler(fs.DPMSolverPP(2))(lambda x, sigma: denoise(x, sigma), start, SIGMAS.float(), disable=True)


def by_distill_dode():
    table, report = fs.distill_dode(PROBLEM, fs.DDIM(), noise=NOISE, sigmas=SIGMAS, guard=False)
    return torch.cat([table.update_eval.flatten(), torch.tensor([report.student_rmse, report.base_rmse])])


@pytest.mark.filterwarnings("ignore")  # of diffusers about itself
@pytest.mark.parametrize("run", [by_sample, by_diffusers, by_k_diffusion, by_distill_dode])
def test_wrong_sign_in_the_update_changes_every_result(run, monkeypatch):
    """The planted executor subtracts the evaluations in each update; stages of these plans contain none."""
    right, combine = run(), executor.combine

    def wrong(terms, state):
        return combine(terms._replace(evaluations=tuple((-w, j) for w, j in terms.evaluations)), state)

    assert torch.equal(run(), right)
    monkeypatch.setattr(executor, "combine", wrong)
    got = run()
    assert not (got.isfinite().all() and torch.allclose(got, right.to(got), rtol=0.05, atol=0.05))
