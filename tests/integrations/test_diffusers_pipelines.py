"""FewStepScheduler in diffusers' own pipelines, with tiny random weights; nothing of theirs is changed."""

import subprocess
import sys

import numpy as np
import pytest
import torch

import fewstep as fs
from fewstep.errors import InputError

df = pytest.importorskip("diffusers")
from fewstep.integrations.diffusers.pipeline import Idle, denoising, distill_dode  # noqa: E402
from fewstep.integrations.diffusers.scheduler import FewStepScheduler  # noqa: E402

# diffusers 0.42 meets numpy 2 and its own configuration with warnings that are not ours to fix
pytestmark = pytest.mark.filterwarnings("ignore")

SD = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)


def gap(a, b):
    assert b.isfinite().all()
    return float((a - b).norm() / a.norm())


def unet(**options):
    torch.manual_seed(0)
    return df.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 8),
        norm_num_groups=4, down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
        add_attention=False, **options,
    ).eval()  # fmt: skip


def elsewhere(code):
    """Run it in a new process, with one thread as here: the order of a sum determines its rounding."""
    subprocess.run([sys.executable, "-W", "ignore", "-c", f"import torch\ntorch.set_num_threads(1)\n{code}"],
                   check=True)  # fmt: skip


def images(pipe, steps, seed=0, **options):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    return pipe(batch_size=2, generator=generator, num_inference_steps=steps, output_type="np", **options).images


def students(problem, event=(1, 8, 8)):
    """Each kind of learned solver, barely trained."""
    noise = torch.randn(16, *event, generator=torch.Generator().manual_seed(0))
    few = dict(noise=noise, steps=3, teacher_substeps=2, guard=False)
    dode, _ = fs.distill_dode(problem, fs.DDIM(), **few)
    training = fs.TrainingOptions(iterations=2)
    table, _ = fs.fit_table(problem, nfe=3, noise=noise, teacher_steps=6, starts=1, iterations=1, guard=False)
    sig, _ = fs.distill_sigdeg(
        problem, steps=3, teacher_steps=6, event_shape=event, training=training,
        teacher_options=fs.TeacherOptions(trajectories=16),
    )  # fmt: skip
    return {
        "dode": dode,
        "table": table,
        "sigdeg": sig,
        "plan": fs.UniPC(2).plan(fs.sigma_grid(problem.schedule, 3)),
    }


@pytest.mark.parametrize("pipeline", ["DDIMPipeline", "DDPMPipeline"])
def test_unconditional_pipelines_accept_every_kind_of_solver(pipeline):
    """With the solver of the pipeline's own scheduler the numbers are its numbers."""
    pipe = getattr(df, pipeline)(unet(), getattr(df, pipeline.replace("Pipeline", "Scheduler"))())
    own = fs.DDIM() if "DDIM" in pipeline else fs.DDPM()
    want = images(pipe, 6)
    config = pipe.scheduler.config
    for solver in (own, fs.UniPC(3), fs.EDMHeun(), fs.DPMSolverSDE(2), fs.ShARK(), fs.PNDM()):
        pipe.scheduler = FewStepScheduler.from_config(config, solver=solver)
        got = images(pipe, 6)
        assert np.isfinite(got).all()
        if solver is own:
            assert np.abs(got - want).max() < 1e-4
    if "DDIM" in pipeline:
        pipe.scheduler = FewStepScheduler.from_config(config, solver=fs.DDIM())
        noisy = images(pipe, 6, eta=1.0)
        pipe.scheduler = df.DDIMScheduler.from_config(config)
        assert np.abs(noisy - images(pipe, 6, eta=1.0)).max() < 1e-4


@pytest.mark.slow
def test_saved_students_give_the_same_images_in_another_process(tmp_path):
    pipe = df.DDIMPipeline(unet(), df.DDIMScheduler(clip_sample=False))
    config = pipe.scheduler.config
    lines = ["import numpy, fewstep.integrations.diffusers, diffusers"]
    for name, student in students(denoising(pipe)).items():
        pipe.scheduler = FewStepScheduler.from_config(config, solver=student)
        np.save(tmp_path / f"{name}.npy", images(pipe, 3))
        pipe.save_pretrained(tmp_path / name)
        files = {p.suffix for p in (tmp_path / name).rglob("*") if p.is_file()}
        assert files == {".json", ".safetensors"}
        lines += [
            f"p = diffusers.DDIMPipeline.from_pretrained({str(tmp_path / name)!r})",
            # the constructor of this pipeline puts a DDIMScheduler in
            "ours = fewstep.integrations.diffusers.FewStepScheduler",
            f"p.scheduler = ours.from_pretrained({str(tmp_path / name)!r}, subfolder='scheduler')",
            "p.set_progress_bar_config(disable=True)",
            "g = torch.Generator().manual_seed(0)",
            "x = p(batch_size=2, generator=g, num_inference_steps=3, output_type='np').images",
            f"assert (x == numpy.load({str(tmp_path / name)!r} + '.npy')).all(), {name!r}",
        ]
    elsewhere("\n".join(lines))


@pytest.mark.slow
def test_loaded_ddpm_pipeline_keeps_the_scheduler(tmp_path):
    """DDIMPipeline's constructor puts a DDIMScheduler in; DDPMPipeline's does not."""
    pipe = df.DDPMPipeline(unet(), FewStepScheduler(solver=fs.UniPC(3)))
    want = images(pipe, 4)
    pipe.save_pretrained(tmp_path)
    code = f"""
import fewstep.integrations.diffusers, diffusers, numpy
p = diffusers.DDPMPipeline.from_pretrained({str(tmp_path)!r})
assert type(p.scheduler).__name__ == "FewStepScheduler" and p.scheduler.solver.order == 3
p.set_progress_bar_config(disable=True)
g = torch.Generator().manual_seed(0)
x = p(batch_size=2, generator=g, num_inference_steps=4, output_type="np").images
numpy.save({str(tmp_path / "x.npy")!r}, x)
"""
    elsewhere(code)
    assert (np.load(tmp_path / "x.npy") == want).all()


def test_students_sample_in_a_pipeline_as_in_fs_sample(tmp_path):
    """A SigSampler has its own network: the pipeline's is evaluated for nothing, unless it is an Idle."""
    pipe = df.DDPMPipeline(unet(), df.DDPMScheduler(clip_sample=False))
    problem = denoising(pipe)
    made = students(problem)
    config = pipe.scheduler.config
    x_T = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(4))
    for name, student in made.items():
        s = FewStepScheduler.from_config(config, solver=student, noise="path")
        s.set_timesteps(3)
        x, generator = x_T, torch.Generator().manual_seed(0)
        with torch.no_grad():
            for t in s.timesteps:
                x = s.step(pipe.unet(x, t).sample, t, x, generator=generator).prev_sample
            path = {"path": s._run.path} if s._setup.plan.levy else {}
            want = fs.sample(problem, student, noise=x_T, **path)
        assert gap(want, x) < 1e-5, name
    pipe.scheduler = FewStepScheduler.from_config(config, solver=made["sigdeg"])
    want = images(pipe, 3)
    if not made["sigdeg"].residual:
        pipe.unet = Idle(pipe.unet)
        assert np.array_equal(images(pipe, 3), want)


def test_distill_dode_returns_a_scheduler():
    pipe = df.DDPMPipeline(unet(), df.DDPMScheduler(clip_sample=False))
    pipe.scheduler, report = distill_dode(pipe, fs.DDIM(), steps=4, samples=16, teacher_substeps=2, terms=2)
    assert report.student_rmse <= report.base_rmse
    assert images(pipe, 4).shape == (2, 8, 8, 1)
    with pytest.raises(InputError, match="4 steps of its own"):
        images(pipe, 5)


def test_class_conditional_unet_equals_diffusers():
    net = unet(num_class_embeds=4)
    ours = FewStepScheduler.from_config(df.DDPMScheduler(clip_sample=False).config, solver=fs.DPMSolverPP(2))
    theirs = df.DPMSolverMultistepScheduler.from_config(ours.config)
    labels, ends = torch.tensor([0, 3]), []
    x_T = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(4))
    for s in (theirs, ours):
        s.set_timesteps(5)
        x = x_T
        with torch.no_grad():
            for t in s.timesteps:
                x = s.step(net(x, t, class_labels=labels).sample, t, x).prev_sample
        ends.append(x)
    assert gap(*ends) < 1e-4
    pipe = df.DDPMPipeline(net, ours)
    both = {"condition": {"class_labels": labels[:1]}, "negative": {"class_labels": labels[1:]}}
    scheduler, _ = distill_dode(pipe, fs.DDIM(), steps=3, samples=16, guidance_scale=2.0, teacher_substeps=2, **both)
    scheduler.set_timesteps(3)


def stable_diffusion(cls, **more):
    torch.manual_seed(0)
    net = df.UNet2DConditionModel(
        sample_size=8, in_channels=more.pop("channels", 4), out_channels=4, layers_per_block=1,
        block_out_channels=(8, 16), norm_num_groups=4, cross_attention_dim=8, attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    vae = df.AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    scheduler = df.PNDMScheduler(skip_prk_steps=True, steps_offset=1, **SD)
    pipe = cls(vae=vae, text_encoder=None, tokenizer=None, unet=net, scheduler=scheduler, safety_checker=None,
               feature_extractor=None, requires_safety_checker=False)  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def prompts():
    generator = torch.Generator().manual_seed(2)
    return {k: torch.randn(1, 5, 8, generator=generator) for k in ("prompt_embeds", "negative_prompt_embeds")}


STABLE = (fs.PNDM(), fs.DPMSolverPP(2), fs.UniPC(2), fs.EDMHeun(), fs.DPMSolverSDE(2), fs.SEA())
THEIRS = {
    "PNDM": df.PNDMScheduler,
    "DPMSolverPP": df.DPMSolverMultistepScheduler,
    "UniPC": df.UniPCMultistepScheduler,
}


@pytest.mark.parametrize("kind", ["text", "image", "inpaint"])
def test_stable_diffusion_pipelines_equal_diffusers(kind):
    """Text to image, image to image and inpainting, guided; the numbers of diffusers' own."""
    cls = {"text": df.StableDiffusionPipeline, "image": df.StableDiffusionImg2ImgPipeline,
           "inpaint": df.StableDiffusionInpaintPipeline}[kind]  # fmt: skip
    pipe = stable_diffusion(cls)
    picture = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(3)) * 2 - 1
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 8:] = 1
    size = dict(height=16, width=16)
    extra = {
        "text": size, "image": dict(image=picture, strength=0.6),
        "inpaint": dict(image=picture, mask_image=mask, strength=0.8, **size),
    }[kind]  # fmt: skip

    def run():
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            return pipe(num_inference_steps=5, guidance_scale=3.0, generator=generator, output_type="np",
                        **prompts(), **extra).images  # fmt: skip

    config = pipe.scheduler.config
    for solver in STABLE:
        pipe.scheduler = FewStepScheduler.from_config(config, solver=solver)
        got = run()
        assert np.isfinite(got).all()
        name = type(solver).__name__
        # image to image: diffusers' PNDM keeps its first steps for the start that is not there
        if name in THEIRS and not (name == "PNDM" and kind != "text"):
            pipe.scheduler = THEIRS[name].from_config(config, **({"solver_order": 2} if name != "PNDM" else {}))
            want = run()
            assert np.abs(got - want).max() < 1e-4


def test_training_and_offload_with_accelerate():
    """A training loop under Accelerator, and sampling through a network that is kept off the device."""
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    scheduler = FewStepScheduler(solver=fs.UniPC(2))
    net = unet().train()
    optimiser = torch.optim.Adam(net.parameters(), 1e-3)
    data = torch.utils.data.DataLoader(torch.rand(8, 1, 8, 8), batch_size=4)
    net, optimiser, data = accelerator.prepare(net, optimiser, data)
    for x0 in data:
        noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
        t = torch.tensor([5, 100, 400, 999])
        loss = (net(scheduler.add_noise(x0, noise, t), t).sample - noise).square().mean()
        accelerator.backward(loss)
        optimiser.step()
        optimiser.zero_grad()
    assert loss.isfinite()
    net = accelerator.unwrap_model(net).eval()
    pipe = df.DDPMPipeline(net, scheduler)
    want = images(pipe, 3)
    accelerate.cpu_offload(net, torch.device("cpu"))
    assert np.allclose(images(pipe, 3), want, atol=1e-6)


def test_table_of_another_pipeline_is_rejected():
    pipe = df.DDPMPipeline(unet(), df.DDPMScheduler(clip_sample=False))
    scheduler, _ = distill_dode(pipe, fs.DDIM(), steps=3, samples=16, teacher_substeps=2)
    other = df.DDPMScheduler(beta_schedule="squaredcos_cap_v2").config
    with pytest.raises(InputError, match="was fitted to"):
        FewStepScheduler.from_config(other, solver=scheduler.solver).set_timesteps(3)


def test_conditions_are_keyed_by_name():
    pipe = stable_diffusion(df.StableDiffusionPipeline)
    with pytest.raises(InputError, match="condition: got torch"):
        denoising(pipe, torch.ones(1))
    problem = denoising(pipe)
    with pytest.raises(InputError, match="encoder_hidden_states"):
        fs.sample(problem, fs.DDIM(), shape=(1, 4, 8, 8), steps=2)
    problem = denoising(pipe, {"encoder_hidden_states": prompts()["prompt_embeds"]})
    assert fs.sample(problem, fs.DDIM(), shape=(3, 4, 8, 8), steps=2).isfinite().all()
