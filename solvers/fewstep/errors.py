"""The exceptions: invalid input and non-finite results."""

import difflib
import sys
import warnings
from collections.abc import Callable, Iterable
from functools import wraps
from inspect import signature
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")
BETWEEN = ("fewstep", "fewstep_analysis", "torch", "torchsde", "diffusers", "k_diffusion", "contextlib", "functools")


class InputError(ValueError):
    """Invalid input. The message names the argument, the value received, the value expected, and how to fix it."""


class NonFiniteError(ArithmeticError):
    """A computation produced inf or nan.

    Attributes:
        step: index (0-based) of the first step of a solve, or evaluation of a sample, that was not finite.
        paths: number of leading-axis samples that were not finite there.
    """

    def __init__(self, message: str, *, step: int, paths: int) -> None:
        super().__init__(message)
        self.step = step
        self.paths = paths


class StepSizeError(ArithmeticError):
    """Adaptive steps became too short or too many for the tolerance.

    Attributes:
        t: the time that was reached.
        y: (*batch, *event) the state there.
        solution: the `Solution` up to there, with the outputs that were due; None outside of `solve`.
    """

    def __init__(self, message: str, *, t: float, y: Any, solution: Any = None) -> None:
        super().__init__(message)
        self.t = t
        self.y = y
        self.solution = solution


def warn(message: str) -> None:
    """Warn at the user's line: the innermost call from outside of this library and of those between it and users."""
    frame = sys._getframe(1)
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).partition(".")[0] in BETWEEN:
        frame = frame.f_back
    module, registry = frame.f_globals.get("__name__"), frame.f_globals.setdefault("__warningregistry__", {})
    warnings.warn_explicit(message, UserWarning, frame.f_code.co_filename, frame.f_lineno, module, registry)


def describe(value: Any) -> str:
    """A short description of an argument: a tensor by dtype and shape, a class or function by its name."""
    import torch  # here, so that the command line starts without it

    if torch.is_tensor(value):
        if value.is_nested:
            return f"a nested tensor of {value.dtype}"
        layout = "" if value.layout == torch.strided else f" in the layout {value.layout}"
        return f"{value.dtype} of shape {tuple(value.shape)}{layout}"
    if isinstance(value, type) or callable(value):
        name = str(getattr(value, "__name__", ""))
        return name if name and isinstance(value, type) else f"{type(value).__name__} {name}".strip()
    if isinstance(value, (tuple, list)) and any(torch.is_tensor(v) for v in value):
        return f"{type(value).__name__} of {len(value)} tensors"
    if isinstance(value, int) and value.bit_length() > 400:  # Python refuses to print more than 4300 digits
        return f"an integer of {value.bit_length()} bits"
    plain = value is None or isinstance(value, (str, bytes, int, float, complex, tuple, list))
    text = ("list " if isinstance(value, list) else "") + repr(value) if plain else type(value).__name__
    return text if len(text) < 80 else text[:77] + "..."


def one_of(argument: str, got: object, expected: Iterable[str]) -> InputError:
    """An `InputError` for a string that is not in a list; suggests the closest one."""
    words = sorted(expected)
    plain = {w.lower(): w for w in words}
    near = difflib.get_close_matches(got.lower(), plain, n=1, cutoff=0.5) if isinstance(got, str) else []
    cure = f" Did you mean {plain[near[0]]!r}?" if near else ""
    return InputError(f"{argument}: got {describe(got)}, expected one of {', '.join(map(repr, words))}.{cure}")


def named(function: Callable[P, R]) -> Callable[P, R]:
    """Wrap a function so that an unknown keyword raises the error of `one_of`."""
    known = signature(function).parameters

    @wraps(function)
    def checked(*args: P.args, **options: P.kwargs) -> R:
        for name in options:
            if name not in known:
                raise one_of("option", name, known)
        return function(*args, **options)

    return checked


def moved(cure: str, *names: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Wrap a function so that options which it had in earlier versions raise an error that names their place."""

    def wrap(function: Callable[P, R]) -> Callable[P, R]:
        @wraps(function)
        def checked(*args: P.args, **options: P.kwargs) -> R:
            for name in names:
                if name in options:
                    raise InputError(f"{name}: got {describe(options[name])}, expected no such option. {cure}")
            return function(*args, **options)

        return checked

    return wrap
