"""Small networks that learned steps use by default. Each is rebuilt from its JSON `config` when loaded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

FREQUENCIES = [0.25 * 2 ** (5 * k / 7) for k in range(8)]  # of log sigma: periods from 25 to 0.8


class Coefficients(nn.Module):
    """(t, y) -> one coefficient for each component of y and each iterated integral; nought at birth.

    y is (*batch, d); the result (*batch, d, terms).
    """

    def __init__(self, d: int, terms: int, width: int = 64) -> None:
        super().__init__()
        self.config = {"d": d, "terms": terms, "width": width}
        self.terms = terms
        self.body = nn.Sequential(nn.Linear(d + 1, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
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
        data_std: standard deviation of the data (preconditioning of arXiv 2206.00364, Table 1).
        dropout: in the blocks, while training.
        skip: add the best linear denoiser; without, the network is nought at birth, a correction.
    """

    def __init__(
        self, event: Sequence[int], width: int = 256, depth: int = 3, letters: int = 0,
        data_std: float = 0.75, dropout: float = 0.0, skip: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.config: dict[str, Any] = {
            "event": list(event), "width": width, "depth": depth, "letters": letters,
            "data_std": data_std, "dropout": dropout,
            "skip": skip,
        }  # fmt: skip
        self.data_std, self.letters, self.skip = data_std, letters, skip
        self.frequencies: Tensor
        size = math.prod(event)
        self.enter = nn.Linear(size, width)
        self.level = nn.Sequential(nn.Linear(2 * len(FREQUENCIES), 64), nn.SiLU())
        self.blocks = nn.ModuleList(_Block(width, dropout) for _ in range(depth))
        self.leave = _zero(nn.Linear(width, size))
        if letters:
            self.signature = _zero(nn.Linear(letters * size, width))
            self.end = _zero(nn.Linear(2 * len(FREQUENCIES), width))
        self.register_buffer("frequencies", torch.tensor(FREQUENCIES), persistent=False)

    def forward(
        self, x: Tensor, sigma: Tensor, sigma_next: Tensor | None = None, xi: Tensor | None = None
    ) -> Tensor:
        s = sigma.to(x.dtype).reshape(-1, *[1] * (x.dim() - 1))
        norm = (s.square() + self.data_std**2).rsqrt()
        hidden = self.enter((x * norm).flatten(1))
        if self.letters and xi is not None and sigma_next is not None:
            hidden = hidden + self.signature(xi.flatten(1)) + self.end(self._embed(sigma_next))
        code = self.level(self._embed(sigma))
        for block in self.blocks:
            hidden = block(hidden, code)
        out = self.leave(nn.functional.silu(hidden)).reshape(x.shape)
        x0: Tensor = self.data_std * s * norm * out
        return x0 + (self.data_std * norm) ** 2 * x if self.skip else x0

    def _embed(self, sigma: Tensor) -> Tensor:
        """(1 or batch, 16) sines and cosines of log sigma."""
        phase = sigma.log().reshape(-1, 1) * self.frequencies
        return torch.cat([phase.sin(), phase.cos()], 1)

    def with_signature(self, letters: int) -> DenoisingMLP:
        """The same denoiser, ready to be told `letters` coordinates; equal in value until it is trained."""
        config = self.config | {"letters": letters, "dropout": 0.0}
        wide = DenoisingMLP(**config).to(self.enter.weight)
        wide.load_state_dict(self.state_dict(), strict=False)
        return wide


class _Block(nn.Module):
    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.first, self.second = nn.Linear(width, width), _zero(nn.Linear(width, width))
        self.shift, self.dropout = nn.Linear(64, width, bias=False), nn.Dropout(dropout)

    def forward(self, hidden: Tensor, code: Tensor) -> Tensor:
        inner = nn.functional.silu(self.first(self.norm(hidden)) + self.shift(code))
        return hidden + self.second(self.dropout(inner))  # type: ignore[no-any-return]


def _zero(layer: nn.Linear) -> nn.Linear:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


NETWORKS: dict[str, type[nn.Module]] = {c.__name__: c for c in (Coefficients, DenoisingMLP)}
