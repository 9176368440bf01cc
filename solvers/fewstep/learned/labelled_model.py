"""A diffusion model, or a family of diffusion models with one label per sample."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import _validation
from ..errors import InputError
from ..problem import DiffusionModel
from ..schedule import Schedule

Labelled = Callable[[Tensor], DiffusionModel]
"""`labels -> DiffusionModel`, whose denoiser holds one label per sample."""


@dataclass(frozen=True)
class Model:
    """A model, and the labels (n, ...) of n start states if it takes labels."""

    problem: DiffusionModel | Labelled
    labels: Tensor | None

    @classmethod
    def of(cls, problem: DiffusionModel | Labelled, labels: Tensor | None, noise: Tensor) -> Model:
        """A checked model; InputError for noise that is not (n, *event), or labels that do not belong to the model."""
        if not torch.is_tensor(noise) or not noise.is_floating_point() or noise.dim() < 2 or 0 in noise.shape[1:]:
            given = _validation.describe(noise)
            raise InputError(f"noise: got {given}, expected a floating-point tensor (n, *event), no event size 0.")
        expected = "expected fewstep.DiffusionModel, or a function labels -> DiffusionModel with labels=(n, ...)."
        if isinstance(problem, DiffusionModel):
            if labels is not None:
                raise InputError(f"labels: got labels for a DiffusionModel, which takes none; {expected}")
            return cls(problem, None)
        if labels is None or not callable(problem):
            raise InputError(f"problem: got {_validation.describe(problem)} and no labels, {expected}")
        if not torch.is_tensor(labels) or labels.dim() == 0 or len(labels) != len(noise):
            given = _validation.describe(labels)
            raise InputError(
                f"labels: got {given}, expected a tensor, one label for each of {len(noise)} start states."
            )
        if not isinstance(problem(labels[:1]), DiffusionModel):
            raise InputError(f"problem: got a function that returns no DiffusionModel, {expected}")
        return cls(problem, labels if noise.is_meta else labels.to(noise.device))

    def at(self, index: Tensor) -> DiffusionModel:
        """The model that holds the labels of these start states."""
        if isinstance(self.problem, DiffusionModel):
            return self.problem
        assert self.labels is not None
        return self.problem(self.labels[index.to(self.labels.device)])

    @property
    def schedule(self) -> Schedule:
        return self.at(torch.zeros(1, dtype=torch.long)).schedule
