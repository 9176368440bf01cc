"""SFDDM students: a network on a subsequence of the teacher's noise levels, sampled by DDIM."""

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
from ...resolve import evaluator_of, resolve
from ...samplers.ddim import DDIM
from ..network_student import NetworkStudent, model_of
from .process import StudentProcess


class SFDDM(NetworkStudent):
    """A diffusion model of T' levels with DDIM on all of them as its sampler (arXiv 2405.14961).

    To use another sampler, take the model itself, `student.problem()`.

    Args:
        network: `(x, sigma) -> x0`, in variance-exploding coordinates; it also gets `labels=` if its attribute
            `labelled` is True.
        process: the levels.
        plan: of the sampler, on the process's levels; by default DDIM's.
    """

    def __init__(self, network: nn.Module, process: StudentProcess, plan: Plan | None = None) -> None:
        _validation.check_instance("network", network, nn.Module, "a torch.nn.Module (x, sigma) -> x0")
        _validation.check_instance("process", process, StudentProcess, "a StudentProcess")
        _validation.check_instance("plan", plan, (Plan, type(None)), "a Plan on the process's levels, or None")
        plan = plan or resolve(DDIM(), process, sigmas=process.grid())[0]
        self.network: nn.Module = network
        self.process: StudentProcess = process
        self.plan: Plan = plan if plan.name.startswith("SFDDM(") else plan.renamed(f"SFDDM({plan.name})")

    def __repr__(self) -> str:
        return f"<{self.plan.name}: {self.plan.nfe} evaluations, {type(self.network).__name__}>"

    def problem(self) -> DiffusionModel:
        """The student as a model on its own process, for any solver of the library."""
        return model_of(self.network, self.process, self.labels)

    def evaluator(self, problem: DiffusionModel | None, like: Tensor) -> Evaluate:
        """The network as the executor calls it, for samples like these (batch, *event)."""
        self.prepare(like)
        return evaluator_of(self.problem(), self.plan, like)

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
