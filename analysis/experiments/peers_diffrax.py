"""diffrax's SDE solvers as series of a work-precision figure; imported only where diffrax is installed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import Tensor

from fewstep_analysis.monte_carlo import Experiment, Stored
from fewstep_analysis.problems import TestProblem
from fewstep_analysis.work import Series

# drift and diffusion of one number: those of `problems` with their default parameters
EQUATIONS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "geometric_brownian_motion": (lambda t, y: 0.5 * y, lambda t, y: 0.7 * y),
    "sine": (lambda t, y: -2.0 * jnp.sin(y), lambda t, y: 0.8 + 0.6 * jnp.cos(y)),
    "additive_sine": (lambda t, y: jnp.sin(y), lambda t, y: jnp.ones_like(y)),
    "additive_in_time": (lambda t, y: jnp.sin(y + t), lambda t, y: (1 + t * t) * jnp.ones_like(y)),
}
# solvers with their drift evaluations per step
SOLVERS = {"diagonal": {"Euler": 1, "ItoMilstein": 1}, "additive": {"Euler": 1, "ShARK": 2}}


class _StoredPath(diffrax.AbstractBrownianPath):
    """Stored increments of one path behind diffrax's interface; it can be queried at its own steps only."""

    t0: Any
    t1: Any
    W: Any
    H: Any
    levy_area: Any = diffrax.SpaceTimeLevyArea

    def evaluate(self, t0: Any, t1: Any = None, left: bool = True, use_levy: bool = False) -> Any:
        h = (self.t1 - self.t0) / len(self.W)
        k = jnp.round((t0 - self.t0) / h).astype(int)
        return self.levy_area(dt=t1 - t0, W=self.W[k], H=self.H[k]) if use_levy else self.W[k]


def diffrax_series(e: Experiment, problem: TestProblem) -> list[Series]:
    """diffrax's solvers of a problem, for `sde_work_precision(peers=)`; none if EQUATIONS lacks it."""
    if problem.name not in EQUATIONS or not _matches(problem) or e.device != "cpu":
        return []
    return [_series(e, problem.name, s, n) for s, n in SOLVERS[problem.sde.noise_type].items()]


def solve_diffrax(problem: str, solver: str, y0: Tensor, ends: tuple[float, float], noise: Stored) -> Tensor:
    """(paths, 1) final states, solved by diffrax in float64 with one step per stored increment."""
    with jax.enable_x64(True):
        W, H = (_columns([getattr(i, name) for i in noise.pieces]) for name in ("W", "H"))

        def one(y: Any, w: Any, h: Any) -> Any:
            return _end(problem, solver, y, _StoredPath(*ends, w, h), len(noise.pieces))

        out = jax.jit(jax.vmap(one))(jnp.asarray(y0.flatten().numpy()), W, H)
        return torch.from_numpy(np.array(out)).unsqueeze(-1)


def _matches(problem: TestProblem) -> bool:
    """Whether the equation here equals the problem's, whose parameters may have been changed."""
    t, y = torch.tensor(0.3, dtype=torch.float64), torch.linspace(-1, 2, 7, dtype=torch.float64)[:, None]
    theirs = (problem.sde.drift(t, y), problem.sde.diffusion(t, y))
    with jax.enable_x64(True):
        ours = [np.array(f(float(t), jnp.asarray(y.numpy()))) for f in EQUATIONS[problem.name]]
    return all(a.shape == b.shape and np.allclose(a, b, 1e-12) for a, b in zip(ours, theirs))


def _columns(pieces: list[Tensor | None]) -> Any:
    """(paths, steps), or None where the noise lacks this coordinate."""
    if pieces[0] is None:
        return None
    return jnp.asarray(torch.cat([p.reshape(-1, 1) for p in pieces], 1).numpy())


def _end(problem: str, solver: str, y: Any, path: Any, steps: int) -> Any:
    drift, diffusion = EQUATIONS[problem]
    terms = diffrax.MultiTerm(
        diffrax.ODETerm(lambda t, y, args: drift(t, y)),
        diffrax.ControlTerm(lambda t, y, args: diffusion(t, y), path),
    )
    return diffrax.diffeqsolve(
        terms, getattr(diffrax, solver)(), path.t0, path.t1, (path.t1 - path.t0) / steps, y,
        max_steps=steps + 1, adjoint=diffrax.ForwardMode(),
    ).ys[-1]  # fmt: skip


def _series(e: Experiment, problem: str, solver: str, evaluations: int) -> Series:
    """Timed as users of diffrax run it: along a VirtualBrownianTree, compiled beforehand."""
    start, compiled = e.start(e.paths), {n: _compiled(e, problem, solver, n) for n in e.levels}

    def run(level: int) -> Any:
        with jax.enable_x64(True):
            keys = jax.random.split(jax.random.key(e.seed), e.paths)
            return compiled[level](jnp.asarray(start.flatten().numpy()), keys).block_until_ready()

    counts = [evaluations * 2**n for n in e.levels]
    return Series(solver, "diffrax", counts, run,
                  lambda noise, n: solve_diffrax(problem, solver, start, e.ends, noise))  # fmt: skip


def _compiled(e: Experiment, problem: str, solver: str, level: int) -> Any:
    area = diffrax.SpaceTimeLevyArea if solver == "ShARK" else diffrax.BrownianIncrement
    h = (e.ends[1] - e.ends[0]) / 2**level

    def one(y: Any, key: Any) -> Any:
        tree = diffrax.VirtualBrownianTree(*e.ends, tol=h / 2, shape=(), key=key, levy_area=area)
        return _end(problem, solver, y, tree, 2**level)

    with jax.enable_x64(True):
        keys = jax.random.split(jax.random.key(e.seed), e.paths)
        many = jax.jit(jax.vmap(one))
        return many.lower(jnp.zeros(e.paths, jnp.float64), keys).compile()
