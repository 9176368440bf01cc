"""Learned solvers on disk: safetensors for numbers, JSON for words; a file cannot run code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from .._serialization import whole
from ..plan import Plan

FORMAT = "fewstep-student-1"


def write(path: str | Path, kind: str, network: nn.Module, meta: dict[str, Any], plan: Plan | None) -> None:
    """A student: its kind, its network's name, config and weights, and its plan where it has one."""
    from safetensors.torch import save_file

    tensors = {f"network.{k}": v.contiguous() for k, v in network.state_dict().items()}
    meta = meta | {
        "format": FORMAT, "kind": kind, "network": type(network).__name__,
        "config": getattr(network, "config", None),
    }  # fmt: skip
    if plan is not None:
        tensors |= {f"plan.{k}": v for k, v in plan.tensors().items()}
        meta["plan"] = {"name": plan.name, "prediction": plan.prediction}
    with whole(path) as part:
        save_file(tensors, str(part), {"fewstep": json.dumps(meta)})
