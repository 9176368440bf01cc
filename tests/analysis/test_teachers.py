"""The shipped teachers: what they compute, and that damaged files are rejected."""

import json

import pytest
import torch

import fewstep as fs
from fewstep import InputError
from fewstep_analysis import teachers

MNIST_FILE = teachers.WEIGHTS / "mnist_unet.safetensors"


@pytest.fixture(scope="module")
def net():
    pytest.importorskip("diffusers")
    return teachers.mnist_network()


def at(problem, x, sigma=1.5):
    return problem.denoiser(x, torch.tensor(sigma))


def images(n, seed=0):
    return torch.randn(n, 1, 28, 28, generator=torch.Generator().manual_seed(seed))


def test_shipped_mnist_teacher_predicts_noise(net):
    assert MNIST_FILE.stat().st_size < 2_500_000
    assert not net.training
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in net.parameters())
    assert net(images(2), torch.tensor([0, 1023]), class_labels=torch.tensor([3, 10])).sample.shape == (
        2, 1, 28, 28,
    )  # fmt: skip
    fs.check_prediction(teachers.mnist(net=net).denoiser, teachers.mnist_schedule(), torch.zeros(8, 1, 28, 28))


def test_guidance_combines_labelled_and_unlabelled_predictions(net):
    def problem(*arguments):
        return teachers.mnist(*arguments, net=net)

    x = images(3)
    free, three = at(problem(), x), at(problem(3), x)
    assert (free - three).abs().max() > 1e-3
    assert torch.equal(at(problem(3, 1.0), x), three)
    assert torch.equal(at(problem(3, 0.0), x), free)
    assert torch.allclose(at(problem(3, 2.0), x), free + 2 * (three - free), atol=1e-4)
    each = at(problem(torch.tensor([3, 8, 3])), x)
    assert torch.allclose(each[::2], three[::2], atol=1e-5)
    assert torch.allclose(each[1:2], at(problem(8), x[1:2]), atol=1e-5)


def test_unconditional_teacher_samples(net):
    x = fs.sample(teachers.mnist(), fs.DPMSolverPP(2), shape=(2, 1, 28, 28), steps=3, seed=0)
    assert x.shape == (2, 1, 28, 28)
    assert x.isfinite().all()
    assert x.dtype == torch.float32


BAD = {
    "label": (dict(label=10), "label: got 10"),
    "negative": (dict(label=torch.tensor([1, -1])), "label: got tensor"),
    "words": (dict(label=1.5), "label: got 1.5"),
    "shape": (dict(label=torch.zeros(2, 2, dtype=torch.long)), "label: got tensor"),
    "guidance without label": (dict(guidance=3.0), "without a label"),
    "guidance": (dict(label=1, guidance=float("nan")), "guidance: got nan"),
}


@pytest.mark.parametrize("case", BAD)
def test_mnist_rejects_invalid_labels(case):
    arguments, message = BAD[case]
    with pytest.raises(InputError) as caught:
        teachers.mnist(**arguments)
    assert message in str(caught.value)


def test_mnist_rejects_wrong_number_of_labels(net):
    with pytest.raises(InputError, match="2 labels for a batch of 3"):
        at(teachers.mnist(torch.tensor([1, 2]), net=net), images(3))


def _header(**change):
    def edit(raw, meta, weights):
        meta = {**meta, "config": {**meta["config"], **change}}
        return meta, weights

    return edit


def _weights(edit):
    return lambda raw, meta, weights: (meta, edit(dict(weights)))


HOSTILE = {
    "format": lambda raw, meta, weights: ({**meta, "format": "other"}, weights),
    "no config": lambda raw, meta, weights: ({"format": meta["format"]}, weights),
    "config of words": lambda raw, meta, weights: ({**meta, "config": "UNet2DModel"}, weights),
    "schedule": lambda raw, meta, weights: ({**meta, "schedule": {"name": "cosine"}}, weights),
    "a giant": _header(channels=[10**6] * 3),
    "endless": _header(layers=10**9),
    "deep": _header(channels=[32] * 200),
    "no groups": _header(groups=0),
    "uneven groups": _header(groups=7),
    "head": _header(head=128),
    "no channels": _header(channels=[]),
    "words for sizes": _header(channels="abc"),
    "other keys": _header(act_fn="silu"),
    "no weights": _weights(lambda w: {}),
    "one is missing": _weights(lambda w: {k: v for k, v in w.items() if k != "conv_in.weight"}),
    "one of another shape": _weights(lambda w: w | {"conv_in.weight": torch.zeros(3)}),
    "truncated": lambda raw, meta, weights: raw[: len(raw) // 2],
    "nothing": lambda raw, meta, weights: b"",
    "not safetensors": lambda raw, meta, weights: b"\x80\x04cos\nsystem\n",
}


@pytest.mark.parametrize("case", HOSTILE)
def test_mnist_network_rejects_invalid_files(case, tmp_path):
    pytest.importorskip("diffusers")
    from safetensors.torch import load_file, save_file

    path, shipped = tmp_path / "net.safetensors", MNIST_FILE
    config = json.loads(json.dumps({"format": teachers.MNIST_FORMAT, "config": teachers.MNIST_CONFIG,
                                    "schedule": teachers.MNIST_SCHEDULE}))  # fmt: skip
    made = HOSTILE[case](shipped.read_bytes(), config, load_file(shipped))
    if isinstance(made, bytes):
        path.write_bytes(made)
    else:
        save_file(made[1], str(path), {"fewstep": json.dumps(made[0])})
    with pytest.raises(InputError, match="path: "):
        teachers.mnist_network(path)


def test_mnist_features_rejects_other_files(tmp_path):
    with pytest.raises(InputError, match="has format"):
        teachers.mnist_features(MNIST_FILE)
    from safetensors.torch import save_file

    path = tmp_path / "features.safetensors"
    save_file({"a": torch.zeros(2)}, str(path), {"fewstep": json.dumps({"format": "fewstep-mnist-features-1"})})
    with pytest.raises(InputError, match="damaged or of another version"):
        teachers.mnist_features(path)
