"""DDIM and PNDM as diffusers steps them: by a fixed stride of labels, whatever the grid.

diffusers' DDIM and PNDM go from label t to t - N // n, though the next evaluation may be told another
label ("linspace", or n that does not divide N). Reached as `form="diffusers"`; on grids of that very
stride nothing differs from the published step.
"""

from __future__ import annotations

from torch import Tensor

from ..errors import InputError
from ..plan import Plan
from ..plan_builder import LinearExpr, PlanBuilder
from ..schedule import Schedule
from ..solver import needs_schedule
from .ipndm import EVEN, composite


class Strides:
    """A builder in the model's own coordinates X = alpha x, where a state has the level one says it has."""

    def __init__(self, solver: str, sigmas: Tensor, schedule: Schedule | None, prediction: str) -> None:
        if schedule is None:
            raise needs_schedule(solver, "counts in labels", f"{solver}() without form needs none")
        if schedule.labels is None:
            raise InputError(
                f"schedule: got {type(schedule).__name__} without labels, expected a DiscreteVP."
            )
        self.builder: PlanBuilder = PlanBuilder(f"{solver}(diffusers)", sigmas, prediction)
        self.schedule = schedule
        self.labels: list[int] = [round(v) for v in schedule.time(sigmas[:-1]).tolist()]
        self.stride: int = schedule.labels // len(self.labels)
        self.last: float = float(sigmas[-1])
        self.X = self.alpha(self.level(self.labels[0])) * self.builder.x
        self.past: list[LinearExpr] = []  # what is combined, newest first, in terms of the present state

    def level(self, label: int) -> float:
        """sigma at a label; below 0 the grid's last level."""
        if label < 0:
            return self.last
        return float(
            self.schedule.sigma(self.schedule.time(self.builder.sigmas[:1]).new_tensor(float(label)))
        )

    def alpha(self, sigma: float) -> float:
        return float(self.schedule.alpha(self.builder.sigmas.new_tensor(sigma)))

    def evaluate(self, X: LinearExpr, label: int) -> LinearExpr:
        s = self.level(label)
        return self.builder.evaluate(X / self.alpha(s), s)

    def keep(self, X: LinearExpr) -> None:
        """Let X be the state from here on; past terms that hold the old state are written in the new."""
        ((old, _),) = self.builder.x.terms.items()
        a = X.terms[old]
        rest = LinearExpr({k: w for k, w in X.terms.items() if k != old})
        self.X = self.builder.advance(X)
        before = (self.X - rest) / a
        self.past = [
            LinearExpr({k: w for k, w in p.terms.items() if k != old}) + p.terms.get(old, 0.0) * before
            for p in self.past
        ]

    def finish(self) -> Plan:
        """The table; its last state leaves in variance-exploding coordinates."""
        return self.builder.finish()

    def leave(self, X: LinearExpr) -> None:
        self.builder.advance(X / self.alpha(self.last))

    def transfer(self, X: LinearExpr, eps: LinearExpr, start: int, end: int) -> LinearExpr:
        """DDIM's step along eps from the level of one label to that of another."""
        s, t = self.level(start), self.level(end)
        return self.alpha(t) * (X / self.alpha(s) + (t - s) * eps)


def ddim(eta: float, sigmas: Tensor, schedule: Schedule | None) -> Plan:
    """Eq. (12) of arXiv 2010.02502 from label t to t - stride."""
    walk = Strides("DDIM", sigmas, schedule, "data")
    for i, label in enumerate(walk.labels):
        s, t = walk.level(label), walk.level(label - walk.stride)
        v = eta * t / s * max(s * s - t * t, 0.0) ** 0.5
        z = walk.builder.noise(s**-2, t**-2)[0] if v > 0 else None
        D = walk.evaluate(walk.X, label)
        keep = (t * t - v * v) ** 0.5 / s
        x = keep / walk.alpha(s) * walk.X + (1 - keep) * D
        X = walk.alpha(t) * (x + v * z if z is not None else x)
        walk.keep(X) if i + 1 < len(walk.labels) else walk.leave(X)
    return walk.finish()


class _Velocities(Strides):
    """Networks of v: diffusers combines the v of several levels and then takes the noise from them."""

    def evaluate(self, X: LinearExpr, label: int) -> LinearExpr:
        s = self.level(label)
        return super().evaluate(X, label) / self.alpha(s) - s * X  # v = (eps - sigma_t X) / alpha

    def transfer(self, X: LinearExpr, eps: LinearExpr, start: int, end: int) -> LinearExpr:
        s = self.level(start)
        return super().transfer(X, self.alpha(s) * (eps + s * X), start, end)


def pndm(warm_up: str, sigmas: Tensor, schedule: Schedule | None, combine: str = "epsilon") -> Plan:
    """Algorithm 2 of arXiv 2202.09778, its Runge-Kutta stages half a stride from the grid's labels."""
    walk = (_Velocities if combine == "v_prediction" else Strides)("PNDM", sigmas, schedule, "noise")
    labels, stride, half = walk.labels, walk.stride, walk.stride // 2
    for i, label in enumerate(labels):
        X, e1 = walk.X, walk.evaluate(walk.X, label)
        walk.past = past = [e1, *walk.past[:3]]
        ahead = labels[i + 1] if i + 1 < len(labels) else -1
        if i < 3 and warm_up == "runge_kutta":
            e2 = walk.evaluate(walk.transfer(X, e1, label, label - half), ahead + half)
            e3 = walk.evaluate(walk.transfer(X, e2, label, ahead + half), ahead + half)
            e4 = walk.evaluate(walk.transfer(X, e3, label, ahead), ahead)
            X = walk.transfer(X, (e1 + 2 * e2 + 2 * e3 + e4) / 6, label, ahead)
        elif i == 0:
            e2 = walk.evaluate(walk.transfer(X, e1, label, label - stride), ahead)
            X = walk.transfer(X, (e1 + e2) / 2, ahead + stride, ahead)
        else:
            X = walk.transfer(X, composite(EVEN[len(past) - 1], past), label, label - stride)
        walk.keep(X) if i + 1 < len(labels) else walk.leave(X)
    return walk.finish()
