"""Compiled steps and loops of FewStepScheduler equal eager ones, to the bit, with a number of graphs that is fixed."""

from functools import partial

import pytest
import torch

import fewstep as fs

df = pytest.importorskip("diffusers")
from fewstep.integrations.diffusers.scheduler import FewStepScheduler  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

SHAPE = (2, 3, 2, 2)
NOISE = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
SAMPLERS = [name for name, s in fs.solvers().items() if isinstance(s, fs.DiffusionSolver)]
SIX = ["DDIM", "UniPC", "EDMHeun", "PNDM", "ERSDE", "ShARK"]  # eager kernels after AOTAutograd
CONFIGS = {
    "clipped": df.DDIMScheduler().config,
    "velocities": df.DDIMScheduler(prediction_type="v_prediction", clip_sample=False, thresholding=True).config,
    "edm": df.EDMEulerScheduler(sigma_max=20.0).config,
    "flow": df.FlowMatchEulerDiscreteScheduler(shift=3.0).config,
}


class Case:
    """A pipeline's loop with a small network, eager or compiled, each run from the same noise."""

    def __init__(self, name, config="clipped", steps=30, dtype=torch.float32, **options):
        self.steps, self.dtype = steps, dtype
        solver = fs.solvers()[name] if isinstance(name, str) else name
        self.scheduler = FewStepScheduler.from_config(CONFIGS[config], solver=solver, **options)

    def loop(self, x, generator, step, timesteps):
        scheduler = self.scheduler
        for t in scheduler.timesteps if timesteps is None else timesteps:
            out = torch.tanh(scheduler.scale_model_input(x, t)) * 0.8
            x = step(out, t, x, generator=generator).prev_sample
        return x

    def run(self, loop=None, step=None, begin=None, generator=None):
        scheduler = self.scheduler
        scheduler.set_timesteps(self.steps)
        timesteps = None
        if begin is not None:
            scheduler.set_begin_index(begin)
            timesteps = scheduler.timesteps[begin:]
        x = (NOISE * scheduler.init_noise_sigma).to(self.dtype)
        generator = torch.Generator() if generator is None else generator
        return (loop or self.loop)(x, generator.manual_seed(3), step or scheduler.step, timesteps)


def check(case, backend, unrolled, graphs, **options):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    want, generator = case.run(**options), torch.Generator()
    make = lambda f: torch.compile(f, fullgraph=True, backend=backend)  # noqa: E731
    compiled = {"loop": make(case.loop)} if unrolled else {"step": make(case.scheduler.step)}
    for _ in range(2):
        assert torch.equal(case.run(**compiled, **options, generator=generator), want)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= graphs
    assert want.isfinite().all()


@pytest.mark.parametrize(("name", "unrolled"), [("UniPC", True), ("DDIM", True), ("ShARK", False)])
def test_compiled_step_and_loop_equal_eager(name, unrolled):
    check(Case(name, steps=3 if unrolled else 12), "eager", unrolled, graphs=1 if unrolled else 3)


def slow(configs):
    """Each sampler under each configuration that it can step."""
    pairs = [(name, config) for name in SAMPLERS for config in configs]
    return [pytest.param(*pair, id="-".join(pair), marks=pytest.mark.slow) for pair in pairs]


def case_of(name, config, **options):
    try:
        return Case(name, config, **options), Case(name, config, **options).run()
    except fs.InputError as error:
        pytest.skip(f"refused: {error}")


@pytest.mark.parametrize(("name", "config"), slow(CONFIGS))
def test_30_compiled_steps_of_each_sampler_equal_eager(name, config):
    case, _ = case_of(name, config)
    check(case, "eager", unrolled=False, graphs=3)


@pytest.mark.parametrize(("name", "config"), slow(["clipped"]))
def test_compiled_loop_of_30_steps_of_each_sampler_equals_eager(name, config):
    case, _ = case_of(name, config)
    check(case, "eager", unrolled=True, graphs=1)


@pytest.mark.parametrize(("name", "config"), slow(["velocities", "edm", "flow"]))
def test_compiled_loop_of_each_sampler_equals_eager(name, config):
    case, _ = case_of(name, config, steps=4)
    check(case, "eager", unrolled=True, graphs=1)


@pytest.mark.slow
@pytest.mark.parametrize("name", SIX)
@pytest.mark.parametrize("unrolled", [False, True], ids=["step", "loop"])
def test_aot_eager_equals_eager(name, unrolled):
    check(Case(name), "aot_eager", unrolled, graphs=1 if unrolled else 3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["UniPC", "EulerMaruyama"])
def test_inductor_equals_eager_to_rounding(name):
    case = Case(name)
    want = case.run()
    torch._dynamo.reset()
    found = case.run(step=torch.compile(case.scheduler.step, fullgraph=True, backend="inductor"))
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)


OPTIONS = {
    "one path per sample": dict(name="ShARK", noise="path"),
    "one path, churn of its own": dict(name=fs.EDMEuler(churn=10.0), noise="path"),
    "published form": dict(name="DPMSolverPP", exact=True),
    "half precision": dict(name="UniPC", dtype=torch.float16),
    "half precision, noise": dict(name="SEEDS", dtype=torch.bfloat16),
    "DDIM with noise": dict(name=fs.DDIM(eta=0.7)),
}


@pytest.mark.parametrize(
    ("case", "unrolled"),
    [pytest.param(case, unrolled, marks=pytest.mark.slow) for case in OPTIONS for unrolled in (False, True)],
)
def test_compiled_options_equal_eager(case, unrolled):
    check(Case(**OPTIONS[case], steps=4 if unrolled else 12), "eager", unrolled, graphs=1 if unrolled else 3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["DDIM", "UniPC", "EDMEuler", "ShARK"])
@pytest.mark.parametrize("unrolled", [False, True], ids=["step", "loop"])
def test_compiled_run_from_a_begin_index_equals_eager(name, unrolled):
    check(Case(name, steps=8), "eager", unrolled, graphs=1 if unrolled else 3, begin=2)


@pytest.mark.slow
def test_one_program_serves_other_numbers_of_steps():
    case = Case("DPMSolverPP", steps=5)
    torch._dynamo.reset()
    step = torch.compile(case.scheduler.step, fullgraph=True, backend="eager")
    for case.steps in (5, 9):
        assert torch.equal(case.run(step=step), case.run())
    with torch._dynamo.config.patch(error_on_recompile=True):
        for case.steps in (12, 7):
            assert torch.equal(case.run(step=step), case.run())


@pytest.mark.slow
def test_begin_index_is_set_in_the_compiled_loop():
    case = Case("DDIM", steps=3)
    want = case.run()

    def loop(x):
        case.scheduler.set_begin_index(0)
        return case.loop(x, None, case.scheduler.step, None)

    torch._dynamo.reset()
    compiled = torch.compile(loop, fullgraph=True, backend="eager")
    assert torch.equal(case.run(loop=lambda x, *_: compiled(x)), want)


def test_compiled_step_refuses_other_timesteps():
    case = Case("UniPC", steps=5)
    case.scheduler.set_timesteps(5)
    torch._dynamo.reset()
    step, t = torch.compile(case.scheduler.step, fullgraph=True, backend="eager"), case.scheduler.timesteps
    step(NOISE, t[0], NOISE)
    with pytest.raises(RuntimeError, match="timestep: got another than the next entry"):
        step(NOISE, t[2], NOISE)


@pytest.mark.slow
@pytest.mark.parametrize(("solver", "options"), [(fs.DDIM(), dict(eta=0.5)), (fs.EDMEuler(), dict(s_churn=5.0))])
def test_options_that_need_a_plan_of_their_own_run_eagerly(solver, options):
    case = Case(solver, steps=3)
    torch._dynamo.reset()
    step = torch.compile(case.scheduler.step, backend="eager")
    found = [case.run(step=partial(f, **options)) for f in (case.scheduler.step, step)]
    assert torch.equal(*found)
