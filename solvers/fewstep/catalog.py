"""The table of solvers of the public surface."""

from __future__ import annotations

from . import _validation
from .problem import NOISE_TYPES
from .solver import Solver


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
    classes = {name: getattr(fewstep, name) for name in fewstep.__all__}
    # learned solvers are made by their fits: they have no default
    found = {
        name: kind()
        for name, kind in sorted(classes.items())
        if isinstance(kind, type)
        and issubclass(kind, Solver)
        and kind.__module__.split(".")[1] in PACKAGES
        and not getattr(kind, "__abstractmethods__", None)
    }
    return {k: v for k, v in found.items() if noise_type in (None, *v.card.strong_order)}


PACKAGES = ("sde", "samplers")
