"""The programs the library has promised to run, as their users type them."""

import pytest
import torch

import fewstep as fs


def test_sdes():
    gbm = fs.SDE(drift=lambda t, y: 0.05 * y, diffusion=lambda t, y: 0.2 * y,
                 noise_type="diagonal", sde_type="ito")  # fmt: skip
    path = fs.BrownianPath(shape=(256, 16), t0=0.0, t1=1.0, seed=0, levy="H")
    sol = fs.solve(gbm, fs.Milstein(), y0=torch.ones(256, 16), grid=torch.linspace(0, 1, 65), path=path)
    assert sol.y.shape == (256, 16)
    assert sol.nfe == 64
    inc = path.increment(0.25, 0.5)
    both = path.increment(0.0, 0.25).join(inc)
    torch.testing.assert_close(both.W, path.increment(0.0, 0.5).W)
    assert fs.levy_area(inc, method="foster", seed=0).shape == (256, 16, 16)
    saved = fs.solve(gbm, fs.EulerMaruyama(), torch.ones(4, 2), torch.linspace(0, 1, 5), save="all")
    assert saved.ys.shape == (5, 4, 2)


def test_torchsde_by_changing_one_import():
    import torchsde

    from fewstep.integrations.torchsde import TorchsdePath, sdeint

    class Additive(torch.nn.Module):
        noise_type, sde_type = "additive", "ito"

        def f(self, t, y):
            return torch.sin(y)

        def g(self, t, y):
            return torch.ones_like(y).unsqueeze(-1)

    y0, ts = torch.zeros(8, 1, dtype=torch.float64), torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    bm = torchsde.BrownianInterval(0.0, 1.0, size=(8, 1), dtype=torch.float64,
                                   levy_area_approximation="space-time")  # fmt: skip
    ys = sdeint(Additive(), y0, ts, bm=bm, method="shark", dt=2**-6)
    assert ys.shape == (3, 8, 1)
    assert TorchsdePath(bm).levy == "H"


def test_diffusion_models(tmp_path):
    schedule = fs.VPLinear()

    def model(x, t):
        sigma = schedule.sigma(t[0].double()).to(x)
        return x * sigma / (1 + sigma**2).sqrt()

    problem = fs.DiffusionModel(fs.from_epsilon(model, schedule), schedule)
    x0 = fs.sample(problem, fs.DPMSolverPP(order=2), shape=(4, 1, 8, 8), steps=10, spacing="logsnr", seed=0)
    assert x0.shape == (4, 1, 8, 8)
    x0 = fs.sample(problem, fs.ShARK(), shape=(4, 1, 8, 8), steps=20, seed=0)
    sigmas = fs.sigma_grid(schedule, 8)
    plan = fs.UniPC(order=3).plan(sigmas)
    x0 = fs.sample(problem, plan, shape=(4, 1, 8, 8), seed=0)
    plan.save(tmp_path / "unipc8.safetensors")
    assert torch.equal(x0, fs.sample(problem, fs.load(tmp_path / "unipc8.safetensors"), shape=(4, 1, 8, 8), seed=0))
    for name in ("from_v", "from_score", "from_sample", "from_flow", "from_edm"):
        assert callable(getattr(fs, name))
    solvers = [fs.DDIM(eta=0), fs.PNDM(), fs.IPNDM(order=4), fs.DPMSolver(2), fs.DPMSolverSDE(2), fs.DEIS(2)]
    for solver in (*solvers, fs.EDMHeun(), fs.DPMSolverPP(3, multistep=True)):
        assert fs.sample(problem, solver, shape=(2, 3), steps=12).isfinite().all()
    for schedule in (fs.VPCosine(), fs.VE(), fs.EDM(0.01, 50.0), fs.FlowMatching(shift=1.0), fs.SubVP()):
        assert len(fs.sigma_grid(schedule, 4)) == 5


def test_drop_in_for_existing_samplers():
    from fewstep.integrations.k_diffusion import sampler  # f(model, x, sigmas, extra_args, callback, disable)

    sigmas, seen = torch.tensor([10.0, 3.0, 1.0, 0.2, 0.0]), []
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 10.0
    model = lambda x, sigma, **extra: x / (1 + sigma.reshape(-1, 1, 1, 1) ** 2)  # noqa: E731
    x = sampler(fs.DPMSolverPP(order=3))(model, x, sigmas, {}, seen.append, True)
    assert x.shape == (2, 3, 4, 4)
    assert [d["i"] for d in seen] == [0, 1, 2, 3]


@pytest.mark.filterwarnings("ignore")  # diffusers' own
def test_drop_in_for_diffusers(tmp_path):
    df = pytest.importorskip("diffusers")
    from fewstep.integrations.diffusers import FewStepScheduler

    unet = df.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8,),
        norm_num_groups=4, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    )  # fmt: skip
    pipe = df.DDPMPipeline(unet, df.DDPMScheduler())
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = FewStepScheduler.from_config(pipe.scheduler.config, solver=fs.UniPC(order=3))
    images = pipe(num_inference_steps=8, output_type="np").images
    assert images.shape == (1, 8, 8, 1)
    pipe.save_pretrained(tmp_path)
    assert FewStepScheduler.from_pretrained(tmp_path, subfolder="scheduler").solver.order == 3


def test_learned_solvers(tmp_path):
    model = fs.DiffusionModel(lambda x, s: x / (1 + s * s), fs.EDM(0.05, 20.0))
    noise = 20 * torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
    table, report = fs.distill_dode(model, base=fs.DDIM(), steps=8, noise=noise)
    assert isinstance(table, fs.Plan)
    assert report.student_rmse <= report.base_rmse
    table, report = fs.fit_table(model, nfe=5, noise=noise, starts=1, iterations=2)
    assert isinstance(table, fs.Plan)
    assert report.student_errors.rmse <= report.base_errors.rmse
    training = fs.TrainingOptions(iterations=5)
    student, _ = fs.distill_sigdeg(
        model, steps=5, teacher_steps=50, levy="H", event_shape=(3,), seed=0, training=training,
        teacher_options=fs.TeacherOptions(trajectories=64),
    )  # fmt: skip
    student.save(tmp_path / "few.safetensors")
    student = fs.load(tmp_path / "few.safetensors")
    assert fs.sample(model, student, shape=(4, 3), seed=1).shape == (4, 3)
    sde = fs.SDE(lambda t, y: -y, lambda t, y: 0.2 + 0.1 * y)
    step, _ = fs.distill_sigdeg_step(sde, steps=8, y0=torch.ones(64, 1), seed=0, training=training)
    assert fs.solve(sde, step, torch.ones(4, 1), [0.0, 0.5, 1.0]).y.shape == (4, 1)


def test_measuring(tmp_path):
    from fewstep_analysis import problems, strong_order, weak_order, work_precision

    assert callable(weak_order)
    assert callable(work_precision)
    r = strong_order(fs.EulerMaruyama(), problems.geometric_brownian_motion(), levels=range(4, 7), paths=128,
                     reference="torchsde", device="cpu", seed=0)  # fmt: skip
    assert len(r.local) == 2
    assert r.verdict
    my_sde = fs.SDE(lambda t, y: -y, lambda t, y: 0.2 * y)
    r = strong_order(fs.Milstein(), my_sde, y0=torch.full((1,), 0.4), t0=0.0, t1=1.0, levels=range(3, 6),
                     paths=200, reference="levels")  # fmt: skip
    r.plot(tmp_path / "em.svg")
    r.save(tmp_path / "em.json")
