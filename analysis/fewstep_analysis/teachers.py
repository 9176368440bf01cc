"""Small diffusion teachers: shipped as safetensors, made again from scratch by `fewstep train-teacher`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep import EDM, DiffusionModel, _serialization, _validation
from fewstep.errors import InputError
from fewstep.learned import training
from fewstep.learned.sigdeg.networks import DenoisingMLP
from fewstep.learned.training import Minibatch, seeded

from . import datasets
from .shipped import write_half

WEIGHTS = Path(__file__).parent / "weights"
FORMAT = "fewstep-teacher-1"
DIGITS = EDM(sigma_min=0.05, sigma_max=20.0)
ITERATIONS = 18000


def digits(device: torch.device | str = "cpu") -> DiffusionModel:
    """The shipped denoiser of 8x8 handwritten digits, events (1, 8, 8) in [-1, 1], sigma in [0.05, 20].

    Args:
        device: where its weights are put, and samples must be.
    """
    return DiffusionModel(load(WEIGHTS / "digits.safetensors").to(_validation.check_device(device)), DIGITS)


def load(path: str | Path) -> DenoisingMLP:
    """A teacher from its file."""
    meta, weights = _serialization.read(path, (FORMAT,))
    _serialization.check_weights(path, weights)
    weights = {k: v.float() for k, v in weights.items()}
    try:
        network = _serialization.build_network(str(path), "DenoisingMLP", meta.get("config"), weights)
        network.load_state_dict(weights)
    except (RuntimeError, ArithmeticError, *_serialization.DAMAGE) as error:
        raise InputError(f"path: {path} is damaged or of another version ({error}).") from error
    assert isinstance(network, DenoisingMLP)
    return network.eval().requires_grad_(False)


def save(network: DenoisingMLP, path: str | Path) -> Path:
    """Write a teacher, in half precision."""
    return write_half(path, {"format": FORMAT, "config": network.config}, network)


def mnist(label: int | Tensor | None = None, guidance: float = 1.0) -> DiffusionModel:
    """The shipped denoiser of MNIST, events (1, 28, 28) in [-1, 1]; see `mnist_teacher.problem`."""
    from . import mnist_teacher

    return mnist_teacher.problem(label, guidance)


def train(
    name: str, path: str | Path, *, seed: int = 0, device: torch.device | str = "cpu", **options: Any
) -> Path:  # fmt: skip
    """Train the named teacher from scratch and write it.

    Args:
        device: where; minibatches and noise are drawn on the CPU, dropout there.
        options: `iterations` for digits; for mnist and mnist-features those of `mnist_teacher.train` and
            `mnist_teacher.train_features`.
    """
    from . import mnist_teacher

    recipes: dict[str, Callable[..., Path]] = {
        "digits": lambda path, seed, device, iterations=ITERATIONS: save(
            _train_digits(seed, iterations, device), path
        ),
        "mnist": mnist_teacher.train,
        "mnist-features": mnist_teacher.train_features,
    }
    if not isinstance(name, str) or name not in recipes:
        raise InputError(f"name: got {name!r}, expected one of {', '.join(recipes)}.")
    place = _validation.check_path(path)
    if not place.resolve().parent.is_dir() or place.is_dir():  # before the training, not after it
        raise InputError(f"path: got {path}, expected a file in a folder that exists; make it first.")
    return recipes[name](
        place, seed=_validation.check_seed(seed), device=_validation.check_device(device), **options
    )


def _train_digits(seed: int, iterations: int, device: torch.device | str) -> DenoisingMLP:
    data = datasets.digits()[0].to(device)
    build: Any = lambda: DenoisingMLP((1, 8, 8), width=256, depth=3, dropout=0.15)  # noqa: E731
    return fit_denoiser(seeded(seed, build), data, DIGITS, iterations, seed)


def fit_denoiser(
    network: Any,
    data: Tensor,
    schedule: EDM,
    iterations: int,
    seed: int,
    batch: int = 256,
    rate: float = 2e-3,
) -> Any:
    """DiffusionModel score matching with EDM's weight (arXiv 2206.00364, Eq. 8) and averaged weights.

    It trains where the data are.
    """
    network.to(data.device)

    def loss(some: Minibatch) -> Tensor:
        x0, generator = data[some.index.to(data.device)], some.generator
        sigma = torch.exp(-0.5 + 1.2 * torch.randn(len(x0), generator=generator)).to(data.device)
        sigma = sigma.clamp(schedule.sigma_min / 2, 2 * schedule.sigma_max)
        s = sigma.reshape(-1, *[1] * (x0.dim() - 1))
        x = x0 + s * torch.randn(x0.shape, generator=generator).to(data.device)
        weight = (s.square() + network.data_std**2) / (s * network.data_std) ** 2
        return (weight * (network(x, sigma) - x0).square()).mean()

    training.fit(
        network, loss, len(data), iterations=iterations, batch=batch, rate=rate, seed=seed, progress=True,
        average=0.999, weight_decay=0.01,
    )  # fmt: skip
    return network.eval()
