"""MNIST: the reader on small files of its format, and the shipped teacher."""

import gzip
import hashlib
import json
import struct

import pytest
import torch

import fewstep as fs
from fewstep.errors import InputError
from fewstep_analysis import datasets, mnist_teacher, teachers

NAMES = [*datasets.MNIST]


def idx(magic, shape, body):
    return struct.pack(f">{1 + len(shape)}I", magic, *shape) + body


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Three training and two test images in the real format, their md5 in place of the real ones."""
    raw = [
        idx(0x803, (3, 28, 28), bytes(range(256)) * 9 + bytes(48)), idx(0x801, (3,), bytes([5, 0, 4])),
        idx(0x803, (2, 28, 28), bytes([255]) * 2 * 784), idx(0x801, (2,), bytes([7, 2])),
    ]  # fmt: skip
    table = {}
    (tmp_path / "mnist").mkdir()
    for name, content in zip(NAMES, raw):
        (tmp_path / "mnist" / f"{name}.gz").write_bytes(gzip.compress(content))
        table[name] = (datasets.MNIST[name][0], hashlib.md5(content).hexdigest())
    monkeypatch.setattr(datasets, "MNIST", table)
    monkeypatch.delenv("FEWSTEP_DATA", raising=False)
    return tmp_path


def test_the_reader_reads_images_and_labels(folder, monkeypatch):
    train, labels, test, test_labels = datasets.mnist(folder)
    assert train.shape == (3, 1, 28, 28)
    assert train.dtype == torch.float32
    assert torch.equal(train.flatten()[:256], torch.arange(256) / 127.5 - 1)
    assert test.shape == (2, 1, 28, 28)
    assert (test == 1).all()
    assert labels.tolist() == [5, 0, 4]
    assert test_labels.tolist() == [7, 2]
    for by in (folder, folder / "mnist"):  # the folder, or the one that holds it
        monkeypatch.setenv("FEWSTEP_DATA", str(by))
        assert torch.equal(datasets.mnist()[0], train)


def test_the_reader_wants_to_know_where(folder):
    with pytest.raises(InputError, match="FEWSTEP_DATA"):
        datasets.mnist()
    with pytest.raises(InputError, match=r"train-images-idx3-ubyte\.gz does not exist"):
        datasets.mnist(folder / "nowhere")


def _rewrite(file, change):
    file.write_bytes(gzip.compress(change(gzip.decompress(file.read_bytes()))))


DAMAGED = {
    "truncated gzip": lambda f: f.write_bytes(f.read_bytes()[:-20]),
    "not gzip": lambda f: f.write_bytes(b"<html>not found</html>"),
    "broken stream": lambda f: f.write_bytes(f.read_bytes()[:12] + b"\xff" * 40),
    "empty": lambda f: _rewrite(f, lambda raw: b""),
    "magic number": lambda f: _rewrite(f, lambda raw: b"\0\0\x0d\x03" + raw[4:]),
    "too short": lambda f: _rewrite(f, lambda raw: raw[:-1]),
    "a giant by its header": lambda f: _rewrite(f, lambda raw: raw[:4] + b"\xff" * 12 + raw[16:]),
    "another byte": lambda f: _rewrite(f, lambda raw: raw[:-1] + bytes([raw[-1] ^ 1])),
}


@pytest.mark.parametrize("name", NAMES[:2])
@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_files_are_refused(folder, damage, name):
    DAMAGED[damage](folder / "mnist" / f"{name}.gz")
    with pytest.raises(InputError, match=name):
        datasets.mnist(folder)


def test_images_and_labels_must_agree_in_number(folder, monkeypatch):
    raw = idx(0x801, (1,), b"\3")
    (folder / "mnist" / f"{NAMES[1]}.gz").write_bytes(gzip.compress(raw))
    monkeypatch.setitem(datasets.MNIST, NAMES[1], (0x801, hashlib.md5(raw).hexdigest()))
    with pytest.raises(InputError, match="3 images for 1 labels"):
        datasets.mnist(folder)


@pytest.fixture(scope="module")
def net():
    pytest.importorskip("diffusers")
    return mnist_teacher.network()


def at(problem, x, sigma=1.5):
    return problem.denoiser(x, torch.tensor(sigma))


def images(n, seed=0):
    return torch.randn(n, 1, 28, 28, generator=torch.Generator().manual_seed(seed))


def test_the_shipped_teacher_answers(net):
    assert mnist_teacher.WEIGHTS.stat().st_size < 2_500_000
    assert not net.training
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in net.parameters())
    assert net(images(2), torch.tensor([0, 1023]), class_labels=torch.tensor([3, 10])).sample.shape == (
        2, 1, 28, 28,
    )  # fmt: skip
    fs.check_prediction(
        mnist_teacher.problem(net=net).denoiser, mnist_teacher.schedule(), torch.zeros(8, 1, 28, 28)
    )


def test_labels_and_guidance(net):
    def problem(*arguments):
        return mnist_teacher.problem(*arguments, net=net)

    x = images(3)
    free, three = at(problem(), x), at(problem(3), x)
    assert (free - three).abs().max() > 1e-3
    assert torch.equal(at(problem(3, 1.0), x), three)
    assert torch.equal(at(problem(3, 0.0), x), free)
    assert torch.allclose(at(problem(3, 2.0), x), free + 2 * (three - free), atol=1e-4)
    each = at(problem(torch.tensor([3, 8, 3])), x)
    assert torch.allclose(each[::2], three[::2], atol=1e-5)
    assert torch.allclose(each[1:2], at(problem(8), x[1:2]), atol=1e-5)


def test_the_unconditional_problem_samples(net):
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
def test_bad_labels_are_told(case):
    arguments, message = BAD[case]
    with pytest.raises(InputError) as caught:
        mnist_teacher.problem(**arguments)
    assert message in str(caught.value)


def test_a_label_for_each_sample(net):
    with pytest.raises(InputError, match="2 labels for a batch of 3"):
        at(mnist_teacher.problem(torch.tensor([1, 2]), net=net), images(3))


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
def test_hostile_and_damaged_files_are_refused(case, tmp_path):
    pytest.importorskip("diffusers")
    from safetensors.torch import load_file, save_file

    path, whole = tmp_path / "net.safetensors", mnist_teacher.WEIGHTS
    config = json.loads(json.dumps({"format": mnist_teacher.FORMAT, "config": mnist_teacher.CONFIG,
                                    "schedule": mnist_teacher.SCHEDULE}))  # fmt: skip
    made = HOSTILE[case](whole.read_bytes(), config, load_file(whole))
    if isinstance(made, bytes):
        path.write_bytes(made)
    else:
        save_file(made[1], str(path), {"fewstep": json.dumps(made[0])})
    with pytest.raises(InputError, match="path: "):
        mnist_teacher.network(path)


def test_features_of_another_file_are_refused(tmp_path):
    with pytest.raises(InputError, match="has format"):
        mnist_teacher.features(mnist_teacher.WEIGHTS)
    from safetensors.torch import save_file

    path = tmp_path / "features.safetensors"
    save_file(
        {"a": torch.zeros(2)}, str(path), {"fewstep": json.dumps({"format": "fewstep-mnist-features-1"})}
    )
    with pytest.raises(InputError, match="do not fit the classifier"):
        mnist_teacher.features(path)


class Stopped(Exception):
    pass


def test_a_run_resumed_is_a_run_never_stopped(tmp_path):
    pytest.importorskip("diffusers")
    small = {"channels": [8, 8], "layers": 1, "groups": 4, "head": 8}
    data, labels = images(8).clamp(-1, 1), torch.arange(8)
    at = tmp_path / "run"

    class Stops:
        """Images that end the run at the fourth look."""

        looks = 0

        def __len__(self):
            return len(data)

        def __getitem__(self, which):
            self.looks += 1
            if self.looks == 4:
                raise Stopped
            return data[which]

    def fit(images, resume=False):
        net = fs.learned.training.seeded(0, lambda: mnist_teacher.unet(**small))
        mnist_teacher.fit(net, images, labels, 4, 0, at, resume, batch=2, every=2)
        return net

    whole = fit(data)
    at.unlink()
    with pytest.raises(Stopped):
        fit(Stops())
    again = fit(data, resume=True)
    for (k, p), q in zip(whole.named_parameters(), again.parameters()):
        assert torch.equal(p, q), k
    assert not list(tmp_path.glob("*.part"))
    at.write_bytes(at.read_bytes()[:1000])
    with pytest.raises(InputError, match="not a whole"):
        fit(data, resume=True)
