"""Drive ComfyUI's own sampling code with a tiny model: its samplers and the node pack's, and write the outcomes.

    python tests/integrations/comfyui_suite.py PATH/TO/ComfyUI [COMMIT]

PATH is a checkout of ComfyUI whose requirements are installed; nothing of it is copied, and nothing is written to it.
Every sampler of its drop-down runs on the same model, levels, noise and mask as the sampler of the same name here;
every sampler and node of the pack runs through ComfyUI's loader and nodes. The table is
`tests/integrations/comfyui_suite.json`.
"""

import asyncio
import json
import logging
import re
import sys
import tempfile
from pathlib import Path

import torch

import fewstep as fs
from fewstep.grid import published
from fewstep.integrations.k_diffusion import BrownianNoiseSampler, snr

CPU = torch.device("cpu")
STEPS, SHAPE = 8, (2, 4, 8, 8)
STUB = "from fewstep.integrations.comfyui import *\n"
# denoise, and whether there is a mask, for each kind of model
KINDS = {"EPS": ((1.0, False), (0.6, True)), "V_PREDICTION": ((1.0, False),), "EDM": ((1.0, False),),
         "FLOW": ((1.0, False), (0.6, True))}  # fmt: skip
EQUAL = 2e-4  # relative to the largest value: float32
NOISY = "ancestral|sde|ddpm|seeds|sa_solver|lcm"

NO_COUNTERPART = {
    "dpm_fast|dpm_adaptive": "choose their own levels; no counterpart",
    "res_multistep_ancestral(_cfg_pp)?": "divides a difference of estimates by another distance; no counterpart",
}
REASONS = {  # pattern of the sampler's name and the kind: why the numbers are others
    "dpmpp_3m_sde": "this library lowers the order right before a last level of 0",
    "uni_pc": "ComfyUI lowers the order of the last steps, and ends at sigma = 0.001",
    "lms|ipndm .*": "ComfyUI takes a step of order 1 to 0",
    "ipndm_v": "a misplaced bracket in orders 3 and 4 of ComfyUI",
    "deis": "polynomials in log sigma here, in the time of a VP process in ComfyUI",
    "er_sde": "a backward difference in order 3 of ComfyUI",
    "sa_solver": "noise between sigma = 1 and 0.05 here, between 20 and 80 % of the model's time in ComfyUI",
    "dpmpp_2s_ancestral_cfg_pp": "ComfyUI shifts the state by the unconditional estimate of the second evaluation",
    "(euler|dpm_2|dpmpp_2s)_ancestral FLOW": "ComfyUI's ancestral steps on flows go to another level below",
    r"\w+_cfg_pp FLOW": "ComfyUI leaves out the factor 1 - sigma of flows",
    "ddpm FLOW": "ComfyUI takes the levels of a flow for those of x0 + sigma n",
    r"ddim \w+ .*mask": "ComfyUI's ddim draws other noise for what the mask keeps",
    ".* FLOW": "the first level of a flow is 0.9999 in ComfyUI and 1 - 1e-6 here",
}


def imported(folder, base):
    """ComfyUI's modules; exits with the name of a missing package."""
    sys.path.insert(0, str(folder))
    sys.argv = [sys.argv[0], "--cpu", "--base-directory", str(base)]
    try:
        import comfy.options

        comfy.options.enable_args_parsing()
        import comfy.model_base
        import comfy.model_patcher
        import comfy.samplers
        import comfy.supported_models_base
        import nodes
    except ImportError as error:
        sys.exit(f"{folder}: ComfyUI cannot be imported ({error}). Install its requirements.txt.")
    return comfy, nodes


class TinyNet(torch.nn.Module):
    """A smooth network whose output depends on the position, the time and the condition."""

    dtype = torch.float32

    def forward(self, x, t, context=None, **kwargs):
        t = t.reshape(-1, 1, 1, 1)
        shift = context.mean((1, 2)).reshape(-1, 1, 1, 1)
        return 0.6 * x + 0.3 * torch.tanh(x.roll(1, -1) + shift) + 0.1 * torch.sin(t / (t.abs().amax() + 1))


class Gaussian(torch.nn.Module):
    """The exact network of data N(0, 1/4): of epsilon on a table of levels, of velocity on a flow."""

    dtype = torch.float32

    def __init__(self, sampling, flow):
        super().__init__()
        self.flow = flow
        self.table = None if flow else sampling.sigmas.double()

    def forward(self, x, t, context=None, **kwargs):
        if self.flow:
            s = (t / 1000).reshape(-1, 1, 1, 1)
            return (s - (1 - s) * 0.25) / ((1 - s) ** 2 * 0.25 + s * s) * x
        s = self.table[t.long()].to(x).reshape(-1, 1, 1, 1)
        return s * (1 + s * s).sqrt() / (0.25 + s * s) * x


def model_of(comfy, kind, net=None):
    """A ModelPatcher around a tiny network."""
    config = comfy.supported_models_base.BASE({"disable_unet_model_creation": True})
    config.sampling_settings = {"sigma_max": 80.0} if kind == "EDM" else {}
    model = comfy.model_base.BaseModel(config, getattr(comfy.model_base.ModelType, kind))
    model.diffusion_model = net(model.model_sampling, kind == "FLOW") if net else TinyNet()
    return comfy.model_patcher.ModelPatcher(model, CPU, CPU)


def conditions():
    return [[[torch.full((1, 3, 4), value), {}]] for value in (0.7, -0.4)]


class Noise:
    """Unit normals of one path in 1 / sigma^2, for levels of a flow in its sigma / (1 - sigma)."""

    def __init__(self, x, flow):
        self.flow = flow
        self.sampler = BrownianNoiseSampler(x, 1e-4, 1e7, seed=5, transform=snr)

    def __call__(self, sigma, sigma_next):
        levels = [float(s) for s in (sigma, sigma_next)]
        if self.flow:
            levels = [s / max(1 - s, 1e-6) for s in levels]
        return self.sampler(*levels)


def run_of(comfy, model, name, denoise, masked, steps=STEPS, shape=SHAPE, cfg=1.7):
    """The end of a run through ComfyUI's guider and sampler, its levels, and the calls of its callback."""
    generator = torch.Generator().manual_seed(3)
    noise, latent = torch.randn(2, *shape, generator=generator)
    latent = latent * (0.5 if denoise < 1 else 0)
    mask = (torch.rand(shape[0], 1, *shape[2:], generator=generator) > 0.5).float() if masked else None
    flow = isinstance(model.get_model_object("model_sampling"), comfy.model_sampling.CONST)
    grid = comfy.samplers.KSampler(model, steps, CPU, name, "simple" if flow else "karras", denoise).sigmas
    sampler = comfy.samplers.sampler_object(name)
    if re.search(NOISY, name):
        tree = re.search("dpmpp_sde", name)  # its two intervals overlap
        sequence = comfy.k_diffusion.sampling.default_noise_sampler(noise, 5)
        sampler.extra_options = {"noise_sampler": Noise(noise, flow) if tree else sequence}
    seen = []
    end = comfy.samplers.sample(
        model, noise, *conditions(), 0.6 if "cfg_pp" in name else cfg, CPU, sampler, grid.clone(), {}, latent, mask,
        lambda i, D, x, total: seen.append((i, total)), True, 3,
    )  # fmt: skip
    return end, grid, seen  # ComfyUI's uni_pc writes to the levels that it is given


def compared(comfy):
    """(case, relative difference, reason) of every sampler of the drop-down."""
    for name in [n for n in comfy.samplers.SAMPLER_NAMES if not n.startswith("fewstep_")]:
        if why := [w for pattern, w in NO_COUNTERPART.items() if re.fullmatch(pattern, name)]:
            yield name, None, why[0]
            continue
        if name.endswith("_gpu"):  # on a CPU the same as without
            continue
        for kind, runs in KINDS.items():
            model = model_of(comfy, kind)
            for denoise, masked in runs:
                case = f"{name} {kind} denoise {denoise:g}{' mask' * masked}"
                theirs, levels, _ = run_of(comfy, model, name, denoise, masked)
                ours, same, seen = run_of(comfy, model, f"fewstep_{name}", denoise, masked)
                assert torch.equal(levels, same), f"{case}: other levels"
                assert [i for i, _ in seen] == list(range(len(levels) - 1)), f"{case}: callback {seen}"
                off = float((ours - theirs).abs().max() / theirs.abs().max())
                found = [w for pattern, w in REASONS.items() if re.match(pattern, case)]
                yield case, off, "" if off <= EQUAL else found[0] if found else "NOT EXPLAINED"


def spreads(comfy, nodes):
    """The standard deviation of samples by each sampler of the pack through the KSampler node, of data with 0.5."""
    sampled = nodes.KSampler()
    for name in [n for n in comfy.samplers.SAMPLER_NAMES if n.startswith("fewstep_")]:
        out = []
        for kind, scheduler in (("EPS", "karras"), ("FLOW", "simple")):
            model = model_of(comfy, kind, Gaussian)
            latent = {"samples": torch.zeros(4, 4, 16, 16)}
            (end,) = sampled.sample(model, 1, 20, 1.0, name, scheduler, *conditions(), latent, 1.0)
            out.append(round(float(end["samples"].std()), 3))
        yield name, out


class Nodes:
    """Each node of the pack by ComfyUI's names, its results sampled by ComfyUI's SamplerCustom."""

    guidance = dict(start_percent=0.0, end_percent=1.0, rescale=0.0, parallel=1.0, norm=0.0)

    def __init__(self, comfy, nodes, base):
        from comfy_extras.nodes_custom_sampler import SamplerCustom

        self.comfy, self.nodes, self.base, self.custom = comfy, nodes.NODE_CLASS_MAPPINGS, base, SamplerCustom()

    def made(self, name, **inputs):
        node = self.nodes[name]
        assert inputs.keys() == node.INPUT_TYPES()["required"].keys()
        return getattr(node(), node.FUNCTION)(**inputs)

    def end_of(self, model, sampler, sigmas):
        args = model, True, 1, 1.7, *conditions(), sampler, sigmas, {"samples": torch.zeros(SHAPE)}
        return self.custom.sample(*args)[0]["samples"]

    def same(self, a, b):
        assert (a - b).abs().max() <= EQUAL * b.abs().max()

    def outcomes(self):
        """(what, outcome) for each node and kind of model."""
        for kind in KINDS:
            model = model_of(self.comfy, kind)
            yield f"FewStepSigmas {kind}", self.sigmas(kind, model)
            (sampler,) = self.made("FewStepSolver", solver="dpmpp_2m", options="", s_noise=1.0, cfg_pp=False)
            spacing = "trailing" if kind == "FLOW" else "logsnr"
            (sigmas,) = self.made("FewStepSigmas", model=model, spacing=spacing, steps=6, denoise=1.0)
            theirs = self.end_of(model, self.comfy.samplers.sampler_object("dpmpp_2m"), sigmas)
            self.same(self.end_of(model, sampler, sigmas), theirs)
            yield f"FewStepSolver {kind}", "dpmpp_2m equal to ComfyUI's"
            yield f"FewStepTable {kind}", self.table(kind, model)
            yield f"FewStepGuidance {kind}", self.guided(model, sampler, sigmas)

    def sigmas(self, kind, model):
        top = float(model.get_model_object("model_sampling").sigma_max)
        known = self.nodes["FewStepSigmas"].INPUT_TYPES()["required"]["spacing"][0]
        used = [s for s in known if s not in published() or s.startswith("oss" if kind == "FLOW" else "ays-sd")]
        for spacing in used:
            (sigmas,) = self.made("FewStepSigmas", model=model, spacing=spacing, steps=6, denoise=1.0)
            (last,) = self.made("FewStepSigmas", model=model, spacing=spacing, steps=3, denoise=0.5)
            assert len(sigmas) == 7
            assert bool((sigmas.diff() < 0).all())
            assert sigmas[-1] == 0
            assert sigmas[0] == top or spacing in ("leading", *published())
            assert torch.equal(last, sigmas[-4:])
        return f"{len(used)} spacings, with denoise 1 and 0.5"

    def table(self, kind, model):
        schedule = fs.FlowMatching() if kind == "FLOW" else fs.EDM(0.03, 14.0)
        plan = fs.DPMSolverPP(2).plan(fs.sigma_grid(schedule, 5), schedule)
        plan.save(self.base / "models" / "fewstep" / f"{kind}.json")
        sampler, sigmas = self.made("FewStepTable", model=model, file=f"{kind}.json")
        again = fs.DPMSolverPP(2).plan(plan.sigmas)
        again.save(self.base / "models" / "fewstep" / f"{kind}.safetensors")
        other, same = self.made("FewStepTable", model=model, file=f"{kind}.safetensors")
        self.same(self.end_of(model, sampler, sigmas), self.end_of(model, other, same))
        return f"{len(sigmas) - 1} steps from {sigmas[0]:.4g}, from JSON and safetensors"

    def guided(self, model, sampler, sigmas):
        (plain,) = self.made("FewStepGuidance", model=model, **self.guidance)
        self.same(self.end_of(plain, sampler, sigmas), self.end_of(model, sampler, sigmas))
        counts = []
        for change in ({}, {"end_percent": 0.5}, {"parallel": 0.0, "norm": 1.0}, {"rescale": 0.7}):
            (guided,) = self.made("FewStepGuidance", model=model, **self.guidance | change)
            rows = []
            hook = model.model.diffusion_model.register_forward_hook(
                lambda net, args, out, rows=rows: rows.append(len(args[0]))
            )
            assert torch.isfinite(self.end_of(guided, sampler, sigmas)).all()
            hook.remove()
            counts.append(sum(rows) // SHAPE[0])
        assert counts[1] < counts[0] == counts[2] == counts[3], counts
        return f"{counts[0]} network evaluations, {counts[1]} with guidance in the first half only"


def main():
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    folder, (commit, *_) = Path(sys.argv[1]).resolve(), (*sys.argv[2:], "unknown commit")
    with tempfile.TemporaryDirectory() as base:
        for part in ("custom_nodes", "models/fewstep"):
            (Path(base) / part).mkdir(parents=True)
        stub = Path(base) / "custom_nodes" / "fewstep_nodes.py"
        stub.write_text(STUB)
        comfy, nodes = imported(folder, base)
        assert asyncio.run(nodes.load_custom_node(str(stub))), "ComfyUI's loader refused the stub"
        of = dict(Nodes(comfy, nodes, Path(base)).outcomes())
        spread = dict(spreads(comfy, nodes))
        cases = list(compared(comfy))
    from comfyui_version import __version__

    not_equal = {}
    for case, off, why in cases:
        if why:
            not_equal.setdefault(why, []).append(case if off is None else f"{case}: {off:.1e}")
    table = {"ComfyUI": __version__, "commit": commit, "cases": len(cases), "equal": sum(not c[2] for c in cases),
             "not equal": not_equal, "standard deviation, EPS and FLOW": spread, "nodes": of}  # fmt: skip
    Path(__file__).with_suffix(".json").write_text(json.dumps(table, indent=1) + "\n")
    print(table["cases"], table["equal"], *not_equal, sep="\n")


if __name__ == "__main__":
    main()
