"""What class-conditional students share: labels given to the student, and told to its network."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..errors import InputError

S = TypeVar("S")


def with_labels(student: S, network: nn.Module, labels: Any) -> S:
    """The same student for samples of these classes; InputError if its network takes none."""
    if not getattr(network, "labelled", False):
        raise InputError(
            "labels: got some for a student whose network takes none. Where the model is a function of "
            "labels, it is the model that is told: fs.sample(model(labels), student, ...)."
        )
    if not torch.is_tensor(labels) or labels.dim() == 0:
        raise InputError(f"labels: got {labels!r}, wanted a tensor (batch, ...).")
    other: Any = copy.copy(student)
    other.labels = labels
    return other  # type: ignore[no-any-return]


def told(network: nn.Module, labels: Tensor | None, x: Tensor) -> dict[str, Tensor]:
    """What a network is told beside x and sigma; InputError where it needs a label a sample and has not."""
    if not getattr(network, "labelled", False):
        return {}
    if labels is None:
        raise InputError(
            "labels: got none; this student is class-conditional. Sample with student.at(labels), labels of "
            "shape (batch,)."
        )
    if len(labels) != len(x):
        raise InputError(f"labels: got {len(labels)} for {len(x)} samples, wanted one each.")
    return {"labels": labels.to(x.device)}
