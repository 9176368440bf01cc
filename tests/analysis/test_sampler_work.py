"""Work-precision of samplers: exact problems, reference values, records and figures."""

import math

import pytest
import torch

import fewstep as fs
from fewstep_analysis import sampler_work
from fewstep_analysis.diffusion_problems import PROBLEMS, by_name
from fewstep_analysis.records import Record


@pytest.mark.parametrize("name", PROBLEMS)
def test_denoiser_is_the_posterior_mean(name):
    """Compared with sums over samples of the data; its score with the gradient of the log density."""
    mixture = by_name(name).mixture
    data = mixture.sample(100_000, seed=0)
    x = mixture.sample(4, seed=1) + 0.1
    for level in (0.5, 3.0):
        sigma = torch.tensor(level, dtype=torch.float64)
        weight = torch.softmax(-(x[:, None] - data).square().sum(-1) / (2 * level**2), 1)
        torch.testing.assert_close(mixture.denoiser(x, sigma), weight @ data, rtol=0.02, atol=0.02)
        y = x.clone().requires_grad_(True)
        variance = mixture.stds**2 + level**2
        squares = (y[:, None] - mixture.means).square().sum(-1)
        density = torch.logsumexp(
            mixture.weights.log() - 0.5 * y.shape[1] * variance.log() - 0.5 * squares / variance, 1
        )
        (score,) = torch.autograd.grad(density.sum(), y)
        torch.testing.assert_close((mixture.denoiser(x, sigma) - x) / level**2, score)


def test_reference_flow_of_gaussian_is_exact():
    problem = by_name("gaussian")
    m, v = problem.mixture.means[0], problem.mixture.stds[0] ** 2
    x = problem.noise(16)
    levels = torch.tensor([20.0, 1.0, 0.02], dtype=torch.float64)
    for sigma, got in zip(levels, problem.mixture.flow(x, levels, 400)):
        want = m + (x - m) * torch.sqrt((v + sigma**2) / (v + 20.0**2))
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8)


@pytest.mark.slow
def test_errors_on_the_ring_equal_independent_measurements(tmp_path):
    """RMSEs of diffusers' schedulers on the same problem, measured once."""
    record = sampler_work.work_precision(
        "ring",
        (5, 10, 20),
        solvers=["ddim", fs.DPMSolverPP(2), "edm_heun", "IPNDM(4)"],
        samples=1024,
        diffusers=False,
    )
    found = {(s["name"], s["spacing"]): dict(zip(s["nfe"], s["rmse"])) for s in record.data["series"]}
    for n, value in {5: 0.361, 10: 0.139, 20: 0.065}.items():
        assert found["DDIM", "trailing"][n] == pytest.approx(value, rel=0.05)
    for n, value in {5: 0.098, 10: 0.070, 20: 0.014}.items():
        assert found["DPMSolverPP(2)", "logsnr"][n] == pytest.approx(value, rel=0.05)
    assert found["IPNDM(4)", "logsnr"][10] < 0.03
    assert set(found["EDMHeun", "karras"]) == {4, 9, 19}  # 3 steps take 4: the one over a factor of 591 is Euler's
    text = sampler_work.table(record, (5, 10))
    assert "| DDIM | trailing | 0.36 | 0.14 |" in text
    assert "(9)" in text
    back = Record.load(record.save(tmp_path / "wp.json"))
    assert sampler_work.figure(back, tmp_path / "wp.svg").stat().st_size > 5000


def test_distances_to_data_decrease_with_work():
    record = sampler_work.work_precision(
        "smooth", (4, 32), solvers=["UniPC(2)"], samples=512, spacings=["logsnr"], diffusers=False
    )
    (series,) = record.data["series"]
    assert series["rmse"][1] < series["rmse"][0] / 5
    assert series["w2"][1] < 3 * record.data["w2_floor"]
    assert not math.isnan(record.data["w2_floor"])
    assert series["mmd"][1] < max(0.2 * series["mmd"][0], 2 * record.data["mmd_floor"], 0.02)


def test_bad_input_is_rejected():
    with pytest.raises(fs.InputError, match="solvers"):
        sampler_work.work_precision("ring", (5,), solvers=["DDIMM"])
    with pytest.raises(fs.InputError, match="problem"):
        sampler_work.work_precision("rings", (5,))
    with pytest.raises(fs.InputError, match="nfe"):
        sampler_work.work_precision("ring", ())
    with pytest.raises(fs.InputError, match="adds noise"):
        sampler_work.work_precision("ring", (5,), solvers=[fs.DDPM()])


def test_any_configured_solver_is_measured():
    record = sampler_work.work_precision(
        "gaussian",
        (4,),
        solvers=["unipc(3, corrector=False)"],
        spacings=["logsnr"],
        samples=8,
        diffusers=False,
    )
    assert [(s["name"], s["nfe"]) for s in record.data["series"]] == [("UniPC(order=3, corrector=False)", [4])]
