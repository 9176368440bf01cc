"""The reader of MNIST on small files of its format, and training that resumes."""

import gzip
import hashlib
import struct

import pytest
import torch

import mnist_data
import train_teachers
from fewstep import InputError
from fewstep.learned.training import seeded
from fewstep_analysis import teachers

NAMES = [*mnist_data.FILES]


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
        table[name] = (mnist_data.FILES[name][0], hashlib.md5(content).hexdigest())
    monkeypatch.setattr(mnist_data, "FILES", table)
    monkeypatch.delenv("FEWSTEP_DATA", raising=False)
    return tmp_path


def test_reader_returns_scaled_images_and_labels(folder, monkeypatch):
    train, labels, test, test_labels = mnist_data.mnist(folder)
    assert train.shape == (3, 1, 28, 28)
    assert train.dtype == torch.float32
    assert torch.equal(train.flatten()[:256], torch.arange(256) / 127.5 - 1)
    assert test.shape == (2, 1, 28, 28)
    assert (test == 1).all()
    assert labels.tolist() == [5, 0, 4]
    assert test_labels.tolist() == [7, 2]
    for by in (folder, folder / "mnist"):  # the folder, or the one that holds it
        monkeypatch.setenv("FEWSTEP_DATA", str(by))
        assert torch.equal(mnist_data.mnist()[0], train)


def test_reader_rejects_missing_folder(folder):
    with pytest.raises(InputError, match="FEWSTEP_DATA"):
        mnist_data.mnist()
    with pytest.raises(InputError, match=r"train-images-idx3-ubyte\.gz does not exist"):
        mnist_data.mnist(folder / "nowhere")


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
def test_reader_rejects_damaged_files(folder, damage, name):
    DAMAGED[damage](folder / "mnist" / f"{name}.gz")
    with pytest.raises(InputError, match=name):
        mnist_data.mnist(folder)


def test_reader_rejects_different_numbers_of_images_and_labels(folder, monkeypatch):
    raw = idx(0x801, (1,), b"\3")
    (folder / "mnist" / f"{NAMES[1]}.gz").write_bytes(gzip.compress(raw))
    monkeypatch.setitem(mnist_data.FILES, NAMES[1], (0x801, hashlib.md5(raw).hexdigest()))
    with pytest.raises(InputError, match="3 images for 1 labels"):
        mnist_data.mnist(folder)


class Stopped(Exception):
    pass


def test_resumed_training_equals_uninterrupted_training(tmp_path):
    pytest.importorskip("diffusers")
    small = {"channels": [8, 8], "layers": 1, "groups": 4, "head": 8}
    data = torch.randn(8, 1, 28, 28, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    labels = torch.arange(8)
    at = tmp_path / "run"

    class Stops:
        """Images that stop the run at the fourth minibatch."""

        looks = 0

        def __len__(self):
            return len(data)

        def __getitem__(self, which):
            self.looks += 1
            if self.looks == 4:
                raise Stopped
            return data[which]

    def fit(images, resume=False):
        net = seeded(0, lambda: teachers.mnist_unet(**small))
        train_teachers.fit_mnist(net, images, labels, 4, 0, at, resume, batch=2, every=2)
        return net

    full = fit(data)
    at.unlink()
    with pytest.raises(Stopped):
        fit(Stops())
    again = fit(data, resume=True)
    for (k, p), q in zip(full.named_parameters(), again.parameters()):
        assert torch.equal(p, q), k
    assert not list(tmp_path.glob("*.part"))
    at.write_bytes(at.read_bytes()[:1000])
    with pytest.raises(InputError, match="path: "):
        fit(data, resume=True)


def test_normalise_scales_features_and_keeps_logits():
    net = seeded(0, teachers.MNISTFeatures)
    x = torch.randn(30, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    before = net.logits(x)
    train_teachers.normalise(net, x)
    assert net(x).square().mean().item() == pytest.approx(1, rel=1e-5)
    assert torch.allclose(net.logits(x), before, atol=1e-5)
