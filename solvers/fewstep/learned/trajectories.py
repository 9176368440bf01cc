"""Teacher data of Sig-DEG: fine trajectories at coarse levels, with the exact signature of each interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import _validation
from .._distributed import barrier, is_first, rank_and_world
from .._progress import progress as progress_bar
from .._serialization import DAMAGE, make_folder, read_json, write, write_json
from ..brownian import FreshIncrements, Increment
from ..brownian.increment import LEVY_ORDER
from ..brownian.random_normals import key_of, node_seed
from ..errors import InputError, NonFiniteError
from ..executor import Normals, run
from ..fingerprint import TOLERANCE, Fingerprint
from ..grid import MOST, check_sigmas, refined
from ..plan import Plan
from ..problem import DiffusionModel
from ..resolve import evaluator_of, resolve
from ..sde.euler_maruyama import EulerMaruyama
from ..solver import DiffusionSolver
from .labelled_model import Labelled, Model
from .training import check_same, digest

FORMAT = "fewstep-trajectories-1"
BLOCK = 256  # trajectories made and written at a time; part of their identity, since draws are per block


@dataclass(frozen=True)
class Batch:
    """Some trajectories.

    Attributes:
        knots: (steps + 1, n, *event) the teacher's states at the coarse levels.
        xi: (steps, n, letters, *event) normalised signatures of the intervals between them.
        labels: (n, ...) or None.
    """

    knots: Tensor
    xi: Tensor
    labels: Tensor | None = None

    def part(self, index: Tensor) -> Batch:
        """The trajectories at these positions."""
        return Batch(self.knots[:, index], self.xi[:, index], None if self.labels is None else self.labels[index])

    def to(self, device: torch.device | str) -> Batch:
        labels = None if self.labels is None else self.labels.to(device)
        return Batch(self.knots.to(device), self.xi.to(device), labels)


@dataclass(frozen=True)
class Trajectories:
    """Trajectories in blocks, in memory or memory-mapped from files.

    Attributes:
        levels: (intervals + 1,) float64, those of the blocks.
        blocks: each has "knots" (n, intervals + 1, *event), "xi" (n, intervals, letters, *event) and perhaps "labels".
        evaluations: network evaluations per trajectory.
        kept: the indices of the coarse levels; None for all.
    """

    levels: Tensor
    blocks: list[dict[str, Tensor]]
    evaluations: int
    kept: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return sum(len(b["knots"]) for b in self.blocks)

    @property
    def sigmas(self) -> Tensor:
        """(steps + 1,) the coarse levels."""
        return self.levels if self.kept is None else self.levels[list(self.kept)]

    @property
    def event(self) -> tuple[int, ...]:
        return tuple(self.blocks[0]["knots"].shape[2:])

    @property
    def levy(self) -> str:
        return "WHK"[self.blocks[0]["xi"].shape[2] - 1]

    @property
    def labelled(self) -> bool:
        return "labels" in self.blocks[0]

    def coarsen(self, keep: int | Sequence[int]) -> Trajectories:
        """The same trajectories at fewer coarse levels, for a student of fewer steps.

        Args:
            keep: keep every so many-th level, a divisor of the number of steps; or the indices of the levels to keep,
                increasing from 0 to that of the last.

        Raises:
            InputError: another number or other indices.
        """
        steps = len(self.sigmas) - 1
        if not isinstance(keep, (Sequence, Tensor)) or (torch.is_tensor(keep) and keep.dim() == 0):
            if steps % _validation.check_int("keep", keep):
                raise InputError(f"keep: got {keep}, expected a divisor of the {steps} steps.")
            keep = range(0, steps + 1, keep)
        if len(keep) > steps + 1:
            raise InputError(f"keep: got {len(keep)} levels, expected at most {steps + 1}.")
        chosen = [_validation.check_int("keep", i, 0) for i in keep]
        if chosen != sorted(set(chosen)) or chosen[:1] != [0] or chosen[-1] != steps:
            raise InputError(f"keep: got {chosen}, expected indices increasing from 0 to {steps}.")
        before = self.kept or range(steps + 1)
        return replace(self, kept=tuple(before[i] for i in chosen))

    def some_knots(self, count: int) -> Tensor:
        """(steps + 1, n, *event) knots of the first trajectories, at most `count` and one block."""
        knots = self.blocks[0]["knots"][: _validation.check_int("count", count)].transpose(0, 1)
        return knots if self.kept is None else knots[list(self.kept)]

    def digest(self) -> str:
        """A hash of the coarse levels, of some final states and of all labels."""
        parts = {"levels": self.sigmas}
        for i, block in enumerate(self.blocks):
            parts |= {f"{i}": block["knots"][:16, -1]} | {f"{i} labels": v for k, v in block.items() if k == "labels"}
        return digest(parts)

    def pick(self, index: Tensor) -> Batch:
        """The trajectories of these indices, in this order; InputError for indices out of range."""
        _validation.check_instance("index", index, Tensor, f"a tensor of indices in 0 ... {len(self) - 1}")
        index = index.cpu() if index.layout == torch.strided and not index.is_meta else torch.empty(0)
        integers = index.dim() == 1 and len(index) > 0 and index.dtype in (torch.int32, torch.int64)
        if not integers or int(index.min()) < 0 or int(index.max()) >= len(self):
            raise InputError(f"index: got {index.reshape(-1).tolist()[:8]}, expected indices in 0 ... {len(self) - 1}.")
        joined = {k: torch.empty(len(index), *v.shape[1:], dtype=v.dtype) for k, v in self.blocks[0].items()}
        first = 0
        for block in self.blocks:
            local = index - first
            mine = (local >= 0) & (local < len(block["knots"]))
            if bool(mine.any()):
                for k, out in joined.items():
                    out[mine] = block[k][local[mine]]
            first += len(block["knots"])
        knots, xi = (joined[k].transpose(0, 1) for k in ("knots", "xi"))
        if self.kept is not None:
            h, coarse = (self.levels**-2.0).diff().tolist(), list[Tensor]()
            for start, end in pairwise(self.kept):  # Chen's relation
                steps = [Increment.from_coordinates(h[k], *xi[k].unbind(1)) for k in range(start, end)]
                coarse.append(torch.stack(reduce(Increment.join, steps).coordinates(), 1))
            knots, xi = knots[list(self.kept)], torch.stack(coarse)
        return Batch(knots, xi, joined.get("labels"))


def make_trajectories(
    problem: DiffusionModel | Labelled, sigmas: Tensor, *, count: int, event_shape: tuple[int, ...], substeps: int,
    teacher: DiffusionSolver | None = None, levy: str = "H", labels: Tensor | None = None, seed: int = 0,
    folder: str | Path | None = None, device: torch.device | str = "cpu", progress: bool = False,
) -> Trajectories:  # fmt: skip
    """Run a fine stochastic sampler and keep what a student of few steps learns from.

    The teacher draws exact (W, H, K) on its own steps; Chen's relation joins them to the coarse intervals.

    Args:
        problem: the model or, with `labels`, a function `labels -> DiffusionModel`.
        sigmas: (steps + 1,) the coarse levels, decreasing, all above 0.
        count: number of trajectories; trajectory i of a seed does not depend on it.
        event_shape: shape of one sample.
        substeps: steps of the teacher per coarse interval, even in log sigma.
        teacher: a stochastic solver whose steps open one path interval each: `EulerMaruyama()` (the default, DDPM's
            ancestral step), `SEA()`, `SRA1()`, `ShARK()` or your own.
        levy: the signature to keep, "W", "H" or "K"; at least what the teacher needs.
        labels: (count, ...) one label per trajectory.
        folder: blocks of 256 are written here atomically. The same call resumes an interrupted one; a different call
            is rejected. Under torch.distributed each process makes its share.
        device: where the network runs.

    Raises:
        InputError: arguments out of range, or a folder with other trajectories.
    """
    sigmas = checked_levels(sigmas)
    _validation.check_choice("levy", levy, LEVY_ORDER)
    count = _validation.check_int("count", count)
    substeps = _validation.check_int("substeps", substeps, 1, MOST)
    seed, device = _validation.check_seed(seed), _validation.check_device(device)
    _validation.check_instance("teacher", teacher, (DiffusionSolver, type(None)), "a solver such as fs.EulerMaruyama()")
    event_shape = _validation.check_shape(event_shape, "event_shape")
    labels = labels.to(device) if torch.is_tensor(labels) else labels
    model = Model.of(problem, labels, torch.empty(count, *event_shape or (1,), device="meta"))
    plan, ends = _teacher_plan(teacher or EulerMaruyama(), model, sigmas, substeps, levy)
    maker = _Maker(model, sigmas, plan, ends, levy, event_shape, seed, device)
    ranges = [*torch.split(torch.arange(count), BLOCK)]
    if folder is None:
        blocks = [maker.block(index) for index in progress_bar(ranges, "block", show=progress)]
    else:
        blocks = _on_disk(_validation.check_file(folder, "folder"), maker, ranges, progress)
    return Trajectories(sigmas, blocks, plan.nfe)


def checked_levels(sigmas: Tensor) -> Tensor:
    """Coarse levels of a stochastic student: all above 0."""
    grid = check_sigmas(sigmas)
    if grid[-1] == 0:
        raise InputError(
            "sigmas: got a grid that ends in 0, where tau = 1/sigma^2 is infinite; end it at the schedule's sigma_min."
        )
    return grid


def _teacher_plan(
    teacher: DiffusionSolver, model: Model, sigmas: Tensor, substeps: int, levy: str
) -> tuple[Plan, list[bool]]:
    """The plan of the teacher, and for each row whether the state after it is at a coarse level."""
    plan, _ = resolve(teacher, model.schedule, sigmas=refined(sigmas, substeps))
    opens = ~plan.noise[:, 0].isnan()
    if not torch.equal(opens, plan.on_path) or int(opens.sum()) != substeps * (len(sigmas) - 1):
        raise InputError(
            f"teacher: got {plan.name!r}, expected a stochastic solver with one interval of the path per step, such as "
            "EulerMaruyama(), SEA() or ShARK()."
        )
    if LEVY_ORDER[plan.levy] > LEVY_ORDER[levy]:
        raise InputError(f"levy: got {levy!r}; the teacher {plan.name} needs {plan.levy!r}.")
    last_of_step = torch.cat([opens[1:], opens.new_ones(1)])
    return plan, (last_of_step & (opens.cumsum(0) % substeps == 0)).tolist()


@dataclass(frozen=True)
class _Maker:
    """Everything that determines a block of trajectories."""

    model: Model
    sigmas: Tensor
    plan: Plan
    ends: list[bool]
    levy: str
    event: tuple[int, ...]
    seed: int
    device: torch.device | str

    @torch.no_grad()
    def block(self, index: Tensor) -> dict[str, Tensor]:
        """The trajectories of these indices, which are those of one block."""
        plan, number, n = self.plan, int(index[0]) // BLOCK, len(index)
        # drawn for a full block and then cut: a trajectory does not depend on the number asked for
        shape, key = (BLOCK, *self.event), key_of(self.seed)
        source = FreshIncrements(shape, levy=self.levy, seed=node_seed(key, 2 * number + 1))
        start = torch.randn(shape, generator=torch.Generator().manual_seed(node_seed(key, 2 * number)))
        x = (start[:n] * float(self.sigmas[0])).to(self.device)
        knots, xi, joined = [x], list[Tensor](), list[Increment]()

        def draw(tau0: float, tau1: float) -> Normals:
            increment = source.increment(tau0, tau1)
            joined.append(joined.pop().join(increment) if joined else increment)
            return tuple(z[:n].to(self.device) for z in increment.coordinates()[: plan.stage_noise.shape[-1]])

        def keep(row: int, x: Tensor, D: Tensor) -> None:
            if self.ends[row]:
                knots.append(x)
                xi.append(torch.stack(joined.pop().coordinates(), 1)[:n])

        run(plan, x, evaluator_of(self.model.at(index), plan, x), draw, keep)
        states = torch.stack(knots, 1).cpu()
        if not bool(states.isfinite().all()):
            message = f"The teacher {plan.name} produced non-finite states; check its denoiser on them."
            raise NonFiniteError(message, step=0, paths=n)
        labels, out = self.model.labels, {"knots": states, "xi": torch.stack(xi, 1)}
        return out if labels is None else out | {"labels": labels[index.to(labels.device)].cpu()}

    def metadata(self, count: int) -> dict[str, Any]:
        """What must match for a folder of blocks to be continued."""
        model = Fingerprint.of_model(self.model, torch.empty(1, *self.event, device=self.device))
        labels = None if self.model.labels is None else digest({"labels": self.model.labels})
        return {
            "format": FORMAT, "count": count, "levy": self.levy, "sigmas": self.sigmas.tolist(), "labels": labels,
            "teacher": self.plan.name, "evaluations": self.plan.nfe, "seed": self.seed, "model": vars(model),
        }  # fmt: skip


def _on_disk(folder: Path, maker: _Maker, ranges: list[Tensor], progress: bool) -> list[dict[str, Tensor]]:
    """Load the blocks of a folder; missing ones are generated first."""
    _claim(folder, maker.metadata(int(ranges[-1][-1]) + 1))
    files = [folder / f"block-{i:05d}.safetensors" for i in range(len(ranges))]
    rank, world = rank_and_world()
    missing = [i for i in range(len(files)) if not files[i].exists()]
    barrier()  # all processes list the files before one writes
    for i in progress_bar(missing[rank::world], "block", show=progress):
        write(files[i], {}, maker.block(ranges[i]))
    barrier()
    return [_mapped(f, len(r), maker) for f, r in zip(files, ranges, strict=True)]


def _claim(folder: Path, metadata: dict[str, Any]) -> None:
    """Write what the folder will contain, or reject one that contains other trajectories."""
    path = folder / "trajectories.json"
    make_folder(folder)
    try:
        held = read_json(path) if path.exists() else None
    except InputError as error:
        raise InputError(f"folder: {path} cannot be read ({error}) Use another folder.") from error
    if held is None and any(folder.glob("block-*.safetensors")):
        raise InputError(f"folder: {folder} has blocks but no {path.name}, which describes them; use an empty folder.")
    barrier()
    if held is None and is_first():
        write_json(path, metadata)
    barrier()
    if held is not None:
        check_same(f"folder: {folder} holds trajectories", held, metadata, _same)


def _same(key: str, held: Any, mine: Any) -> bool:
    try:
        return held == mine or (key == "model" and Fingerprint(**held).miss(Fingerprint(**mine)) <= TOLERANCE)
    except (*DAMAGE, RuntimeError):
        return False


def _mapped(path: Path, count: int, maker: _Maker) -> dict[str, Tensor]:
    """A block memory-mapped from its file."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        block = load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"folder: {path} is damaged ({error}); delete it, and the same call makes it again."
        ) from error
    steps, labels = len(maker.sigmas) - 1, maker.model.labels
    expected = {
        "knots": (torch.float32, (count, steps + 1, *maker.event)),
        "xi": (torch.float32, (count, steps, LEVY_ORDER[maker.levy], *maker.event)),
    }
    if labels is not None:
        expected["labels"] = (labels.dtype, (count, *labels.shape[1:]))
    if {k: (v.dtype, tuple(v.shape)) for k, v in block.items()} != expected:
        raise InputError(f"folder: {path} is no block of these trajectories; delete it, and the same call makes it.")
    return block
