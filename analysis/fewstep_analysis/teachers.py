"""The small diffusion teachers shipped with the package: 8x8 digits, MNIST, and a classifier of MNIST.

`analysis/experiments/train_teachers.py` trains each of them again.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from fewstep import (
    EDM,
    DiffusionModel,
    DiscreteVP,
    InputError,
    _serialization,
    _validation,
    classifier_free_guidance,
    from_epsilon,
)
from fewstep.learned import loading
from fewstep.learned.sigdeg.networks import DenoisingMLP
from fewstep.learned.unet_denoiser import unet_class

if TYPE_CHECKING:
    from diffusers import UNet2DModel

T = TypeVar("T", bound=nn.Module)

WEIGHTS = Path(__file__).parent / "weights"
DIGITS_FORMAT = "fewstep-teacher-1"
MNIST_FORMAT = "fewstep-mnist-unet-1"
FEATURES_FORMAT = "fewstep-mnist-features-1"
DIGITS = EDM(sigma_min=0.05, sigma_max=20.0)
MNIST_SCHEDULE: dict[str, Any] = {"name": "linear", "steps": 1024}
MNIST_CONFIG: dict[str, Any] = {"channels": [32, 32, 64], "layers": 1, "groups": 8, "head": 16}
NO_CLASS = 10


def digits(device: torch.device | str = "cpu") -> DiffusionModel:
    """The shipped denoiser of 8x8 handwritten digits: events (1, 8, 8) in [-1, 1], sigma in [0.05, 20].

    Args:
        device: where the weights are put and where samples must be.
    """
    return DiffusionModel(load(WEIGHTS / "digits.safetensors").to(_validation.check_device(device)), DIGITS)


def load(path: str | Path) -> DenoisingMLP:
    """A denoiser written by `save`, as a float32 network for inference."""

    def build(meta: dict[str, Any], weights: dict[str, Tensor]) -> DenoisingMLP:
        network = loading.build_network(str(path), "DenoisingMLP", meta.get("config"), weights)
        assert isinstance(network, DenoisingMLP)
        return network

    return _load(path, DIGITS_FORMAT, build)


def save(network: DenoisingMLP, path: str | Path) -> Path:
    """Write a denoiser in half precision."""
    _validation.check_instance("network", network, DenoisingMLP, "a DenoisingMLP")
    return write_half(path, {"format": DIGITS_FORMAT, "config": network.config}, network)


def write_half(path: str | Path, meta: dict[str, Any], network: nn.Module) -> Path:
    """Write a network in half precision, which halves the size of the package; it is read as float32."""
    _serialization.write(path, meta, {k: v.half() for k, v in network.state_dict().items()})
    return Path(path)


def _load(path: str | Path, expected: str, build: Callable[[dict[str, Any], dict[str, Tensor]], T]) -> T:
    """A network that `write_half` wrote, in float32 for inference; `build` makes it from metadata and weights."""
    meta, weights = _serialization.read(path, (expected,))
    loading.check_weights(path, weights)
    try:
        network = build(meta, weights)
        # meta tensors are replaced; shapes that differ raise before memory is allocated
        network.load_state_dict({k: v.float() for k, v in weights.items()}, assign=True)
    except InputError:
        raise
    except (RuntimeError, ArithmeticError, *_serialization.DAMAGE) as error:
        raise InputError(f"path: {path} is damaged or of another version ({error}).") from error
    return network.eval().requires_grad_(False)


def mnist_schedule() -> DiscreteVP:
    """The schedule of the MNIST teacher: 1,024 labels, linear betas from 1e-4 to 0.02."""
    return DiscreteVP.named(**MNIST_SCHEDULE)


def mnist(label: int | Tensor | None = None, guidance: float = 1.0, net: UNet2DModel | None = None) -> DiffusionModel:
    """The shipped denoiser of MNIST: a class-conditional U-Net (diffusers) that predicts noise.

    Events are (1, 28, 28) in [-1, 1]. One network serves unconditional, conditional and guided sampling, since a
    tenth of the labels were replaced by "no class" in training (arXiv 2207.12598).

    Args:
        label: None for digits of any class, 0 ... 9 for one class, (batch,) for one class per sample.
        guidance: w in e_u + w (e_c - e_u). 0 is unconditional and 1 conditional; other values evaluate a batch of
            twice the size.
        net: the network where it is loaded already or not on the CPU; by default `mnist_network()`.
    """
    labels = _check_labels(label, guidance)
    number = 0 if labels.dim() else int(labels)
    net = mnist_network() if net is None else net

    def model(x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        out: Tensor = net(x, t, class_labels=c).sample
        return out.float()  # half precision under autocast

    def labelled(x: Tensor, t: Tensor) -> Tensor:
        if labels.dim() and len(labels) != len(x):
            raise InputError(f"label: got {len(labels)} labels for a batch of {len(x)}, expected one per sample.")
        # a number is not copied to the device in each evaluation
        c = labels.to(x.device) if labels.dim() else torch.full((len(x),), number, device=x.device)
        if guidance == 1 or label is None:
            return model(x, t, c)
        none = torch.full_like(c, NO_CLASS)
        if guidance == 0:
            return model(x, t, none)
        return classifier_free_guidance(model, c, none, guidance)(x, t)

    schedule = mnist_schedule()
    return DiffusionModel(from_epsilon(labelled, schedule, dtype=torch.float32), schedule)


def _check_labels(label: int | Tensor | None, guidance: float) -> Tensor:
    """The labels, () or (batch,)."""
    guidance = _validation.check_float("guidance", guidance, expected="a finite number; 1 is no guidance")
    if label is None:
        if guidance not in (0, 1):
            raise InputError(f"guidance: got {guidance} without a label, expected 0 or 1; pass label= to use guidance.")
        return torch.tensor(NO_CLASS)
    expected = "None, a digit 0 ... 9, or a (batch,) tensor of them"
    try:
        labels = torch.as_tensor(label)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"label: got {label!r}, expected {expected}.") from error
    integers = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
    if not integers or labels.dim() > 1 or bool(((labels < 0) | (labels >= NO_CLASS)).any()):
        raise InputError(f"label: got {label!r}, expected {expected}.")
    return labels.long()


def mnist_network(path: str | Path | None = None) -> UNet2DModel:
    """The shipped U-Net of MNIST, or one trained again: float32, for inference.

    Call it as `net(x, t, class_labels=c).sample` with c (batch,); 10 is no class.

    Raises:
        InputError: the file is damaged or of another kind, or diffusers is not installed.
    """
    return _load(WEIGHTS / "mnist_unet.safetensors" if path is None else path, MNIST_FORMAT, _build)


def _build(meta: dict[str, Any], weights: dict[str, Tensor]) -> UNet2DModel:
    """The network of a file, which is not trusted: no size may exceed those of the weights."""
    config = meta["config"]
    known = set(config) == set(MNIST_CONFIG) and meta["schedule"] == MNIST_SCHEDULE
    sizes = [*config["channels"], config["layers"], config["groups"], config["head"]] if known else [0]
    limit = max(n for w in weights.values() for n in w.shape)
    if not all(type(n) is int and 0 < n <= limit for n in sizes) or (
        len(config["channels"]) * config["layers"] > len(weights) or config["head"] > config["channels"][-1]
    ):
        raise ValueError(f"the config does not fit the weights: {config}")
    with torch.device("meta"):
        return mnist_unet(**config)


def mnist_unet(channels: list[int], layers: int, groups: int, head: int) -> UNet2DModel:
    """An untrained U-Net for (batch, 1, 28, 28): attention on the coarsest grid, ten classes and none."""
    above = len(channels) - 1
    return unet_class()(
        sample_size=28, in_channels=1, out_channels=1, num_class_embeds=NO_CLASS + 1, add_attention=False,
        block_out_channels=tuple(channels), layers_per_block=layers, norm_num_groups=groups, attention_head_dim=head,
        down_block_types=("DownBlock2D",) * above + ("AttnDownBlock2D",),
        up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * above,
    )  # fmt: skip


class MNISTFeatures(nn.Module):
    """A classifier of (n, 1, 28, 28) images in [-1, 1]; calling it returns 64 features, (n, 64)."""

    def __init__(self) -> None:
        super().__init__()
        self.body: nn.Sequential = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(64, 48, 3, padding=1), nn.ReLU(), nn.Flatten(),
            nn.Linear(48 * 7 * 7, 64), nn.ReLU(),
        )  # fmt: skip
        self.head: nn.Linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x)
        return out

    def logits(self, x: Tensor) -> Tensor:
        """Class scores, (n, 10)."""
        out: Tensor = self.head(self(x))
        return out


def mnist_features(path: str | Path | None = None) -> MNISTFeatures:
    """The shipped classifier of MNIST, or one trained again: float32, for inference."""

    def build(meta: dict[str, Any], weights: dict[str, Tensor]) -> MNISTFeatures:
        with torch.device("meta"):
            return MNISTFeatures()

    return _load(WEIGHTS / "mnist_features.safetensors" if path is None else path, FEATURES_FORMAT, build)
