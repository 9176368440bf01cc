"""A U-Net of diffusers as a denoiser that can be trained, saved and loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..denoiser import AFFINE, Converted
from ..errors import InputError, one_of
from ..schedule import DiscreteVP


def unet_class() -> Any:
    """diffusers' `UNet2DModel`; InputError where diffusers is not installed."""
    try:
        from diffusers import UNet2DModel
    except ImportError as error:
        raise InputError(f"diffusers: cannot be imported ({error}). Run: pip install diffusers") from error
    return UNet2DModel


class UNetDenoiser(nn.Module):
    """`(x, sigma) -> x0` of a `UNet2DModel` that was trained on a table of noise levels.

    Create one with `UNetDenoiser.of(unet, schedule)`; the constructor is for files.

    Args:
        unet: the U-Net's configuration.
        labels: length of the schedule's table.
        prediction: what the U-Net was trained to predict: "epsilon", "v_prediction" or "sample".
    """

    def __init__(self, unet: Mapping[str, Any], labels: int, prediction: str = "epsilon") -> None:
        super().__init__()
        if prediction not in AFFINE:
            raise one_of("prediction", prediction, AFFINE)
        self.config: dict[str, Any] = {"unet": dict(unet), "labels": labels, "prediction": prediction}
        self.prediction = prediction
        self.unet: nn.Module = unet_class().from_config(unet)
        classes = [unet.get(name) for name in ("num_class_embeds", "class_embed_type")]
        self.labelled: bool = any(c is not None for c in classes)
        self.classes: int | None = classes[0] if classes[1] is None else None
        self.log_sigmas: Tensor
        self.register_buffer("log_sigmas", torch.zeros(labels, dtype=torch.float64))

    @classmethod
    def of(cls, unet: Any, schedule: DiscreteVP, prediction: str = "epsilon") -> UNetDenoiser:
        """A copy of a trained U-Net; InputError for another kind of network or schedule."""
        denoiser = cls(configuration(unet, schedule), len(schedule.log_sigmas), prediction)
        denoiser.unet.load_state_dict(unet.state_dict())
        denoiser.log_sigmas.copy_(schedule.log_sigmas)
        return denoiser.to(unet.device)

    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        """x: (batch, channels, height, width); sigma: 0-d or (batch,); labels: (batch,)."""
        return self.outputs(x, sigma, labels)[0]

    def outputs(self, x: Tensor, sigma: Tensor, labels: Tensor | None, extra: Sequence[Tensor] = ()) -> list[Tensor]:
        """x0 and the further outputs of the U-Net, whose input has the channels `extra` after x_t."""
        more: list[Tensor] = []

        def unet(x_t: Tensor, t: Tensor) -> Tensor:
            out = self.unet(torch.cat([x_t, *extra], 1), t, class_labels=labels).sample
            first, *more[:] = torch.split(out.to(x.dtype), x.shape[1], 1)
            return first

        x0 = Converted(unet, DiscreteVP.of_table(self.log_sigmas), self.prediction)(x, sigma)
        return [x0, *more]


def configuration(unet: Any, schedule: Any) -> dict[str, Any]:
    """The U-Net's configuration; InputError for another kind of network or schedule."""
    if type(unet).__name__ != "UNet2DModel" or not isinstance(schedule, DiscreteVP):
        raise InputError(
            f"unet: got {type(unet).__name__} on {type(schedule).__name__}, expected a UNet2DModel of diffusers on a "
            "DiscreteVP. Write another network as a module (x, sigma) -> x0 or (x, sigma, sigma_next, xi) -> x0."
        )
    config = {k: v for k, v in unet.config.items() if not k.startswith("_")}
    if config["out_channels"] != config["in_channels"]:
        raise InputError(
            f"unet: got {config['in_channels']} input and {config['out_channels']} output channels, expected equal "
            "numbers; a U-Net that also predicts its variance is not supported."
        )
    return config
