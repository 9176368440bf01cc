"""The ComfyUI node pack on stand-ins for the parts of ComfyUI that it uses, as they are in 0.3.64.

`comfyui_suite.py` drives ComfyUI itself.
"""

import importlib.util
import sys
import types
from pathlib import Path

import pytest
import torch

import fewstep as fs
from fewstep import integrations
from fewstep.grid import published
from fewstep.integrations.k_diffusion import sampler

FOLDER = Path(integrations.__file__).parent / "comfyui"


class KSAMPLER:
    def __init__(self, sampler_function, extra_options={}, inpaint_options={}):  # noqa: B006
        self.sampler_function, self.extra_options = sampler_function, extra_options


class Sampling:
    """EPS on a table of levels."""

    def __init__(self, sigmas):
        self.sigmas = sigmas

    sigma_min = property(lambda self: self.sigmas[0])
    sigma_max = property(lambda self: self.sigmas[-1])

    def percent_to_sigma(self, percent):
        return {0.0: 999999999.9, 1.0: 0.0}.get(percent, float(self.sigma_max) * (1 - percent))


class ModelSamplingDiscrete(Sampling):
    pass


class CONST:
    pass


class Flow(Sampling, CONST):
    shift = 3.0


class ModelSamplingFlux(Flow):
    shift = 1.15


class Patcher:
    """ComfyUI's ModelPatcher around an estimate of x0 that is c x / (1 + sigma), c the condition."""

    def __init__(self, sampling):
        self.sampling, self.options, self.seen = sampling, {}, []

    def get_model_object(self, name):
        return {"model_sampling": self.sampling}[name]

    def clone(self):
        out = Patcher(self.sampling)
        out.options, out.seen = dict(self.options), self.seen
        return out

    def set_model_sampler_cfg_function(self, function):
        self.options["sampler_cfg_function"] = function

    def set_model_sampler_calc_cond_batch_function(self, function):
        self.options["sampler_calc_cond_batch_function"] = function


def calc_cond_batch(model, conds, x, sigma, options):
    model.seen.append(sum(c is not None for c in conds))
    return [torch.zeros_like(x) if c is None else c * x / (1 + sigma.reshape(-1, 1)) for c in conds]


def sampling_function(model, x, sigma, uncond, cond, scale):
    """comfy.samplers.sampling_function: the guided x0."""
    options = model.options
    conds = [cond, None if scale == 1 else uncond]
    args = {"conds": conds, "input": x, "sigma": sigma, "model": model, "model_options": options}
    c, u = options.get("sampler_calc_cond_batch_function", lambda a: calc_cond_batch(model, conds, x, sigma, {}))(args)
    if "sampler_cfg_function" not in options:
        return u + (c - u) * scale
    args = {"cond_denoised": c, "uncond_denoised": u, "cond_scale": scale, "input": x, "sigma": sigma}
    return x - options["sampler_cfg_function"](args)


@pytest.fixture
def comfy(monkeypatch, tmp_path):
    """The modules `comfy` and `folder_paths`."""
    names = ["euler", "euler_cfg_pp", "dpm_2", "ddim"]
    samplers = types.ModuleType("comfy.samplers")
    samplers.KSAMPLER, samplers.SAMPLER_NAMES, samplers.KSAMPLER_NAMES = KSAMPLER, names, names[:-1]
    samplers.calc_cond_batch, samplers.cfg_function = calc_cond_batch, print
    samplers.KSampler = type(
        "KSampler", (), {"SAMPLERS": names, "DISCARD_PENULTIMATE_SIGMA_SAMPLERS": {"dpm_2", "uni_pc"}}
    )
    sampling = types.ModuleType("comfy.k_diffusion.sampling")
    for name in names:
        setattr(sampling, f"sample_{name}", print)
    package, k_diffusion = types.ModuleType("comfy"), types.ModuleType("comfy.k_diffusion")
    package.samplers, package.k_diffusion, k_diffusion.sampling = samplers, k_diffusion, sampling
    paths = types.ModuleType("folder_paths")
    paths.models_dir, paths.folder_names_and_paths = str(tmp_path), {}
    paths.add_model_folder_path = lambda name, path: paths.folder_names_and_paths.setdefault(name, ([path], set()))
    paths.get_filename_list = lambda name: sorted(
        f.name
        for folder in map(Path, paths.folder_names_and_paths[name][0])
        for f in folder.glob("*")
        if f.suffix in paths.folder_names_and_paths[name][1]
    )
    paths.get_full_path_or_raise = lambda name, file: str(Path(paths.folder_names_and_paths[name][0][0]) / file)
    for module in (package, samplers, k_diffusion, sampling, paths):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.delitem(sys.modules, "fewstep.integrations.comfyui", raising=False)
    yield package
    sys.modules.pop("fewstep.integrations.comfyui", None)


def loaded(path, monkeypatch):
    """What `nodes.load_custom_node` does with a file or a folder of custom_nodes."""
    name = str(path).replace(".", "_x_")
    spec = importlib.util.spec_from_file_location(name, path if path.is_file() else path / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def pack(comfy, monkeypatch, tmp_path):
    stub = tmp_path / "fewstep_nodes.py"
    stub.write_text("from fewstep.integrations.comfyui import *\n")
    return loaded(stub, monkeypatch)


def made(pack, node, **inputs):
    cls = pack.NODE_CLASS_MAPPINGS[node]
    required = cls.INPUT_TYPES()["required"]
    assert inputs.keys() == required.keys()
    for name, value in inputs.items():  # values that the widgets can have
        kind, *options = required[name]
        if isinstance(kind, list):
            assert value in kind
        elif kind in ("INT", "FLOAT"):
            assert options[0]["min"] <= value <= options[0]["max"]
    out = getattr(cls(), cls.FUNCTION)(**inputs)
    assert len(out) == len(cls.RETURN_TYPES)
    return out


VP = fs.DiscreteVP.named("scaled_linear", 1000, 0.00085, 0.012)
LEVELS = {
    "table": ModelSamplingDiscrete(VP.sigma(torch.arange(1000.0)).float()),
    "range": Sampling(torch.logspace(-2.7, 1.9, 1000)),
    "flow": Flow(fs.FlowMatching().label(fs.FlowMatching(3.0).sigma(torch.arange(1, 1001).double() / 1000)).float()),
    "flux": ModelSamplingFlux((torch.arange(1, 1001) / 1000).float()),
}
LEVELS["flow"].sigmas[-1] = 1.0


def test_stub_and_folder_are_loaded_as_comfyui_does(comfy, pack, monkeypatch):
    shown = comfy.samplers.KSampler.SAMPLERS
    assert pack.NODE_CLASS_MAPPINGS.keys() == pack.NODE_DISPLAY_NAME_MAPPINGS.keys()
    assert len(shown) == len(set(shown))
    for name in ("uni_pc", "shark", "dpmpp_2m_cfg_pp", "gradient_estimation", "er_sde", "plms", "lcm"):
        assert f"fewstep_{name}" in shown
        assert isinstance(getattr(comfy.k_diffusion.sampling, f"sample_fewstep_{name}").solver, fs.solver.Solver)
    discarded = comfy.samplers.KSampler.DISCARD_PENULTIMATE_SIGMA_SAMPLERS
    own = {n.removeprefix("fewstep_") for n in discarded if n.startswith("fewstep_")}
    assert own == {"dpm_2", "dpm_2_ancestral", "uni_pc", "uni_pc_bh2"}
    count = len(shown)
    copied = loaded(FOLDER, monkeypatch)  # the folder itself, copied into custom_nodes in addition
    assert copied.NODE_CLASS_MAPPINGS.keys() == pack.NODE_CLASS_MAPPINGS.keys()
    assert len(shown) == count


def test_every_sampler_of_the_library_is_in_the_list_and_runs(comfy, pack):
    kinds = {type(s) for s in fs.solvers().values() if isinstance(s, fs.solver.DiffusionSolver)}
    functions = [getattr(comfy.k_diffusion.sampling, f"sample_{n}") for n in comfy.samplers.SAMPLER_NAMES if "few" in n]
    assert {type(f.solver) for f in functions} >= kinds
    model = lambda x, sigma, seed: x / (1 + sigma[:, None] ** 2)  # noqa: E731
    model.model_sampling, model.sigmas = LEVELS["table"], torch.tensor([14.0, 5.0, 0.0])  # levels of a run
    x, sigmas = 14.0 * torch.ones(2, 3), torch.tensor([14.0, 5.0, 2.0, 0.7, 0.2, 0.0])
    for function in functions:
        if not function.cfg_pp:
            out = function(model, x, sigmas, {"seed": 1}, disable=True)
            assert bool(out.isfinite().all())


def test_solver_node_makes_the_described_solver(pack):
    (found,) = made(pack, "FewStepSolver", solver="dpmpp_2m_sde", options="eta=0.5, order=3", s_noise=0.9, cfg_pp=False)
    function = found.sampler_function
    assert (repr(function.solver), function.s_noise) == ("DPMSolverSDE(order=3, eta=0.5)", 0.9)
    (found,) = made(pack, "FewStepSolver", solver="dpmpp_2m", options="", s_noise=1.0, cfg_pp=True)
    assert (found.sampler_function.cfg_pp, found.sampler_function.history) == (True, "unconditional")
    (found,) = made(pack, "FewStepSolver", solver="shark", options="", s_noise=1.0, cfg_pp=False)
    assert repr(found.sampler_function.solver) == "ShARK()"
    with pytest.raises(fs.InputError, match="takes order=2"):
        made(pack, "FewStepSolver", solver="dpmpp_2m", options="eta=1", s_noise=1.0, cfg_pp=False)


def test_solver_node_and_drop_down_make_the_same_solver_of_each_name(comfy, pack):
    for name in pack.NODE_CLASS_MAPPINGS["FewStepSolver"].INPUT_TYPES()["required"]["solver"][0]:
        (node,) = made(pack, "FewStepSolver", solver=name, options="", s_noise=1.0, cfg_pp=False)
        listed = getattr(comfy.k_diffusion.sampling, f"sample_fewstep_{name}")
        assert repr(listed.solver) == repr(node.sampler_function.solver), name


def test_samplers_and_nodes_make_the_same_schedule_of_a_table(pack):
    model, sigmas = lambda x, sigma: x / (1 + sigma[:, None] ** 2), torch.tensor([14.0, 5.0, 2.0, 0.7, 0.2, 0.0])
    model.model_sampling = LEVELS["table"]
    schedule = sys.modules["fewstep.integrations.comfyui"].schedule_of(Patcher(LEVELS["table"]))
    x = 14.0 * torch.ones(2, 3)
    assert torch.equal(sampler("plms")(model, x, sigmas), sampler("plms", schedule=schedule)(model, x, sigmas))


@pytest.mark.parametrize("kind", LEVELS)
def test_sigmas_node_gives_levels_of_the_model(pack, kind):
    model = Patcher(LEVELS[kind])
    spacings = pack.NODE_CLASS_MAPPINGS["FewStepSigmas"].INPUT_TYPES()["required"]["spacing"][0]
    own = "oss" if kind[0] == "f" else "ays-sd"  # published for models of another kind
    for spacing in [s for s in spacings if s not in published() or s.startswith(own)]:
        (levels,) = made(pack, "FewStepSigmas", model=model, spacing=spacing, steps=6, denoise=1.0)
        assert levels.shape == (7,)
        assert levels.dtype == torch.float32
        assert bool((levels.diff() < 0).all())
        assert levels[-1] == 0
        assert levels[0] == model.sampling.sigma_max or spacing in ("leading", *published())
        (last,) = made(pack, "FewStepSigmas", model=model, spacing=spacing, steps=4, denoise=0.65)  # int(4 / 0.65) = 6
        assert torch.equal(last, levels[-5:])
    (none,) = made(pack, "FewStepSigmas", model=model, spacing="karras", steps=4, denoise=0.0)
    assert len(none) == 0


def test_sigmas_node_is_sigma_grid(pack):
    (levels,) = made(pack, "FewStepSigmas", model=Patcher(LEVELS["table"]), spacing="trailing", steps=5, denoise=1.0)
    torch.testing.assert_close(levels.double(), fs.sigma_grid(VP, 5, "trailing"), rtol=1e-5, atol=0)
    (levels,) = made(pack, "FewStepSigmas", model=Patcher(LEVELS["flow"]), spacing="trailing", steps=4, denoise=1.0)
    u = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0])
    torch.testing.assert_close(levels, 3 * u / (1 + 2 * u), rtol=0, atol=2e-3)


def fitted(schedule):
    problem = fs.DiffusionModel(lambda x, sigma: x / (1 + sigma**2), schedule)
    size = 1 if isinstance(schedule, fs.FlowMatching) else schedule.sigma_max
    noise = size * torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
    return fs.distill_dode(problem, base=fs.DDIM(), steps=3, noise=noise, teacher_substeps=2)[0]


@pytest.mark.parametrize("suffix", ["json", "safetensors"])
def test_table_node_gives_the_steps_and_their_levels(pack, tmp_path, suffix):
    table = fitted(fs.EDM(0.03, 14.0))
    (tmp_path / "fewstep").mkdir()
    table.save(tmp_path / "fewstep" / f"few.{suffix}")
    (tmp_path / "fewstep" / "notes.txt").touch()
    inputs = pack.NODE_CLASS_MAPPINGS["FewStepTable"].INPUT_TYPES()["required"]
    assert inputs["file"][0] == [f"few.{suffix}"]
    found, levels = made(pack, "FewStepTable", model=Patcher(LEVELS["table"]), file=f"few.{suffix}")
    torch.testing.assert_close(levels.double(), table.sigmas, rtol=1e-6, atol=0)
    x = levels[0] * torch.randn(4, 5, generator=torch.Generator().manual_seed(1))  # another shape than the fit's
    model = lambda x, sigma, **kw: torch.tanh(x) / (1 + sigma[:, None])  # noqa: E731  and another model
    out = found.sampler_function(model, x, levels, {"seed": 1}, disable=True)
    plan = fs.Plan(**{k: getattr(table, k) for k in table.__dataclass_fields__ if k not in ("fit",)})
    problem = fs.DiffusionModel(lambda x, s: torch.tanh(x) / (1 + s), fs.EDM(0.03, 14.0))
    torch.testing.assert_close(out, fs.sample(problem, plan, noise=x), rtol=1e-5, atol=1e-5)
    with pytest.raises(fs.InputError, match="model: got one that is a flow; few.* was fitted to EDM"):
        made(pack, "FewStepTable", model=Patcher(LEVELS["flow"]), file=f"few.{suffix}")


def test_table_of_a_flow_has_the_levels_of_the_flow(pack, tmp_path):
    table = fitted(fs.FlowMatching())
    (tmp_path / "fewstep").mkdir()
    table.save(tmp_path / "fewstep" / "flow.json")
    _, levels = made(pack, "FewStepTable", model=Patcher(LEVELS["flow"]), file="flow.json")
    torch.testing.assert_close(levels.double(), fs.FlowMatching().label(table.sigmas), rtol=1e-6, atol=1e-7)


def test_guidance_node_is_classifier_free_guidance(pack):
    x, c, u = torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(2)).unbind()
    sigma, model = torch.tensor([4.0, 4.0]), Patcher(LEVELS["table"])
    plain = dict(start_percent=0.0, end_percent=1.0, rescale=0.0, parallel=1.0, norm=0.0)
    for change in ({}, {"rescale": 0.7}, {"parallel": 0.0}, {"parallel": 0.3, "norm": 0.5, "rescale": 0.2}):
        (patched,) = made(pack, "FewStepGuidance", model=model, **plain | change)
        out = sampling_function(patched, x, sigma, u, c, 3.0)
        options = dict(change, norm=change.get("norm"))
        network = lambda x, t, k: k * x / (1 + t[:, None])  # noqa: E731
        guided = fs.classifier_free_guidance(network, c, u, 3.0, **options)
        want = fs.from_sample(guided, fs.EDM(0.1, 20.0))(x, torch.tensor(4.0))
        torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-6)
    assert not model.options  # the input is left as it was


def test_guidance_node_evaluates_one_half_outside_of_its_interval(pack):
    x, model = torch.ones(2, 5), Patcher(LEVELS["table"])
    inputs = dict(model=model, start_percent=0.25, end_percent=0.75, rescale=0.0, parallel=1.0, norm=0.0)
    (patched,) = made(pack, "FewStepGuidance", **inputs)
    for sigma, halves in ((14.0, 1), (7.0, 2), (1.0, 1)):
        model.seen.clear()
        out = sampling_function(patched, x, torch.full((2,), sigma), -1.0, 1.0, 2.0)
        assert model.seen == [halves]
        torch.testing.assert_close(out, (3.0 if halves == 2 else 1.0) * x / (1 + sigma))


def test_outside_of_comfyui_the_pack_is_an_import_error():
    sys.modules.pop("fewstep.integrations.comfyui", None)
    with pytest.raises(ImportError, match="ComfyUI cannot be imported here"):
        importlib.import_module("fewstep.integrations.comfyui")
