"""CFG++ in the k-diffusion sampler against ComfyUI's formulas, with a model that has ComfyUI's model_options."""

import itertools
import math

import pytest
import torch
from k_diffusion_cases import karras

import fewstep as fs
from fewstep.integrations import k_diffusion as kd
from fewstep.sampler_names import CFG_PP

SIGMAS = karras(7).double()
START = 15 * torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def halves(x, s):
    return (0.3 * x + 0.5 * s * s) / (0.3 + s * s), 0.3 * x.sin() / (0.3 + s * s)


def guided(x, s):
    c, u = halves(x, s)
    return u + 0.7 * (c - u), u


def comfy_model(x, sigma, model_options=None, seed=None):
    D, u = guided(x, sigma.reshape(-1, 1, 1, 1))
    for function in (model_options or {}).get("sampler_post_cfg_function", []):
        D = function({"denoised": D, "uncond_denoised": u})
    return D


def noise(sigma, sigma_next):
    """Normals that depend on the level."""
    return torch.randn(START.shape, generator=torch.Generator().manual_seed(int(1000 * sigma)), dtype=torch.float64)


def by_formula(name):
    """The loops of the samplers; the ancestral ones add noise after each step."""
    x, old = START, None
    for i, (s, t) in enumerate(itertools.pairwise(SIGMAS.tolist())):
        D, u = guided(x, s)
        if t == 0:
            return D
        end, up = t, 0.0
        if "ancestral" in name:
            up = t * math.sqrt(s * s - t * t) / s
            t = math.sqrt(t * t - up * up)
        h, e = math.log(s / t), t / s
        moved = x + D - u
        if name in ("euler", "euler_ancestral"):
            x = D + t * (x - u) / s
        elif name == "dpmpp_2s_ancestral":
            mid = math.sqrt(s * t)
            D2, _ = guided(mid / s * moved + (1 - mid / s) * D, mid)
            x = e * moved + (1 - e) * D2
        elif name == "dpmpp_2m":
            x = D - e * u + e * x
            if old is not None:
                x = x + (1 - e) * h / (2 * math.log(SIGMAS[i - 1] / s)) * (D - old)
        elif name == "gradient_estimation":
            d = (x - u) / s
            x = D + t * d + (0.0 if old is None else (t - s) * (d - old))
            u = d  # kept
        elif old is None:
            x = e * moved + (1 - e) * D
        else:
            phi1, phi2 = (1 - e) / h, ((1 - e) / h - 1) / -h
            ratio = -math.log(SIGMAS[i - 1] / s) / h
            x = e * moved + h * ((phi1 - phi2 / ratio) * u + phi2 / ratio * old)
        old, x = u, x + up * noise(s, end) if up else x
    return x


@pytest.mark.parametrize("name", CFG_PP)
def test_names_have_comfyuis_formulas(name):
    options = {"noise_sampler": noise} if "ancestral" in name else {}
    got = kd.sampler(f"{name}_cfg_pp")(comfy_model, START, SIGMAS, **options)
    torch.testing.assert_close(got, by_formula(name), rtol=1e-6, atol=1e-6)


def test_other_post_cfg_functions_are_called_and_the_callers_options_stay():
    seen = []
    options = {"sampler_post_cfg_function": [lambda args: seen.append(1) or args["denoised"]]}
    kd.sampler("euler_ancestral_cfg_pp")(comfy_model, START, SIGMAS, {"model_options": options, "seed": 3})
    assert len(seen) == len(SIGMAS) - 1
    assert list(options) == ["sampler_post_cfg_function"]
    assert len(options["sampler_post_cfg_function"]) == 1


def test_models_without_guidance_and_solvers_with_correctors_are_refused():
    for name, model in (("euler_cfg_pp", lambda x, sigma, model_options: x), ("uni_pc_cfg_pp", comfy_model)):
        with pytest.raises(fs.InputError, match="^cfg_pp: got"):
            kd.sampler(name)(model, START, SIGMAS)
