"""Eleven pipelines of diffusers with tiny random networks: equal to stock in every family, and with our own solvers."""

import pytest
import torch

import fewstep as fs

df = pytest.importorskip("diffusers")
from fewstep.integrations.diffusers import FewStepScheduler, denoising  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]

SD = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
SIZE = dict(height=16, width=16)


def normal(*shape, seed=2):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def unet(**options):
    torch.manual_seed(0)
    return df.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16),
        norm_num_groups=4, cross_attention_dim=8, attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        **options,
    ).eval()  # fmt: skip


def vae():
    torch.manual_seed(0)
    return df.AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    ).eval()  # fmt: skip


def stable_diffusion(cls, **more):
    rest = dict(text_encoder=None, tokenizer=None, safety_checker=None, feature_extractor=None)
    scheduler = df.PNDMScheduler(skip_prk_steps=True, steps_offset=1, **SD)
    return cls(vae=vae(), unet=unet(), scheduler=scheduler, requires_safety_checker=False, **rest, **more)


def texts(width=8):
    return {"prompt_embeds": normal(1, 5, width), "negative_prompt_embeds": normal(1, 5, width, seed=3)}


def picture(*shape):
    return normal(*(shape or (1, 3, 16, 16)), seed=4).clamp(-1, 1)


def sd():
    return stable_diffusion(df.StableDiffusionPipeline), texts() | SIZE


def image_to_image():
    return stable_diffusion(df.StableDiffusionImg2ImgPipeline), texts() | dict(image=picture(), strength=0.6)


def inpaint():
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 8:] = 1
    given = dict(image=picture(), mask_image=mask, strength=0.8)
    return stable_diffusion(df.StableDiffusionInpaintPipeline), texts() | given | SIZE


def control_net():
    torch.manual_seed(0)
    net = df.ControlNetModel(
        in_channels=4, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4, cross_attention_dim=8,
        attention_head_dim=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        conditioning_embedding_out_channels=(8, 16),
    ).eval()  # fmt: skip
    pipe = stable_diffusion(df.StableDiffusionControlNetPipeline, controlnet=net)
    return pipe, texts() | dict(image=picture())


def xl(cls, **options):
    embedding = dict(addition_embed_type="text_time", addition_time_embed_dim=4, **options)
    net = unet(projection_class_embeddings_input_dim=8 + 4 * (5 if "Img2Img" in cls.__name__ else 6), **embedding)
    scheduler = df.EulerDiscreteScheduler(timestep_spacing="leading", steps_offset=1, **SD)
    rest = dict(text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None, add_watermarker=False)
    more = {"requires_aesthetics_score": True} if "Img2Img" in cls.__name__ else {}
    return cls(vae=vae(), unet=net, scheduler=scheduler, **rest, **more)


def pooled():
    return texts() | {"pooled_prompt_embeds": normal(1, 8), "negative_pooled_prompt_embeds": normal(1, 8, seed=5)}


def sd3():
    torch.manual_seed(0)
    net = df.SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2,
        caption_projection_dim=16, joint_attention_dim=8, pooled_projection_dim=8, out_channels=4,
    ).eval()  # fmt: skip
    names = ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3")
    scheduler = df.FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = df.StableDiffusion3Pipeline(transformer=net, vae=vae(), scheduler=scheduler, **dict.fromkeys(names))
    return pipe, pooled() | SIZE


def flux():
    torch.manual_seed(0)
    net = df.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(4, 4, 8),
    ).eval()  # fmt: skip
    scheduler = df.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    names = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    pipe = df.FluxPipeline(transformer=net, vae=vae(), scheduler=scheduler, **dict.fromkeys(names))
    return pipe, {"prompt_embeds": normal(1, 5, 8), "pooled_prompt_embeds": normal(1, 8)} | SIZE


def wan():
    torch.manual_seed(0)
    net = df.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16,
        text_dim=8, freq_dim=16, ffn_dim=16, num_layers=1, rope_max_seq_len=32,
    ).eval()  # fmt: skip
    coder = df.AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    scheduler = df.FlowMatchEulerDiscreteScheduler(shift=7.0)
    pipe = df.WanPipeline(transformer=net, vae=coder.eval(), scheduler=scheduler, text_encoder=None, tokenizer=None)
    return pipe, texts() | SIZE | dict(num_frames=5)


def ltx(cls):
    torch.manual_seed(0)
    net = df.LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, patch_size=1, patch_size_t=1, num_attention_heads=2, attention_head_dim=8,
        cross_attention_dim=16, num_layers=1, caption_channels=8,
    ).eval()  # fmt: skip
    four, five = (8,) * 4, (1,) * 5
    coder = df.AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=four, decoder_block_out_channels=four, layers_per_block=five,
        decoder_layers_per_block=five, spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False), decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4, upsample_factor=(1,) * 4, patch_size=1, patch_size_t=1,
    ).eval()  # fmt: skip
    coder.use_framewise_encoding = coder.use_framewise_decoding = False
    scheduler = df.FlowMatchEulerDiscreteScheduler()
    pipe = cls(transformer=net, vae=coder, scheduler=scheduler, text_encoder=None, tokenizer=None)
    masks = {"prompt_attention_mask": torch.ones(1, 5), "negative_prompt_attention_mask": torch.ones(1, 5)}
    return pipe, texts() | masks | dict(height=32, width=32, num_frames=9)


def ltx_condition():
    pipe, given = ltx(df.LTXConditionPipeline)
    return pipe, given | dict(image=picture(1, 3, 32, 32))


def dit():
    torch.manual_seed(0)
    net = df.DiTTransformer2DModel(
        sample_size=8, num_layers=1, patch_size=4, attention_head_dim=8, num_attention_heads=2, in_channels=4,
        out_channels=8, attention_bias=True, activation_fn="gelu-approximate", num_embeds_ada_norm=1000,
        norm_type="ada_norm_zero", norm_elementwise_affine=False,
    ).eval()  # fmt: skip
    return df.DiTPipeline(transformer=net, vae=vae(), scheduler=df.DDIMScheduler(clip_sample=False)), {}


PIPELINES = {
    "SD": sd, "image to image": image_to_image, "inpainting": inpaint, "ControlNet": control_net,
    "SDXL with refiner": None, "SD3": sd3, "Flux": flux, "Wan": wan,
    "LTX": lambda: ltx(df.LTXPipeline), "LTXCondition": ltx_condition, "DiT": dit,
}  # fmt: skip
FLOWS = ("SD3", "Flux", "Wan", "LTX", "LTXCondition")
FAMILIES = {
    "DDIM": (df.DDIMScheduler, dict(clip_sample=False), fs.DDIM()),
    "DDPM": (df.DDPMScheduler, dict(clip_sample=False), fs.DDPM()),
    "PNDM": (df.PNDMScheduler, dict(skip_prk_steps=True), fs.PNDM()),
    "DPM++ 2M": (df.DPMSolverMultistepScheduler, {}, fs.DPMSolverPP(2)),
    "DPM++ 2S": (df.DPMSolverSinglestepScheduler, {}, fs.DPMSolverPP(2, multistep=False)),
    "SDE-DPM++": (df.DPMSolverMultistepScheduler, dict(algorithm_type="sde-dpmsolver++"), fs.DPMSolverSDE(2)),
    "UniPC": (df.UniPCMultistepScheduler, {}, fs.UniPC(2)),
    "DEIS": (df.DEISMultistepScheduler, {}, fs.DEIS(2)),
    "Euler": (df.EulerDiscreteScheduler, {}, fs.EDMEuler()),
    "Heun": (df.HeunDiscreteScheduler, {}, fs.EDMHeun()),
}
FLOW = dict(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
FLOW_FAMILIES = {
    "Euler": (None, {}, fs.EDMEuler()),
    "DPM++ 2M": (df.DPMSolverMultistepScheduler, FLOW, fs.DPMSolverPP(2)),
    "UniPC": (df.UniPCMultistepScheduler, FLOW, fs.UniPC(2)),
    "DEIS": (df.DEISMultistepScheduler, FLOW, fs.DEIS(2)),
}


def generate(pipe, given, steps=6, **more):
    pipe.set_progress_bar_config(disable=True)
    end = "pt" if isinstance(pipe, df.DiTPipeline) else "latent"
    torch.manual_seed(0)  # DiT's pipeline passes no generator
    generator = torch.Generator().manual_seed(0)
    call = {"num_inference_steps": steps, "guidance_scale": 3.0, "generator": generator, "output_type": end} | given
    if isinstance(pipe, df.DiTPipeline):
        call = call | {"class_labels": [1], "output_type": "np"}
    with torch.no_grad():
        return torch.as_tensor(pipe(**call, **more)[0])


def with_refiner(base, refiner, scheduler, steps=10):
    """Both halves of a run: to 0.6 by the base, from there by the refiner, each with a scheduler of its own."""
    base.scheduler, refiner.scheduler = scheduler(), scheduler()
    middle = generate(base, pooled() | SIZE, steps, denoising_end=0.6)
    return generate(refiner, pooled(), steps, image=middle, denoising_start=0.6)


def close(want, got, family=""):
    assert got.isfinite().all(), family
    assert float((want - got).norm() / want.norm()) < 1e-4, family


@pytest.mark.parametrize("name", [n for n in PIPELINES if n != "SDXL with refiner"])
def test_pipeline_equals_diffusers_in_every_family(name):
    pipe, given = PIPELINES[name]()
    config, own = pipe.scheduler.config, type(pipe.scheduler)
    for family, (cls, options, solver) in (FLOW_FAMILIES if name in FLOWS else FAMILIES).items():
        if cls is not None and name in ("Flux", "LTX", "LTXCondition"):
            continue  # these pipelines pass sigmas, or a shift per resolution, to Euler's scheduler only
        stock = own.from_config(config) if cls is None else cls.from_config(config, **options)
        pipe.scheduler = stock
        want = generate(pipe, given)
        pipe.scheduler = FewStepScheduler.from_config(stock.config, solver=solver)
        assert want.isfinite().all(), family
        close(want, generate(pipe, given), family)


def test_base_and_refiner_equal_diffusers_in_every_family():
    """Also one half by stock and the other by ours: what is handed over is in the coordinates of stock."""
    base, refiner = xl(df.StableDiffusionXLPipeline), xl(df.StableDiffusionXLImg2ImgPipeline)
    config = base.scheduler.config
    for cls, options, solver in FAMILIES.values():
        makers = [
            lambda: cls.from_config(config, **options),  # noqa: B023
            lambda: FewStepScheduler.from_config(cls.from_config(config, **options).config, solver=solver),  # noqa: B023
        ]
        want = with_refiner(base, refiner, makers[0])
        close(want, with_refiner(base, refiner, makers[1]))
        turns = iter(makers)
        close(want, with_refiner(base, refiner, lambda: next(turns)()))  # noqa: B023


@pytest.mark.parametrize("name", [n for n in PIPELINES if n != "SDXL with refiner"])
def test_pipeline_runs_with_solvers_that_diffusers_lacks(name):
    pipe, given = PIPELINES[name]()
    config = pipe.scheduler.config
    scheduler = FewStepScheduler.from_config(config, solver=fs.DPMSolverPP(2))
    scheduler.set_timesteps(6, **({"mu": 1.0} if config.get("use_dynamic_shifting") else {}))
    table = fs.DDIM().plan(scheduler._setup.grid.sigmas)
    solvers = [fs.ShARK(), fs.SEEDS(2), fs.SASolver(2, 2), table]
    for solver in solvers:
        spacing = {} if name in FLOWS else {"use_karras_sigmas": True}
        pipe.scheduler = FewStepScheduler.from_config(config, solver=solver, **spacing)
        assert generate(pipe, given).isfinite().all()


def conditions(name, pipe, given):
    """What the pipeline gives its network: the condition and the negative one."""
    halves = []
    for half in ("", "negative_"):
        found = {"encoder_hidden_states": given.get(f"{half}prompt_embeds")}
        if name != "SD":
            found["pooled_projections"] = given.get(f"{half}pooled_prompt_embeds")
        if name == "Flux":
            ids = pipe._prepare_latent_image_ids(1, 4, 4, "cpu", torch.float32)
            found |= {"img_ids": ids, "txt_ids": torch.zeros(5, 3)}
        halves.append(found)
    return halves if name != "Flux" else [halves[0], None]


@pytest.mark.parametrize("name", ["SD", "SD3", "Flux"])
def test_a_pipeline_is_a_problem_with_its_own_numbers_and_can_be_compared(name):
    pipe, given = PIPELINES[name]()
    solver, latents = fs.DPMSolverPP(2), normal(*((1, 16, 16) if name == "Flux" else (1, 4, 8, 8)))
    condition, negative = conditions(name, pipe, given)
    pipe.scheduler = FewStepScheduler.from_config(pipe.scheduler.config, solver=solver)
    scale = 3.0 if negative else 1.0
    want = generate(pipe, given | ({} if negative else {"guidance_scale": 3.0}), latents=latents)
    problem = denoising(pipe, condition, negative, scale)
    with torch.no_grad():
        got = fs.sample(problem, solver, noise=latents, sigmas=pipe.scheduler._setup.grid.sigmas)
    close(want, got)
    noise = normal(4, *latents.shape[1:], seed=7).double()
    best = fs.compare(problem, nfe=4, noise=noise, solvers=[solver, fs.UniPC(2)], tol=1.0)
    assert len(best.rows) == 8
    assert best.fine_rmse < best.rows[-1].errors.rmse < float("inf")
    if name == "SD":
        grid = fs.fit_grid(problem, 3, noise=normal(16, *latents.shape[1:], seed=8), nodes=6, sweeps=0)
        assert len(grid) == 4
