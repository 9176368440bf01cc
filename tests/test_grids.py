"""Published grids, spacings by quantiles, and a user's levels, against diffusers, SciPy and the papers' formulas."""

import numpy as np
import pytest
import scipy.stats
import torch

import fewstep as fs
from fewstep.grid import published, spacing_names

LATENT = fs.DiscreteVP.named("scaled_linear", 1000, 0.00085, 0.012)
FLOW = fs.FlowMatching(3.0)
SCHEDULES = {"ays-svd": fs.EDM(0.002, 700.0), "oss": FLOW}


def of(name):
    """The kind of schedule that a grid was made for."""
    return SCHEDULES.get(name, SCHEDULES.get(name[:3], LATENT))


@pytest.mark.parametrize("final", ["x0", "sigma_min"])
@pytest.mark.parametrize("steps", [1, 2, 7, 20, 300])
def test_every_spacing_decreases_between_the_ends_of_its_schedule(steps, final):
    for name in spacing_names():
        schedule = of(name)
        grid = fs.sigma_grid(schedule, steps, name, final)
        assert grid.shape == (steps + 1,)
        assert grid.dtype == torch.float64
        assert (grid.diff() < 0).all(), name
        assert 0 < grid[0] <= schedule.sigma_max * (1 + 1e-9)
        assert grid[-1] == pytest.approx(0 if final == "x0" else schedule.sigma_min, rel=1e-9)


def test_align_your_steps_equals_diffusers():
    pytest.importorskip("diffusers")
    from diffusers.schedulers import AysSchedules

    for key, name in (("StableDiffusion", "ays-sd15"), ("StableDiffusionXL", "ays-sdxl")):
        grid = fs.sigma_grid(LATENT, 10, name)
        labels = torch.tensor(AysSchedules[f"{key}Timesteps"]).double()
        torch.testing.assert_close(grid[:-1], LATENT.sigma(labels), rtol=1e-6, atol=0)
        # diffusers' own sigmas have three digits; the last ones differ by up to 1.5 % from its timesteps
        torch.testing.assert_close(grid, torch.tensor(AysSchedules[f"{key}Sigmas"]).double(), rtol=0.015, atol=0)
    video = fs.sigma_grid(of("ays-svd"), 10, "ays-svd")
    assert video.tolist() == pytest.approx(AysSchedules["StableDiffusionVideoSigmas"], rel=1e-12)


PUBLISHED = {
    ("gits-0.80", 3): [14.61464119, 11.54541874, 6.77309084],
    ("gits-1.00", 10): [14.61464119, 11.54541874, 7.49001646, 5.85520077, 4.45427561, 3.07277966, 1.98035145,
                        1.24153244, 0.72133851, 0.34370604],
    ("gits-1.20", 5): [14.61464119, 2.84484982, 1.24153244, 0.59516323, 0.25053367],
    ("gits-1.50", 20): [14.61464119, 2.45070267, 1.41535246, 0.95350921, 0.72133851, 0.57119018, 0.4783645,
                        0.43325692, 0.38853383, 0.36617002, 0.34370604, 0.32104823, 0.29807833, 0.27464288,
                        0.25053367, 0.22545385, 0.19894916, 0.17026083, 0.13792117, 0.09824532],
    ("oss-flux", 10): [0.9968, 0.9886, 0.9819, 0.975, 0.966, 0.9471, 0.9158, 0.8287, 0.5512, 0.2808],
    ("oss-wan", 20): [0.99996667, 0.997, 0.995, 0.993, 0.991, 0.989, 0.987, 0.985, 0.98, 0.975, 0.973, 0.968, 0.96,
                      0.946, 0.927, 0.902, 0.864, 0.776, 0.539, 0.208],
}  # fmt: skip


@pytest.mark.parametrize(("name", "steps"), PUBLISHED)
def test_published_levels_at_the_published_counts(name, steps):
    grid = fs.sigma_grid(of(name), steps, name)[:-1]
    levels = grid / (1 + grid) if name.startswith("oss") else grid  # flows are published in t
    assert levels.tolist() == pytest.approx(PUBLISHED[name, steps], rel=1e-8)


@pytest.mark.parametrize("name", published())
@pytest.mark.parametrize("steps", [4, 33])
def test_other_counts_are_interpolated_in_the_logarithm(name, steps):
    """NumPy's piecewise linear interpolation of the log of the longest published grid, as in ComfyUI's nodes."""
    clock, tables = published()[name]
    schedule, table = of(name), tables[-1].numpy()
    if steps + 1 in map(len, tables):
        table = tables[steps - 2].numpy()
    if clock == "flow":  # the ends are moved into the range of this schedule
        schedule = fs.FlowMatching(1.0, 1e-3, 1 - 1e-7)
        table = table.clip(1e-3, 1 - 1e-7)
    nodes = np.exp(np.interp(np.linspace(0, 1, steps + 1), np.linspace(0, 1, len(table)), np.log(table)))
    expected = nodes / (1 - nodes) if clock == "flow" else nodes
    np.testing.assert_allclose(fs.sigma_grid(schedule, steps, name)[:-1].numpy(), expected[:-1], rtol=1e-7)


def test_beta_has_the_quantiles_of_scipy():
    p = 1 - np.arange(12) / 12
    quantiles = scipy.stats.beta.ppf(p, 0.6, 0.6)
    times = LATENT.time(fs.sigma_grid(LATENT, 12, "beta")[:-1])
    assert times.tolist() == pytest.approx(np.rint(quantiles * 999).tolist(), abs=1e-7)
    clock = FLOW.time(fs.sigma_grid(FLOW, 12, "beta")[:-1]).numpy()
    np.testing.assert_allclose(clock, 1e-3 + quantiles * (FLOW.t_max - 1e-3), rtol=1e-12)
    many = LATENT.time(fs.sigma_grid(LATENT, 400, "beta")[:-1]).numpy()  # labels would repeat
    np.testing.assert_allclose(
        many, scipy.stats.beta.ppf(1 - np.arange(400) / 400, 0.6, 0.6) * 999, rtol=1e-8, atol=1e-8
    )


def test_kl_optimal_is_even_in_the_arc_tangent():
    grid = fs.sigma_grid(LATENT, 9, "kl_optimal")[:-1]
    ends = np.arctan([LATENT.sigma_max, LATENT.sigma_min])
    np.testing.assert_allclose(grid.numpy(), np.tan(np.linspace(*ends, 9)), rtol=1e-9)


@pytest.mark.parametrize("steps", [2, 9, 40])
def test_linear_quadratic_is_the_formula_of_mochi(steps):
    half, threshold = steps // 2, 0.025
    difference, rest = half - threshold * steps, steps - half
    square = difference / (half * rest**2)
    linear = threshold / half - 2 * difference / rest**2
    fall = [i * threshold / half for i in range(half)]
    fall += [square * i * i + linear * i + square * half**2 for i in range(half, steps)]
    expected = 1 - np.array(fall)
    sigma = fs.sigma_grid(LATENT, steps, "linear_quadratic")[:-1].numpy()
    np.testing.assert_allclose(sigma, expected * LATENT.sigma_max, rtol=1e-12)
    flow = fs.sigma_grid(fs.FlowMatching(), steps, "linear_quadratic")[:-1].numpy()
    np.testing.assert_allclose(flow / (1 + flow), expected * (1 - 1e-4), rtol=1e-9)


def test_levels_of_a_user_are_a_spacing():
    levels = [10.0, 3.0, 1.0, 0.1]
    edm = fs.EDM(0.1, 10.0)
    assert fs.sigma_grid(edm, 3, levels, "sigma_min").tolist() == pytest.approx(levels)
    assert fs.sigma_grid(edm, 3, [*levels[:-1], 0.0]).tolist() == pytest.approx([*levels[:-1], 0.0])
    finer = fs.sigma_grid(edm, 6, torch.tensor(levels), "sigma_min")
    assert finer[1::2].tolist() == pytest.approx([30**0.5, 3**0.5, 0.1**0.5], rel=1e-6)
    model = fs.DiffusionModel(lambda x, s: x / (1 + s * s), edm)
    a, b = (
        fs.sample(model, fs.DDIM(), shape=(4, 2), **grid)
        for grid in (dict(steps=3, spacing=levels), dict(sigmas=[10.0, 3.0, 1.0, 0.0]))
    )
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("schedule", "spacing", "steps", "words"), [
    (LATENT, "ays-svd", 10, "ays-svd.*between the schedule's 0.02917 and 14.61"),
    (LATENT, "oss-flux", 10, "made for this kind of model"), (LATENT, "ays-sd", 10, "Did you mean 'ays-s"),
    (LATENT, [1.0, 2.0], 3, "spacing: got .* Reverse"), (LATENT, [100.0, 50.0, 1.0], 2, "got a tensor"),
    (LATENT, [], 3, "n >= 2"), (LATENT, 7, 3, "spacing"), (LATENT, None, 3, "spacing"),
])  # fmt: skip
def test_grids_that_do_not_fit_are_rejected(schedule, spacing, steps, words):
    with pytest.raises(fs.InputError, match=words):
        fs.sigma_grid(schedule, steps, spacing)
