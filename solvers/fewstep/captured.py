"""What drift and diffusion depend on besides time and state: the tensors that a gradient must reach."""

import gc
import math
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from .errors import InputError
from .problem import SDE

Edge = tuple[Any, int]


def edge_of(x: Tensor) -> Edge:
    """Where the gradient of a tensor goes: a node of the graph and the number of its output."""
    found = torch.autograd.graph.get_gradient_edge(x)
    return found.node, found.output_nr


def edges(roots: Iterable[Tensor], known: Iterable[Edge] = (), before: float = -math.inf) -> list[Edge]:
    """The edges at which the graph of `roots` ends: at leaves, or at nodes made `before`; not those that are known."""
    stop, seen, out = frozenset(known), set[Any](), list[Edge]()
    todo = [edge_of(x) for x in roots if x.requires_grad]
    while todo:
        edge = node, _ = todo.pop()
        if node is None or edge in stop or edge in seen:
            continue
        seen.add(edge)
        if not node.next_functions or hasattr(node, "variable") or node._sequence_nr() < before:
            out.append(edge)
        elif node not in seen:
            seen.add(node)
            todo.extend(node.next_functions)
    return out


def leaves(found: Iterable[Edge]) -> list[Tensor]:
    """The leaves among edges."""
    return [node.variable for node, _ in found if hasattr(node, "variable")]


class Unknown:
    """Leaves of the graph of one step that are not captured: those that outlive the graph should have been."""

    def __init__(self) -> None:
        self.found: list[weakref.ref[Tensor]] = []

    def add(self, roots: Iterable[Tensor], known: Iterable[Edge]) -> None:
        """Keep the leaves of a step, after a check of those of the step before, whose graph is gone."""
        self.check()
        self.found = [weakref.ref(x) for x in leaves(edges(roots, known))]

    def check(self) -> None:
        """Raise an error for a leaf that still exists; one that a step made to differentiate is gone."""
        if any(x() is not None for x in self.found):
            gc.collect()  # graphs may be cycles
        if any(x() is not None for x in self.found):
            raise InputError(
                "gradient: a drift or diffusion uses other tensors with a graph at later times than at the first one. "
                "Make them methods of an nn.Module whose parameters these are, or use gradient='direct'."
            )


class _Seen(TorchFunctionMode):
    """Keeps the tensors with a graph that torch's functions receive."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[Edge, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for x in tree_leaves((args, kwargs)):
            if isinstance(x, Tensor) and x.requires_grad and x.grad_fn is not None:
                self.found[edge_of(x)] = x
        return func(*args, **kwargs or {})


def captured(asked: SDE, sde: SDE, t: Tensor, y: Tensor) -> list[Tensor]:
    """The tensors with a graph that drift, diffusion and derivative use besides t and y.

    They are those of the graph at t, leaves or tensors made before the solve, and the parameters of the modules whose
    methods the functions are.

    Args:
        asked: the problem as the user gave it, `sde` as the steps call it.
    """
    names = ["drift", "diffusion"] + ["derivative"] * (sde.derivative is not None)

    y = y.detach().requires_grad_()

    def values() -> list[Tensor]:
        return [getattr(sde, name)(t, y) for name in names]

    with torch.enable_grad():
        before = edge_of(torch.ones((), requires_grad=True).exp())[0]._sequence_nr()
        found = edges(values(), [edge_of(y)], before)
        tensors = leaves(found)
        inner = [edge for edge in found if not hasattr(edge[0], "variable")]
        if inner:
            with _Seen() as seen:
                values()
            tensors += [_visible(seen, edge) for edge in inner]
    for name in names:
        owner = getattr(getattr(asked, name), "__self__", getattr(asked, name))
        if isinstance(owner, torch.nn.Module):
            tensors += [p for p in owner.parameters() if p.requires_grad]
    unique = list({id(x): x for x in tensors}.values())
    _check_independent(unique)
    return unique


def _visible(seen: _Seen, edge: Edge) -> Tensor:
    if edge not in seen.found:
        raise InputError(
            "gradient: compiled code of the drift or diffusion uses a tensor with a graph made before the solve, which "
            "only 'direct' supports. Compute the tensor in the drift, or use gradient='direct'."
        )
    return seen.found[edge]


def _check_independent(tensors: Sequence[Tensor]) -> None:
    """Refuse a tensor that another one was computed from: its gradient would be counted twice."""
    known = {edge_of(x) for x in tensors}
    for x in tensors:
        above: list[Any] = [] if x.grad_fn is None else [edge for edge in x.grad_fn.next_functions if edge[0]]
        seen = set[Any]()
        while above:
            edge = above.pop()
            if edge in known:
                raise InputError(
                    "gradient: drift and diffusion use a tensor and another one computed from it before the solve, "
                    "which only 'direct' supports. Compute it in the drift, or use gradient='direct'."
                )
            if edge[0] not in seen:
                seen.add(edge[0])
                above.extend(e for e in edge[0].next_functions if e[0])
