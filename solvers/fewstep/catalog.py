"""The table of solvers of the public surface."""

from __future__ import annotations

from . import _validation
from .problem import NOISE_TYPES
from .solver import Solver

PACKAGES = ("sde", "samplers")  # learned solvers have no default: their fits make them


def solvers(noise_type: str | None = None) -> dict[str, Solver]:
    """Every solver of this library with its default options, keyed by name.

    Args:
        noise_type: only the solvers that solve SDEs with this noise type.

    Raises:
        InputError: an unknown noise type.
    """
    import fewstep

    if noise_type is not None:
        _validation.check_choice("noise_type", noise_type, NOISE_TYPES)
    kinds = (getattr(fewstep, name) for name in sorted(dir(fewstep)))
    found = (
        kind() for kind in kinds
        if isinstance(kind, type) and issubclass(kind, Solver) and kind.__module__.split(".")[1] in PACKAGES
    )  # fmt: skip
    return {type(s).__name__: s for s in found if noise_type in (None, *s.card.strong_order)}
