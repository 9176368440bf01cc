"""A U-Net of diffusers as a denoiser that can be trained, saved and loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..denoiser import AFFINE
from ..errors import InputError, one_of
from ..schedule import DiscreteVP


def unet_class() -> Any:
    """diffusers' `UNet2DModel`; InputError where diffusers is not installed."""
    try:
        from diffusers import UNet2DModel
    except ImportError as error:
        raise InputError(
            f"diffusers: cannot be imported ({error}); run: pip install 'fewstep[diffusers]'"
        ) from error
    return UNet2DModel


class UNetDenoiser(nn.Module):
    """`(x, sigma) -> x0` of a `UNet2DModel` that was trained on a table of levels.

    Make one with `UNetDenoiser.of(unet, schedule)`; the constructor is for files.

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
        """The same U-Net, copied.

        Raises:
            InputError: another kind of network or schedule.
        """
        made = cls(*configuration(unet, schedule), prediction)
        made.unet.load_state_dict(unet.state_dict())
        made.log_sigmas.copy_(schedule.log_sigmas)
        return made.to(unet.device)

    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        """x: (batch, channels, height, width); sigma: 0-d or (batch,); labels: (batch,)."""
        (x0,) = ask(self.unet, self.log_sigmas, self.prediction, x, sigma, labels)
        return x0


def ask(
    unet: nn.Module, log_sigmas: Tensor, prediction: str, x: Tensor, sigma: Tensor, labels: Tensor | None,
    told: Sequence[Tensor] = (),
) -> tuple[Tensor, ...]:  # fmt: skip
    """x0, and what comes out of the U-Net beside it; `told` goes in as channels beside x_t."""
    schedule, level = DiscreteVP.of_table(log_sigmas), sigma.double()
    alpha, t = schedule.alpha(level), schedule.label(level)
    p, q = AFFINE[prediction](level, alpha)
    shape = (-1, 1, 1, 1) if level.dim() else ()
    p, q, scale = (v.to(x).reshape(shape) for v in (p, q, alpha))
    out = unet(torch.cat([x * scale, *told], 1), t.to(x.dtype).expand(len(x)), class_labels=labels).sample
    first, *more = torch.split(out.to(x.dtype), x.shape[1], 1)
    return p * x + q * first, *more


def configuration(unet: Any, schedule: Any) -> tuple[dict[str, Any], int]:
    """The U-Net's configuration and the table's length; InputError for others."""
    if type(unet).__name__ != "UNet2DModel" or not isinstance(schedule, DiscreteVP):
        raise InputError(
            f"unet: got {type(unet).__name__} on {type(schedule).__name__}, expected a UNet2DModel of "
            "diffusers on a DiscreteVP. Write another network as a module (x, sigma) -> x0, for a signature "
            "(x, sigma, sigma_next, xi) -> x0."
        )
    config = {k: v for k, v in unet.config.items() if not k.startswith("_")}
    if config["out_channels"] != config["in_channels"]:
        raise InputError(
            f"unet: got {config['in_channels']} channels in and {config['out_channels']} out, expected as "
            "many; one that learns its variance too is not supported."
        )
    return config, len(schedule.log_sigmas)
