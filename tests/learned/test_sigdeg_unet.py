"""A U-Net of diffusers as a student of Sig-DEG."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import fewstep as fs
from fewstep.errors import InputError

df = pytest.importorskip("diffusers")
from fewstep.integrations.diffusers.scheduler import FewStepScheduler  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

SCHEDULE = fs.DiscreteVP.named(steps=1000)
GRID = torch.tensor([SCHEDULE.sigma_max, 3.0, 0.5, 0.05], dtype=torch.float64)
CONVERT = {"epsilon": fs.from_epsilon, "v_prediction": fs.from_v, "sample": fs.from_sample}


def unet(**options):
    torch.manual_seed(0)
    return df.UNet2DModel(
        sample_size=8, in_channels=2, out_channels=2, layers_per_block=1, block_out_channels=(8, 8),
        norm_num_groups=4, down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
        add_attention=False, **options,
    ).eval()  # fmt: skip


def model_of(net, labels=None, prediction="epsilon"):
    arguments = {} if labels is None else {"class_labels": labels}
    model = CONVERT[prediction](lambda x, t: net(x, t, **arguments).sample, SCHEDULE, dtype=torch.float32)
    return fs.DiffusionModel(model, SCHEDULE)


@pytest.mark.parametrize("head", ["direct", "graded"])
@pytest.mark.parametrize("prediction", CONVERT)
def test_student_is_initialised_to_its_teacher(head, prediction):
    net = unet()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    student = fs.SigUNet.of(net, SCHEDULE, 3, head=head, prediction=prediction)
    x, xi = torch.randn(4, 2, 8, 8), torch.randn(4, 3, 2, 8, 8)
    problem = model_of(net, prediction=prediction)
    with torch.no_grad():
        for s in (0.05, 1.0, 50.0):
            sigma = torch.tensor(s)
            got, want = student(x * s, sigma, sigma * 0.7, xi), problem.denoiser(x * s, sigma)
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * s)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


@pytest.fixture(scope="module")
def conditional():
    """A student of a class-conditional U-Net after a short training."""
    net = unet(num_class_embeds=3)
    labels = torch.arange(32) % 3
    return net, fs.distill_sigdeg(
        lambda c: model_of(net, c), sigmas=GRID, teacher_steps=12, event_shape=(2, 8, 8), labels=labels,
        network=fs.SigUNet.of(net, SCHEDULE, 2), forcing=0.5,
        teacher_options=fs.TeacherOptions(trajectories=32), training=fs.TrainingOptions(12, 8, 3e-4),
    )  # fmt: skip


def test_student_learns_and_survives_its_file(conditional, tmp_path):
    net, (student, report) = conditional
    assert report.student_rmse < report.parent_rmse
    labels = torch.tensor([2, 0])
    student.save(tmp_path / "s.safetensors")
    back = fs.load(tmp_path / "s.safetensors")
    a, b = (fs.sample(model_of(net), s.at(labels), shape=(2, 2, 8, 8), seed=1) for s in (student, back))
    assert torch.equal(a, b)
    other = fs.sample(model_of(net), student.at(labels.flip(0)), shape=(2, 2, 8, 8), seed=1)
    assert not torch.allclose(a, other)


def test_scheduler_equals_sample(conditional):
    net, (student, _) = conditional
    labels = torch.tensor([2, 0])
    theirs = df.DDPMScheduler(beta_schedule="linear", clip_sample=False)
    scheduler = FewStepScheduler.from_config(theirs.config, solver=student.at(labels), noise="path")
    scheduler.set_timesteps(3)
    noise = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(4)) * scheduler.init_noise_sigma
    x = noise
    for t in scheduler.timesteps:  # the pipeline's own network is not used
        x = scheduler.step(torch.zeros_like(x), t, x, generator=torch.Generator().manual_seed(0)).prev_sample
    want = fs.sample(model_of(net), student.at(labels), noise=noise, path=scheduler._run.path)
    assert (x - want).norm() < 1e-5 * want.norm()


def test_hostile_files_and_wrong_networks_are_rejected(conditional, tmp_path):
    _, (student, _) = conditional
    student.save(tmp_path / "s.safetensors")
    with safe_open(tmp_path / "s.safetensors", framework="pt") as file:
        meta, tensors = json.loads(file.metadata()["fewstep"]), {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    bad = {
        "giant": {"unet": meta["config"]["unet"] | {"block_out_channels": [10**9, 8]}},
        "deep": {"unet": meta["config"]["unet"] | {"layers_per_block": 10**9}},
        "blocks": {"unet": meta["config"]["unet"] | {"down_block_types": ["os.system"]}},
        "head": {"head": "other"}, "labels": {"labels": 7}, "unet": {"unet": "x"},
    }  # fmt: skip
    for name, change in bad.items():
        words = meta | {"config": meta["config"] | change}
        save_file(tensors, tmp_path / f"{name}.safetensors", {"fewstep": json.dumps(words)})
        with pytest.raises(InputError):
            fs.load(tmp_path / f"{name}.safetensors")
    with pytest.raises(InputError, match="expected a UNet2DModel"):
        fs.SigUNet.of(torch.nn.Linear(1, 1), SCHEDULE)
    with pytest.raises(InputError, match="expected a UNet2DModel"):
        fs.SigUNet.of(unet(), fs.VPLinear())
