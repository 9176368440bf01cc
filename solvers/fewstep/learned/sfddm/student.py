"""SFDDM students: a network of its own on a subsequence of the teacher's levels, sampled by DDIM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ... import _validation
from ..._serialization import write_student
from ...executor import Evaluate
from ...plan import Plan
from ...problem import DiffusionModel
from ...samplers.ddim import DDIM
from ..labels import told, with_labels
from ..sigdeg.student import fits
from .process import StudentProcess


class SFDDM:
    """A diffusion model of T' levels, and DDIM on all of them as its sampler (arXiv 2405.14961).

    For another sampler take the model itself, `student.problem()`, like any other.

    Args:
        network: `(x, sigma) -> x0`, in variance-exploding coordinates; one whose `labelled` is True is told
            `labels=` as well.
        plan: of the sampler, on the process's levels; by default DDIM's.
        process: the levels.
    """

    def __init__(self, network: nn.Module, process: StudentProcess, plan: Plan | None = None) -> None:
        _validation.check_instance("network", network, nn.Module, "a torch.nn.Module (x, sigma) -> x0")
        _validation.check_instance("process", process, StudentProcess, "a StudentProcess")
        _validation.check_instance(
            "plan", plan, (Plan, type(None)), "a Plan on the process's levels, or None"
        )
        made = plan or DDIM().plan(process.grid())
        self.network = network
        self.process = process
        self.plan: Plan = made if made.name.startswith("SFDDM(") else made.renamed(f"SFDDM({made.name})")
        self.labels: Tensor | None = None

    def __repr__(self) -> str:
        return f"<{self.plan.name}: {self.plan.nfe} evaluations, {type(self.network).__name__}>"

    def at(self, labels: Tensor) -> SFDDM:
        """The same student for samples of these classes, (batch, ...).

        Raises:
            InputError: the network takes no labels.
        """
        return with_labels(self, self.network, labels)

    def problem(self) -> DiffusionModel:
        """The student as a model on its own process, for any solver of the library."""
        return DiffusionModel(self._denoise, self.process)

    def evaluator(self, problem: DiffusionModel | None, like: Tensor) -> Evaluate:
        """The network as the executor calls it."""
        fits(self.network, "noise", like, like.shape[1:])
        self.network.to(like.device)
        levels = self.plan.sigma.to(like.device, like.dtype).unbind()
        if self.plan.prediction == "data":
            return lambda row, x, normals: self._denoise(x, levels[row])
        return lambda row, x, normals: (x - self._denoise(x, levels[row])) / levels[row]

    def _denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        out: Tensor = self.network(x, sigma, **told(self.network, self.labels, x))
        return out

    def save(self, path: str | Path) -> None:
        """Write the student; `fewstep.load` reads it. Labels are not part of it."""
        meta = {"phi": self.process.phi.tolist(), "log_sigmas": self.process.log_sigmas.tolist()}
        write_student(path, "SFDDM", self.network, meta, self.plan)

    @classmethod
    def _from_parts(cls, network: nn.Module, meta: dict[str, Any], plan: Plan | None) -> SFDDM:
        process = StudentProcess.of_table(torch.tensor(meta["log_sigmas"], dtype=torch.float64))
        assert isinstance(process, StudentProcess)
        process.phi = torch.tensor(meta["phi"])
        return cls(network, process, plan)
