"""Checks of public arguments: each raises one clear `InputError` or returns the checked value."""

import json
import math
import operator
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

from ._tracing import constant, constants, holds
from .errors import InputError, one_of
from .errors import describe as describe

COUNT = 10**9  # of anything that an argument counts: more is a mistake, and torch's sizes end at 2^63
ITEMS = 10**7  # of a range
ELEMENTS = 2**36  # of a tensor: more is a mistake, and the sizes of larger ones overflow or exhaust the memory


def check_choice(argument: str, value: Any, words: Iterable[str]) -> str:
    """Check that a string is one of `words`."""
    known = list(words)
    if not isinstance(value, str) or value not in known:
        raise one_of(argument, value, known)
    return value


def check_int(argument: str, value: Any, least: float = 1, most: float = COUNT) -> int:
    """Check an integer in [least, most]; True, 3.0 and "3" are not accepted."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except (TypeError, ValueError, RuntimeError):
        number = None
    if number is None or not least <= number <= most:
        lower = f" of at least {least:g}" if least > -math.inf else ""
        above = number is not None and number > most
        upper = f" and at most {most:g}" if above or most < COUNT else ""
        raise InputError(f"{argument}: got {describe(value)}, expected an integer{lower}{upper}.")
    return number


def check_int_or_none(argument: str, value: Any, least: float = 1, most: float = COUNT) -> int | None:
    """Check an integer in [least, most], or None."""
    return None if value is None else check_int(argument, value, least, most)


def check_float(
    argument: str, value: Any, low: float = -math.inf, high: float = math.inf, expected: str = "a finite number"
) -> float:
    """Check a finite number in [low, high]; a tensor with one element and no graph is accepted."""
    check_no_graph(argument, value)
    try:
        refused = isinstance(value, (bool, str, bytes, list, tuple))
        number = math.nan if refused else float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        number = math.nan
    if not (low <= number <= high and math.isfinite(number)):
        raise InputError(f"{argument}: got {describe(value)}, expected {expected}.")
    return number


def check_flag(argument: str, value: Any) -> bool:
    """Check True or False; 1 and 0 stand for them."""
    if not isinstance(value, (bool, int, np.bool_)) or value not in (0, 1):
        raise InputError(f"{argument}: got {describe(value)}, expected True or False.")
    return bool(value)


def check_seed(value: Any, argument: str = "seed") -> int:
    """Check a seed: an integer in the range of torch's generators."""
    try:
        return check_int(argument, value, -(2**63), 2**64 - 1)
    except InputError as error:
        expected = "expected an integer from -2^63 to 2^64 - 1; a vmap shares one"
        raise InputError(f"{argument}: got {describe(value)}, {expected}.") from error


def check_seeds(value: Any, count: int | None = None, argument: str = "seeds") -> list[int]:
    """Convert a tensor or a sequence to one seed per sample, of `count` samples unless that is None."""
    given = constants(check_numbers(argument, value) if value.is_meta else value) if torch.is_tensor(value) else value
    each = [check_seed(s, argument) for s in check_sequence(argument, given, "integers, one for each sample")]
    if count is not None and len(each) != count:
        raise InputError(f"{argument}: got {len(each)}, expected one for each of the {count} samples.")
    return each


def check_device(value: Any, argument: str = "device") -> torch.device:
    """Parse a device and check that it is available."""
    try:
        if isinstance(value, bool) or not isinstance(value, (str, int, torch.device)):
            raise TypeError(f"{type(value).__name__} is not a device")
        found = torch.device(value)
        if found.type == "meta":
            raise TypeError("meta tensors have no values")
        torch.empty(0, device=found)
    except (RuntimeError, TypeError, ValueError, AssertionError, NotImplementedError) as error:
        reason = (str(error).splitlines() or ["not available"])[0]
        expected = f"an available device such as 'cpu' ({reason:.200})"
        raise InputError(f"{argument}: got {describe(value)}, expected {expected}.") from error
    return found


def check_dtype(value: Any, argument: str = "dtype") -> torch.dtype | None:
    """Check a floating-point dtype, or None."""
    if value is not None and not (isinstance(value, torch.dtype) and value.is_floating_point):
        raise InputError(f"{argument}: got {describe(value)}, expected a floating-point dtype such as torch.float32.")
    return value


def check_callable(argument: str, value: Any, expected: str) -> None:
    """Check that a value can be called."""
    if not callable(value):
        raise InputError(f"{argument}: got {describe(value)}, expected {expected}.")


def check_instance(argument: str, value: Any, kind: type | tuple[type, ...], expected: str) -> None:
    """Check that a value is an instance of a class (the class itself is not)."""
    if not isinstance(value, kind):
        raise InputError(f"{argument}: got {describe(value)}, expected {expected}.")


def check_state(
    argument: str, value: Any, expected: str = "a finite floating-point tensor (n, *event)", finite: bool = True
) -> Tensor:
    """Check a floating-point tensor with at least one axis, with finite values unless `finite` is False."""
    dense = isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta
    real = dense and value.is_floating_point() and value.element_size() > 1  # float8 has no arithmetic
    if not isinstance(value, Tensor) or not real or value.dim() == 0:
        cure = "" if torch.is_tensor(value) else " Use torch.as_tensor(..., dtype=torch.float32)."
        if dense:
            cure = " Add the axis of the batch: value.reshape(1)." if real else " Convert it: value.to(torch.float32)."
        raise InputError(f"{argument}: got {describe(value)}, expected {expected}.{cure}")
    if finite and not all_finite(value):
        count = int((~value.isfinite()).sum())
        raise InputError(f"{argument}: got {count} values that are not finite, expected {expected}.")
    return value


def all_finite(*values: Tensor) -> bool:
    """Whether all numbers are finite; True where they cannot be read. Where their sum is, one pass is enough."""
    total = torch.stack([value.detach().sum() for value in values]).sum()
    return holds(total.isfinite()) or holds(torch.stack([value.isfinite().all() for value in values]).all())


def as_numbers(argument: str, value: Any) -> Tensor:
    """Convert a tensor or a sequence of real numbers, of any shape, to float64, on its device and with its graph."""
    _check_length(argument, value)
    try:
        if value is None or isinstance(value, (str, bytes)):
            raise TypeError("not numbers")
        tensors = [v for v in value if torch.is_tensor(v)] if isinstance(value, (list, tuple)) else []
        if tensors:  # as_tensor would drop their graphs
            device = tensors[0].device
            value = torch.stack([torch.as_tensor(v, dtype=torch.float64, device=device) for v in value])
        found = torch.as_tensor(value)
        if found.is_complex() or found.is_meta or found.layout != torch.strided or found.dtype == torch.bool:
            raise TypeError("not real numbers")
        # torch would round a list of floats to its default dtype
        return torch.as_tensor(value, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{argument}: got {describe(value)}, expected a 1-D tensor of numbers.") from error


def check_reals(argument: str, value: Any) -> Tensor:
    """A tensor of real numbers as it is; anything else as a float64 tensor."""
    if not isinstance(value, Tensor):
        return as_numbers(argument, value)
    plain = value.layout == torch.strided and not (value.is_meta or value.is_complex() or value.dtype == torch.bool)
    if not plain or (value.is_floating_point() and value.element_size() == 1):
        raise InputError(f"{argument}: got {describe(value)}, expected a tensor of real numbers, best of float64.")
    return value


def check_input(x: Any, sigma: Any, argument: str = "sigma") -> Tensor:
    """Check the input of a denoiser, x (batch, *event) and sigma 0-d or (batch,); returns sigma as a tensor."""
    check_state("x", x, "a floating-point tensor (batch, *event)", finite=False)
    level = check_reals(argument, sigma)
    if level.dim() and (level.dim() > 1 or len(level) not in (1, len(x))):
        raise InputError(
            f"{argument}: got shape {tuple(level.shape)} for a batch of {len(x)}, expected a number or (batch,)."
        )
    if level.device != x.device and (level.dim() or level.device.type != "cpu"):
        raise InputError(f"{argument}: got a tensor on {level.device}, expected one on x's {x.device}. Move it.")
    return level


def at_once(value: Any) -> bool:
    """Whether values can be read without waiting for a device; elsewhere they are checked at the end of a run."""
    return not torch.is_tensor(value) or value.device.type == "cpu"


def check_numbers(argument: str, value: Any, dtype: torch.dtype | None = None) -> Tensor:
    """Convert a tensor or a sequence of real numbers, of any shape, to float64 on the CPU; refuse a graph.

    Args:
        dtype: of the user's numbers where they were converted before.
    """
    found = as_numbers(argument, value)
    check_no_graph(argument, found)
    numbers = found.detach().cpu()
    return constant(argument, numbers, dtype or value.dtype) if torch.is_tensor(value) else numbers


def has_graph(value: Tensor) -> bool:
    """Whether a result computed from a tensor would have a derivative with respect to it, in either mode."""
    backward = value.requires_grad and torch.is_grad_enabled()
    if backward or torch.compiler.is_compiling():
        return backward
    return forward_ad.unpack_dual(value).tangent is not None  # type: ignore[no-untyped-call]


def check_no_graph(argument: str, value: Any) -> None:
    """Refuse a tensor with a graph where no gradient flows."""
    if torch.is_tensor(value) and has_graph(value):
        raise InputError(
            f"{argument}: got a tensor that requires grad, expected one without a graph: no gradient flows to it. Pass "
            "tensor.detach()."
        )


def times_dtype(value: Any) -> torch.dtype | None:
    """The floating-point dtype of a tensor or array of times; None for integers and sequences."""
    dtype = torch.as_tensor(value).dtype if hasattr(value, "dtype") else None
    return dtype if dtype is not None and dtype.is_floating_point else None


def check_times(argument: str, value: Any, decreasing: bool = False, dtype: torch.dtype | None = None) -> Tensor:
    """Convert a tensor or a sequence of at least two strictly increasing times to float64 (n,) on the CPU.

    Args:
        decreasing: accept strictly decreasing times too.
        dtype: as in `check_numbers`.
    """
    times = check_numbers(argument, value, dtype)
    if times.dim() != 1 or len(times) < 2:
        expected = "(n,) with at least two times, for instance torch.linspace(0, 1, 65)"
        raise InputError(f"{argument}: got shape {tuple(times.shape)}, expected {expected}.")
    steps = times.diff()
    backward = bool(constants((steps < 0).all()))
    if not constants(times.isfinite().all() & (steps > 0).all()) and not (decreasing and backward):
        some = ", ".join(f"{t:.10g}" for t in constants(times[:6])) + ", ..." * (len(times) > 6)
        cure = "A Brownian motion runs forward in time" if backward else "Sort them and drop repeated ones"
        if (dtype or times_dtype(value)) not in (None, torch.float64) and constants((steps >= 0).all()):
            cure = "Times that are close are equal in low precision: pass them in float64"
        raise InputError(f"{argument}: got [{some}], expected finite, strictly increasing times. {cure}.")
    return times


def check_answer(
    name: str, value: Any, like: Tensor, where: str | Callable[[], str] = "", of: str = "x", hint: str = ""
) -> Tensor:
    """What a caller's function returned, in the dtype of `like`; its shape and device must be those of `like`.

    Lower precision (autocast, half precision networks) is converted, higher precision is refused. Nothing is read from
    a device.

    Args:
        where: the evaluation, for the message.
        of: the name of `like` in the message.
        hint: a last sentence of the message.
    """
    if (
        type(value) is Tensor
        and value.layout == torch.strided
        and not value.is_nested
        and value.dtype == like.dtype
        and value.shape == like.shape
        and value.device == like.device
    ):
        return value
    if not isinstance(value, Tensor) or value.is_nested or value.layout != torch.strided:
        cure = "Return one dense tensor." if isinstance(value, Tensor) else "Return one tensor."
    elif value.shape != like.shape:
        cure = f"Return one value for each component of {of}."
    elif value.device != like.device:
        cure = f"Move its parameters and constants to {of}'s device."
    else:
        most = torch.promote_types(like.dtype, torch.float32)
        real = value.is_floating_point() and value.element_size() > 1  # float8 has no arithmetic
        if real and torch.promote_types(value.dtype, most) == most:
            return value if value.dtype == like.dtype else value.to(like.dtype)
        cure = f"Convert its constants and parameters, or {of}."
    at = f" on {value.device}" if isinstance(value, Tensor) and value.device != like.device else ""
    expected = f"{like.dtype} of shape {tuple(like.shape)}" + (at and f" on {like.device}")
    place = where if isinstance(where, str) else where()
    raise InputError(f"{name}: got {describe(value)}{at}{place}, expected {of}'s {expected}. {cure} {hint}".rstrip())


def changes(x: Tensor) -> int:
    """How often x was changed in place; 0 where torch does not count."""
    return 0 if torch.compiler.is_compiling() or x.is_inference() else x._version


def check_unchanged(name: str, x: Tensor, before: int, of: str = "x") -> None:
    """Refuse a caller's function that has changed its argument in place: the solver needs it afterwards."""
    if changes(x) != before:
        raise InputError(
            f"{name}: got a function that changes {of} in place, expected one that leaves {of} as it is. Call it with "
            f"{of}.clone()."
        )


def check_shape(value: Any, argument: str = "shape") -> tuple[int, ...]:
    """Check a shape: a sequence of non-negative integers, of at most `ELEMENTS` numbers."""
    _check_length(argument, value)
    try:
        out = tuple(operator.index(n) for n in value)
    except TypeError:
        out = (-1,)
    if any(n < 0 for n in out):
        raise InputError(f"{argument}: got {describe(value)}, expected a sequence of sizes, such as (16, 3).")
    if math.prod(out) > ELEMENTS:
        raise InputError(f"{argument}: got {describe(value)}, expected at most {ELEMENTS:.2g} numbers.")
    return out


def check_file(value: Any, argument: str = "path") -> Path:
    """Check the path of a file or folder, which need not exist."""
    text = os.fspath(value) if isinstance(value, (str, os.PathLike)) else ""
    if not isinstance(text, str) or not text or "\0" in text:
        raise InputError(f"{argument}: got {describe(value)}, expected the path of a file, a string or a Path.")
    try:
        os.stat(text)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:  # too long, a loop of links, a folder that may not be searched
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{argument}: got {describe(text)}, which cannot be used ({reason}).") from error
    return Path(text)


def _check_length(argument: str, value: Any) -> None:
    """Refuse a range that would fill the memory as a list."""
    if isinstance(value, range) and value[ITEMS:]:
        raise InputError(f"{argument}: got {value!r:.80}, expected at most {ITEMS:g} items.")


def check_sequence(argument: str, value: Any, expected: str) -> Sequence[Any]:
    """Convert an iterable with at least one item to a list."""
    _check_length(argument, value)
    listed = isinstance(value, Iterable) and not isinstance(value, (str, bytes, Tensor))
    items = list(value) if listed else []
    if not items:
        raise InputError(f"{argument}: got {'an empty sequence' if listed else describe(value)}, expected {expected}.")
    return items


def check_json(argument: str, value: Any, words: dict[str, Any]) -> dict[str, Any]:
    """The words, updated by a user's dict of values that JSON can hold, as JSON returns them."""
    try:
        found: dict[str, Any] = json.loads(json.dumps(words | dict(value), allow_nan=False))
    except (TypeError, ValueError, RuntimeError, RecursionError) as error:
        held = describe(value)
        raise InputError(f"{argument}: got {held}, which JSON cannot hold ({error}); expected plain values.") from error
    return found
