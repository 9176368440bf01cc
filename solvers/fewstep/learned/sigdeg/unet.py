"""A U-Net of diffusers that also receives the partial signature of its step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ... import _validation
from ...schedule import DiscreteVP
from ..unet_denoiser import UNetDenoiser, configuration
from .networks import HEADS, graded


class SigUNet(UNetDenoiser):
    """`(x, sigma, sigma_next, xi) -> x0` from an unconditional or class-conditional `UNet2DModel`.

    The first convolution has more input channels: the step's length and, for the head "direct", the signature. The
    last one has more output channels, which are added to x0 in units of x0: at large sigma the error of the U-Net's
    own output is sigma times that of the noise it predicts. Both start at zero, so the student starts as its teacher.

    Create one with `SigUNet.of(unet, schedule)`; the constructor is for files.

    Args:
        unet: the configuration of the widened U-Net.
        labels: length of the schedule's table.
        letters, head: as in `DenoisingMLP`.
        prediction: what the U-Net was trained to predict: "epsilon", "v_prediction" or "sample".
    """

    def __init__(
        self, unet: Mapping[str, Any], labels: int, letters: int = 2, prediction: str = "epsilon", head: str = "direct"
    ) -> None:
        super().__init__(unet, labels, prediction)
        self.head: str = _validation.check_choice("head", head, HEADS)
        self.letters = letters
        self.config.update(letters=letters, head=head)

    @classmethod
    def of(  # type: ignore[override]
        cls, unet: Any, schedule: DiscreteVP, letters: int = 2, *, prediction: str = "epsilon", head: str = "direct"
    ) -> SigUNet:
        """Widen a trained U-Net, which is left unchanged; InputError for another kind of network or schedule.

        Args:
            unet: a `UNet2DModel` called with x_t (batch, channels, height, width) and the schedule's labels (batch,).
            schedule: the table it was trained on.
            letters: how many of W, H and K the student reads: 1, 2 or 3, as `levy` of `distill_sigdeg`.
            prediction: what the U-Net was trained to predict: "epsilon", "v_prediction" or "sample".
            head: how the signature enters, "direct" or "graded", as in `distill_sigdeg`.

        Returns:
            the widened network on the U-Net's device, trainable.
        """
        config = configuration(unet, schedule)
        channels, direct = config["in_channels"], head == "direct"
        wide = config | {
            "in_channels": channels + 1 + letters * channels * direct,
            "out_channels": channels * (2 if direct else 2 + letters),
        }
        student = cls(wide, len(schedule.log_sigmas), letters, prediction, head)
        own = unet.state_dict()
        for name, axis in (("conv_in.weight", 1), ("conv_out.weight", 0), ("conv_out.bias", 0)):
            widened = torch.zeros_like(student.unet.state_dict()[name])
            widened.narrow(axis, 0, own[name].shape[axis]).copy_(own[name])
            own[name] = widened
        student.unet.load_state_dict(own)
        student.log_sigmas.copy_(schedule.log_sigmas)
        return student.to(unet.device).requires_grad_(True)

    def forward(  # type: ignore[override]
        self, x: Tensor, sigma: Tensor, sigma_next: Tensor, xi: Tensor, labels: Tensor | None = None
    ) -> Tensor:
        """x: (batch, channels, height, width); sigma, sigma_next: 0-d; xi: (batch, letters, *event)."""
        extra = [torch.log(sigma / sigma_next).expand(len(x), 1, *x.shape[2:])]
        extra += [xi.flatten(1, 2)] if self.head == "direct" else []
        x0, *terms = self.outputs(x, sigma, labels, extra)
        if self.head == "graded":
            return x0 + graded(torch.stack(terms, 1), xi, sigma, sigma_next)
        return x0 + terms[0]
