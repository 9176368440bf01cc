"""The forward process of a single-fold student: the teacher's at a subsequence of its levels."""

import torch
from torch import Tensor

from ... import _validation
from ...errors import InputError, warn
from ...schedule import DiscreteVP

SPACINGS = ("trailing", "uniform", "logsnr")
SIGNAL = 0.02  # amplitude of x0 at the last level above which starting from pure noise is visible


def subsequence(teacher: DiscreteVP, steps: int, spacing: str = "trailing") -> Tensor:
    """(steps,) increasing labels phi of the teacher, for a student of that many levels.

    Args:
        spacing: "trailing", round((k+1) T/T') - 1, ends at the teacher's last label, and so does "logsnr", even in
            log sigma; "uniform", k T/T', of the released code, falls short of it.

    Raises:
        InputError: an unknown word, or more steps than labels.
    """
    _validation.check_instance("teacher", teacher, DiscreteVP, "a DiscreteVP, the teacher's levels as a table")
    T = len(teacher.log_sigmas)
    steps = _validation.check_int("steps", steps, 1, T)
    _validation.check_choice("spacing", spacing, SPACINGS)
    k = torch.arange(steps, dtype=torch.float64)
    if spacing == "uniform":
        return (k * (T / steps)).floor().long()
    if spacing == "trailing":
        return ((k + 1) * (T / steps)).round().long() - 1
    table = teacher.log_sigmas.double().cpu()
    # the first label is a step above the smallest, because x0 itself comes after it
    levels = torch.lerp(table[0], table[-1], (k + 1) / steps)
    phi = teacher.time(levels.exp()).round().long()
    while bool((phi.diff() <= 0).any()):  # near the smallest level labels are further apart than steps
        phi[1:] = torch.maximum(phi[1:], phi[:-1] + 1)
    return phi - (phi - torch.arange(T - steps, T)).clamp(min=0)


class StudentProcess(DiscreteVP):
    """The teacher's process at a subsequence of its levels: abar'_k = abar_phi(k) (arXiv 2405.14961, code).

    A schedule like any other, which every sampler accepts, with `labels` 0 ... T'-1.

    Args:
        teacher: the table of T levels.
        phi: (T',) increasing labels of it; see `subsequence`.

    Warns:
        UserWarning: phi ends where so much of x0 is left that it is visible in samples started from pure noise.

    Raises:
        InputError: phi is not increasing or not within the table.
    """

    def __init__(self, teacher: DiscreteVP, phi: Tensor) -> None:
        _validation.check_instance("teacher", teacher, DiscreteVP, "a DiscreteVP, the teacher's levels as a table")
        given, T = _validation.check_numbers("phi", phi), len(teacher.log_sigmas)
        integers = given.dim() == 1 and len(given) > 0 and not torch.as_tensor(phi).is_floating_point()
        if not integers or bool((given.diff() <= 0).any()) or not 0 <= int(given[0]) <= int(given[-1]) < T:
            raise InputError(f"phi: got {given.tolist()}, expected increasing labels in 0 ... {T - 1}.")
        phi = torch.as_tensor(phi).cpu()
        self.phi: Tensor = phi
        self.log_sigmas: Tensor = teacher.log_sigmas.cpu()[phi]
        self.labels: int = len(phi)
        signal = float(self.abar[-1].sqrt())
        if signal > SIGNAL and int(phi[-1]) < T - 1:  # at the last label the teacher has the same error
            message = f"phi ends at label {int(phi[-1])} of {T}, where {signal:.1%} of x0 is left: samples started from"
            message += ' pure noise lack it. End at the last label, as spacing="trailing" does.'
            warn(message)

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

    def grid(self) -> Tensor:
        """(T' + 1,) the levels of T'-step sampling, decreasing to 0."""
        return torch.cat([self.log_sigmas.exp().flip(0), torch.zeros(1, dtype=torch.float64)])
