"""What a table is fitted to: pairs of a start and a teacher's end, the loss, and its normal equations."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..._distributed import part, sum_over_processes
from ...brownian.random_normals import key_of, node_seed
from ...errors import InputError
from ...problem import Denoiser
from ..labelled_model import Model
from .coefficients import Coefficients
from .families import Family
from .unrolled import Rollout, pulled_back, rollout

Loss = Callable[[Tensor, Tensor], Tensor]
"""`(student ends, teacher ends) -> (batch,)`."""
LOSSES = ("squared", "robust")
MOST_DIRECTIONS = 4
RATIO = 16  # of random directions over all states to fitted numbers


@dataclass(frozen=True)
class Pairs:
    """Start states with the ends that a teacher reaches from them.

    Attributes:
        x, ends: (n, *event), in x0 + sigma n.
        normals: (normals, n, *event) that the rows read; none for a deterministic table.
        kept, held: indices of the pairs that are fitted to, and of those that judge the fit.
        batch: samples per network call.
        spent: a tally of network evaluations of one sample.
    """

    model: Model
    x: Tensor
    ends: Tensor
    normals: Tensor
    kept: Tensor
    held: Tensor
    batch: int
    spent: list[int] = field(default_factory=lambda: [0])

    def parts(self, which: Tensor) -> Iterator[Tensor]:
        """Positions in `which`, in batches; under torch.distributed, this process's batches."""
        yield from torch.split(torch.arange(len(which)), self.batch)[part()]

    def evaluations(self) -> int:
        """Network evaluations so far per pair."""
        return -(-round(float(sum_over_processes(torch.tensor(float(self.spent[0]))))) // len(self.x))

    def finals(self, c: Coefficients) -> Tensor:
        """(n, *event) the final states of a table from all pairs."""
        out = torch.zeros_like(self.ends)
        for at in self.parts(torch.arange(len(self.x))):
            out[at.to(out.device)] = self.run(c, at)[1].end
        return sum_over_processes(out)

    def denoiser(self, index: Tensor) -> Denoiser:
        """The model of these samples, counting evaluations."""
        inner = self.model.at(index).denoiser

        def counted(x: Tensor, sigma: Tensor) -> Tensor:
            self.spent[0] += len(x)
            return inner(x, sigma)

        return counted

    def run(self, c: Coefficients, index: Tensor) -> tuple[Denoiser, Rollout, Tensor]:
        """The denoiser, the rows and the teacher's ends of these pairs."""
        at, denoiser = index.to(self.x.device), self.denoiser(index)
        return denoiser, rollout(c, denoiser, self.x[at], self.normals[:, at]), self.ends[at]


@dataclass(frozen=True)
class Objective:
    """The mean loss of a table on pairs, with what a Newton step needs.

    Attributes:
        loss: a squared or robust distance, or a function of the ends.
        decode: applied to the ends before the loss.
        scale: the squared distance beyond which the robust loss grows as a logarithm.
        directions: the most output directions through which a state's Jacobian is seen; None for a few.
        seed: of the random directions.
        fitted: indices of the pairs that are fitted to.
    """

    pairs: Pairs
    loss: str | Loss
    decode: Callable[[Tensor], Tensor] | None
    scale: float
    directions: int | None
    seed: int
    fitted: Tensor

    @torch.no_grad()
    def squares(self, c: Coefficients, which: Tensor) -> Tensor:
        """(n,) mean squared distance per element to the teacher's ends."""
        return self._each(c, which, lambda a, b: (a - b).double().square().flatten(1).mean(1))

    @torch.no_grad()
    def losses(self, c: Coefficients, which: Tensor) -> Tensor:
        """(n,) the loss of each sample."""
        return self._each(c, which, self._loss)

    def value(self, c: Coefficients) -> float:
        """The mean loss of the pairs that are fitted to."""
        return float(self.losses(c, self.fitted).mean())

    def equations(self, family: Family, numbers: Tensor, iteration: int) -> tuple[Tensor, Tensor]:
        """(J'J, J'r) by a family's numbers: exact derivatives of the loss, and the Gauss-Newton matrix.

        States of more numbers than `directions` are seen through random signs, whose mean is the identity; the
        gradient stays exact.
        """
        c, pairs = family.table(numbers), self.pairs
        chain = family.jacobian(numbers).to(pairs.x.device)
        count = chain.shape[1]
        found = chain.new_zeros(count, count + 1)
        generator = torch.Generator().manual_seed(node_seed(key_of(self.seed), iteration))
        # enough products with random directions to determine the numbers
        few = (
            min(MOST_DIRECTIONS, -(-RATIO * count // len(self.fitted))) if self.directions is None else self.directions
        )
        for at in pairs.parts(self.fitted):
            denoiser, made, ends = pairs.run(c, self.fitted[at])
            cotangents, exact = self._cotangents(made.end, ends, few, generator)
            J = pulled_back(c, denoiser, made, cotangents).double() @ chain
            gradient, seen = J[0].sum(0), J[1:].flatten(0, 1)
            found[:, :count] += seen.T @ seen / (1 if exact else len(J) - 1)
            found[:, count] += gradient
        found = sum_over_processes(found).cpu() / len(self.fitted)  # the iteration's only read from the device
        return found[:, :count], found[:, count]

    def _each(self, c: Coefficients, which: Tensor, of: Loss) -> Tensor:
        out = torch.zeros(len(which), dtype=torch.float64, device=self.pairs.x.device)
        for at in self.pairs.parts(which):
            _, made, ends = self.pairs.run(c, which[at])
            out[at.to(out.device)] = of(made.end, ends).detach().double()
        return sum_over_processes(out).cpu()

    def _decoded(self, ends: Tensor) -> Tensor:
        return ends if self.decode is None else self.decode(ends)

    def _loss(self, a: Tensor, b: Tensor) -> Tensor:
        a, b = self._decoded(a), self._decoded(b)
        if callable(self.loss):
            found = self.loss(a, b)
            if not torch.is_tensor(found) or found.shape != (len(a),):
                got = tuple(found.shape) if torch.is_tensor(found) else type(found).__name__
                raise InputError(f"loss: got {got}, expected one number for each of the {len(a)} samples.")
            return found
        square = (a - b).flatten(1).square().mean(1)
        return square / 2 if self.loss == "squared" else self.scale / 2 * torch.log1p(square / self.scale)

    def _cotangents(self, end: Tensor, target: Tensor, few: int, generator: torch.Generator) -> tuple[Tensor, bool]:
        """(1 + k, n, *event): the gradient of each sample's loss by its end, and k directions of the residual."""
        with torch.enable_grad():
            at = end.detach().requires_grad_(True)
            total = self._loss(at, target).sum()
            if not total.requires_grad:
                argument = "decode" if self.decode is not None else "loss"
                raise InputError(f"{argument}: got a function without a gradient; expected one of torch operations.")
            (gradient,) = torch.autograd.grad(total, at)
            y = self._decoded(at)
            size = y[0].numel()
            exact = size <= max(few, MOST_DIRECTIONS if self.directions is None else 0)
            shape = (size if exact else few, *y.shape)
            if exact:
                signs = torch.eye(size).reshape(size, 1, *y.shape[1:]).expand(shape).to(y)
            else:
                signs = (2.0 * torch.randint(0, 2, shape, generator=generator) - 1).to(y)
            weights = self._weights(y.detach(), target) / math.sqrt(size)
            signs = signs * weights.reshape(1, -1, *[1] * (y.dim() - 1))
            rows = (
                list(signs)
                if self.decode is None
                else [torch.autograd.grad(y, at, s, retain_graph=True)[0] for s in signs]
            )
        return torch.stack([gradient, *rows]), exact

    def _weights(self, y: Tensor, target: Tensor) -> Tensor:
        """(n,) the root of the weight of each sample's squared distance in the Gauss-Newton matrix."""
        if self.loss == "squared" or callable(self.loss):
            return y.new_ones(len(y))
        square = (y - self._decoded(target)).flatten(1).square().mean(1)
        return (1 / (1 + square / self.scale)).sqrt()
