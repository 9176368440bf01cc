"""What a Brownian path does over one interval, and how two neighbours combine (Chen's relation)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .. import _validation
from ..errors import InputError
from .signature import Word, minimal_words, signature_from_coordinates

LEVY_ORDER: dict[str, int] = {"W": 1, "H": 2, "K": 3}


class Path(Protocol):
    """A source of increments: what loops and executors ask of Brownian motion.

    Asked again it gives the same numbers, except `FreshIncrements`, which has no memory.
    """

    levy: str

    def increment(self, t0: float, t1: float, /) -> Increment:
        """The increment of [t0, t1]."""

    def increments(self, grid: Tensor, /) -> Iterable[Increment]:
        """The increments of the intervals of a grid (n,)."""


@dataclass(frozen=True, slots=True, eq=False)
class Increment:
    """A Brownian motion over an interval [s, s+h], described as far as its fields go.

    W, H and K are independent, and of one shape, dtype and device. A depends on them, by
    E[A_ij | W, H] = H_i W_j - W_i H_j.

    Attributes:
        h: length of the interval.
        W: (...) the increment, N(0, h).
        H: (...) space-time Lévy area, (1/h) int (W_u - u/h W_h) du ~ N(0, h/12).
        K: (...) space-time-time Lévy area, (1/h^2) int (W_u - u/h W_h)(h/2 - u) du ~ N(0, h/720).
        A: (..., m, m) space-space area, (1/2)(int W^i dW^j - int W^j dW^i); m is W's last axis.

    Raises:
        InputError: K without H; h that is no length.

    Reference: Foster, Lyons and Oberhauser, arXiv 1904.06998; B, section 2.2.
    """

    h: float
    W: Tensor
    H: Tensor | None = None
    K: Tensor | None = None
    A: Tensor | None = None

    def __post_init__(self) -> None:
        if isinstance(self.h, Tensor):  # a number on a device is not read
            pass
        elif (
            isinstance(self.h, bool) or not isinstance(self.h, (int, float)) or not 0 < abs(self.h) < math.inf
        ):
            raise InputError(
                f"h: got {_validation.describe(self.h)}, expected a length, below 0 to step back."
            )
        for name, field in (("W", self.W), ("H", self.H), ("K", self.K), ("A", self.A)):
            if not isinstance(field, Tensor) and (name == "W" or field is not None):
                raise InputError(f"{name}: got {_validation.describe(field)}, expected a tensor.")
        if self.K is not None and self.H is None:
            raise InputError("K: got K without H, expected both; Chen's relation for K needs H")

    @property
    def levy(self) -> str:
        """The richest of "W", "H", "K" that is present."""
        if self.K is not None:
            return "K"
        return "H" if self.H is not None else "W"

    def join(self, later: Increment) -> Increment:
        """The increment over both intervals, of what both know, by Chen's relation.

        Associative to rounding.

        Raises:
            InputError: the shapes of W differ.

        Reference: B, section 2.3.
        """
        _validation.check_instance("later", later, Increment, "an Increment")
        if self.W.shape != later.W.shape:
            raise InputError(
                f"later: got W of shape {tuple(later.W.shape)}, expected {tuple(self.W.shape)} "
                "as in this increment; join increments of one path"
            )
        h = self.h + later.h
        x, y = self.h / h, later.h / h
        H = K = None
        if self.H is not None and later.H is not None:
            H = x * (self.H - later.W / 2) + y * (later.H + self.W / 2)
            if self.K is not None and later.K is not None:
                K = x * x * self.K + y * y * later.K
                K = K + (x * y / 2) * (self.H - later.H)
                K = K + ((x - y) / 12) * (x * later.W - y * self.W)
        A = None
        if self.A is not None and later.A is not None:
            # one product and its transpose: antisymmetric to the bit
            outer = self.W.unsqueeze(-1) * later.W.unsqueeze(-2)
            A = self.A + later.A + 0.5 * (outer - outer.transpose(-1, -2))
        return Increment(h, self.W + later.W, H, K, A)

    @property
    def U(self) -> Tensor:
        """torchsde's U = int W ds = I_(1,0) = h (W/2 + H). Raises InputError without H."""
        return self.h * (self.W / 2 + self._need_H("U"))

    @property
    def I10(self) -> Tensor:
        """I_(1,0) = int W ds = h (W/2 + H): torchsde's U. Raises InputError without H."""
        return self.U

    @property
    def I01(self) -> Tensor:
        """I_(0,1) = int s dW = h (W/2 - H). Raises InputError without H."""
        return self.h * (self.W / 2 - self._need_H("I01"))

    @property
    def I100(self) -> Tensor:
        """I_(1,0,0) = int int W = h^2 (W/6 + H/2 + K). Raises InputError without K."""
        H, K = self._need_H("I100"), self._need_K("I100")
        return self.h**2 * (self.W / 6 + H / 2 + K)

    @classmethod
    def from_U(cls, h: float, W: Tensor, U: Tensor) -> Increment:
        """From torchsde's pair (W, U): H = U/h - W/2."""
        return cls(h, W, U / h - W / 2)

    @classmethod
    def from_integrals(cls, h: float, W: Tensor, I10: Tensor, I100: Tensor | None = None) -> Increment:
        """From W, I_(1,0) = int W ds and, if known, I_(1,0,0) = int int W."""
        H = I10 / h - W / 2
        K = None if I100 is None else I100 / h**2 - W / 6 - H / 2
        return cls(h, W, H, K)

    def coordinates(self) -> tuple[Tensor, ...]:
        """The independent N(0, 1) Legendre coordinates xi_n present, each shaped like W.

        xi_0 = W/sqrt(h), xi_1 = sqrt(12/h) H, xi_2 = sqrt(720/h) K. With L_n = int P_n(2s/h - 1) dW
        this is xi_n = (-1)^n sqrt((2n+1)/h) L_n: the sign of H, not that of L_1.
        """
        out = [self.W / math.sqrt(self.h)]
        if self.H is not None:
            out.append(self.H * math.sqrt(12 / self.h))
        if self.K is not None:
            out.append(self.K * math.sqrt(720 / self.h))
        return tuple(out)

    @classmethod
    def from_coordinates(cls, h: float, *xi: Tensor) -> Increment:
        """The inverse of `coordinates`, from one to three tensors; InputError for more or fewer."""
        if not 1 <= len(xi) <= 3:
            raise InputError(f"xi: got {len(xi)} coordinates, expected 1 (W), 2 (W,H) or 3 (W,H,K)")
        _validation.check_float("h", h, 2.0**-1000, expected="a length above 0")
        for x in xi:
            _validation.check_instance("xi", x, Tensor, "tensors")
        scales = (math.sqrt(h), math.sqrt(h / 12), math.sqrt(h / 720))
        return cls(h, *(s * x for s, x in zip(scales, xi, strict=False)))

    def partial_signature(self, depth: int | None = None, *, words: tuple[Word, ...] | None = None) -> Tensor:
        """Iterated integrals with one Brownian letter, `(..., len(words))`.

        `words` are pairs (a, b) for 0^a j 0^b and default to j, j0, ..., j0^depth; `depth`
        defaults to all that is known (W: 0, H: 1, K: 2). Their law is
        `partial_signature_covariance(depth, h)`. Raises InputError where the depth needs a
        coordinate this increment has not.
        """
        xi = self.coordinates()
        depth = len(xi) - 1 if depth is None else _validation.check_int("depth", depth, 0)
        if depth > len(xi) - 1:
            raise InputError(
                f"depth: got {depth}, but {self.levy!r} knows depth {len(xi) - 1}; make the path "
                'with levy="H" (depth 1) or "K" (depth 2)'
            )
        chosen = minimal_words(depth) if words is None else words
        return signature_from_coordinates(torch.stack(xi[: depth + 1], -1), self.h, chosen)

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Increment:
        """The same increment in another dtype or on another device; InputError where it cannot be."""
        dtype = _validation.check_dtype(dtype)
        device = None if device is None else _validation.check_device(device)

        def move(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.to(device=device, dtype=dtype or x.dtype)

        W = self.W.to(device=device, dtype=dtype or self.W.dtype)
        return Increment(self.h, W, move(self.H), move(self.K), move(self.A))

    def _need_H(self, who: str) -> Tensor:
        if self.H is None:
            raise InputError(f'{who}: this increment has no H; make the path with levy="H"')
        return self.H

    def _need_K(self, who: str) -> Tensor:
        if self.K is None:
            raise InputError(f'{who}: this increment has no K; make the path with levy="K"')
        return self.K


def check_levy(levy: str) -> str:
    """`levy` itself, or InputError for another word."""
    return _validation.check_choice("levy", levy, LEVY_ORDER)


def check_dtype(dtype: torch.dtype | None) -> torch.dtype:
    """`dtype`, by default torch's; InputError for another than float32 and float64."""
    dtype = torch.get_default_dtype() if dtype is None else dtype
    if dtype not in (torch.float32, torch.float64):
        raise InputError(
            f"dtype: got {dtype}, expected torch.float32 or torch.float64. Convert increments with "
            ".to(dtype): sums of half precision noise lose the path."
        )
    return dtype
