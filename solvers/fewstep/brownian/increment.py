"""The Brownian motion of one interval, how two adjacent intervals join, and the protocol of a path."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .. import _validation
from ..errors import InputError

LEVY_ORDER: dict[str, int] = {"W": 1, "H": 2, "K": 3}


class Path(Protocol):
    """A source of increments: what loops and executors need from Brownian motion.

    Repeated queries return the same numbers, except from `FreshIncrements`, which has no memory. A source
    whose increments also have the space-space area A sets `area = True`.
    """

    levy: str

    def increment(self, t0: float, t1: float, /) -> Increment:
        """Return the increment over [t0, t1]."""

    def increments(self, grid: Tensor, /) -> Iterable[Increment]:
        """Return the increments over the intervals of a grid (n,)."""


@dataclass(frozen=True, slots=True, eq=False)
class Increment:
    r"""A Brownian motion over an interval [s, s+h], described by W and optionally H, K and A.

    W, H and K are independent and have one shape, dtype and device. A depends on them:
    $E[A_{ij} | W, H] = H_i W_j - W_i H_j$.

    Attributes:
        h: length of the interval, negative for a step back; a 0-d tensor where it has a graph.
        W: (...) the increment, N(0, h).
        H: (...) space-time Lévy area, (1/h) int (W_u - u/h W_h) du ~ N(0, h/12).
        K: (...) space-time-time Lévy area, (1/h^2) int (W_u - u/h W_h)(h/2 - u) du ~ N(0, h/720).
        A: (..., m, m) space-space area, (1/2)(int W^i dW^j - int W^j dW^i); m is W's last axis.

    Raises:
        InputError: K without H, or an h that is not a length.

    Reference: Foster, Lyons & Oberhauser, arXiv 1904.06998; Jelinčić, Foster & Kidger, arXiv 2405.06464
    (B below), section 2.2.
    """

    h: float
    W: Tensor
    H: Tensor | None = None
    K: Tensor | None = None
    A: Tensor | None = None

    def __post_init__(self) -> None:
        h = self.h  # a tensor h is not read back from its device
        if type(h) is float and 0 < abs(h) < math.inf and type(self.W) is Tensor and self.H is self.K is self.A is None:
            return
        number = isinstance(h, (int, float)) and not isinstance(h, bool) and 0 < abs(h) < math.inf
        if not (number or isinstance(h, Tensor)):
            raise InputError(f"h: got {_validation.describe(h)}, expected a length (negative to step back).")
        for name, field in (("W", self.W), ("H", self.H), ("K", self.K), ("A", self.A)):
            if not isinstance(field, Tensor) and (name == "W" or field is not None):
                raise InputError(f"{name}: got {_validation.describe(field)}, expected a tensor.")
        if self.K is not None and self.H is None:
            raise InputError("K: got K without H, expected both, since Chen's relation for K needs H.")

    @property
    def levy(self) -> str:
        """The last of "W", "H", "K" that is present."""
        return "K" if self.K is not None else "H" if self.H is not None else "W"

    def join(self, later: Increment) -> Increment:
        r"""Return the increment over both intervals, with the fields that both have, by Chen's relation.

        With $x = h_1/h$ and $y = h_2/h$: $W = W_1 + W_2$, $H = x(H_1 - W_2/2) + y(H_2 + W_1/2)$,
        $K = x^2 K_1 + y^2 K_2 + xy(H_1 - H_2)/2 + (x - y)(x W_2 - y W_1)/12$ and
        $A = A_1 + A_2 + (W_1 W_2^T - W_2 W_1^T)/2$. Associative up to rounding. Source: B, section 2.3.

        Raises:
            InputError: the shapes or devices of W differ.
        """
        _validation.check_instance("later", later, Increment, "an Increment")
        if self.W.shape != later.W.shape:
            got, expected = tuple(later.W.shape), tuple(self.W.shape)
            raise InputError(f"later: got W of shape {got}, expected {expected}. Join increments of one path.")
        if self.W.device != later.W.device:
            raise InputError(
                f"later: got W on {later.W.device}, expected {self.W.device}. Move it with later.to(device=...)."
            )
        h = self.h + later.h
        x, y = self.h / h, later.h / h
        H = K = A = None
        if self.H is not None and later.H is not None:
            H = x * torch.sub(self.H, later.W, alpha=0.5) + y * torch.add(later.H, self.W, alpha=0.5)
            if self.K is not None and later.K is not None:
                K = x * x * self.K + y * y * later.K + (x * y / 2) * (self.H - later.H)
                K = K + ((x - y) / 12) * (x * later.W - y * self.W)
        if self.A is not None and later.A is not None:
            A = self.A + later.A + 0.5 * wedge(self.W, later.W)
        return Increment(h, self.W + later.W, H, K, A)

    def reversed(self) -> Increment:
        """Return the increment of the same path from its end back to its start: (-h, -W, H, -K, -A)."""
        K, A = (None if x is None else -x for x in (self.K, self.A))
        return Increment(-self.h, -self.W, self.H, K, A)

    @property
    def U(self) -> Tensor:
        r"""The time integral $U = \int W\,ds = h (W/2 + H)$, as in torchsde; raises InputError without H."""
        if self.H is None:
            raise InputError('U: got an increment without H. Make the path with levy="H".')
        return self.h * (self.W / 2 + self.H)

    @classmethod
    def from_U(cls, h: float, W: Tensor, U: Tensor) -> Increment:
        """Return the increment with torchsde's pair (W, U): H = U/h - W/2."""
        return cls(h, W, U / h - W / 2)

    def coordinates(self) -> tuple[Tensor, ...]:
        """Return the independent N(0, 1) Legendre coordinates xi_n that are present, each shaped like W.

        xi_0 = W/sqrt(h), xi_1 = sqrt(12/h) H, xi_2 = sqrt(720/h) K. With L_n = int P_n(2s/h - 1) dW
        this is xi_n = (-1)^n sqrt((2n+1)/h) L_n: the sign of H, not that of L_1.
        """
        areas = [x * _sqrt(c / self.h) for x, c in ((self.H, 12), (self.K, 720)) if x is not None]
        return self.W / _sqrt(self.h), *areas

    @classmethod
    def from_coordinates(cls, h: float, *xi: Tensor) -> Increment:
        """Invert `coordinates`, for one to three tensors; raises InputError for another number."""
        if not 1 <= len(xi) <= 3:
            raise InputError(f"xi: got {len(xi)} coordinates, expected 1 (W), 2 (W, H) or 3 (W, H, K).")
        h = _validation.check_float("h", h, 2.0**-1000, expected="a positive length")
        for x in xi:
            _validation.check_instance("xi", x, Tensor, "tensors")
        return cls(h, *(math.sqrt(h / c) * x for c, x in zip((1, 12, 720), xi)))

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Increment:
        """Return the increment in another dtype or on another device."""
        dtype = _validation.check_dtype(dtype)
        device = None if device is None else _validation.check_device(device)
        fields = (None if x is None else x.to(device, dtype) for x in (self.W, self.H, self.K, self.A))
        h: Any = self.h.to(device) if isinstance(self.h, Tensor) else self.h
        return Increment(h, *fields)  # type: ignore[arg-type]


def _sqrt(x: Any) -> Any:
    return x.sqrt() if isinstance(x, Tensor) else math.sqrt(x)


def wedge(a: Tensor, b: Tensor) -> Tensor:
    """Return a b' - b a', (..., m, m), antisymmetric to the bit."""
    outer = a.unsqueeze(-1) * b.unsqueeze(-2)
    return outer - outer.mT


def letters_for(*needs: str) -> str:
    """The `levy` of a path for solvers whose cards need these: A is drawn given W and H."""
    least = [{"A": "H", "": "W"}.get(levy, levy) for levy in needs]
    return next(levy for levy in reversed(LEVY_ORDER) if levy in least)


def check_dtype(dtype: torch.dtype | None) -> torch.dtype:
    """Check that `dtype` is float32 or float64, by default torch's."""
    dtype = torch.get_default_dtype() if dtype is None else dtype
    if not isinstance(dtype, torch.dtype) or dtype not in (torch.float32, torch.float64):
        raise InputError(
            f"dtype: got {dtype!s:.80}, expected torch.float32 or torch.float64. Convert increments with .to(dtype): "
            "sums of half precision noise lose the path."
        )
    return dtype


def _shortest(t: float) -> str:
    """The time in six digits if they give it exactly, else in all."""
    return f"{t:g}" if float(f"{t:g}") == t else repr(t)


def check_path(
    path: Any, who: str, levy: str, shape: tuple[int, ...], ends: tuple[float, float],
    dtype: torch.dtype | None = None, device: torch.device | None = None, method: str = "increments",
    argument: str = "path",
    cure: str = "Make the path over at least this interval.",
) -> None:  # fmt: skip
    """Raise an `InputError` unless a path gives the increments that a solver or a plan needs.

    Args:
        who, levy: the name of the solver or plan, and the Lévy data that it needs, as on its card.
        shape, dtype, device: of W; dtype if it matters.
        ends: the times between which increments are needed. Paths without t0 and t1 are not checked.
        method: the method of the path that is called, `"increments"` or `"increment"`.
        argument, cure: the name of the caller's argument, and what to do about a path that is too short.
    """
    if not hasattr(path, method) or getattr(path, "levy", None) not in LEVY_ORDER:
        raise InputError(
            f"{argument}: got {_validation.describe(path)}, expected a BrownianPath, AreaPath or "
            "FreshIncrements. Wrap a torchsde path: fewstep.integrations.torchsde.TorchsdePath(bm)."
        )
    if levy == "A" and not getattr(path, "area", False):
        raise InputError(
            f"{argument}: got a {type(path).__name__} without space-space area; {who} needs A. Pass "
            "AreaPath(BrownianPath(...), cells=...), or none: areas with the right law are then drawn."
        )
    if levy in LEVY_ORDER and LEVY_ORDER[path.levy] < LEVY_ORDER[levy]:
        cure = f"Make the path with levy={levy!r}."
        if hasattr(path, "interval"):  # of torchsde
            cure = f'Make it with levy_area_approximation="space-time", which gives H, or BrownianPath(levy={levy!r}).'
        raise InputError(f"{argument}: got levy={path.levy!r}; {who} needs {levy!r}. {cure}")
    got = tuple(getattr(path, "shape", shape))
    if got != shape:
        raise InputError(f"{argument}: got shape {got}, expected {shape}. Make the path with this shape.")
    t0, t1 = getattr(path, "t0", ends[0]), getattr(path, "t1", ends[1])
    # times may have been rounded to float32; the path itself checks them precisely
    slack = [1e-6 * min(abs(end), max(ends[1] - ends[0], 0.0)) for end in ends]
    if t0 > ends[0] + slack[0] or t1 < ends[1] - slack[1]:
        spans = [f"[{_shortest(a)}, {_shortest(b)}]" for a, b in ((t0, t1), ends)]
        raise InputError(f"{argument}: got {spans[0]}, expected a path over {spans[1]}. {cure}")
    if dtype is not None and getattr(path, "dtype", dtype) != dtype:
        raise InputError(f"{argument}: got {path.dtype}, expected {dtype}. Make the path with dtype={dtype}.")
    if device is not None:
        check_device_of(argument, path, device)


def check_device_of(argument: str, path: Any, device: torch.device) -> None:
    """Raise an `InputError` for a path whose increments are on another device than the state."""
    own = getattr(path, "device", device)
    if torch.empty(0, device=own).device != device:  # "cuda" is "cuda:0"
        cure = f"Make the path with device={str(device)!r}."
        raise InputError(f"{argument}: got a path on {own}, expected one on {device}, as the state. {cure}")
