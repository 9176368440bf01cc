"""Measuring: orders of convergence, work-precision, distances. Never imported by `fewstep` itself."""

from __future__ import annotations

from . import problems
from .convergence import OrderEstimate, strong_order, strong_orders, weak_order, weak_orders
from .records import Record
from .work import work_precision

__all__ = [
    "OrderEstimate", "Record", "problems", "strong_order", "strong_orders", "weak_order", "weak_orders",
    "work_precision",
]  # fmt: skip
