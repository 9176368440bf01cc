"""The MNIST study of Sig-DEG, whole and tiny; MNIST itself is not needed."""

import pytest
import torch

pytest.importorskip("diffusers")
from experiments import sigdeg_mnist
from fewstep_analysis import datasets

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def pretended(monkeypatch):
    """Blobs in place of digits, in as many classes."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(300, 1, 28, 28, generator=generator) * 2 - 1
    monkeypatch.setattr(datasets, "mnist", lambda data: (images, torch.arange(300) % 10) * 2)


def test_the_levels_nest():
    levels = sigdeg_mnist.levels()
    assert len(levels) == 21
    assert (levels.diff() < 0).all()
    torch.testing.assert_close(levels[2:-2:2], torch.tensor(sigdeg_mnist.TEN, dtype=torch.float64))
    assert all(len(kept) == n + 1 for n, kept in sigdeg_mnist.KEPT.items())


@pytest.mark.slow
def test_it_runs_and_goes_on_where_it_was_stopped(pretended, tmp_path, monkeypatch):
    lines = sigdeg_mnist.run(tmp_path, budget="smoke")
    assert len(lines) == 2 + 3 * 3
    for name in ("records/sigdeg-mnist.json", "figures/sigdeg-mnist.svg", "figures/sigdeg-mnist.png"):
        assert (tmp_path / name).stat().st_size > 1000
    # all is done: nothing of it is done again
    monkeypatch.setattr("fewstep.learned.trajectories._Maker.block", None)
    monkeypatch.setattr("fewstep.learned.training.Training.step", None)
    monkeypatch.setattr(sigdeg_mnist, "distances", lambda *_: [])
    record, _ = sigdeg_mnist.study("smoke", 0, "cpu", tmp_path / "work" / "sigdeg-mnist-smoke")
    assert record.data["trajectories"] == 32
