"""Brownian motion: increments and how they join, refinable paths, independent draws, Lévy areas."""

from .area_path import AreaPath
from .fresh import FreshIncrements
from .increment import Increment
from .levy_area import levy_area
from .path import BrownianPath

__all__ = ["AreaPath", "BrownianPath", "FreshIncrements", "Increment", "levy_area"]
