"""What class-conditional students share: labels given to the student, and told to its network."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .. import _validation
from ..errors import InputError

S = TypeVar("S")


def with_labels(student: S, network: nn.Module, labels: Any) -> S:
    """The same student for samples of these classes; InputError if its network takes none."""
    if not getattr(network, "labelled", False):
        raise InputError(
            "labels: got some for a student whose network takes none. Where the model is a function of "
            "labels, it is the model that is told: fs.sample(model(labels), student, ...)."
        )
    check_labels(network, labels)
    other: Any = copy.copy(student)
    other.labels = labels
    return other  # type: ignore[no-any-return]


def check_labels(network: Any, labels: Any) -> None:
    """Refuse what is no tensor (batch, ...), and numbers that are no class of the network's, if it says."""
    if not torch.is_tensor(labels) or labels.dim() == 0 or len(labels) == 0:
        raise InputError(f"labels: got {_validation.describe(labels)}, expected a tensor (batch, ...).")
    classes = getattr(network, "classes", None)
    if classes is None:
        return
    whole = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
    if not whole or labels.dim() != 1 or bool(((labels < 0) | (labels >= classes)).any()):
        values = f" from {labels.min()} to {labels.max()}" if whole else ""
        raise InputError(
            f"labels: got {_validation.describe(labels)}{values}, expected whole numbers (batch,) in 0 ... "
            f"{classes - 1}, the network's classes."
        )


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
        raise InputError(f"labels: got {len(labels)} for {len(x)} samples, expected one each.")
    return {"labels": labels.to(x.device)}
