"""fewstep: learned and classical SDE/ODE solvers that need few steps.

The public names are those of `__init__.pyi`; each is imported when it is first used.
"""

from importlib.metadata import version as _version
from typing import Any

import lazy_loader as _lazy

_attribute, __dir__, __all__ = _lazy.attach_stub(__name__, __file__)
__version__: str = _version("fewstep")
_RENAMED = {"Denoising": "DiffusionModel", "Tape": "PlanBuilder"}  # 0.1 -> 0.2


def __getattr__(name: str) -> Any:
    if name in _RENAMED:
        import warnings

        new = _RENAMED[name]
        warnings.warn(f"fewstep.{name} is now fewstep.{new}.", DeprecationWarning, stacklevel=2)
        return _attribute(new)
    return _attribute(name)
