"""Small networks that learned steps use by default. Each is rebuilt from its JSON `config` when loaded."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn


class Coefficients(nn.Module):
    """(t, y) -> one coefficient for each component of y and each iterated integral; nought at birth.

    y is (*batch, d); the result (*batch, d, terms).
    """

    def __init__(self, d: int, terms: int, width: int = 64) -> None:
        super().__init__()
        self.config = {"d": d, "terms": terms, "width": width}
        self.terms = terms
        self.body = nn.Sequential(
            nn.Linear(d + 1, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()
        )
        self.head = _zero(nn.Linear(width, d * terms))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        inputs = torch.cat([y, t.expand(*y.shape[:-1], 1)], -1)
        return self.head(self.body(inputs)).unflatten(-1, (-1, self.terms))  # type: ignore[no-any-return]


class DenoisingMLP(nn.Module):
    """A denoiser `(x, sigma) -> x0` for small events, EDM-preconditioned, that can also be told a signature.

    A residual MLP on the flattened event, modulated by the noise level. With `letters > 0` it takes the
    normalised partial signature xi (batch, letters, *event) of a step and the step's end as well; the
    weights of these inputs start at nought, so that it is born equal to the denoiser it is widened from.

    Args:
        event: shape of a sample.
        width, depth: of the residual blocks.
        letters: coordinates of the signature it is told; 0 for a plain denoiser.
        data_std: standard deviation of the data (arXiv 2206.00364, Table 1).
    """

    def __init__(
        self, event: tuple[int, ...], width: int = 256, depth: int = 3, letters: int = 0,
        data_std: float = 0.7,
    ) -> None:  # fmt: skip
        super().__init__()
        self.config: dict[str, Any] = {
            "event": list(event), "width": width, "depth": depth, "letters": letters,
            "data_std": data_std,
        }  # fmt: skip
        self.data_std, self.letters = data_std, letters
        size = math.prod(event)
        self.enter = nn.Linear(size, width)
        self.level = nn.Sequential(nn.Linear(32, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(_Block(width) for _ in range(depth))
        self.leave = nn.Linear(width, size)
        if letters:
            self.signature = _zero(nn.Linear(letters * size, width))
            self.end = _zero(nn.Linear(32, width))
        self.register_buffer("frequencies", torch.linspace(0, math.log(60), 16).exp(), persistent=False)

    def forward(
        self, x: Tensor, sigma: Tensor, sigma_next: Tensor | None = None, xi: Tensor | None = None
    ) -> Tensor:
        s = sigma.to(x.dtype).reshape(-1, *[1] * (x.dim() - 1))
        norm = (s.square() + self.data_std**2).rsqrt()
        hidden = self.enter((x * norm).flatten(1))
        code = self.level(self._embed(sigma))
        if self.letters and xi is not None and sigma_next is not None:
            hidden = hidden + self.signature(xi.flatten(1))
            code = code + self.end(self._embed(sigma_next))
        for block in self.blocks:
            hidden = block(hidden, code)
        out = self.leave(hidden).reshape(x.shape)
        skip = self.data_std**2 * norm.square()
        return skip * x + self.data_std * s * norm * out

    def _embed(self, sigma: Tensor) -> Tensor:
        """(1 or batch, 32) sines and cosines of log(sigma)/4."""
        phase = 0.25 * sigma.clamp(min=1e-4).log().reshape(-1, 1) * self.frequencies
        return torch.cat([phase.sin(), phase.cos()], 1)

    def with_signature(self, letters: int) -> DenoisingMLP:
        """The same denoiser, ready to be told `letters` coordinates; equal in value until it is trained."""
        wide = DenoisingMLP(**(self.config | {"letters": letters}))
        wide.load_state_dict(self.state_dict(), strict=False)
        return wide


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.shift = nn.LayerNorm(width), nn.Linear(width, 2 * width)
        self.first, self.second = nn.Linear(width, width), _zero(nn.Linear(width, width))

    def forward(self, hidden: Tensor, code: Tensor) -> Tensor:
        scale, shift = self.shift(code).chunk(2, -1)
        inner = nn.functional.silu(self.first(self.norm(hidden) * (1 + scale) + shift))
        return hidden + self.second(inner)  # type: ignore[no-any-return]


def _zero(layer: nn.Linear) -> nn.Linear:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


NETWORKS: dict[str, type[nn.Module]] = {c.__name__: c for c in (Coefficients, DenoisingMLP)}
