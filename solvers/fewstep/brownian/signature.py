"""Partial signatures: the exact Gaussian law of the iterated integrals with one Brownian letter.

The word (a, b) stands for `0^a j 0^b`: a time letters, one Brownian letter, b time letters,
innermost first,

    I_(a,b) = int_0^h s^a/a! (h-s)^b/b! dW_s,     so (0,0) = W, (0,1) = int W ds, (1,0) = int s dW.

All words with a + b <= depth span only depth + 1 dimensions a channel, so their joint covariance
is singular. They are therefore never factored: each is a linear map of the independent coordinates
`xi_0 .. xi_depth`,

    xi_n = sqrt((2n+1)/h) int_0^h P_n(1 - 2s/h) dW_s ~ N(0, 1),       P_n the Legendre polynomials,

which in the sign used here are W/sqrt(h), +sqrt(12/h) H and +sqrt(720/h) K (reference B, sections
2.1 and 2.2).
"""

from __future__ import annotations

import math
from fractions import Fraction
from functools import lru_cache

import torch
from torch import Tensor

from .. import _validation
from ..errors import InputError

Word = tuple[int, int]


def minimal_words(depth: int) -> tuple[Word, ...]:
    """The non-redundant words j, j0, ..., j0^depth as pairs (0, b)."""
    _check_depth(depth)
    return tuple((0, b) for b in range(depth + 1))


def all_words(depth: int) -> tuple[Word, ...]:
    """Every word 0^a j 0^b with a + b <= depth: (0,0), (0,1), (1,0), (0,2), (1,1), ..."""
    _check_depth(depth)
    return tuple((a, n - a) for n in range(depth + 1) for a in range(n + 1))


def partial_signature_covariance(depth: int, h: float, *, words: tuple[Word, ...] | None = None) -> Tensor:
    """The exact covariance of one channel's partial signature over an interval of length h.

    Returns float64 `(len(words), len(words))`; `words` defaults to `minimal_words`, for which the
    matrix is non-singular; for `all_words` its rank is depth + 1 (B, 2.1). Channels are
    independent. Raises InputError for a negative depth, or an h that is not a positive number.
    """
    chosen = minimal_words(depth) if words is None else words
    _check_length(h)
    f = math.factorial

    def entry(left: Word, right: Word) -> float:
        (a, b), (c, d) = left, right
        ratio = Fraction(f(a + c) * f(b + d), f(a) * f(b) * f(c) * f(d) * f(a + b + c + d + 1))
        return float(ratio) * h ** (a + b + c + d + 1)

    return torch.tensor([[entry(p, q) for q in chosen] for p in chosen], dtype=torch.float64)


def partial_signature_map(depth: int, h: float, *, words: tuple[Word, ...] | None = None) -> Tensor:
    """The matrix T with `signature = T @ (xi_0, ..., xi_depth)`: float64 `(len(words), depth + 1)`.

    `T @ T.T` equals `partial_signature_covariance`, also for redundant words. Raises InputError as
    there, and for a word longer than the depth can express.
    """
    chosen = minimal_words(depth) if words is None else words
    _check_length(h)
    for a, b in chosen:
        if a + b > depth:
            raise InputError(
                f"words: the word {(a, b)} needs depth {a + b}, got depth {depth}; "
                "raise depth or drop the word"
            )
    rows = [[c * h ** (a + b + 0.5) for c in _row(a, b, depth)] for a, b in chosen]
    return torch.tensor(rows, dtype=torch.float64)


def signature_from_coordinates(xi: Tensor, h: float, words: tuple[Word, ...]) -> Tensor:
    """(..., len(words)) iterated integrals from unit coordinates xi (..., depth + 1)."""
    depth = xi.shape[-1] - 1
    matrix = partial_signature_map(depth, h, words=words)
    # Not a matmul: TF32, where users switch it on, would keep ten bits.
    columns = matrix.to(dtype=xi.dtype, device=xi.device)
    return (xi.unsqueeze(-2) * columns).sum(-1)


@lru_cache(maxsize=1024)
def _row(a: int, b: int, depth: int) -> tuple[float, ...]:
    """Coefficients of xi_0, ..., xi_depth in I_(a,b) at h = 1."""
    return tuple(
        float(_moment(a, b, n)) * math.sqrt(2 * n + 1) if n <= a + b else 0.0 for n in range(depth + 1)
    )


def _moment(a: int, b: int, n: int) -> Fraction:
    """int_0^1 x^a (1-x)^b / (a! b!) P_n(1-2x) dx; P_n(1-2x) = sum_k (-x)^k C(n,k) C(n+k,k)."""
    f = math.factorial
    total = Fraction(0)
    for k in range(n + 1):
        beta = Fraction(f(a + k) * f(b), f(a + b + k + 1))
        total += (-1) ** k * math.comb(n, k) * math.comb(n + k, k) * beta
    return total / (f(a) * f(b))


def _check_depth(depth: int) -> None:
    _validation.check_int("depth", depth, 0)


def _check_length(h: float) -> None:
    if not _validation.check_float("h", h) > 0:
        raise InputError(f"h: got {h!r}, expected a positive, finite interval length")
