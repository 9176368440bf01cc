"""Judges samples of the ten digits by MNIST: distances of features, class score, share of right classes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import images
from fewstep_analysis import teachers
from mnist_data import mnist


@dataclass(frozen=True)
class Judge:
    """The features of the training set, and the test set in the place of a perfect sampler.

    Attributes:
        net: the shipped classifier.
        real: (60000, 64) its features of the training set.
        test, classes: the test set.
    """

    net: teachers.MNISTFeatures
    real: Tensor
    test: Tensor
    classes: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, data: Path | None = None) -> Judge:
        """Read MNIST from this folder; by default FEWSTEP_DATA."""
        train, _, test, classes = mnist(data)
        net = teachers.mnist_features()
        return cls(net, torch.cat([net(x) for x in train.split(1000)]), test, classes)

    def digits(self, labels: Tensor, seed: int) -> Tensor:
        """Test digits of these classes, drawn without repetition."""
        order = torch.randperm(len(self.classes), generator=torch.Generator().manual_seed(seed))
        chosen = torch.empty_like(labels)
        for k in labels.unique():
            mine = labels == k
            chosen[mine] = order[self.classes[order] == k][: int(mine.sum())]
        return self.test[chosen]

    @torch.no_grad()
    def frechet(self, x: Tensor) -> float:
        """Fréchet distance of the features to those of the training set."""
        return images.frechet_distance(self.net(x), self.real)

    @torch.no_grad()
    def __call__(self, x: Tensor, labels: Tensor) -> dict[str, float]:
        """Fréchet and kernel distance to the training set, class score, and the share of right classes."""
        few = self.real[:: max(1, len(self.real) // 10000)]
        return {
            "frechet": self.frechet(x),
            "kernel": images.kernel_distance(self.net(x), few),
            "score": images.class_score(self.net.logits(x)),
            "right": float((self.net.logits(x).argmax(1) == labels).double().mean()),
        }
