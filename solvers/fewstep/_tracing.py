"""What Python may not do while torch transforms it: the one place that decides, and the ways around it.

torch.compile and torch.export trace code on tensors without values; a vmap of `torch.func` hides the values of its
samples; a CUDA graph is captured before its kernels run. Checks of values are skipped there (`holds`). Numbers that
follow from arguments alone (grids, coefficients) are computed by functions marked `while_tracing`, which
torch.compile calls with real arguments. They must return a string or a number: torch puts guards
that it cannot evaluate on other results. Hence `encode` and `decode`.
"""

import operator
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

from .errors import InputError

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")


def while_tracing(function: F) -> F:
    """A function that torch.compile calls while it traces; what it returns, a string or a number, is a constant."""
    # what torch.compiler.assume_constant_result does, without its import of the compiler, which takes two seconds
    marked: Any = function
    marked._dynamo_marked_constant = True

    def call(*args: Any) -> Any:
        return marked(*[_specialized(arg) for arg in args])

    return call  # type: ignore[return-value]


def _specialized(value: Any) -> Any:
    """The value with its numbers as constants of the program, where torch.compile has made them its arguments."""
    if isinstance(value, bool):
        return value
    if isinstance(value, int):
        return operator.index(value)
    if isinstance(value, float):
        return float.fromhex(value.hex())
    return tuple([_specialized(v) for v in value]) if type(value) is tuple else value


def made_outside(what: str) -> None:
    """Break the graph where torch.compile traces: what follows keeps locks, generators or files."""
    if torch.compiler.is_compiling():
        torch._dynamo.graph_break(msg=f"{what}: got one made in the compiled function, expected one made before it.")


def transformed() -> bool:
    """Whether a transform of torch.func (vmap, grad, jvp, jacrev, ...) runs the running code."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def apart(function: Callable[..., T], *args: Any) -> T:
    """`function(*args)`, outside of the transforms of torch.func: for noise and plans, constant and equal in a vmap."""
    if torch.compiler.is_compiling() or not transformed():
        return function(*args)
    with temporarily_clear_interpreter_stack():
        return function(*args)


def each_apart(function: Callable[..., Iterable[T]], *args: Any) -> Iterable[T]:
    """The items of `function(*args)`, each made outside of the transforms of torch.func."""
    if not transformed():
        return function(*args)
    items = iter(apart(function, *args))
    return iter(lambda: apart(next, items, None), None)


def unwrapped(argument: str, value: Tensor) -> Tensor:
    """The tensor inside the wrappers of torch.func; an `InputError` if its numbers differ between samples of a vmap."""
    if torch.compiler.is_compiling():
        return value
    while torch._C._functorch.is_functorch_wrapped_tensor(value):
        if torch._C._functorch.is_batchedtensor(value):
            raise InputError(f"{argument}: got numbers mapped by torch.func.vmap, expected the same for all samples.")
        value = torch._C._functorch.get_unwrapped(value)
    return value


def readable(value: Tensor) -> bool:
    """Whether Python can read a tensor's numbers: not in a trace, a vmap, or the capture of a CUDA graph."""
    if torch.compiler.is_compiling():
        return False
    while torch._C._functorch.is_functorch_wrapped_tensor(value):
        if torch._C._functorch.is_batchedtensor(value):
            return False
        value = torch._C._functorch.get_unwrapped(value)
    return not _captured(value.device)


def _captured(device: torch.device) -> bool:
    """Whether work on the device is being captured as a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def placed(numbers: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Constants (R,) on a device, by one copy; by kernels in the capture of a CUDA graph, where no copy is possible."""
    if numbers.device == device or torch.compiler.is_compiling() or not _captured(device):
        return numbers.to(device, dtype)
    return torch.stack([torch.full((), v, dtype=dtype, device=device) for v in numbers.tolist()])


def new_generator(device: torch.device | str) -> torch.Generator:
    """A generator of the device; an `InputError` in the capture of a CUDA graph, whose replays repeat draws."""
    if _captured(torch.device(device)):
        raise InputError(
            "seed: got noise of a seed in the capture of a CUDA graph, expected none: each replay would repeat it. "
            "Capture a deterministic solver with noise=..., or steps on increments that you draw yourself."
        )
    return torch.Generator(device)


def holds(condition: Tensor) -> bool:
    """`bool(condition)`; True where it cannot be read."""
    return not readable(condition) or bool(condition)


def constants(value: Tensor) -> Any:
    """`value.tolist()`; in a trace the numbers become constants of the program, so they must follow from constants."""
    return decode(_listed(value)) if torch.compiler.is_compiling() else unwrapped("grid", value).tolist()


def constant(argument: str, numbers: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """A user's numbers as a constant of a traced program, which then raises an error for other numbers.

    A compiler may compute them with another rounding, as Inductor does for linspace.
    """
    if not torch.compiler.is_compiling():
        return numbers
    known = torch.tensor(constants(numbers), dtype=numbers.dtype)
    eps = min(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps) if dtype.is_floating_point else 0.0
    near = (4 * eps * known.abs()).nan_to_num(0.0, 0.0)
    same = ((numbers == known) | ((numbers - known).abs() <= near) | (numbers.isnan() & known.isnan())).all()
    torch._assert_async(same, f"{argument}: got other numbers than the program was compiled for. Compile it again.")
    return known


def encode(value: Any) -> str:
    """Nested lists and tuples of numbers and None as text, for `decode`."""
    if isinstance(value, (list, tuple)):
        return " ".join(["(", *map(encode, value), ")"])
    return f"i{int(value)}" if isinstance(value, int) else f"f{value!r}" if isinstance(value, float) else "n"


def decode(text: str) -> Any:
    """The inverse of `encode`, with lists as tuples, in operations that torch.compile traces."""
    levels: list[list[Any]] = [[]]
    for word in text.split():
        if word == "(":
            levels.append([])
        elif word == ")":
            done = tuple(levels.pop())
            levels[-1].append(done)
        else:
            read = int if word[0] == "i" else float
            levels[-1].append(None if word == "n" else read(word[1:]))
    return levels[0][0]


@while_tracing
def _listed(value: Tensor) -> str:
    return encode(value.tolist())
