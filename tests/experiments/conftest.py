"""Experiments are scripts that import each other as plain modules, with their folder on sys.path."""

import sys
from pathlib import Path

import pytest
import torch

EXPERIMENTS = Path(__file__).parents[2] / "analysis" / "experiments"
sys.path.insert(0, str(EXPERIMENTS))


@pytest.fixture
def run(tmp_path):
    """`run(script, **changes)`: an experiment at smoke budget; checks that all its files are written."""
    threads = torch.get_num_threads()

    def run(script, **changes):
        records = script.EXPERIMENT.run("smoke", tmp_path, changes=changes)
        assert all((tmp_path / "records" / f"{name}.json").exists() for name in records)
        assert all((tmp_path / "figures" / name).exists() for name in script.EXPERIMENT.figures)
        assert all("| --- |" in text or text.endswith(".") for text in script.EXPERIMENT.tables(records).values())
        return records

    yield run
    torch.set_num_threads(threads)


@pytest.fixture
def any_network(monkeypatch):
    """A small U-Net with random weights in place of the MNIST teacher, and random images as data."""
    pytest.importorskip("diffusers")
    import mnist_data
    import mnist_judge
    import sfddm_mnist
    from fewstep_analysis import teachers

    torch.manual_seed(0)
    net = teachers.mnist_unet([16, 16, 16], 1, 8, 8).eval().requires_grad_(False)
    monkeypatch.setattr(teachers, "mnist_network", lambda *a: net)
    images = torch.rand(400, 1, 28, 28, generator=torch.Generator().manual_seed(0)) * 2 - 1
    labels = torch.arange(400) % 10
    for module in (mnist_data, mnist_judge, sfddm_mnist):
        monkeypatch.setattr(module, "mnist", lambda *a: (images, labels, images, labels))
