"""What students with a network of their own share: class labels, and the checks of what they are given."""

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .. import _validation
from ..errors import InputError
from ..plan import Plan
from ..problem import DiffusionModel
from ..schedule import Schedule

S = TypeVar("S", bound="NetworkStudent")


class NetworkStudent:
    """A sampler made of a plan and of a network that evaluates its rows in place of a model."""

    network: nn.Module
    plan: Plan
    labels: Tensor | None = None

    def at(self: S, labels: Tensor) -> S:
        """The same student for samples of these classes, (batch, ...).

        Raises:
            InputError: the network takes no labels.
        """
        if not getattr(self.network, "labelled", False):
            raise InputError(
                "labels: got some for a student whose network takes none. If the model is a function of labels, give "
                "them to the model: fs.sample(model(labels), student, ...)."
            )
        check_labels(self.network, labels)
        other = copy.copy(self)
        other.labels = labels
        return other

    def prepare(self, like: Tensor) -> dict[str, Tensor]:
        """Check the samples, move the network to their device, and return its keyword arguments for them."""
        check_compatible(self.network, "noise", like, like.shape[1:])
        self.network.to(like.device)
        return label_arguments(self.network, self.labels, like)


def model_of(network: nn.Module, schedule: Schedule, labels: Tensor | None) -> DiffusionModel:
    """A network `(x, sigma) -> x0` as a model, for samples of these classes if it takes labels."""
    return DiffusionModel(lambda x, s: network(x, s, **label_arguments(network, labels, x)), schedule)


def label_arguments(network: nn.Module, labels: Tensor | None, x: Tensor) -> dict[str, Tensor]:
    """`labels=` for a network whose `labelled` is True, else nothing; raises InputError unless one per sample."""
    if not getattr(network, "labelled", False):
        return {}
    if labels is None:
        raise InputError("labels: got none for a class-conditional student; sample with student.at(labels), (batch,).")
    if len(labels) != len(x):
        raise InputError(f"labels: got {len(labels)} for {len(x)} samples, expected one each.")
    return {"labels": labels.to(x.device)}


def check_labels(network: Any, labels: Any) -> None:
    """Reject what is not a tensor (batch, ...) of classes of the network, if it declares how many it has."""
    if not torch.is_tensor(labels) or labels.dim() == 0 or len(labels) == 0:
        raise InputError(f"labels: got {_validation.describe(labels)}, expected a tensor (batch, ...).")
    classes = getattr(network, "classes", None)
    if classes is None:
        return
    integer = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
    if not integer or labels.dim() != 1 or bool(((labels < 0) | (labels >= classes)).any()):
        values = f" from {labels.min()} to {labels.max()}" if integer else ""
        raise InputError(
            f"labels: got {_validation.describe(labels)}{values}, expected the network's classes, integers (batch,) "
            f"in 0 ... {classes - 1}."
        )


def check_compatible(network: nn.Module, argument: str, x: Tensor, event: tuple[int, ...]) -> None:
    """Reject a state of another event shape or dtype than the network was made for."""
    config: Any = getattr(network, "config", {})
    expected = tuple(config.get("event", [config["d"]] if "d" in config else event))
    if tuple(event) != expected:
        raise InputError(f"{argument}: got events of shape {tuple(event)}; the student was made for {expected}.")
    dtype = next((p.dtype for p in network.parameters()), x.dtype)
    if x.dtype != dtype:
        raise InputError(
            f"{argument}: got {x.dtype}; the student's network is in {dtype}. Convert the state, or the network with "
            "student.network.to(dtype)."
        )
