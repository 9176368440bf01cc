"""How much of an error made at a noise level is left in the final sample."""

from torch import Tensor

from ..errors import InputError


def left_at_end(ends: Tensor, sigmas: Tensor) -> Tensor:
    r"""Return the share $s^2 / (s^2 + \sigma^2)$ of an error at each level that remains at the end, (steps,) float64.

    For Gaussian data of variance s^2 along a direction, dy = (D - y) d tau / tau takes an error made at level sigma
    to this share of it. For the probability-flow ODE, whose states scale as sqrt(s^2 + sigma^2), the share is its
    square root. s^2 is the mean variance over directions, weighted by variance: tr C^2 / tr C.

    Args:
        ends: (n, *event) samples, not all equal, else InputError.
        sigmas: (steps,) the levels.
    """
    flat = ends.double().flatten(1)
    apart = flat - flat.mean(0)
    if not bool(apart.any()):  # once, before training
        raise InputError("data: got samples that are all equal, expected at least two that differ.")
    gram = apart @ apart.T / (len(flat) - 1)
    along = (gram.square().sum() / gram.trace()).to(sigmas.device)
    return along / (along + sigmas.double().square())
