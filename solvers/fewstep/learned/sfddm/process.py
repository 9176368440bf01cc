"""The forward process of a single-fold student: the teacher's at a subsequence of its levels."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from ... import _validation
from ...errors import InputError
from ...schedule import DiscreteVP

SPACINGS = ("trailing", "uniform", "logsnr")
SIGNAL = 0.02  # of x0 in the last level, above which starting from pure noise shows


def subsequence(teacher: DiscreteVP, steps: int, spacing: str = "trailing") -> Tensor:
    """(steps,) increasing labels phi of the teacher.

    Args:
        spacing: "trailing", round((k+1) T/T') - 1, ends at the teacher's last; "uniform", k T/T', of the
            released code, falls short of it; "logsnr" is even in log sigma and ends at the last.

    Raises:
        InputError: an unknown word, or more steps than labels.
    """
    _validation.check_instance(
        "teacher", teacher, DiscreteVP, "a DiscreteVP, the teacher's levels as a table"
    )
    T = len(teacher.log_sigmas)
    _validation.check_int("steps", steps, 1, T)
    _validation.check_choice("spacing", spacing, SPACINGS)
    k = torch.arange(steps, dtype=torch.float64)
    if spacing == "uniform":
        return (k * (T / steps)).floor().long()
    if spacing == "trailing":
        return ((k + 1) * (T / steps)).round().long() - 1
    table = teacher.log_sigmas.double().cpu()
    # from the last label down; the first is a step above the smallest, as x0 itself comes after it
    levels = torch.lerp(table[0], table[-1], (k + 1) / steps)
    phi = teacher.time(levels.exp()).round().long()
    while bool((phi.diff() <= 0).any()):  # near the smallest level labels are further apart than asked
        phi[1:] = torch.maximum(phi[1:], phi[:-1] + 1)
    return phi - (phi - torch.arange(T - steps, T)).clamp(min=0)


class StudentProcess(DiscreteVP):
    """q'(x'_k | x0) = q(x_phi(k) | x0): abar'_k = abar_phi(k) (arXiv 2405.14961, its released code).

    A schedule like any other: every sampler takes it, `labels` are 0 ... T'-1.

    Args:
        teacher: the table of T levels.
        phi: (T',) increasing labels of it; see `subsequence`.

    Warns:
        UserWarning: phi ends before the teacher's last label, and keeps so much of x0 there that samples
            begun from noise alone will show it.

    Raises:
        InputError: phi is not increasing or not within the table.
    """

    def __init__(self, teacher: DiscreteVP, phi: Tensor) -> None:
        _validation.check_instance(
            "teacher", teacher, DiscreteVP, "a DiscreteVP, the teacher's levels as a table"
        )
        said, T = _validation.check_numbers("phi", phi), len(teacher.log_sigmas)
        whole = said.dim() == 1 and len(said) > 0 and not torch.as_tensor(phi).is_floating_point()
        if not whole or bool((said.diff() <= 0).any()) or not 0 <= int(said[0]) <= int(said[-1]) < T:
            raise InputError(f"phi: got {said.tolist()}, expected increasing labels in 0 ... {T - 1}.")
        phi = torch.as_tensor(phi)
        self.phi = phi
        self.log_sigmas: Tensor = teacher.log_sigmas.cpu()[phi]
        self.labels: int = len(phi)
        signal = float(self.abar[-1].sqrt())
        if signal > SIGNAL and int(phi[-1]) < T - 1:  # at the last label the teacher's samples miss it too
            warnings.warn(
                f"phi ends at label {int(phi[-1])} of {T}, where {signal:.1%} of x0 is left: samples that "
                'begin as noise alone will miss it. End at the last label, as spacing="trailing" does.',
                stacklevel=2,
            )  # fmt: skip

    @property
    def abar(self) -> Tensor:
        """(T',) the squared share of x0, 1 / (1 + sigma^2)."""
        return 1 / (1 + torch.exp(2 * self.log_sigmas))

    @property
    def alphas(self) -> Tensor:
        """(T',) alpha'_k = abar'_k / abar'_(k-1), alpha'_0 = abar'_0: their products telescope to abar'."""
        return self.abar / torch.cat([torch.ones(1, dtype=torch.float64), self.abar[:-1]])

    @property
    def betas(self) -> Tensor:
        """(T',) 1 - alpha'."""
        return 1 - self.alphas

    def posterior(self, k: int, x0: Tensor, x_k: Tensor) -> tuple[Tensor, float]:
        """Mean and variance of q'(x'_(k-1) | x'_k, x0), k from 1 (arXiv 2006.11239, Eq. 7)."""
        _validation.check_int("k", k, 1, len(self.phi) - 1)
        _validation.check_state("x0", x0)
        _validation.check_state("x_k", x_k)
        before, now, alpha = float(self.abar[k - 1]), float(self.abar[k]), float(self.alphas[k])
        mean = before**0.5 * (1 - alpha) / (1 - now) * x0 + alpha**0.5 * (1 - before) / (1 - now) * x_k
        return mean, (1 - alpha) * (1 - before) / (1 - now)

    def grid(self) -> Tensor:
        """(T' + 1,) the levels of T'-step sampling: all of them from the noisiest, then 0."""
        return torch.cat([self.log_sigmas.exp().flip(0), torch.zeros(1, dtype=torch.float64)])
