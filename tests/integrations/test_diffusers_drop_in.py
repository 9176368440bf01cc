"""FewStepScheduler where stock schedulers stand: options of a call, one run at a time, state and attributes."""

import copy
import inspect
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fewstep as fs
from fewstep.errors import InputError

df = pytest.importorskip("diffusers")
from fewstep.integrations.diffusers import FewStepScheduler  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

SD = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
SHAPE = (2, 4, 8, 8)
X, OUT = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
FLOW = dict(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
ZERO_SNR = dict(rescale_betas_zero_snr=True, prediction_type="v_prediction", timestep_spacing="trailing", **SD)
SKIPPED = dict(skip_prk_steps=True, steps_offset=1, **SD)
STOCK = {
    "DDIM": (df.DDIMScheduler, dict(set_alpha_to_one=False, steps_offset=1, clip_sample=False, **SD), fs.DDIM()),
    "DDIM zero SNR": (df.DDIMScheduler, ZERO_SNR, fs.DDIM()),
    "DDPM": (df.DDPMScheduler, {}, fs.DDPM()),
    "PNDM": (df.PNDMScheduler, SKIPPED, fs.PNDM()),
    "PNDM v": (df.PNDMScheduler, dict(prediction_type="v_prediction", **SKIPPED), fs.PNDM()),
    "PNDM Runge-Kutta": (df.PNDMScheduler, SD, fs.PNDM()),
    "DPM++ 2M": (df.DPMSolverMultistepScheduler, SD, fs.DPMSolverPP(2)),
    "DPM++ 2M flow": (df.DPMSolverMultistepScheduler, FLOW, fs.DPMSolverPP(2)),
    "DPM++ 2S": (df.DPMSolverSinglestepScheduler, SD, fs.DPMSolverPP(2, multistep=False)),
    "DPM++ 2S flow": (df.DPMSolverSinglestepScheduler, FLOW, fs.DPMSolverPP(2, multistep=False)),
    "UniPC": (df.UniPCMultistepScheduler, SD, fs.UniPC(2)),
    "DEIS": (df.DEISMultistepScheduler, SD, fs.DEIS(2)),
    "Euler": (df.EulerDiscreteScheduler, SD, fs.EDMEuler()),
    "Euler leading": (df.EulerDiscreteScheduler, dict(timestep_spacing="leading", **SD), fs.EDMEuler()),
    "Heun": (df.HeunDiscreteScheduler, SD, fs.EDMHeun()),
    "flow Euler": (df.FlowMatchEulerDiscreteScheduler, dict(shift=3.0), fs.EDMEuler()),
    "EDM Euler": (df.EDMEulerScheduler, {}, fs.EDMEuler()),
    "EDM DPM++ 2M": (df.EDMDPMSolverMultistepScheduler, {}, fs.DPMSolverPP(2)),
}  # fmt: skip
FREE = ("DDIM", "DDIM zero SNR", "DDPM", "Euler", "Euler leading", "flow Euler", "EDM Euler")
HISTORY = [n for n in STOCK if n not in FREE]


def both(name, **more):
    cls, options, solver = STOCK[name]
    stock = cls(**options, **more)
    return stock, FewStepScheduler.from_config(stock.config, solver=solver)


def network(x, t):
    """Any smooth network: stock and ours call it with equal inputs."""
    return torch.sin(2 * x) * 0.7 + 1e-4 * float(t)


def close(a, b, tolerance=1e-4):
    assert a.isfinite().all()
    assert float((a - b).norm() / a.norm()) < tolerance


def start(scheduler, x0, begin):
    """The noisy picture of an image-to-image pipeline."""
    t = scheduler.timesteps[begin : begin + 1]
    if hasattr(scheduler, "add_noise"):
        return scheduler.add_noise(x0, X, t)
    return scheduler.scale_noise(x0, t, X)


def steps(scheduler, x, timesteps, seed=5, model=network):
    """What a pipeline holds after each step."""
    scale = getattr(scheduler, "scale_model_input", lambda x, t: x)
    drawn = "generator" in inspect.signature(scheduler.step).parameters
    options = {"generator": torch.Generator().manual_seed(seed)} if drawn else {}
    for t in timesteps:
        x = scheduler.step(model(scale(x, t), t), t, x, **options).prev_sample
        yield x


# ---------------------------------------------------------------------- nothing is swallowed


def test_unknown_keywords_are_refused():
    s = FewStepScheduler(solver=fs.EDMEuler())
    with pytest.raises(InputError, match="option of set_timesteps: got 'timestep'.*Did you mean 'timesteps'"):
        s.set_timesteps(4, timestep=3)
    with pytest.raises(InputError, match="original_inference_steps: EulerDiscreteScheduler takes none"):
        s.set_timesteps(4, original_inference_steps=50)
    s.set_timesteps(4)
    with pytest.raises(InputError, match="option of step: got 'churn'.*Did you mean 's_churn'"):
        s.step(OUT, s.timesteps[0], X, churn=3.0)


@pytest.mark.parametrize("name", ["UniPC", "flow Euler", "Heun"])
@pytest.mark.parametrize("option", [
    dict(s_churn=5.0), dict(s_noise=1.01), dict(s_noise=0.0), dict(s_tmin=0.1), dict(s_tmax=9.0), dict(eta=0.5),
    dict(use_clipped_model_output=True),
])  # fmt: skip
def test_options_of_other_solvers_are_refused(name, option):
    _, s = both(name)
    s.set_timesteps(4)
    with pytest.raises(InputError, match=f"{min(option)}: got .*fewstep"):
        s.step(OUT, s.timesteps[0], X, **option)
    s.step(OUT, s.timesteps[0], X, eta=0.0, use_clipped_model_output=None, generator=None, variance_noise=None)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", ["Euler", "Euler leading", "EDM Euler"])
def test_churn_of_a_call_equals_diffusers(name, prediction):
    stock, ours = both(name, prediction_type=prediction)
    ends = []
    for s in (stock, ours):
        s.set_timesteps(6)
        x, generator = X * s.init_noise_sigma, torch.Generator().manual_seed(1)
        for t in s.timesteps:
            options = dict(s_churn=2.0, s_tmin=0.1, s_tmax=10.0, s_noise=1.01, generator=generator)
            x = s.step(network(s.scale_model_input(x, t), t), t, x, **options).prev_sample
        ends.append(x)
    close(*ends)


def test_timesteps_of_tokens_equal_diffusers():
    stock, ours = both("flow Euler")
    x, v = torch.randn(2, 2, 6, 8, generator=torch.Generator().manual_seed(2))
    for s in (stock, ours):
        s.set_timesteps(4)
    for i, t in enumerate(stock.timesteps):
        each = torch.minimum(t, torch.linspace(0, 1000, 12).reshape(2, 6))
        options = dict(per_token_timesteps=each, return_dict=False)
        close(stock.step(-v, t, x, **options)[0], ours.step(-v, t, x, **options)[0], 1e-6)
        with pytest.raises(InputError, match="per_token_timesteps: got shape"):
            ours.step(-v, t, x, per_token_timesteps=each[:1])
        x = x + 0.1 * i


@pytest.mark.parametrize("solver", [fs.DPMSolverPP(2), fs.SEEDS(2), fs.ShARK()], ids=repr)
def test_tokens_below_the_level_wait_for_it(solver):
    """Tokens at the level of the run step as without levels of their own; a token below is unchanged until then."""
    waiting, plain = (FewStepScheduler.from_config(df.FlowMatchEulerDiscreteScheduler().config, solver=solver) for _ in "ab")  # fmt: skip  # noqa: E501
    x = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(3))
    y, start, own = x.clone(), x.clone(), torch.full((2, 6), 1000.0)
    own[:, 3:] = 600.0
    for s in (waiting, plain):
        s.set_timesteps(6)
    for i, t in enumerate(waiting.timesteps):
        each = torch.minimum(t, own)
        generators = [torch.Generator().manual_seed(i) for _ in "ab"]
        x = waiting.step(0.3 * x, t, x, per_token_timesteps=each, generator=generators[0]).prev_sample
        y = plain.step(-0.3 * y, t, y, generator=generators[1]).prev_sample
        close(y[:, :3], x[:, :3], 1e-6)
        assert torch.equal(x[:, 3:], start[:, 3:]) == bool(t > 600)


FOREIGN = {
    "CogVideoXDDIMScheduler": "snr_shift_scale", "CMStochasticIterativeScheduler": "clip_denoised",
    "ScoreSdeVeScheduler": "sampling_eps", "DDPMWuerstchenScheduler": "scaler", "KarrasVeScheduler": "s_min",
    "CosineDPMSolverMultistepScheduler": "_class_name",
}  # fmt: skip


@pytest.mark.parametrize("name", FOREIGN)
def test_configuration_of_another_forward_process_is_refused(name):
    if not hasattr(df, name):
        pytest.skip("not in this version of diffusers")
    config = {**getattr(df, name)().config, "_class_name": name}
    with pytest.raises(InputError, match=rf"^{FOREIGN[name]}: got .*Use {name} itself"):
        FewStepScheduler.from_config(config)
    if name.startswith("Cog"):  # a shift of 1 changes nothing
        FewStepScheduler.from_config({**config, "snr_shift_scale": 1.0}, solver=fs.DDIM()).set_timesteps(4)


def test_samples_at_different_timesteps_are_refused():
    for name in ("DDIM", "DPM++ 2M"):
        _, s = both(name)
        s.set_timesteps(4)
        with pytest.raises(InputError, match=r"timestep: got \[.*expected the same for all samples"):
            s.step(OUT, s.timesteps[:2], X)
        s.step(OUT, s.timesteps[:1].expand(2), X)


def test_network_of_a_distilled_configuration_takes_other_solvers():
    for cls in (df.LCMScheduler, df.TCDScheduler):
        FewStepScheduler.from_config(cls(**SD).config, solver=fs.DDIM()).set_timesteps(4)


# ---------------------------------------------------------------------- one scheduler, one run


@pytest.mark.parametrize("begin", [None, 0])
@pytest.mark.parametrize("name", [*HISTORY, "SDE"])
def test_run_refuses_a_second_sample(name, begin):
    """Two samples in turn, a step twice, one left out, one too many; a copy per run serves both."""
    s = FewStepScheduler(solver=fs.DPMSolverSDE(2)) if name == "SDE" else both(name)[1]
    s.set_timesteps(5)
    s.set_begin_index(begin) if begin is not None else None
    t, pair = s.timesteps, (s, copy.deepcopy(s))
    want = None
    for x in (X, X):
        s.set_timesteps(5)
        s.set_begin_index(begin) if begin is not None else None
        *_, end = steps(s, x * s.init_noise_sigma, t, model=lambda x, t: 0.1 * x)
        assert want is None or torch.equal(want, end)
        want = end
    with pytest.raises(InputError, match=r"this scheduler is in a run at its end.*copy.deepcopy"):
        s.step(0.1 * end, t[-1], end)
    runs = [steps(p, X * s.init_noise_sigma, t, model=lambda x, t: 0.1 * x) for p in pair]
    *_, ends = zip(*runs, strict=True)
    assert all(torch.equal(end, want) for end in ends)
    s.set_timesteps(5)
    s.set_begin_index(begin) if begin is not None else None
    x = s.step(OUT, t[0], X).prev_sample
    for wrong in (t[0], t[3]):
        with pytest.raises(InputError, match=rf"this scheduler is in a run at t={float(t[1]):g}.*copy.deepcopy"):
            s.step(OUT, wrong, X)
    s.step(OUT, t[1], x)


@pytest.mark.parametrize("name", ["DDIM", "DDPM", "flow Euler", "Euler", "EDM Euler"])
def test_solvers_without_history_take_any_timestep(name):
    """Samples in turn and any order: each step is that of a scheduler of its own."""
    stock, s = both(name)
    stock.set_timesteps(6)
    s.set_timesteps(6)
    for i in (3, 1, 5, 1, 0):
        own = copy.deepcopy(stock)
        t = s.timesteps[i]
        scale = getattr(own, "scale_model_input", lambda x, t: x)
        out = network(scale(X, t), t)
        options = {} if "flow" in name or "generator" not in inspect.signature(own.step).parameters else {
            "generator": torch.Generator().manual_seed(i)}  # fmt: skip
        want = own.step(out, t, X, **options).prev_sample
        close(want, s.step(out, t, X, **(options and {"generator": torch.Generator().manual_seed(i)})).prev_sample)


def test_ddim_steps_from_labels_outside_the_schedule():
    stock, s = both("DDIM")
    for one in (stock, s):
        one.set_timesteps(20)
    for t in (7, 33, 500, 981, 999):
        for eta in (0.0, 0.6):
            want, got = (one.step(OUT, t, X, eta, generator=torch.Generator().manual_seed(1)) for one in (stock, s))
            close(want.prev_sample, got.prev_sample)
    for wrong in (-1, 1000, 3.5):
        with pytest.raises(InputError, match="timestep: got"):
            s.step(OUT, wrong, X)
    _, s = both("DDPM")
    s.set_timesteps(20)
    with pytest.raises(InputError, match="timestep: got 7"):
        s.step(OUT, 7, X)


class HostReads(TorchDispatchMode):
    """Counts the numbers that are read from tensors."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", STOCK)
def test_timesteps_of_a_device_are_not_read(name):
    """On the device "meta", where reading a number fails: the position of a timestep in `timesteps` names it."""
    _, s = both(name)
    s.set_timesteps(5, device="meta")
    x, generator = torch.empty(SHAPE), torch.Generator()
    with HostReads() as reads:
        for t in s.timesteps:
            out = s.scale_model_input(x, t).clone()
            x = s.step(out, t, x, generator=generator).prev_sample
    assert reads.count == 0
    s.set_timesteps(5, device="meta")
    s.step(out, s.timesteps[0], x, generator=generator)
    if name in HISTORY:
        with pytest.raises(InputError, match="in a run at t="):
            s.step(out, s.timesteps[3].expand(2), x, generator=generator)


# ---------------------------------------------------------------------- state and attributes


@pytest.mark.parametrize("name", STOCK)
def test_attributes_equal_diffusers_before_and_after_set_timesteps(name):
    stock, ours = both(name)
    names = ("betas", "alphas", "alphas_cumprod", "final_alpha_cumprod", "sigmas", "timesteps", "init_noise_sigma")
    for n in (None, 5 if "Runge" in name else 1, 7):
        if n is not None:
            stock.set_timesteps(n)
            ours.set_timesteps(n)
        for word in names:
            if getattr(stock, word, None) is not None:
                want, got = (torch.as_tensor(getattr(s, word)) for s in (stock, ours))
                assert torch.allclose(want, got.to(want), rtol=1e-6), (word, n)
        assert n is None or ours.order == stock.order


@pytest.mark.parametrize("name", STOCK)
@pytest.mark.parametrize("n", [7, 20])
def test_states_inside_a_run_are_those_of_diffusers(name, n):
    """Every state that is handed over, and any step of one by the other: base and refiner mixed."""
    stock, ours = both(name)
    for s in (stock, ours):
        s.set_timesteps(n)
    x = X * getattr(stock, "init_noise_sigma", 1.0)
    for want, got in zip(*(steps(s, x, s.timesteps) for s in (stock, ours)), strict=True):
        close(want, got)


@pytest.mark.parametrize("name", STOCK)
@pytest.mark.parametrize("n", [7, 20, pytest.param(50, marks=pytest.mark.slow)])
def test_image_to_image_equals_diffusers_from_every_entry(name, n):
    """From a begin index, as pipelines of image to image, inpainting and denoising_start do."""
    stock, ours = both(name)
    stock.set_timesteps(n)
    entries = range(0, len(stock.timesteps), stock.order)
    for begin in {*entries[:3], *entries[3 :: len(entries) // 4], *entries[-2:]}:
        ends = []
        for s in (stock, ours):
            s.set_timesteps(n)
            s.set_begin_index(begin) if hasattr(s, "set_begin_index") else None
            *_, end = steps(s, start(s, 0.3 * OUT, begin), s.timesteps[begin:])
            ends.append(end)
        # four stages from one label along slopes of others: values of 1e3, all rounding
        close(*ends, 1e-2 if "Runge" in name else 1e-4)


@pytest.mark.parametrize("name", STOCK)
def test_inpainting_equals_diffusers(name):
    """The known half of every sample is written over, at stages and steps, in place or not."""
    stock, ours = both(name)
    ends = []
    for s in (stock, ours):
        s.set_timesteps(9)
        x, labels = X * getattr(s, "init_noise_sigma", 1.0), s.timesteps
        generator = torch.Generator().manual_seed(1)
        drawn = "DDPM" in name or "DDIM" in name
        for i, t in enumerate(labels):
            scaled = s.scale_model_input(x, t) if hasattr(s, "scale_model_input") else x
            x = s.step(network(scaled, t), t, x, **({"generator": generator} if drawn else {})).prev_sample
            if i + 1 < len(labels):
                x = x if i % 2 else x.clone()
                x[:, :2] = start(s, 0.3 * OUT, i + 1)[:, :2]
        ends.append(x)
    # PNDM combines outputs v; the plan keeps them as noise and state, which the edits change
    close(*ends, 1e-3 if name == "PNDM v" else 1e-4)


def test_given_sigmas_have_the_labels_of_diffusers():
    stock, ours = both("Euler")
    for given in (dict(sigmas=[14.6, 5, 2, 1, 0.3, 0.03, 0]), dict(timesteps=[999, 850, 736, 24])):
        for s in (stock, ours):
            s.set_timesteps(**given)
        assert torch.allclose(stock.timesteps, ours.timesteps)
        assert torch.allclose(stock.sigmas, ours.sigmas)
        *_, want = steps(stock, X * stock.init_noise_sigma, stock.timesteps)
        *_, got = steps(ours, X * ours.init_noise_sigma, ours.timesteps)
        close(want, got)
    with pytest.raises(InputError, match="refuses 5 steps"):
        ours.set_timesteps(5, timesteps=[999, 3])
    with pytest.raises(InputError, match=r"num_inference_steps: got 5 with a list of 1 steps"):
        both("UniPC")[1].set_timesteps(5, sigmas=[3.0, 0.0])


@pytest.mark.parametrize("name", ["DDPM", "DPM++ 2M", "Euler", "flow Euler", "EDM Euler"])
def test_labels_that_the_schedule_lacks_are_refused(name):
    _, s = both(name)
    for labels in ([-2], [1001], [999, -3], [float("nan")]):
        with pytest.raises(InputError, match="timesteps: got .*expected labels from"):
            s.add_noise(X[: len(labels)], X[: len(labels)], torch.tensor(labels))


def test_steps_before_set_timesteps_equal_diffusers():
    for name in ("DDPM", "Euler", "EDM Euler", "flow Euler"):
        stock, ours = both(name)
        t = stock.timesteps[-40]
        scale = getattr(stock, "scale_model_input", lambda x, t: x)
        out = network(scale(X, t), t)
        assert torch.allclose(ours.scale_model_input(X, t), scale(X, t), rtol=1e-5)
        draw = {"generator": torch.Generator().manual_seed(1)} if name == "DDPM" else {}
        want = stock.step(out, t, X, **draw).prev_sample
        close(want, ours.step(out, t, X, generator=torch.Generator().manual_seed(1)).prev_sample)
    with pytest.raises(InputError, match="set_timesteps: not called"):
        FewStepScheduler(solver=fs.UniPC(2)).step(OUT, 999, X)


def test_signal_to_noise_ratio_of_training():
    from diffusers.training_utils import compute_snr

    t = torch.tensor([0, 500, 999])
    assert torch.equal(*(compute_snr(s, t) for s in both("UniPC")))


def test_given_sigmas_down_to_the_last_label():
    ours = FewStepScheduler.from_config(df.DDIMScheduler().config)
    lowest = float(((1 - ours.alphas_cumprod[0]) / ours.alphas_cumprod[0]).sqrt())
    ours.set_timesteps(sigmas=[14.0, 1.0, lowest, 0.0])
    assert ours.timesteps[-1] == 0


def test_plan_that_gives_the_network_another_first_level_runs_as_in_sample():
    """A fitted table may; the pipeline's first state is then that of the level that the network is given."""
    stock = df.DDIMScheduler()
    schedule = fs.DiscreteVP(stock.alphas_cumprod.double())
    plan = fs.IPNDM(2).plan(fs.sigma_grid(schedule, 4))
    plan = replace(plan, sigma=plan.sigma * torch.tensor([0.4, 1.0, 1.0, 1.0]))
    model = fs.DiffusionModel(fs.from_epsilon(lambda x, t: network(x, t[0]), schedule), schedule)
    ours = FewStepScheduler.from_config(stock.config, solver=plan, exact=True)
    ours.set_timesteps(4)
    *_, got = steps(ours, X * ours.init_noise_sigma, ours.timesteps)
    close(fs.sample(model, plan, noise=X), got)
