"""Train the shipped teachers again: the denoisers of 8x8 digits and MNIST, and the classifier of MNIST.

    python analysis/experiments/train_teachers.py digits --out digits.safetensors
    python analysis/experiments/train_teachers.py mnist --data data/mnist --out mnist.safetensors --resume

digits and mnist-features take minutes on one core, mnist 45 minutes.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep import EDM, InputError
from fewstep._progress import progress
from fewstep.learned import training
from fewstep.learned.sigdeg.networks import DenoisingMLP
from fewstep.learned.training import Minibatch, TrainingOptions, seeded, warmup_cosine
from fewstep_analysis import datasets, teachers
from mnist_data import mnist

DIGITS_ITERATIONS = 18000
# 45 minutes of one free core (Zen 4); see _mnist_loss for the precision of the last part. The shipped
# weights had 3,850 iterations: the core was busy, so the run was resumed with fewer three times.
MNIST_ITERATIONS, MNIST_BATCH, FULL_PRECISION_SHARE = 5000, 64, 0.1


def train_digits(
    path: str | Path,
    *,
    seed: int = 0,
    iterations: int = DIGITS_ITERATIONS,
    device: torch.device | str = "cpu",
) -> Path:
    """Train the denoiser of 8x8 digits from scratch and write its averaged weights."""
    data = datasets.digits()[0].to(device)
    network = seeded(seed, lambda: DenoisingMLP((1, 8, 8), width=256, depth=3, dropout=0.15))
    return teachers.save(fit_denoiser(network, data, teachers.DIGITS, iterations, seed), path)


def fit_denoiser(
    network: Any,
    data: Tensor,
    schedule: EDM,
    iterations: int,
    seed: int,
    batch: int = 256,
    rate: float = 2e-3,
) -> Any:
    """Denoising score matching with EDM's weight (arXiv 2206.00364, Eq. 8); returns the averaged network.

    Training runs on the device of the data.
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

    options = TrainingOptions(iterations, batch, rate, ema_decay=0.999, weight_decay=0.01)
    training.fit(network, loss, len(data), options, seed=seed, progress=True)
    return network.eval()


def train_mnist(
    path: str | Path, data: str | Path | None = None, *, seed: int = 0,
    device: torch.device | str = "cpu", iterations: int = MNIST_ITERATIONS, resume: bool = False,
) -> Path:  # fmt: skip
    """Train the U-Net of MNIST from scratch and write its averaged weights.

    Args:
        data: the folder of MNIST; see `mnist_data.mnist`.
        resume: continue from the checkpoint, `path` + ".training", which is written every 250 iterations
            (two minutes). On one device the result is bitwise that of an uninterrupted run.
    """
    images, labels, _, _ = mnist(data)
    net = seeded(seed, lambda: teachers.mnist_unet(**teachers.MNIST_CONFIG)).to(device)
    fit_mnist(net, images.to(device), labels.to(device), iterations, seed, Path(f"{path}.training"), resume)
    meta = {"format": teachers.MNIST_FORMAT, "config": teachers.MNIST_CONFIG}
    return teachers.write_half(path, meta | {"schedule": teachers.MNIST_SCHEDULE}, net)


def fit_mnist(
    net: Any, images: Tensor, labels: Tensor, iterations: int, seed: int, checkpoint: Path,
    resume: bool = False, batch: int = MNIST_BATCH, rate: float = 1e-3, every: int = 250,
) -> None:  # fmt: skip
    """Train the network in place; it ends with the averaged weights.

    Args:
        images, labels: (n, 1, 28, 28) in [-1, 1] and (n,), on the network's device.
    """
    if not resume:
        checkpoint.unlink(missing_ok=True)
    elif not checkpoint.exists():
        raise InputError(f"checkpoint: {checkpoint} does not exist; leave out resume to start anew.")
    log_sigmas = teachers.mnist_schedule().log_sigmas
    abar = 1 / (1 + torch.exp(2 * log_sigmas)).float().to(labels.device)

    def loss(some: Minibatch) -> Tensor:
        index, fast = some.index.to(labels.device), some.share < 1 - FULL_PRECISION_SHARE
        return _mnist_loss(net, images[index], labels[index], abar, some.generator, fast)

    options = TrainingOptions(iterations, batch, rate, 0.999, 0.01, checkpoint_every=every)
    training.fit(net, loss, len(images), options, seed=seed, progress=True, checkpoint=checkpoint)


def _mnist_loss(net: Any, x0: Tensor, labels: Tensor, abar: Tensor, generator: torch.Generator, fast: bool) -> Tensor:
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
        out = net(x, t, class_labels=labels.masked_fill(drop, teachers.NO_CLASS)).sample
    weight = (5 * (1 - a) / a).clamp(0.1, 1)
    return (weight * (out.float() - noise).square()).mean()


def train_features(
    path: str | Path, data: str | Path | None = None, *, seed: int = 0, epochs: int = 5,
    device: torch.device | str = "cpu",
) -> Path:  # fmt: skip
    """Train the classifier on the training set (two minutes of one core) and write it."""
    images, labels, _, _ = mnist(data)
    images, labels = images.to(device), labels.to(device)
    net, generator = seeded(seed, teachers.MNISTFeatures).to(device), torch.Generator().manual_seed(seed)
    assert isinstance(net, teachers.MNISTFeatures)
    optimiser = torch.optim.AdamW(net.parameters(), 2e-3, weight_decay=0.01)
    iterations = epochs * len(images) // 128
    for i in progress(range(iterations), "batch"):
        which = torch.randint(len(images), (128,), generator=generator).to(device)
        # one shift of up to two pixels per batch costs nothing and is worth 0.2 % of accuracy
        shift = torch.randint(-2, 3, (2,), generator=generator).tolist()
        out = net.logits(images[which].roll(shift, (2, 3)))
        loss = torch.nn.functional.cross_entropy(out, labels[which])
        optimiser.param_groups[0]["lr"] = 2e-3 * warmup_cosine(i, iterations)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
    normalise(net, images[:10000])
    return teachers.write_half(path, {"format": teachers.FEATURES_FORMAT}, net)


@torch.no_grad()
def normalise(net: teachers.MNISTFeatures, x: Tensor) -> None:
    """Divide the features by their root mean square on x, leaving the logits unchanged.

    A kernel distance adds 1 to the mean product of features, which should thus be of that size.
    """
    scale = torch.cat([net(part) for part in x.split(500)]).square().mean().sqrt()
    last = net.body[-2]
    assert isinstance(last, torch.nn.Linear)
    for p in (last.weight, last.bias):
        p.div_(scale)
    net.head.weight.mul_(scale)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("name", choices=("digits", "mnist", "mnist-features"))
    parser.add_argument("--out", type=Path, help="file of the weights (default: NAME.safetensors)")
    parser.add_argument("--data", type=Path, help="folder of MNIST's four files (default: $FEWSTEP_DATA)")
    parser.add_argument("--resume", action="store_true", help="mnist: continue from OUT.training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    out = given.out or Path(f"{given.name}.safetensors")
    if given.name == "digits":
        train_digits(out, seed=given.seed, device=given.device)
    elif given.name == "mnist":
        train_mnist(out, given.data, seed=given.seed, device=given.device, resume=given.resume)
    else:
        train_features(out, given.data, seed=given.seed, device=given.device)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
