"""Seven methods for the space-space Lévy area A_ij = (1/2)(int W^i dW^j - int W^j dW^i) of an increment.

Each draws what the increment does not determine, so that (W, H, K, A) has the right joint law: exactly in its first
two conditional moments ("davie" on average), or up to an L2 error that decreases with the number of terms.

There are two expansions. For h = 1, with X, Y, zeta_n independent N(0, I_m) (B, sections 3.1 and 3.2,
where B is arXiv 2405.06464):

    Legendre  A = (1/2) sum_n (zeta_{n-1} zeta_n' - zeta_n zeta_{n-1}') / sqrt(4n^2 - 1)
    Fourier   A = (S - S') / (2 pi),   S = sum_k (Y_k - sqrt2 W) X_k' / k

W, H and K are zeta_0, -zeta_1/sqrt12 and zeta_2/sqrt720 of the first, and of the second
sqrt2 pi H = sum_k X_k/k and 2 sqrt2 pi^2 K = sum_k Y_k/k^2, on which X and Y are conditioned.
"""

import math

import torch
from torch import Tensor

from .. import _validation
from .._tracing import new_generator
from ..errors import InputError
from .increment import LEVY_ORDER, Increment, wedge
from .random_normals import key_of

_WEAK = ("davie", "foster")
_FOURIER = ("fourier", "milstein", "wiktorsson", "mrongowius_roessler")
MOST_TERMS = 1 << 20  # each is a field of normals
FEW_TERMS = 8  # of Legendre's series, summed one by one; more are one product of matrices
METHODS = (*_WEAK, *_FOURIER, "legendre")


def levy_area(
    increment: Increment, method: str = "foster", seed: int | torch.Generator = 0, *,
    tol: float | None = None, terms: int | None = None,
) -> Tensor:  # fmt: skip
    """Draw the space-space area (..., m, m) of an increment with W (..., m); antisymmetric to the bit.

    Weak methods have the right moments given W, H (and K), by one draw: `"davie"` the conditional mean and the
    average conditional variance, `"foster"` the conditional mean and covariance of all pairs of channels.

    Strong methods give A within an L2 error of the area of a path with these W, H, K:

    - `"legendre"`, `"fourier"`, `"milstein"`: error O(terms^-1/2); any increment.
    - `"mrongowius_roessler"`: O(terms^-1), the fewest normals at small h; increments without K.
    - `"wiktorsson"`: O(terms^-1); increments with W only.

    A coarse area cannot be refined: for areas of a `BrownianPath` use `AreaPath`, or join fine increments with A.

    Args:
        increment: W (..., m) with channels last, and optionally H and K.
        seed: an integer, or a torch.Generator on W's device. In a loop pass a generator or another
            integer per step, otherwise the areas of all steps are dependent.
        tol: the largest root mean square error of an entry, for strong methods; by default
            h^(3/2), which preserves strong order 1.
        terms: number of terms instead of tol; for `"legendre"` at least the number of known
            coordinates after W (H: 1, K: 2).

    Raises:
        InputError: an unknown method; both tol and terms, or one for a weak method; W without a channel axis;
            H or K for a method that cannot be conditioned on it; a generator on another device.

    References: Davie (2014); Foster, Lyons & Oberhauser, arXiv 1904.06998; Kloeden, Platen & Wright
    (1992); Wiktorsson, Ann. Appl. Probab. 11 (2001); Mrongowius & Rößler, Stoch. Anal. Appl. 40
    (2022); constants as in Kastner & Rößler, arXiv 2201.08424, and B, section 3.2.
    """
    _check(increment, method, tol, terms)
    if method not in _WEAK and terms is None:
        terms = terms_for(method, increment.h, increment.W.shape[-1], tol)
    draw = _Draw(increment.W, seed)
    series = _fourier if method in _FOURIER else _legendre
    return series(increment, method, draw, terms or 0)


def terms_for(method: str, h: float, m: int, tol: float | None = None) -> int:
    """Number of terms for which a strong method's error is at most tol (default h^(3/2)); B, section 3.2."""
    tol = h**1.5 if tol is None else tol
    ratio = (h / tol) ** 2
    if method == "legendre":
        return max(1, math.ceil((ratio / 4 - 1) / 2))
    constants = {"fourier": 3 / 2, "milstein": 1 / 2, "wiktorsson": 5 * m / 12, "mrongowius_roessler": m / 12}
    square = constants[method] / math.pi**2 * ratio
    return max(1, math.ceil(square if method in ("fourier", "milstein") else math.sqrt(square)))


class _Draw:
    """A source of standard normals (*batch, *event) in W's dtype and on its device."""

    def __init__(self, W: Tensor, seed: int | torch.Generator) -> None:
        self.batch, self.m, self.W = W.shape[:-1], W.shape[-1], W
        if not isinstance(seed, torch.Generator):
            key = key_of(_validation.check_seed(seed))
            seed = new_generator(W.device).manual_seed(key >> 1)
        if seed.device.type != W.device.type:
            raise InputError(f"seed: got a generator on {seed.device}, expected one on W's device, {W.device}.")
        self.generator = seed

    def __call__(self, *event: int) -> Tensor:
        # float64 normals take six times as long and have the same law
        z = torch.randn(*self.batch, *event, generator=self.generator, device=self.W.device, dtype=torch.float32)
        return z.to(self.W.dtype)

    def pairs(self) -> Tensor:
        """An antisymmetric (..., m, m) with independent N(0, 1) above the diagonal."""
        i, j = torch.triu_indices(self.m, self.m, 1, device=self.W.device)
        upper = self.W.new_zeros(*self.batch, self.m, self.m)
        upper[..., i, j] = self(len(i))
        return upper - upper.mT


def _legendre(inc: Increment, method: str, draw: _Draw, terms: int) -> Tensor:
    """Sum the series over known and drawn coordinates; weak methods add noise for the rest."""
    zeta = [x if n % 2 == 0 else -x for n, x in enumerate(inc.coordinates())]
    if len(zeta) == 1 or method == "legendre":
        zeta += [draw(draw.m) for _ in range(max(terms + 1, 2) - len(zeta))]
    area = torch.zeros_like(inc.W.unsqueeze(-1) * inc.W.unsqueeze(-2))
    q = len(zeta) - 1
    if q <= FEW_TERMS:
        for n in range(1, q + 1):
            area = area + wedge(zeta[n - 1], zeta[n]) / math.sqrt(4 * n * n - 1)
    else:
        stacked, k = torch.stack(zeta, -1), torch.arange(1, q + 1, dtype=inc.W.dtype, device=inc.W.device)
        with torch.autocast(inc.W.device.type, enabled=False):
            half = (stacked[..., :-1] / (4 * k * k - 1).sqrt()) @ stacked[..., 1:].mT
        area = half - half.mT
    rest, link = 1 / (2 * q + 1), 1 / (4 * (q + 1) ** 2 - 1)
    if method == "davie":
        area = area + math.sqrt(rest) * draw.pairs()
    if method == "foster":
        # the next coordinate gives the covariance between pairs; for m = 2 this is Foster's normal
        area = area + math.sqrt(link) * wedge(zeta[q], draw(draw.m))
        area = area + math.sqrt(rest - 2 * link) * draw.pairs()
    return (inc.h / 2) * area


def _fourier(inc: Increment, method: str, draw: _Draw, n: int) -> Tensor:
    """Sum n terms of the Fourier series and the method's tail."""
    W = inc.W / math.sqrt(inc.h)
    k = torch.arange(1, n + 1, dtype=W.dtype, device=W.device)
    X, Y = draw(draw.m, n), draw(draw.m, n)
    variance = _zeta_tail(2, n)
    T = math.sqrt(variance) * draw(draw.m)  # sum of X_k / k beyond n
    if inc.H is not None:
        goal = math.sqrt(2 / inc.h) * math.pi * inc.H
        miss = (goal - (X / k).sum(-1) - T) / (math.pi**2 / 6)
        X, T = X + miss.unsqueeze(-1) / k, T + variance * miss
    if inc.K is not None:
        goal = 2 * math.sqrt(2 / inc.h) * math.pi**2 * inc.K
        tail = math.sqrt(_zeta_tail(4, n)) * draw(draw.m)
        miss = (goal - (Y / k**2).sum(-1) - tail) / (math.pi**4 / 90)
        Y = Y + miss.unsqueeze(-1) / k**2
    base = ((Y - math.sqrt(2) * W.unsqueeze(-1)) / k) @ X.mT
    area = base - base.mT
    if method in ("milstein", "mrongowius_roessler"):
        area = area - math.sqrt(2) * wedge(W, T)
    if method == "mrongowius_roessler":
        area = area + math.sqrt(2 * variance) * draw.pairs()
    if method == "wiktorsson":
        G = math.sqrt(2 * variance) * draw.pairs()
        GW = (G * W.unsqueeze(-2)).sum(-1)
        root = torch.sqrt(1 + (W * W).sum(-1, keepdim=True))
        area = area + G + wedge(GW / (1 + root), W)
    return (inc.h / (2 * math.pi)) * area


def _zeta_tail(power: int, n: int) -> float:
    """sum over k > n of k^-power, for power 2 or 4."""
    psi = torch.special.polygamma(power - 1, torch.tensor(n + 1.0, dtype=torch.float64, device="cpu"))
    return float(psi) / math.factorial(power - 1)


def _check(inc: Increment, method: str, tol: float | None, terms: int | None) -> None:
    _validation.check_instance("increment", inc, Increment, "an Increment")
    _validation.check_choice("method", method, METHODS)
    if inc.W.dim() == 0:
        raise InputError("increment: got a 0-d W, expected (..., m) with channels last. Reshape it.")
    _validation.check_no_graph("increment.h", inc.h)
    if tol is not None and terms is not None:
        raise InputError("tol, terms: got both, expected one. Leave out terms to use as many as tol needs.")
    if method in _WEAK and (tol is not None or terms is not None):
        raise InputError(
            f"method: got {method!r} with tol or terms, which belong to strong methods. "
            "For a strong area use method='legendre' or 'mrongowius_roessler'."
        )
    if tol is not None and not _validation.check_float("tol", tol) > 0:
        raise InputError(f"tol: got {tol!r}, expected a positive error.")
    if terms is not None:
        terms = _validation.check_int("terms", terms, 1, MOST_TERMS)
    limit = {"wiktorsson": "W", "mrongowius_roessler": "H"}.get(method, "K")
    if LEVY_ORDER[inc.levy] > LEVY_ORDER[limit]:
        cure = "Use 'legendre', or Increment(h, W)."
        raise InputError(f"method: got {method!r} for an increment with {inc.levy}, expected {limit} at most. {cure}")
