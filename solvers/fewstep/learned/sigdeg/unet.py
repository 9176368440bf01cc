"""A U-Net of diffusers as a signature-driven student: born equal to the denoiser it is made from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...denoiser import AFFINE
from ...errors import one_of
from ...schedule import DiscreteVP
from ..unet_denoiser import ask, configuration, unet_class
from .networks import HEADS, graded


class SigUNet(nn.Module):
    """`(x, sigma, sigma_next, xi) -> x0` from an unconditional or class-conditional `UNet2DModel`.

    Its first convolution has more input channels, the step's length and (head "direct") the signature; its
    last one more output channels, which are added to x0 in units of x0. Both start at nought. The U-Net's own
    output is read as before; at large sigma its error is sigma times that of the noise it predicts, hence
    the second way out.

    Make one with `SigUNet.of(unet, schedule)`; the constructor is for files.

    Args:
        unet: the configuration of the widened U-Net.
        labels: length of the schedule's table.
        letters, head, feedback: as of `DenoisingMLP`.
        prediction: what the U-Net was trained to predict: "epsilon", "v_prediction" or "sample".
    """

    def __init__(
        self, unet: Mapping[str, Any], labels: int, letters: int = 2, prediction: str = "epsilon",
        head: str = "direct", feedback: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        if head not in HEADS:
            raise one_of("head", head, HEADS)
        if prediction not in AFFINE:
            raise one_of("prediction", prediction, AFFINE)
        self.config: dict[str, Any] = {
            "unet": dict(unet), "labels": labels, "letters": letters, "prediction": prediction,
            "head": head, "feedback": feedback,
        }  # fmt: skip
        self.letters = letters
        self.prediction = prediction
        self.head = head
        self.feedback = feedback
        self.unet: nn.Module = unet_class().from_config(unet)
        classes = [unet.get(name) for name in ("num_class_embeds", "class_embed_type")]
        self.labelled: bool = any(c is not None for c in classes)
        self.classes: int | None = classes[0] if classes[1] is None else None
        self.log_sigmas: Tensor
        self.register_buffer("log_sigmas", torch.zeros(labels, dtype=torch.float64))

    @classmethod
    def of(
        cls, unet: Any, schedule: DiscreteVP, letters: int = 2, *, prediction: str = "epsilon",
        head: str = "direct", feedback: bool = False,
    ) -> SigUNet:  # fmt: skip
        """Widen a trained U-Net; it is left as it is.

        Args:
            unet: a `UNet2DModel`, told x_t and labels of the schedule.
            schedule: the one it was trained on, a table.

        Raises:
            InputError: another kind of network or schedule.
        """
        config, labels = configuration(unet, schedule)
        enter, leave = config["in_channels"], config["out_channels"]
        more = 1 + (letters * enter if head == "direct" else 0) + (enter if feedback else 0)
        ways = 2 if head == "direct" else 2 + letters
        wide = config | {"in_channels": enter + more, "out_channels": leave * ways}
        student = cls(wide, labels, letters, prediction, head, feedback)
        own = unet.state_dict()
        for name, axis in (("conv_in.weight", 1), ("conv_out.weight", 0), ("conv_out.bias", 0)):
            room = student.unet.state_dict()[name].clone().zero_()
            room.narrow(axis, 0, own[name].shape[axis]).copy_(own[name])
            own[name] = room
        student.unet.load_state_dict(own)
        student.log_sigmas.copy_(schedule.log_sigmas)
        return student.to(unet.device).requires_grad_(True)

    def forward(
        self, x: Tensor, sigma: Tensor, sigma_next: Tensor, xi: Tensor, labels: Tensor | None = None,
        last: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """x: (batch, channels, height, width); sigma, sigma_next: 0-d; xi: (batch, letters, *event)."""
        told = [torch.log(sigma / sigma_next).expand(len(x), 1, *x.shape[2:])]
        told += [xi.flatten(1, 2)] if self.head == "direct" else []
        told += [last] if last is not None else []
        x0, *terms = ask(self.unet, self.log_sigmas, self.prediction, x, sigma, labels, told)
        if self.head == "graded":
            return x0 + graded(torch.stack(terms, 1), xi, sigma, sigma_next)
        return x0 + terms[0]
