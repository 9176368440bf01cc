"""Brownian motion: increments and their join, refinable paths, fresh draws, Lévy areas."""

from __future__ import annotations

from .area_path import AreaPath
from .fresh import FreshIncrements
from .increment import Increment
from .levy_area import levy_area
from .path import BrownianPath
from .signature import partial_signature_covariance

__all__ = [
    "AreaPath",
    "BrownianPath",
    "FreshIncrements",
    "Increment",
    "levy_area",
    "partial_signature_covariance",
]
