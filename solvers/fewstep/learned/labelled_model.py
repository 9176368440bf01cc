"""A diffusion model, or a family of them with one label per sample."""

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


@dataclass(frozen=True)
class Model:
    """A diffusion model, or a family of them with one label a sample."""

    problem: DiffusionModel | Labelled
    labels: Tensor | None

    @classmethod
    def of(cls, problem: DiffusionModel | Labelled, labels: Tensor | None, noise: Tensor) -> Model:
        """Refuse a model and labels that do not belong together."""
        if not torch.is_tensor(noise) or not noise.is_floating_point() or noise.dim() < 2:
            came = f"{noise.dtype} {tuple(noise.shape)}" if torch.is_tensor(noise) else type(noise).__name__
            raise InputError(f"noise: got {came}, expected a floating-point tensor (n, *event).")
        single = isinstance(problem, DiffusionModel)
        if not single and (labels is None or not callable(problem)):
            raise InputError(
                f"problem: got {_validation.describe(problem)} and no labels, expected fewstep.DiffusionModel(denoiser, "
                "schedule), or a function labels -> DiffusionModel with labels=(n, ...)."
            )
        if single and labels is not None:
            raise InputError(
                "labels: got some beside a DiffusionModel; expected a DiffusionModel without labels, or a function "
                "labels -> DiffusionModel with labels=(n, ...)."
            )
        if labels is not None and (
            not torch.is_tensor(labels) or labels.dim() == 0 or len(labels) != len(noise)
        ):
            came = f"shape {tuple(labels.shape)}" if torch.is_tensor(labels) else type(labels).__name__
            raise InputError(f"labels: got {came}, expected a tensor with one label for each of the "
                             f"{len(noise)} start states.")  # fmt: skip
        if labels is not None and not isinstance(problem(labels[:1]), DiffusionModel):  # type: ignore[operator]
            raise InputError(
                "problem: got a function that makes no DiffusionModel of labels, expected one that does."
            )
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
