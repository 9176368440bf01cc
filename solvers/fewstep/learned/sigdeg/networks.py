"""Small networks that learned steps use by default; loading rebuilds each from its JSON `config`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ... import _validation
from ...errors import InputError

FREQUENCIES = [0.25 * 2 ** (5 * k / 7) for k in range(8)]  # of log sigma: periods from 25 to 0.8
HEADS = ("direct", "graded")


class Coefficients(nn.Module):
    """`(t, y) -> coefficients` of the iterated integrals of a step; initialised to zero.

    y is (*batch, d) and the result (*batch, d, terms), in units of y.

    Args:
        width: of the two hidden layers.
        scaled: work in units of y and t set by `rescale`, which are saved with the weights. The last layer then also
            gets y and t, because coefficients are often linear in y.
    """

    def __init__(self, d: int, terms: int, width: int = 64, scaled: bool = False) -> None:
        super().__init__()
        self.config: dict[str, Any] = {"d": d, "terms": terms, "width": width, "scaled": scaled}
        self.terms = terms
        self.centre: Tensor
        self.scale: Tensor
        self.register_buffer("centre", torch.zeros(d + 1), persistent=scaled)  # of y, and of t
        self.register_buffer("scale", torch.ones(d + 1), persistent=scaled)
        layers = nn.Linear(d + 1, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()
        self.body: nn.Sequential = nn.Sequential(*layers)
        self.head: nn.Linear = _zero(nn.Linear(width + (d + 1) * scaled, d * terms))

    def rescale(self, times: Tensor, states: Tensor) -> None:
        """Set the units: the mean and standard deviation of y and t, from states (n, batch, d) at times (n,)."""
        for k, x in enumerate([*states.unbind(-1), times]):
            self.centre[k], self.scale[k] = x.mean(), spread(x)

    def features(self, t: Tensor, y: Tensor) -> Tensor:
        """(*batch, features): the input of the last layer."""
        inputs = (torch.cat([y, t.expand(*y.shape[:-1], 1)], -1) - self.centre) / self.scale
        inner: Tensor = self.body(inputs)
        return torch.cat([inner, inputs], -1) if self.config["scaled"] else inner

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        out: Tensor = self.head(self.features(t, y)).unflatten(-1, (-1, self.terms))
        return out * self.scale[:-1, None]


def spread(x: Tensor) -> float:
    """The standard deviation, or 1 if x varies by rounding alone."""
    found, mean = float(x.std()), float(x.mean())
    return found if found > 16 * torch.finfo(x.dtype).eps * abs(mean) else 1.0


class DenoisingMLP(nn.Module):
    """A denoiser `(x, sigma) -> x0` for small events, or `(x, sigma, sigma_next, xi) -> x0` of a student.

    A residual MLP on the flattened event with EDM's preconditioning, modulated by the noise level. With `letters > 0`
    it also takes the end of a step and its normalised partial signature xi (batch, letters, *event). The weights of
    these inputs start at zero, so a widened denoiser starts equal to the original.

    Args:
        event: shape of a sample.
        width, depth: of the residual blocks.
        letters: coordinates of the signature; 0 for a plain denoiser.
        data_std: standard deviation of the data (preconditioning of arXiv 2206.00364, Table 1).
        dropout: in the blocks, while training.
        skip: add the best linear denoiser. Without it the network is a correction, initialised to zero.
        head: what it does with xi: "direct", a further input; "graded", see `graded`.
    """

    def __init__(
        self, event: Sequence[int], width: int = 256, depth: int = 3, letters: int = 0,
        data_std: float = 0.75, dropout: float = 0.0, skip: bool = True, head: str = "direct",
    ) -> None:  # fmt: skip
        super().__init__()
        self.head: str = _validation.check_choice("head", head, HEADS)
        self.config: dict[str, Any] = {
            "event": list(event), "width": width, "depth": depth, "letters": letters, "data_std": data_std,
            "dropout": dropout, "skip": skip, "head": head,
        }  # fmt: skip
        self.data_std: float = data_std
        self.letters: int = letters
        self.skip: bool = skip
        self.frequencies: Tensor
        size = math.prod(event)
        self.enter: nn.Linear = nn.Linear(size, width)
        self.level: nn.Sequential = nn.Sequential(nn.Linear(2 * len(FREQUENCIES), 64), nn.SiLU())
        self.blocks: nn.ModuleList = nn.ModuleList(_Block(width, dropout) for _ in range(depth))
        self.leave: nn.Linear = _zero(nn.Linear(width, size))
        if letters:
            direct = head == "direct"
            self.signature: nn.Linear = _zero(
                nn.Linear(letters * size, width) if direct else nn.Linear(width, (letters + 1) * size)
            )
            self.end: nn.Linear = _zero(nn.Linear(2 * len(FREQUENCIES), width))
        self.register_buffer("frequencies", torch.tensor(FREQUENCIES), persistent=False)

    def forward(self, x: Tensor, sigma: Tensor, sigma_next: Tensor | None = None, xi: Tensor | None = None) -> Tensor:
        if x.dim() < 2 or math.prod(x.shape[1:]) != self.enter.in_features:
            raise InputError(f"x: got shape {tuple(x.shape)}, expected (batch, *{tuple(self.config['event'])}).")
        s = sigma.to(x.dtype).reshape(-1, *[1] * (x.dim() - 1))
        norm = (s.square() + self.data_std**2).rsqrt()
        hidden = self.enter((x * norm).flatten(1))
        if xi is not None and sigma_next is not None:
            hidden = hidden + self.end(self._embed(sigma_next))
            if self.head == "direct":
                hidden = hidden + self.signature(xi.flatten(1))
        code = self.level(self._embed(sigma))
        for block in self.blocks:
            hidden = block(hidden, code)
        hidden = nn.functional.silu(hidden)
        x0: Tensor = self.data_std * s * norm * self.leave(hidden).reshape(x.shape)
        x0 = x0 + (self.data_std * norm) ** 2 * x if self.skip else x0
        if xi is not None and sigma_next is not None and self.head == "graded":
            terms = self.signature(hidden).reshape(len(x), -1, *x.shape[1:])
            x0 = x0 + graded(terms, xi, sigma, sigma_next)
        return x0

    def _embed(self, sigma: Tensor) -> Tensor:
        """(1 or batch, 16) sines and cosines of log sigma."""
        phase = sigma.log().reshape(-1, 1) * self.frequencies
        return torch.cat([phase.sin(), phase.cos()], 1)

    def with_signature(self, letters: int, head: str = "direct") -> DenoisingMLP:
        """The same denoiser with inputs for `letters` coordinates, equal in value until it is trained."""
        config = self.config | {"letters": letters, "dropout": 0.0, "head": head}
        wide = DenoisingMLP(**config).to(self.enter.weight)
        wide.load_state_dict(self.state_dict(), strict=False)
        return wide


def graded(terms: Tensor, xi: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    r"""$b\,c_0 + s \sum_j c_j\,\xi_{j-1}$: coefficients on a step's signature, scaled by the step.

    b = 1 - (sigma_next/sigma)^2 is the weight of x0 in the step, s = sigma_next sqrt(b) the standard deviation of its
    noise. The terms vanish with the step as the drift's iterated integrals do, so the parent's order holds for any
    coefficients; to first order c_1 and c_2 are D's derivative along W/2 + H.

    Args:
        terms: (batch, 1 + letters, *event), c.
        xi: (batch, letters, *event).
    """
    ratio = (sigma_next / sigma).to(xi.dtype).reshape(-1, *[1] * (xi.dim() - 2))
    b = 1 - ratio.square()
    s = sigma_next.to(xi.dtype).reshape(ratio.shape) * b.sqrt()
    return b * terms[:, 0] + s * (terms[:, 1:] * xi).sum(1)


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
