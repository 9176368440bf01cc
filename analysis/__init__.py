"""Measuring: orders of convergence, work-precision, distances. Never imported by `fewstep` itself."""

from __future__ import annotations

from . import problems
from .convergence import OrderEstimate, strong_order, strong_orders
from .records import Record

__all__ = ["OrderEstimate", "Record", "problems", "strong_order", "strong_orders"]
