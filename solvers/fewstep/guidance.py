"""Classifier-free guidance of a network: scales per sample and per level, intervals, rescaling and APG."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import _validation
from ._tracing import constants
from .errors import InputError
from .plan import Weight

Scale = float | Tensor | Callable[[Tensor], Tensor]
Interval = tuple[float, float]
Here = float | Tensor | None
"""The scale at one level: a number, (batch,) or 0-d; None where there is no guidance."""
Guide = tuple[Here, Weight, Weight]
"""The scale at a level, and p, q with x0 = p x + q output there."""


@dataclass(frozen=True)
class Guided:
    """A guided network `(x, t) -> output`. Made by `classifier_free_guidance`."""

    model: Callable[[Tensor, Tensor, Tensor], Tensor]
    condition: Tensor
    unconditional: Tensor
    scale: Scale
    intervals: tuple[Interval, ...]  # none: all levels
    rescale: float
    parallel: float
    norm: float | None

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """The guided output, where it needs neither a level nor x0."""
        if self.intervals or self._projects or not isinstance(self.scale, (float, Tensor)):
            raise InputError(
                "scale, interval, parallel, norm: got options that depend on sigma or x0 in a call with (x, t). "
                "Convert the guided network with from_epsilon or another from_... first."
            )
        t = _validation.check_input(x, t, "t").expand(len(x))
        scale = self.scale.to(x) if torch.is_tensor(self.scale) else self.scale
        return self.combined(*self.halves(x, t, scale), x, scale, 0.0, 1.0)

    @property
    def _projects(self) -> bool:
        return self.parallel != 1 or self.norm is not None

    def scales(self, levels: Tensor, like: Tensor) -> list[Here]:
        """The scale at each of the levels (R,), known to Python."""
        out: list[Here]
        if isinstance(self.scale, (float, Tensor)):
            out = [self.scale if isinstance(self.scale, float) else self.scale.to(like)] * len(levels)
        else:
            found = _scale_at(self.scale, levels.double().cpu())
            _validation.check_no_graph("scale", found)
            out = list(constants(found))
        if self.intervals:
            inside = [any(low <= s <= high for low, high in self.intervals) for s in constants(levels)]
            out = [w if guided else None for w, guided in zip(out, inside, strict=True)]
        return out

    def scale_at(self, sigma: Tensor, like: Tensor) -> Tensor:
        """The scale at levels that Python does not know, 0-d or (batch,): 1 outside the intervals."""
        if isinstance(self.scale, float):
            scale = torch.full((), self.scale, dtype=torch.float64, device=sigma.device)
        else:
            scale = self.scale if torch.is_tensor(self.scale) else _scale_at(self.scale, sigma)
        if self.intervals:
            inside = [(low <= sigma) & (sigma <= high) for low, high in self.intervals]
            scale = torch.where(torch.stack(inside).any(0), scale.to(sigma.device), 1.0)
        return scale.to(like)

    def halves(self, x: Tensor, t: Tensor, scale: Here, both: bool = False) -> tuple[Tensor | None, Tensor | None]:
        """The unconditional and the conditional output, None for one that is not needed; t: (batch,)."""
        if len(self.condition) != len(x):
            raise InputError(f"condition: got {len(self.condition)} for a batch of {len(x)}; expected one each.")
        for name, given in (("condition", self.condition), ("unconditional", self.unconditional)):
            if given.device != x.device:
                raise InputError(f"{name}: got a tensor on {given.device}, expected the device of x, {x.device}.")
        if scale is None or (not both and isinstance(scale, float) and scale == 1):
            return None, self.model(x, t, self.condition)
        if not both and isinstance(scale, float) and scale == 0 and not (self.rescale or self._projects):
            return self.model(x, t, self.unconditional), None
        out = self.model(torch.cat([x, x]), torch.cat([t, t]), torch.cat([self.unconditional, self.condition]))
        if not torch.is_tensor(out) or len(out) != 2 * len(x):
            return out, out  # for the caller's check of outputs to reject
        u, c = out.chunk(2)
        return u, c

    def combined(self, u: Tensor | None, c: Tensor | None, x: Tensor, scale: Here, p: Weight, q: Weight) -> Tensor:
        """The guided output, given what `halves` has evaluated; x0 = p x + q output."""
        if u is None or c is None:
            out = c if u is None else u
            assert out is not None
            return out
        assert scale is not None
        w = scale.reshape(-1, *[1] * (c.dim() - 1)) if torch.is_tensor(scale) and scale.dim() else scale
        if torch.is_tensor(w) and w.dim() and len(w) not in (1, len(c)):
            raise InputError(f"scale: got {len(w)} for a batch of {len(c)}; expected a number, or one per sample.")
        out = torch.lerp(u, c, w)
        if self._projects:
            out = c + (w - 1) * self._projected(q * (c - u), p * x + q * c) / q
        if self.rescale:
            axes = tuple(range(1, c.dim()))
            ratio = c.std(axes, keepdim=True) / out.std(axes, keepdim=True).clamp_min(torch.finfo(c.dtype).tiny)
            out = out * torch.lerp(torch.ones_like(ratio), ratio, self.rescale)
        return out

    def _projected(self, direction: Tensor, x0: Tensor) -> Tensor:
        """The direction c - u of x0, limited in its norm, and `parallel` of its part along x0."""
        axes, least = tuple(range(1, x0.dim())), torch.finfo(x0.dtype).tiny
        if self.norm is not None:
            size = direction.square().sum(axes, keepdim=True).sqrt()
            direction = direction * (self.norm / size.clamp_min(least)).clamp(max=1)
        along = (direction * x0).sum(axes, keepdim=True) / x0.square().sum(axes, keepdim=True).clamp_min(least) * x0
        return direction + (self.parallel - 1) * along


def classifier_free_guidance(
    model: Callable[[Tensor, Tensor, Tensor], Tensor], condition: Tensor, unconditional: Tensor, scale: Scale = 7.5, *,
    interval: Interval | Sequence[Interval] | None = None, rescale: float = 0.0, parallel: float = 1.0,
    norm: float | None = None,
) -> Guided:  # fmt: skip
    r"""A guided network `(x, t) -> u + scale (c - u)`, both halves in one call (arXiv 2207.12598, Eq. 6).

    Wrap the network before its conversion; any kind of prediction works. Where sampling knows that the scale is 1 or
    0, only one half is evaluated. `sample(..., cfg_pp=True)` takes the steps of CFG++ with it.

    Args:
        model: `(x, t, condition) -> output`, called with x (2 batch, *event) and t (2 batch,).
        condition, unconditional: (batch, ...) conditions c and u, of one shape.
        scale: the weight of the conditional direction: 0 is unconditional, 1 conditional, more is guided. Or (batch,)
            one per sample, or a function of sigma, elementwise on float64 tensors, for one per level.
        interval: (low, high) or several of these: guidance at levels low <= sigma <= high only, and the conditional
            network alone outside, at half the cost (arXiv 2404.07724).
        rescale: phi of arXiv 2305.08891, Eq. 15-16: the output is multiplied by
            (1 - phi) + phi std(c) / std(output) of each sample.
        parallel: eta of APG (arXiv 2410.02416): what is kept of the part of the direction that is parallel to the
            conditional x0, the cause of oversaturation; 0 in that paper, 1 is ordinary guidance. The output is then
            c + (scale - 1) (orthogonal + eta parallel), both of x0. APG's momentum, which would be state that the
            network keeps between steps, is not offered.
        norm: the largest norm of the direction c - u of x0 per sample (r of APG).

    Raises:
        InputError: conditions of two shapes or not as many as samples; a scale that is not a number, (batch,) or a
            function; an empty interval; when called as (x, t): options that depend on sigma or x0.
    """
    _validation.check_callable("model", model, "a network called as model(x, t, condition)")
    if all(hasattr(model, name) for name in ("schedule", "kind", "rounding")):  # a converted network
        raise InputError(
            f"model: got {_validation.describe(model)}, expected a network called as model(x, t, condition). Wrap the "
            "network first and convert it then: from_epsilon(classifier_free_guidance(network, ...), schedule)."
        )
    for name, given in (("condition", condition), ("unconditional", unconditional)):
        if not torch.is_tensor(given) or given.shape != condition.shape or given.dim() == 0:
            raise InputError(
                f"{name}: got {_validation.describe(given)}, expected a tensor (batch, ...), both halves of one shape."
            )
    if torch.is_tensor(scale) and scale.dim() == 1 and scale.is_floating_point() and not scale.is_meta:
        if len(scale) != len(condition):
            raise InputError(f"scale: got {len(scale)} for {len(condition)} conditions; expected one per sample.")
    elif not callable(scale):
        scale = _validation.check_float("scale", scale)
    rescale = _validation.check_float("rescale", rescale, 0, 1, "a number in [0, 1]")
    parallel = _validation.check_float("parallel", parallel)
    if norm is not None:
        norm = _validation.check_float("norm", norm, 0, expected="a number of at least 0, or None")
    return Guided(
        model, condition, unconditional, scale, _check_intervals(interval), float(rescale), float(parallel),
        None if norm is None else float(norm),
    )  # fmt: skip


def _check_intervals(given: Any) -> tuple[Interval, ...]:
    if given is None:
        return ()
    expected = "(low, high) with low < high, or a list of these"
    pairs = _validation.check_sequence("interval", given, expected)
    if len(pairs) == 2 and not any(isinstance(p, Sequence) for p in pairs):
        pairs = [pairs]
    out = []
    for pair in pairs:
        if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
            raise InputError(f"interval: got {_validation.describe(pair)}, expected {expected}.")
        low = _validation.check_float("interval", pair[0])
        high = float("inf") if pair[1] == float("inf") else _validation.check_float("interval", pair[1])
        if not low < high:
            raise InputError(f"interval: got {low:g} and {high:g}, expected {expected}.")
        out.append((low, high))
    if not out:
        raise InputError(f"interval: got none, expected {expected}. Use scale=1.0 for no guidance.")
    return tuple(out)


def _scale_at(scale: Callable[[Tensor], Tensor], sigma: Tensor) -> Tensor:
    found: Any = scale(sigma)
    if isinstance(found, (int, float)):
        found = torch.full_like(sigma, found)
    if not torch.is_tensor(found) or found.shape != sigma.shape:
        raise InputError(
            f"scale: got {_validation.describe(found)} for sigma of shape {tuple(sigma.shape)}; expected a tensor of "
            "that shape, for instance from lambda sigma: torch.where(sigma < 5, 6.0, 2.0)."
        )
    return found
