"""Solvers that reproduce the results of other codes where these differ from the papers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import numpy as np
from torch import Tensor

from . import _validation
from .errors import InputError
from .plan import Plan
from .plan_builder import LinearExpr, PlanBuilder
from .samplers.ddim import DDIM
from .samplers.deis import DEIS
from .samplers.dpm import DPMFamily, Group, Rules
from .samplers.edm import EDMHeun
from .samplers.exponential import path_noise, weighted_sum
from .samplers.ipndm import EVEN
from .samplers.lcm import LCM
from .samplers.pndm import PNDM
from .samplers.unipc import UniPC
from .schedule import Schedule
from .solver import Card, DiffusionSolver, needs_schedule

SHORT = 15  # below this many steps diffusers lowers the order of the last two


@dataclass(frozen=True)
class Ending:
    """How a run of diffusers ends.

    Args:
        total: the number of steps of the full run, where a grid is only its end.
        lower: diffusers' `lower_order_final`: the order of the last steps falls to 1.
        euler: diffusers' `euler_at_final`: the last step has order 1.
    """

    total: int | None = None
    lower: bool = True
    euler: bool = False

    def steps(self, sigmas: Tensor) -> int:
        """The number of steps of the full run."""
        return self.total or len(sigmas) - 1

    def order(self, order: int, left: int, sigmas: Tensor) -> int:
        """The order of a multistep step when `left` steps are left."""
        if left == 1 and self.euler:
            return 1
        return min(order, left) if self.lower and self.steps(sigmas) < SHORT else order

    def groups(self, order: int, sigmas: Tensor) -> list[Group]:
        """The steps of a singlestep solver whose inner nodes are levels of the grid."""
        levels, n, total = sigmas.tolist(), len(sigmas) - 1, self.steps(sigmas)
        full = not self.lower and levels[-1] > 0 and total % order == 0
        orders = [order] * (total // order) if full else _orders(order, total, levels[-1] == 0)
        ends = [0, *(e for e in (v - total + n for v in accumulate(orders)) if e > 0)]
        groups = [levels[a : b + 1] for a, b in pairwise(ends)]
        return [([s, *v, t], [math.log(s / u) / math.log(s / t) for u in v]) for s, *v, t in groups]


def _orders(order: int, n: int, to_zero: bool) -> list[int]:
    """Orders of steps that cover n grid intervals: `order` each, fewer at the end (arXiv 2206.00927, App. C)."""
    tails: dict[int, list[list[int]]] = {1: [[]], 2: [[1, 1], [1]], 3: [[2, 1], [1], [2]]}
    tail = tails[order][n % order]
    orders = [order] * ((n - sum(tail)) // order) + tail
    return [*orders[:-1], *[1] * orders[-1]] if to_zero else orders


def _as_in_diffusers(card: Card, order: float | None = None) -> Card:
    return replace(card, summary=f"{card.summary}, as in diffusers", deterministic_order=order)


class DiffusersDPM(DiffusionSolver):
    """DPMSolver, DPMSolverPP, DPMSolverSDE, DEIS or UniPC with the choices of diffusers' schedulers.

    - The order of the last steps falls as `ending` has it, whatever the last level.
    - Third-order multistep drops a factor 2 of the second derivative: order 2. With noise the weight of that term has
      the wrong sign: order 1.
    - Singlestep takes the grid's own levels as inner nodes, one evaluation per interval of the grid.
    - DEIS integrates its polynomials by closed forms in float32, where they cancel.

    Args:
        solver: the solver; DEIS in "log_rho" and of order 3 at most.
        ending: how a run ends.
    """

    repeats_levels = True

    def __init__(self, solver: DPMFamily | DEIS | UniPC, ending: Ending = Ending()) -> None:
        kinds = "a DPMSolver, DPMSolverPP, DPMSolverSDE, DEIS or UniPC"
        _validation.check_instance("solver", solver, (DPMFamily, DEIS, UniPC), kinds)
        _validation.check_instance("ending", ending, Ending, "an Ending")
        if isinstance(solver, DEIS) and (solver.variable != "log_rho" or solver.order > 3):
            raise InputError(f"solver: got {solver!r}; diffusers has DEIS in 'log_rho' and up to order 3.")
        if isinstance(solver, DPMFamily) and not solver.multistep and (solver.eta > 0 or solver.r != 0.5):
            raise InputError(f"solver: got {solver!r}; diffusers has singlestep solvers without noise or r.")
        self.solver = solver
        self.ending = ending
        self.card: Card = replace(_as_in_diffusers(solver.card, self._order()), evaluations=1)

    def _order(self) -> float | None:
        solver, order = self.solver, self.solver.card.deterministic_order
        if order is None or isinstance(solver, DEIS) or not getattr(solver, "multistep", True):
            return None  # hidden by rounding in float32; dependent on the grid
        if isinstance(solver, DPMFamily) and solver.order == 3:
            return 1 if solver.eta > 0 else 2
        lowered = self.ending.euler or (self.ending.lower and isinstance(solver, UniPC))
        return min(order, 2) if lowered else order

    def plan(self, sigmas: Tensor, schedule: Schedule | None = None) -> Plan:
        solver, ending = self.solver, self.ending
        if isinstance(solver, UniPC):
            return solver.plan_by(lambda order, left, _: min(order, left) if ending.lower else order, sigmas)
        if isinstance(solver, DEIS):
            return solver.plan_by(_float32_deis, ending.order, sigmas, schedule)
        halved = solver.solver_type == "midpoint"
        shift = -1.0 if solver.eta > 0 else 0.0  # `- 0.5` where the integral has `+ 0.5`
        return solver.plan_by(Rules(ending.order, ending.groups, 1.0, shift, halved, math.inf), sigmas)


class OfficialDPM(DiffusionSolver):
    """Third-order multistep DPMSolver, DPMSolverPP or DPMSolverSDE as in the authors' code and k-diffusion.

    The second derivative lacks a factor 2, which leaves order 2, sometimes with the smaller error at few steps.

    Args:
        solver: the solver; other orders are returned as they are.
    """

    def __init__(self, solver: DPMFamily) -> None:
        _validation.check_instance("solver", solver, DPMFamily, "a DPMSolver, DPMSolverPP or DPMSolverSDE")
        self.solver = solver
        order = 2 if solver.order == 3 and solver.multistep else solver.card.deterministic_order
        summary = f"{solver.card.summary}, as released"
        self.card: Card = replace(solver.card, summary=summary, deterministic_order=order)

    def plan(self, sigmas: Tensor, schedule: Schedule | None = None) -> Plan:
        return self.solver.plan_by(Rules(curvature=1.0), sigmas)


def _float32_deis(nodes: list[float], t: float, schedule: Schedule | None) -> list[float]:
    """int l_j(log rho) d rho for 2 or 3 nodes by its antiderivative, in float32 as diffusers' DEIS has it."""
    sigma = np.array([t, *nodes], dtype=np.float32)
    alpha = 1 / np.sqrt(sigma**2 + np.float32(1))
    rho = (sigma * alpha) / alpha  # rounds as theirs does; what cancels below multiplies it
    log, out, count = np.log(rho), [], len(nodes)
    l, ends = log[:2], rho[:2]
    for j in range(count):
        b, c, d = (log[1 + (j + k) % count] for k in range(3))
        if count == 2:
            F = ends * (-c + l - 1) / (b - c)
        else:  # (l - c)(l - d) e^l integrates to e^l (l^2 - (c + d + 2) l + cd + c + d + 2)
            F = ends * (c * (d - l + 1) - d * l + d + l**2 - 2 * l + 2) / ((b - c) * (b - d))
        out.append(float(F[0] - F[1]))
    return out


class DiffusersHeun(EDMHeun):
    """EDMHeun with Heun's step over every factor in sigma, as in diffusers."""

    steep: float = math.inf


class DiffusersRenoised(DiffusionSolver):
    """FlowMatchEulerDiscreteScheduler with `stochastic_sampling`: x_t = D + t z, fresh noise of the next level.

    The step of consistency models, for networks that were distilled for it; others give samples of too small variance.
    """

    card: Card = Card(
        summary="the estimate of x0 with fresh noise of the next level, as in diffusers",
        reference="Song et al. 2023 (arXiv 2303.01469), Algorithm 1, as in diffusers",
        levy="W",
    )

    def plan(self, sigmas: Tensor, schedule: Schedule | None = None) -> Plan:
        builder = PlanBuilder("Renoised(diffusers)", sigmas)
        for s, t in pairwise(builder.sigmas.tolist()):
            noise = path_noise(builder, s, t, t)
            builder.advance(builder.evaluate(builder.x, s) + noise)
        return builder.finish()


class DiffusersDDIM(DiffusionSolver):
    """DDIM from label t to t - N // n, whatever the grid's next label is; the plan needs a DiscreteVP.

    On "linspace" grids, or where n does not divide N, the state is then not at the level that the network receives. On
    grids of that stride it equals `DDIM`.

    Args:
        eta: the share of the ancestral noise, in [0, 1].
    """

    repeats_levels = True

    def __init__(self, eta: float = 0.0) -> None:
        self.eta: float = DDIM(eta).eta
        self.card: Card = _as_in_diffusers(DDIM(eta).card)

    def plan(self, sigmas: Tensor, schedule: Schedule | None = None) -> Plan:
        strides = _Strides("DDIM", sigmas, schedule, "data")
        for i, label in enumerate(strides.labels, 1):  # Eq. (12) of arXiv 2010.02502
            s, t = strides.level(label), strides.level(label - strides.stride)
            v = self.eta * t / s * max(s * s - t * t, 0.0) ** 0.5
            noise = path_noise(strides.builder, s, t, v)
            keep = (t * t - v * v) ** 0.5 / s
            x = keep / strides.alpha(s) * strides.X + (1 - keep) * strides.evaluate(strides.X, label)
            strides.advance(strides.alpha(t) * (x + noise), i == len(strides.labels))
        return strides.builder.finish()


class DiffusersPNDM(DiffusionSolver):
    """PNDM in strides of N // n labels, whatever the grid; the plan needs a DiscreteVP.

    Args:
        warm_up: "runge_kutta" or "plms", as for `PNDM`.
        combine: "epsilon", or "v_prediction", which combines v for networks of v.
        begin: the evaluation of the full run at which it begins. As in diffusers it repeats its warm-up there, which
            for "plms" leaves the state one label behind.
    """

    repeats_levels = True

    def __init__(self, warm_up: str = "runge_kutta", combine: str = "epsilon", begin: int = 0) -> None:
        self.warm_up: str = PNDM(warm_up).warm_up
        self.combine: str = _validation.check_choice("combine", combine, ("epsilon", "v_prediction"))
        self.begin: int = _validation.check_int("begin", begin, 0)
        self.card: Card = _as_in_diffusers(PNDM.card)

    def plan(self, sigmas: Tensor, schedule: Schedule | None = None) -> Plan:
        kind = _Velocities if self.combine == "v_prediction" else _Strides
        strides = kind("PNDM", sigmas, schedule, "noise")
        stride, half, labels = strides.stride, strides.stride // 2, strides.labels
        if self.warm_up == "runge_kutta":  # four stages, half a stride apart, from each of the first three labels
            groups = [(a, b + half, b + half, b) for a, b in pairwise(labels[:4])]
            starts = [a for a, *_ in groups for _ in range(4)]
            entries = [v for group in groups for v in group] + labels[3:]
        else:
            starts, entries = [], [*labels[:2], *labels[1:]]
        rows = entries[self.begin :]
        at, slopes = strides.X, list[LinearExpr]()  # the network's input, and the outputs of the present group
        for i, label in enumerate(rows):
            e, stage = strides.evaluate(at, label), i % 4
            if i < len(starts):
                slopes = [*slopes, e] if stage else [e]
                if stage == 0:
                    strides.past = [e, *strides.past[:3]]
                slope = e if stage < 3 else (slopes[0] + 2 * slopes[1] + 2 * slopes[2] + e) / 6
                at = strides.transfer(strides.X, slope, starts[i], label if stage % 2 else label - half)
                advances = stage == 3
            elif i == 1:  # the first step again, with the mean of both its slopes
                at = strides.transfer(strides.X, (e + strides.past[0]) / 2, label + stride, label)
                advances = True
            else:
                strides.past = [e, *strides.past[:3]]
                slope = weighted_sum(EVEN[len(strides.past) - 1], strides.past)
                at = strides.transfer(strides.X, slope, label, label - stride)
                advances = i > 0
            last = i == len(rows) - 1
            if advances or last:
                strides.advance(at, last)
                at = strides.X
        return strides.builder.finish()


class _Strides:
    """A builder in the model's own coordinates X = alpha x, where levels are named by labels."""

    def __init__(self, solver: str, sigmas: Tensor, schedule: Schedule | None, prediction: str) -> None:
        if schedule is None:
            raise needs_schedule(f"Diffusers{solver}", "counts in labels", f"{solver}() needs none")
        if schedule.labels is None:
            raise InputError(f"schedule: got {type(schedule).__name__} without labels, expected a DiscreteVP.")
        self.builder: PlanBuilder = PlanBuilder(f"{solver}(diffusers)", sigmas, prediction)
        self.schedule = schedule
        self.labels: list[int] = [round(v) for v in schedule.time(self.builder.sigmas[:-1]).tolist()]
        self.stride: int = schedule.labels // len(self.labels)
        self.X: LinearExpr = self.alpha(self.level(self.labels[0])) * self.builder.x
        self.past: Sequence[LinearExpr] = []  # what is combined, newest first, in terms of the present state

    def level(self, label: int) -> float:
        """Return sigma at a label; a negative label means the grid's last level."""
        sigmas = self.builder.sigmas
        return float(sigmas[-1] if label < 0 else self.schedule.sigma(sigmas.new_tensor(label)))

    def alpha(self, sigma: float) -> float:
        return float(self.schedule.alpha(self.builder.sigmas.new_tensor(sigma)))

    def evaluate(self, X: LinearExpr, label: int) -> LinearExpr:
        s = self.level(label)
        return self.builder.evaluate(X / self.alpha(s), s)

    def transfer(self, X: LinearExpr, eps: LinearExpr, start: int, end: int) -> LinearExpr:
        """DDIM's step along eps from the level of one label to that of another."""
        s, t = self.level(start), self.level(end)
        return self.alpha(t) * (X / self.alpha(s) + (t - s) * eps)

    def advance(self, X: LinearExpr, last: bool) -> None:
        """Make X the current state (X / alpha at the end) and rewrite past terms with the old state in the new one."""
        if last:
            self.builder.advance(X / self.alpha(float(self.builder.sigmas[-1])))
            return
        (old,) = self.builder.x.terms

        def rest(p: LinearExpr) -> LinearExpr:
            return LinearExpr({k: w for k, w in p.terms.items() if k != old})

        self.X = self.builder.advance(X)
        if self.past:
            before = (self.X - rest(X)) / X.terms[old]
            self.past = [rest(p) + p.terms.get(old, 0.0) * before for p in self.past]


class _Velocities(_Strides):
    """For networks of v: diffusers combines the v of several levels and then takes the noise from them."""

    def evaluate(self, X: LinearExpr, label: int) -> LinearExpr:
        s = self.level(label)
        return super().evaluate(X, label) / self.alpha(s) - s * X  # v = (eps - sigma_t X) / alpha

    def transfer(self, X: LinearExpr, eps: LinearExpr, start: int, end: int) -> LinearExpr:
        s = self.level(start)
        return super().transfer(X, self.alpha(s) * (eps + s * X), start, end)


class MisalignedTeacher(DiffusionSolver):
    """A teacher for `distill_dode` whose targets are those of the authors' code of arXiv 2309.16421.

    It compares states at equal indices of two grids, not at equal levels: targets are up to a student step too noisy.
    """

    aligned = False

    def __init__(self, solver: DiffusionSolver) -> None:
        self.solver = solver
        self.card: Card = solver.card

    def plan(self, sigmas: Tensor, schedule: Schedule | None = None) -> Plan:
        return self.solver.plan(sigmas, schedule)


class HeunPP2(DiffusionSolver):
    r"""Heun++ of webui and ComfyUI (`heunpp2`): three slopes at this level and the next two.

    .. math:: x_t = x_s + (t-s)\,\big(w_1 d_1 + w_2 d_2 + w_3 d_3\big), \qquad
        w_2 = \frac{t}{3\sigma_0},\ w_3 = \frac{u}{3\sigma_0},\ w_1 = 1 - w_2 - w_3

    with u the level after t and $\sigma_0$ the first one. Order 1 at three evaluations per step, because the weights do
    not depend on the step: `EDMHeun` has order 2 at two. The last step is Euler's, the one before has two slopes.
    """

    card: Card = Card(
        summary="Euler's method in sigma along a weighted mean of three slopes",
        reference="Carzit/sd-webui-samplers-scheduler, as in ComfyUI; no paper, after Algorithm 2 of arXiv 2206.00364",
        deterministic_order=1,
        evaluations=3,
    )

    def plan(self, sigmas: Tensor, schedule: Schedule | None = None) -> Plan:
        builder = PlanBuilder("HeunPP2", sigmas)
        levels = builder.sigmas.tolist()
        for i, s in enumerate(levels[:-1]):
            ahead, x, slopes = levels[i : i + 3], builder.x, list[LinearExpr]()
            if len(levels) - i <= 3:  # no slope at the last level
                ahead = levels[i:-1]
            for u, v in pairwise([*ahead, levels[-1]]):
                slopes.append((x - builder.evaluate(x, u)) / u)
                x = x + (v - u) * slopes[-1]
            rest = [u / (len(ahead) * levels[0]) for u in ahead[1:]]
            builder.advance(builder.x + (levels[i + 1] - s) * weighted_sum([1 - sum(rest), *rest], slopes))
        return builder.finish()


class DiffusersLCM(DiffusionSolver):
    r"""`LCM` as diffusers' LCMScheduler has it: with a boundary condition, which acts at small labels alone.

    .. math:: x_t = \frac{r}{\sqrt{r^2 + 1/4}}\,D + \frac{1/4}{r^2 + 1/4}\,\alpha_s x_s + t\,z,\qquad
        r = \text{scaling}\cdot\operatorname{label}(s)

    Args:
        scaling: `timestep_scaling` of the configuration.
    """

    card: Card = LCM.card

    def __init__(self, scaling: float = 10.0) -> None:
        self.scaling: float = _validation.check_float("scaling", scaling, 0, expected="a number of at least 0")

    def plan(self, sigmas: Tensor, schedule: Schedule | None = None) -> Plan:
        if schedule is None:
            raise needs_schedule("DiffusersLCM", "depends on labels", "LCM() needs none")
        builder = PlanBuilder("LCM of diffusers", sigmas)
        ratios = (self.scaling * schedule.time(builder.sigmas[:-1])).tolist()
        alphas = schedule.alpha(builder.sigmas[:-1]).tolist()
        for (s, t), r, alpha in zip(pairwise(builder.sigmas.tolist()), ratios, alphas, strict=True):
            noise, total = path_noise(builder, s, t, t), r * r + 0.25
            x, D = builder.x, builder.evaluate(builder.x, s)
            builder.advance(r / math.sqrt(total) * D + 0.25 / total * alpha * x + noise)
        return builder.finish()
