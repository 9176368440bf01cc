"""k-diffusion's samplers, imported without the packages that only its training scripts need."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

UNUSED = ("torchvision", "torchvision.transforms", "torchvision.transforms.functional")


def installed() -> bool:
    """Whether it can be imported: pip install --no-deps k-diffusion==0.1.1 torchdiffeq."""
    return all(importlib.util.find_spec(name) for name in ("k_diffusion", "torchdiffeq"))


@contextmanager
def modules() -> Iterator[tuple[ModuleType, ModuleType]]:
    """`k_diffusion.sampling` and `.external`; `sys.modules` is as before on leaving."""
    spec = importlib.util.find_spec("k_diffusion")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    package = ModuleType("k_diffusion")
    package.__path__ = list(spec.submodule_search_locations)
    missing = UNUSED if importlib.util.find_spec("torchvision") is None else ()
    before = dict(sys.modules)
    try:
        sys.modules["k_diffusion"] = package
        for name in missing:  # named by k_diffusion.utils, not used
            made = sys.modules[name] = ModuleType(name)
            parent, _, last = name.rpartition(".")
            if parent:
                setattr(sys.modules[parent], last, made)
        yield importlib.import_module("k_diffusion.sampling"), importlib.import_module("k_diffusion.external")
    finally:
        for name in (*UNUSED, *[m for m in sys.modules if m.split(".")[0] == "k_diffusion"]):
            sys.modules.pop(name, None)
            if name in before:
                sys.modules[name] = before[name]
