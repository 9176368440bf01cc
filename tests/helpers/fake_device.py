"""A CUDA device without hardware: tensors that say "cuda:0" and hold their values in plain CPU tensors.

    with FakeDevice() as device:
        y = fs.solve(sde, solver, torch.ones(4, 1, device="cuda"), grid).y
    device.reads    # ["aten._local_scalar_dense at solvers/fewstep/solve.py:79", ...]

What a GPU refuses raises `MixUp`: an operation on tensors of both devices (0-d CPU tensors are allowed where torch
allows them), a generator of the other device, numpy. What makes the host wait for the device is counted with the line
of the library that causes it: reads of values (`reads`) and copies of CPU tensors to the device (`uploads`).

C++ sees the wrappers as CPU tensors, because autograd of a build without CUDA has no streams for other devices. The
device is therefore reported, and given to factory functions, by a mode for torch functions, and only inside of it.
"""

import sys
import warnings
from functools import lru_cache, partial
from typing import Any, ClassVar

import pytest
import torch
import torch._dynamo  # before functions that it looks up are replaced
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import return_and_correct_aliasing

CUDA, CPU = torch.device("cuda:0"), torch.device("cpu")
PACKAGES = ("/fewstep/", "/fewstep_analysis/")
# operations whose result has a size or a value that the host must know
WAITING = {
    "_local_scalar_dense", "equal", "nonzero", "nonzero_numpy", "masked_select", "_unique2", "unique_dim", "bincount",
    "unique_consecutive", "repeat_interleave", "_linalg_check_errors", "linalg_eigh", "_linalg_eigh", "linalg_lstsq",
}  # fmt: skip
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
GETTERS = {
    Tensor.device.__get__: lambda device: device,
    Tensor.is_cuda.__get__: lambda device: device == CUDA,
    Tensor.is_cpu.__get__: lambda device: device == CPU,
}
INSIDE = (torch.quantile, Tensor.quantile)  # make tensors inside of C++, on the device that it sees
FROM_DATA = (torch.tensor, torch.as_tensor, torch.asarray, torch.Tensor.new_tensor)


class MixUp(RuntimeError):
    """What torch refuses on a GPU."""


class Held(Tensor):
    """A tensor on the device; `held` is the CPU tensor with its values."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> "Held":
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        made = Tensor._make_wrapper_subclass(cls, held.shape, device=CPU, requires_grad=False, **layout)
        made.held = held
        return made

    def __init__(self, held: Tensor) -> None:
        pass

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Held({self.held!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, about = kwargs or {}, _about(func)
        tensors = _tensors(args) + _tensors(kwargs.values())
        about.check(tensors, args)
        about.count(args)
        out = func(*map(_held, args), **{k: _held(v) for k, v in kwargs.items()})
        if about.writes and out is _held(args[0]):
            return args[0]
        if any(t.is_meta for t in _tensors((out,))):
            return out  # forward-mode AD looks up shapes there
        out = _wrapped(out)
        return return_and_correct_aliasing(func, args, kwargs, out) if about.aliases else out


def _held(value: Any) -> Any:
    """The argument with held tensors in place of those on the device."""
    if isinstance(value, Held):
        return value.held
    return type(value)(map(_held, value)) if isinstance(value, (list, tuple)) else value


def _wrapped(value: Any) -> Any:
    """The result with its tensors on the device."""
    if isinstance(value, Tensor):
        return value if isinstance(value, Held) else Held(value)
    return type(value)(map(_wrapped, value)) if isinstance(value, (list, tuple)) else value


def _tensors(values: Any) -> list[Tensor]:
    out: list[Tensor] = []
    for v in values:
        if isinstance(v, Tensor):
            out.append(v)
        elif isinstance(v, (list, tuple)):
            out += _tensors(v)
    return out


class About:
    """The facts of an operation: which tensors it refuses, and whether the host waits for it."""

    def __init__(self, func: Any) -> None:
        self.name: str = func.__name__.split(".")[0]
        arguments = func._schema.arguments
        self.aliases = any(a.alias_info for a in (*arguments, *func._schema.returns))
        self.writes = bool(arguments) and arguments[0].is_write
        self.pointwise = torch.Tag.pointwise in func.tags
        self.crosses = self.name in ("copy_", "is_same_size", "_has_same_storage_numel")
        self.indexing = self.name in INDEXING
        self.func = func

    def check(self, tensors: list[Tensor], args: Any) -> None:
        """Refuse tensors of both devices."""
        plain = [t for t in tensors if not isinstance(t, Held)]
        if not plain or self.crosses or (self.indexing and isinstance(args[0], Held)):
            return
        scalars = self.pointwise and all(t.dim() == 0 for t in plain)
        if not scalars or (self.writes and not isinstance(args[0], Held)):
            shapes = ", ".join(f"{device_of(t)} {tuple(t.shape)}" for t in tensors)
            message = f"Expected all tensors to be on the same device, got {shapes} in {self.func} at {_place()}"
            raise MixUp(message)

    def count(self, args: Any) -> None:
        """Record what makes the host wait."""
        if self.name == "copy_":
            if isinstance(args[0], Held) != isinstance(args[1], Held):
                _record("uploads" if isinstance(args[0], Held) else "reads", "copy")
        elif self.indexing:
            indices = [t for t in args[1] if t is not None]
            if any(isinstance(t, Held) and t.dtype in (torch.bool, torch.uint8) for t in indices):
                _record("reads", self.name)
            if any(not isinstance(t, Held) for t in indices):
                _record("uploads", self.name)
        elif self.name in WAITING:
            _record("reads", self.name)


_about = lru_cache(None)(About)


def _enter(frame: Any, event: str, arg: Any) -> None:
    if event == "call":
        FakeDevice.entered.add(frame.f_code)


def _record(kind: str, what: str) -> None:
    if FakeDevice.active is not None:
        getattr(FakeDevice.active, kind).append(f"{what} at {_place()}")


class Cross(torch.autograd.Function):
    """A copy to the other device, through which gradients flow back."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.held.clone() if isinstance(x, Held) else Held(x.detach().clone())

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _to(gradient, CPU if device_of(gradient) == CUDA else CUDA)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return Cross.apply(tangent)


class Generator(torch.Generator):
    """A generator that reports where it is and draws on the CPU."""

    def __new__(cls, device: Any = "cpu") -> "Generator":
        made = super().__new__(cls, "cpu")
        made.place = torch.device(device)
        return made

    def __init__(self, device: Any = "cpu") -> None:
        pass

    @property
    def device(self) -> torch.device:
        return CUDA if self.place.type == "cuda" else self.place


def _grouped(own: Any, lists: Any, indices: bool = False) -> Any:
    """The groups that gradient clipping forms, under the device that the tensors report."""
    return {(device_of(found[0][0]), dtype): (found, at) for (_, dtype), (found, at) in own(lists, indices).items()}


class FakeDevice(TorchFunctionMode):
    """The context in which "cuda" can be used; `reads` and `uploads` say which lines made the host wait."""

    active: "FakeDevice | None" = None
    entered: ClassVar[set[Any]] = set()  # the code of all functions that were called on a device

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[str] = []
        self.uploads: list[str] = []
        self._patch = pytest.MonkeyPatch()

    def __enter__(self) -> "FakeDevice":
        self._outer, FakeDevice.active = FakeDevice.active, self
        for owner, name, replacement in REPLACED:
            self._patch.setattr(owner, name, replacement)
        self._library = torch.library.Library("aten", "IMPL")
        with warnings.catch_warnings(action="ignore"):  # warns that it replaces the own kernel
            self._library.impl("_efficientzerotensor", _zeros, "CPU")
        super().__enter__()
        self._profile = sys.getprofile()
        sys.setprofile(_enter)
        return self

    def __exit__(self, *error: Any) -> None:
        sys.setprofile(self._profile)
        super().__exit__(*error)
        self._patch.undo()
        self._library._destroy()
        FakeDevice.active = self._outer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in GETTERS:
            return GETTERS[func](device_of(args[0]))
        if func in (Tensor.to, Tensor.cpu, Tensor.cuda, Tensor.type_as):
            return _moved(func, args, kwargs)
        if func in (Tensor.numpy, Tensor.__array__, Tensor.tolist) and device_of(args[0]) == CUDA:
            if func is not Tensor.tolist:
                raise MixUp("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")
            _record("reads", "tolist")
            return bare(args[0]).held.tolist()
        if func is Tensor.__format__ and device_of(args[0]) == CUDA and args[0].dim() == 0:
            return format(args[0].item(), args[1])
        first = args[0] if args and torch.is_tensor(args[0]) else None
        wanted = kwargs.pop("device", None)
        target = CPU if first is None else device_of(first)
        target = target if wanted is None else _known(wanted)
        if (generator := kwargs.get("generator")) is not None and generator.device.type != target.type:
            raise MixUp(f"Expected a '{target}' device type for generator but found '{generator.device.type}'")
        if func is Tensor.new_tensor:
            func, args, kwargs = torch.tensor, args[1:], {"dtype": first.dtype} | kwargs  # type: ignore[union-attr]
        if func in FROM_DATA:
            out = func(*args, **kwargs)
            return _to(out, target if wanted is not None or first is None or func is torch.tensor else device_of(first))
        scalars = len(args) > 1 and any(map(_differentiable_scalar, args))
        if scalars and any(isinstance(t, Tensor) and device_of(t) == CUDA for t in args):
            # gradients of scalars on the CPU come back to it
            args = tuple(_to(t, CUDA, counted=False) if _differentiable_scalar(t) else t for t in args)
        if func in INSIDE and target == CUDA:
            return _to(func(_to(args[0], CPU, counted=False), *args[1:], **kwargs), CUDA, counted=False)
        out = func(*args, **kwargs)
        return out if wanted is None else _to(out, target, counted=False)


def _parsed(own: Any, *args: Any, **kwargs: Any) -> Any:
    """The arguments of a module's `to`, which may be a tensor."""
    device, *rest = own(*args, **kwargs)
    return (device_of(args[0]) if args and torch.is_tensor(args[0]) else device, *rest)


REPLACED = (
    (torch._C._nn, "_parse_to", partial(_parsed, torch._C._nn._parse_to)),
    (torch, "Generator", Generator),
    (torch.cuda, "get_device_name", lambda device: "fake"),
    # a module that moves gets new parameters
    (torch, "_has_compatible_shallow_copy_type", lambda a, b: a is b or Held not in (type(a), type(b))),
    (torch._C, "_group_tensors_by_device_and_dtype", partial(_grouped, torch._C._group_tensors_by_device_and_dtype)),
)


def _zeros(size: Any, *, dtype: Any = None, **_: Any) -> Tensor:
    """The zeros that forward-mode AD makes without looking at a tensor."""
    return Held(torch.zeros(size, dtype=dtype))


def device_of(x: Tensor) -> torch.device:
    """The device that a tensor reports, also inside of torch.func's transforms."""
    if type(x) is Held:
        return CUDA
    return CUDA if isinstance(bare(x), Held) else torch._C._TensorBase.device.__get__(x)


def bare(x: Tensor) -> Tensor:
    """The tensor inside of the wrappers of torch.func's transforms."""
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        x = torch._C._functorch.get_unwrapped(x)
    return x


def _differentiable_scalar(x: Any) -> bool:
    return isinstance(x, Tensor) and x.requires_grad and x.dim() == 0 and device_of(x) == CPU


def _known(device: Any) -> torch.device:
    found = torch.device(device)
    return CUDA if found.type == "cuda" and found.index in (None, 0) else found


def _moved(func: Any, args: Any, kwargs: Any) -> Tensor:
    """`to`, `cpu`, `cuda` and `type_as`: cross the border where that is asked for, then convert the dtype."""
    x, *rest = args
    given = [*rest, *(kwargs.get(k) for k in ("device", "other", "dtype"))]
    like = next((v for v in given if torch.is_tensor(v)), None)
    dtype = next((v for v in given if isinstance(v, torch.dtype)), None if like is None else like.dtype)
    device = next((v for v in given if isinstance(v, (str, torch.device)) or type(v) is int), None)
    if func in (Tensor.cpu, Tensor.cuda):
        device, dtype = func.__name__, None
    device = device_of(like) if like is not None else device
    x = x if device is None else _to(x, _known(device))
    return x.to(x.dtype if dtype is None else dtype, copy=kwargs.get("copy", False))


def _to(x: Tensor, device: torch.device, counted: bool = True) -> Tensor:
    here = device_of(x)
    if here == device:
        return x
    if counted:
        _record("uploads" if device == CUDA else "reads", "copy")
    return Cross.apply(x)


def _place() -> str:
    """The innermost line of the library, else of whoever called torch."""
    frame, fallback = sys._getframe(1), ""
    while frame is not None:
        name = frame.f_code.co_filename
        if any(p in name for p in PACKAGES):
            return f"{name[max(name.rfind(p) for p in PACKAGES) + 1 :]}:{frame.f_lineno}"
        if not fallback and name != __file__ and "/torch/" not in name:
            fallback = f"{name}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return fallback
