"""What users can call: the names in `__all__` and in docs/api.md, by the code of their functions and methods."""

import inspect
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import fewstep as fs
import fewstep_analysis as fa

API = Path(__file__).parents[2] / "docs" / "api.md"
SPECIAL = ("__init__", "__post_init__", "__call__")


def public() -> dict[Any, str]:
    """The name of each public function and method, by its code without decorators."""
    found: list[Any] = [getattr(package, name) for package in (fs, fa) for name in package.__all__]
    for module in filter(inspect.ismodule, found.copy()):
        found += [v for k, v in vars(module).items() if k[0] != "_" and getattr(v, "__module__", "") == module.__name__]
    module = "fewstep"
    for kind, name in re.findall(r"^\.\. (currentmodule|auto\w+):: (\S+)", API.read_text(), re.MULTILINE):
        if kind == "currentmodule":
            module = name
            continue
        place, _, name = (name if name.startswith("fewstep") else f"{module}.{name}").rpartition(".")
        try:
            found.append(getattr(import_module(place), name))
        except ImportError:
            assert "diffusers" in place  # which is not installed
    names: dict[Any, str] = {}
    for value in found:
        owners = value.__mro__ if inspect.isclass(value) else ()
        members = [v for c in owners for k, v in vars(c).items() if k[0] != "_" or k in SPECIAL]
        for member in (value, *members):
            function = inspect.unwrap(getattr(member, "__func__", member))
            # neither generated nor another library's
            written = inspect.isfunction(function) and "/fewstep" in function.__code__.co_filename
            if written and not hasattr(function, "__isabstractmethod__"):
                names[function.__code__] = f"{function.__module__}.{function.__qualname__}"
    return names
