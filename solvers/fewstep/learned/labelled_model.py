"""A diffusion model, or a family of diffusion models with one label per sample."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

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
        """A checked model.

        Raises:
            InputError: noise that is not (n, *event), or a model and labels that do not belong together.
        """
        if not torch.is_tensor(noise) or not noise.is_floating_point() or noise.dim() < 2:
            given = f"{noise.dtype} {tuple(noise.shape)}" if torch.is_tensor(noise) else type(noise).__name__
            raise InputError(f"noise: got {given}, expected a floating-point tensor (n, *event).")
        expected = (
            "expected fewstep.DiffusionModel(denoiser, schedule), or a function labels -> DiffusionModel "
            "with labels=(n, ...)."
        )
        if isinstance(problem, DiffusionModel):
            if labels is not None:
                raise InputError(f"labels: got labels for a DiffusionModel, which takes none; {expected}")
            return cls(problem, None)
        if labels is None or not callable(problem):
            raise InputError(f"problem: got {_validation.describe(problem)} and no labels, {expected}")
        if not torch.is_tensor(labels) or labels.dim() == 0 or len(labels) != len(noise):
            shape: Any = f"shape {tuple(labels.shape)}" if torch.is_tensor(labels) else type(labels).__name__
            raise InputError(
                f"labels: got {shape}, expected a tensor with one label for each of the {len(noise)} start states."
            )
        if not isinstance(problem(labels[:1]), DiffusionModel):
            raise InputError(f"problem: got a function that returns no DiffusionModel, {expected}")
        return cls(problem, labels)

    def at(self, index: Tensor) -> DiffusionModel:
        """The model that holds the labels of these start states."""
        if isinstance(self.problem, DiffusionModel):
            return self.problem
        assert self.labels is not None
        return self.problem(self.labels[index.to(self.labels.device)])

    @property
    def schedule(self) -> Schedule:
        return self.at(torch.zeros(1, dtype=torch.long)).schedule
