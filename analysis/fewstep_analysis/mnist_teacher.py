"""The MNIST teacher: a small class-conditional U-Net (diffusers) trained to predict noise.

Label 10 means "no class": it stands in for a tenth of the labels in training, so that one network serves
unconditional, conditional and guided sampling (arXiv 2207.12598). The classifier whose features judge
samples (`images`) is here as well.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fewstep import (
    DiffusionModel,
    DiscreteVP,
    _serialization,
    _validation,
    classifier_free_guidance,
    from_epsilon,
)
from fewstep.errors import InputError
from fewstep.learned import training
from fewstep.learned.training import Minibatch, learning_rate, seeded
from fewstep.learned.unet_denoiser import unet_class

from . import datasets
from .shipped import write_half

if TYPE_CHECKING:
    from diffusers import UNet2DModel

FORMAT = "fewstep-mnist-unet-1"
FEATURES_FORMAT = "fewstep-mnist-features-1"
WEIGHTS = Path(__file__).parent / "weights" / "mnist_unet.safetensors"
FEATURES = Path(__file__).parent / "weights" / "mnist_features.safetensors"
SCHEDULE = {"name": "linear", "steps": 1024}
CONFIG: dict[str, Any] = {"channels": [32, 32, 64], "layers": 1, "groups": 8, "head": 16}
NO_CLASS = 10
# Three quarters of an hour of one free core (Zen 4); see _loss for what the last part is computed in. The
# shipped weights had 3,850 iterations: the core was busy, so the run was resumed with fewer three times.
ITERATIONS, BATCH, PRECISE = 5000, 64, 0.1


def schedule() -> DiscreteVP:
    """The process it is trained on: 1024 labels, linear betas from 1e-4 to 0.02."""
    return DiscreteVP.named(**SCHEDULE)


def problem(
    label: int | Tensor | None = None, guidance: float = 1.0, net: UNet2DModel | None = None
) -> DiffusionModel:
    """Samples of MNIST: events (1, 28, 28) in [-1, 1].

    Args:
        label: None for digits of any class; 0 .. 9 for one class; (batch,) for a class a sample.
        guidance: w in e_u + w (e_c - e_u): 0 is unconditional, 1 conditional; others run a batch of twice
            the size.
        net: the network where it is loaded already, or not on the CPU; by default `network()`.
    """
    labels = _checked(label, guidance)
    net = network() if net is None else net

    def model(x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        out: Tensor = net(x, t, class_labels=c).sample
        return out.float()  # under autocast it is in half precision

    def told(x: Tensor, t: Tensor) -> Tensor:
        if labels.dim() and len(labels) != len(x):
            raise InputError(f"label: got {len(labels)} labels for a batch of {len(x)}; give each its own.")
        c = labels.to(x.device).expand(len(x))
        if guidance == 1 or label is None:
            return model(x, t, c)
        none = torch.full_like(c, NO_CLASS)
        if guidance == 0:
            return model(x, t, none)
        return classifier_free_guidance(model, c, none, guidance)(x, t)

    process = schedule()
    return DiffusionModel(from_epsilon(told, process, dtype=torch.float32), process)


def _checked(label: int | Tensor | None, guidance: float) -> Tensor:
    """The labels, () or (batch,)."""
    _validation.check_float("guidance", guidance, expected="a finite number; 1 is none")
    if label is None:
        if guidance not in (0, 1):
            raise InputError(f"guidance: got {guidance} without a label; say which class to guide to.")
        return torch.tensor(NO_CLASS)
    try:
        labels = torch.as_tensor(label)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"label: got {label!r}, expected None, a digit, or a (batch,) tensor.") from error
    whole = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
    if not whole or labels.dim() > 1 or bool(((labels < 0) | (labels >= NO_CLASS)).any()):
        raise InputError(
            f"label: got {label!r}, expected None, a digit 0 .. 9, or a (batch,) tensor of them."
        )
    return labels.long()


def network(path: str | Path | None = None) -> UNet2DModel:
    """The shipped U-Net, or one that `train` wrote: float32, for inference.

    Call it as `net(x, t, class_labels=c).sample`; c is (batch,), 10 for no class.

    Raises:
        InputError: not such a file, or not whole; diffusers is not installed.
    """
    path = WEIGHTS if path is None else path
    meta, weights = _serialization.read(path, (FORMAT,))
    _serialization.check_weights(path, weights)
    try:
        net = _build(path, meta, {k: v.float() for k, v in weights.items()})
    except InputError:
        raise
    except (RuntimeError, ArithmeticError, *_serialization.DAMAGE) as error:
        raise InputError(f"path: {path} is damaged or of another version ({error}).") from error
    return net.eval().requires_grad_(False)


def _build(path: str | Path, meta: dict[str, Any], weights: dict[str, Tensor]) -> UNet2DModel:
    """A hostile header must not make us build a giant: shapes are compared where none is allocated."""
    config = meta["config"]
    fits = set(config) == set(CONFIG) and meta["schedule"] == SCHEDULE
    sizes = [*config["channels"], config["layers"], config["groups"], config["head"]] if fits else [0]
    limit = max(n for w in weights.values() for n in w.shape)
    if not all(type(n) is int and 0 < n <= limit for n in sizes) or (
        len(config["channels"]) * config["layers"] > len(weights) or config["head"] > config["channels"][-1]
    ):
        raise InputError(f"path: {path} has a config that does not fit its weights: {config}.")
    with torch.device("meta"):
        net = unet(**config)
    if {k: v.shape for k, v in net.state_dict().items()} != {k: v.shape for k, v in weights.items()}:
        raise InputError(f"path: the weights in {path} do not have the shapes of its config.")
    net.load_state_dict(weights, assign=True)
    return net


def unet(channels: list[int], layers: int, groups: int, head: int) -> UNet2DModel:
    """A U-Net for (batch, 1, 28, 28), attention on the coarsest grid only, ten classes and none."""
    above = len(channels) - 1
    return unet_class()(  # type: ignore[no-any-return]
        sample_size=28, in_channels=1, out_channels=1, num_class_embeds=NO_CLASS + 1, add_attention=False,
        block_out_channels=tuple(channels), layers_per_block=layers, norm_num_groups=groups,
        attention_head_dim=head, down_block_types=("DownBlock2D",) * above + ("AttnDownBlock2D",),
        up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * above,
    )  # fmt: skip


def train(
    path: str | Path = WEIGHTS, data: str | Path | None = None, *, seed: int = 0,
    device: torch.device | str = "cpu",
    iterations: int = ITERATIONS, checkpoint: str | Path | None = None, resume: bool = False,
) -> Path:  # fmt: skip
    """Train from scratch (45 minutes of one core) and write the averaged weights.

    Args:
        data: the folder of MNIST; see `datasets.mnist`.
        checkpoint: written every 250 iterations (two minutes); by default `path` + ".training".
        resume: go on from the checkpoint; on one device it ends with the bits of a run never stopped.
    """
    images, labels, _, _ = datasets.mnist(data)
    checkpoint = Path(checkpoint or f"{path}.training")
    net = seeded(seed, lambda: unet(**CONFIG)).to(device)
    fit(net, images.to(device), labels.to(device), iterations, seed, checkpoint, resume)
    return write_half(path, {"format": FORMAT, "config": CONFIG, "schedule": SCHEDULE}, net)


def fit(
    net: Any, images: Tensor, labels: Tensor, iterations: int, seed: int, checkpoint: Path,
    resume: bool = False, batch: int = BATCH, rate: float = 1e-3, every: int = 250,
) -> None:  # fmt: skip
    """Train in place; ends with the averaged weights.

    Args:
        images, labels: (n, 1, 28, 28) in [-1, 1] and (n,), on the network's device.
    """
    if not resume:
        checkpoint.unlink(missing_ok=True)
    elif not checkpoint.exists():
        raise InputError(f"checkpoint: {checkpoint} does not exist; leave resume out to begin.")
    abar = 1 / (1 + torch.exp(2 * schedule().log_sigmas)).float().to(labels.device)

    def loss(some: Minibatch) -> Tensor:
        index, fast = some.index.to(labels.device), some.share < 1 - PRECISE
        return _loss(net, images[index], labels[index], abar, some.generator, fast)

    training.fit(
        net, loss, len(images), iterations=iterations, batch=batch, rate=rate, seed=seed, progress=True,
        average=0.999, weight_decay=0.01, every=every, checkpoint=checkpoint,
    )  # fmt: skip


def _loss(
    net: Any, x0: Tensor, labels: Tensor, abar: Tensor, generator: torch.Generator, fast: bool
) -> Tensor:
    """Mean squared error of the noise, weighted by min-SNR (arXiv 2303.09556), at least by 0.1.

    `fast` computes in bfloat16, which takes 0.6 of the time. Its 8 bits blur noise of size 0.01 on a
    background of -1, hence the last part of training does not use it.
    """
    n, device = len(x0), x0.device
    t = torch.randint(len(abar), (n,), generator=generator).to(device)
    drop = (torch.rand(n, generator=generator) < 0.1).to(device)
    noise = torch.randn(x0.shape, generator=generator).to(device)
    a = abar[t].reshape(-1, 1, 1, 1)
    x = a.sqrt() * x0 + (1 - a).sqrt() * noise
    with torch.autocast(device.type, torch.bfloat16, enabled=fast):
        out = net(x, t, class_labels=labels.masked_fill(drop, NO_CLASS)).sample
    weight = (5 * (1 - a) / a).clamp(0.1, 1)
    return (weight * (out.float() - noise).square()).mean()


class Features(nn.Module):
    """A classifier of (n, 1, 28, 28) images in [-1, 1]; its 64 features before the last layer, (n, 64)."""

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
        """(n, 10)"""
        out: Tensor = self.head(self(x))
        return out

    @torch.no_grad()
    def normalise(self, x: Tensor) -> None:
        """Divide the features by their root mean square on x; the logits stay as they are.

        A kernel distance adds 1 to the mean product of features, which should thus be of that size.
        """
        scale = torch.cat([self(part) for part in x.split(500)]).square().mean().sqrt()
        last = self.body[-2]
        assert isinstance(last, nn.Linear)
        for p in (last.weight, last.bias):
            p.div_(scale)
        self.head.weight.mul_(scale)


def features(path: str | Path | None = None) -> Features:
    """The shipped classifier, or one that `train_features` wrote: float32, for inference."""
    path = FEATURES if path is None else path
    _, weights = _serialization.read(path, (FEATURES_FORMAT,))
    with torch.device("meta"):
        net = Features()
    try:
        net.load_state_dict({k: v.float() for k, v in weights.items()}, assign=True)
    except RuntimeError as error:
        raise InputError(f"path: the weights in {path} do not fit the classifier: {error}") from error
    return net.eval().requires_grad_(False)


def train_features(
    path: str | Path = FEATURES, data: str | Path | None = None, *, seed: int = 0, epochs: int = 5,
    device: torch.device | str = "cpu",
) -> Path:  # fmt: skip
    """Train the classifier on the training set (two minutes of one core) and write it."""
    from tqdm import trange

    images, labels, _, _ = datasets.mnist(data)
    images, labels = images.to(device), labels.to(device)
    net, generator = seeded(seed, Features).to(device), torch.Generator().manual_seed(seed)
    assert isinstance(net, Features)
    optimiser = torch.optim.AdamW(net.parameters(), 2e-3, weight_decay=0.01)
    iterations = epochs * len(images) // 128
    for i in trange(iterations, desc="classifier", disable=None):
        which = torch.randint(len(images), (128,), generator=generator).to(device)
        # shifts of up to two pixels, the same for a batch: they cost nothing and are worth 0.2 %
        shift = torch.randint(-2, 3, (2,), generator=generator).tolist()
        out = net.logits(images[which].roll(shift, (2, 3)))
        loss = torch.nn.functional.cross_entropy(out, labels[which])
        optimiser.param_groups[0]["lr"] = 2e-3 * learning_rate(i, iterations)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
    net.normalise(images[:10000])
    return write_half(path, {"format": FEATURES_FORMAT}, net)
