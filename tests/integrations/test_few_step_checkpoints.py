"""LCM, TCD and flow LCM configurations in FewStepScheduler: diffusers' labels, and its numbers on the same noise."""

import pytest
import torch

import fewstep as fs

df = pytest.importorskip("diffusers")
from fewstep.integrations.diffusers import FewStepScheduler  # noqa: E402

SHAPE = (2, 4, 8, 8)
FLOW = dict(shift=3.0)


def network(x, t):
    return 0.3 * torch.tanh(x) + 0.1 * x + 1e-4 * float(t)


def run(scheduler, steps, begin=0, **options):
    """The samples after each step, with every draw from one generator."""
    scheduler.set_timesteps(steps)
    scheduler.set_begin_index(begin)
    generator = torch.Generator().manual_seed(5)
    x, found = torch.randn(SHAPE, generator=generator), []
    for t in scheduler.timesteps[begin:]:
        x = scheduler.step(network(x, t), t, x, generator=generator, **options).prev_sample
        found.append(x)
    return torch.stack(found)


CASES = {
    "LCM": (df.LCMScheduler(), {}, None), "LCM v": (df.LCMScheduler(prediction_type="v_prediction"), {}, None),
    "LCM clipped": (df.LCMScheduler(clip_sample=True), {}, None),
    "LCM of 100": (df.LCMScheduler(original_inference_steps=100, timestep_scaling=0.01), {}, None),
    "TCD": (df.TCDScheduler(), {}, fs.TCD(0.0)), "TCD 0.3": (df.TCDScheduler(), dict(eta=0.3), fs.TCD(0.7)),
    "TCD 1": (df.TCDScheduler(prediction_type="sample"), dict(eta=1.0), fs.TCD()),
    "flow": (df.FlowMatchLCMScheduler(**FLOW), {}, None),
    "flow, beta": (df.FlowMatchLCMScheduler(use_beta_sigmas=True), {}, None),
}  # fmt: skip


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize("name", CASES)
def test_configurations_of_distilled_networks_equal_diffusers(name, steps):
    stock, options, solver = CASES[name]
    if name == "flow, beta" and steps == 1:
        pytest.skip("diffusers' own list is nan")
    ours = FewStepScheduler.from_config(stock.config, solver=solver)
    taken = {} if "eta" in options and name == "TCD" else options
    defaults = {"eta": 0.0} if name == "TCD" else {}
    want, got = run(stock, steps, **options | defaults), run(ours, steps, **taken)
    torch.testing.assert_close(ours.timesteps.float(), stock.timesteps.float(), rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)
    if steps == 8:
        torch.testing.assert_close(
            run(ours, 8, 3, **taken), run(stock, 8, 3, **options | defaults), rtol=2e-5, atol=2e-5
        )


@pytest.mark.parametrize("strength", [None, 0.5])
@pytest.mark.parametrize("original", [None, 100, 20])
@pytest.mark.parametrize("name", ["LCM", "TCD"])
def test_set_timesteps_takes_the_steps_of_the_distillation(name, original, strength):
    """As LatentConsistencyModelPipeline and its image-to-image form pass them."""
    stock, _, solver = CASES[name]
    ours = FewStepScheduler.from_config(stock.config, solver=solver)
    given = dict(original_inference_steps=original) | ({} if strength is None else dict(strength=strength))
    for steps in (4, 2):
        stock.set_timesteps(steps, **given)
        ours.set_timesteps(steps, **given)
        assert ours.timesteps.tolist() == stock.timesteps.tolist()


def test_other_configurations_have_no_distillation():
    ours = FewStepScheduler.from_config(df.DDIMScheduler().config)
    for given in (dict(original_inference_steps=50), dict(strength=0.5)):
        with pytest.raises(fs.InputError, match=f"^{next(iter(given))}: DPM.* takes none"):
            ours.set_timesteps(4, **given)


def test_labels_of_an_lcm_configuration():
    scheduler = FewStepScheduler.from_config(df.LCMScheduler().config)
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == [999, 759, 499, 259]
    assert repr(scheduler.solver) == "LCM()"
    scheduler.set_timesteps(timesteps=[999, 499])
    assert scheduler.timesteps.tolist() == [999, 499]


def test_a_loaded_configuration_names_its_class(tmp_path):
    for cls, solver in ((df.LCMScheduler, "LCM()"), (df.TCDScheduler, "TCD()")):
        cls().save_pretrained(tmp_path)
        assert repr(FewStepScheduler.from_pretrained(tmp_path).solver) == solver
        loaded = cls.from_pretrained(tmp_path)
        assert repr(FewStepScheduler.from_config(loaded.config).solver) == solver
        made = FewStepScheduler.from_config(loaded.config)
        made.save_pretrained(tmp_path)
        assert repr(FewStepScheduler.from_pretrained(tmp_path).solver) == solver


def test_lcm_and_tcd_replace_the_scheduler_of_an_ordinary_configuration():
    """As users do with the weights of LCM-LoRA on Stable Diffusion."""
    config = df.DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012).config
    for stock, solver, options in ((df.LCMScheduler, fs.LCM(), {}), (df.TCDScheduler, fs.TCD(0.3), {"eta": 0.3})):
        theirs, ours = stock.from_config(config), FewStepScheduler.from_config(config, solver=solver)
        torch.testing.assert_close(run(ours, 4), run(theirs, 4, **options), rtol=2e-5, atol=2e-5)


def test_options_that_are_not_offered_are_rejected():
    with pytest.raises(fs.InputError, match="scale_factors.*FlowMatchLCMScheduler"):
        FewStepScheduler.from_config(df.FlowMatchLCMScheduler(scale_factors=[2.0]).config)
    ours = FewStepScheduler.from_config(df.LCMScheduler().config)
    with pytest.raises(fs.InputError, match="eta.*TCD"):
        run(ours, 2, eta=0.3)
    with pytest.raises(fs.InputError, match="1 LCM|set_timesteps|original"):
        ours.set_timesteps(60)


@pytest.mark.filterwarnings("ignore:__array__")  # of diffusers itself
def test_published_spacings_are_options_of_a_configuration():
    from diffusers.schedulers import AysSchedules

    stable = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    stock = df.DPMSolverMultistepScheduler(**stable)
    ours = FewStepScheduler.from_config(stock.config, timestep_spacing="ays-sdxl", solver=fs.DPMSolverPP(2))
    ours.set_timesteps(10)
    assert ours.timesteps.tolist() == AysSchedules["StableDiffusionXLTimesteps"]
    stock.set_timesteps(timesteps=AysSchedules["StableDiffusionXLTimesteps"])
    ends = []
    for scheduler in (stock, ours):
        x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
        for t in scheduler.timesteps:
            x = scheduler.step(network(x, t), t, x).prev_sample
        ends.append(x)
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-4, atol=1e-4)
    flow = FewStepScheduler.from_config(
        df.FlowMatchEulerDiscreteScheduler(shift=3.0).config, timestep_spacing="oss-flux"
    )
    flow.set_timesteps(10)
    assert flow.timesteps[:3].tolist() == pytest.approx([996.8, 988.6, 981.9])
    assert flow.sigmas[:3].tolist() == pytest.approx([0.9968, 0.9886, 0.9819])
