"""The cost of Brownian increments, as ratios to a bare torch loop of the same run.

The batch is 4096 x 16 in float32, 256 steps, one thread. All series take turns and the fastest turn of each
is kept, so other work on the machine affects all of them alike.
"""

from __future__ import annotations

import importlib.util
import math
import os
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
import torchsde
from torch import Tensor

import fewstep as fs
from base import Experiment, Job, Record, Row, single_threaded, table
from fewstep.brownian import BrownianPath, FreshIncrements, Increment

NAME = "brownian-speed"
STEPS = 256
TARGETS = {"fresh W, Euler loop": 1.0, "path W, walked": 1.2, "path W,H, walked": 2.3}


@dataclass(frozen=True)
class Budget:
    """Batch, turns of each series, and steps of the long walk whose memory is measured."""

    shape: tuple[int, ...]
    turns: int
    long_steps: int


BUDGETS = {"smoke": Budget((64, 2), 1, 2**12), "paper": Budget((4096, 16), 12, 2**20)}


def measure(budget: Budget, job: Job) -> dict[str, Record]:
    """Memory of a long walk, seconds of every series, milliseconds of a query at random."""
    single_threaded()
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")
    memory = long_walk(budget.long_steps)
    data = {
        "shape": list(budget.shape), "dtype": "float32", "steps": STEPS, "threads": 1, "targets": TARGETS,
        "torchsde": metadata.version("torchsde"),
        "diffrax": metadata.version("diffrax") if importlib.util.find_spec("diffrax") else None,
        "rows": time_series(budget, job.seed), "memory": memory, "random_access": random_access(20),
    }  # fmt: skip
    return {NAME: Record(NAME, data, job.seed)}


def time_series(budget: Budget, seed: int) -> list[Row]:
    """Seconds of every series, and their ratio to the bare loop; peers have fewer turns."""
    runs = series(budget.shape, seed)
    if importlib.util.find_spec("diffrax"):
        runs |= diffrax_series(budget.shape, seed)
    best = dict.fromkeys(runs, math.inf)
    for turn in range(budget.turns):
        for name, run in runs.items():
            if name.startswith(("torchsde", "diffrax")) and turn >= max(1, budget.turns // 4):
                continue
            start = time.perf_counter()
            run()
            best[name] = min(best[name], time.perf_counter() - start)
    bare, normals = best["bare torch loop"], best["normals alone"]
    jax = best.get("jax bare scan", bare)  # each is compared with the bare loop of its own framework
    return [
        {"series": name, "seconds": s, "to_bare_loop": s / (jax if name[:3] in ("jax", "dif") else bare),
         "to_normals": s / normals}
        for name, s in best.items()
    ]  # fmt: skip


def series(shape: tuple[int, ...], seed: int) -> dict[str, Callable[[], None]]:
    """This library's increments, torchsde's, and bare loops, by name."""
    grid, float32 = torch.linspace(0, 1, STEPS + 1), torch.float32

    def path(levy: str, seeds: range | None = None) -> Iterator[Increment]:
        return BrownianPath(shape, seed=seed, levy=levy, dtype=float32, seeds=seeds).increments(grid)

    def fresh(levy: str, reuse: bool = True) -> Iterator[Increment]:
        return FreshIncrements(shape, levy, seed=seed, dtype=float32, reuse=reuse).increments(grid)

    def torchsde_queries(levy: str, hint: bool) -> Iterator[object]:
        """BrownianInterval asked for each step in turn; `dt` is its hint for the tree."""
        options = {"levy_area_approximation": levy, "dt": 1 / STEPS if hint else None}
        bm = torchsde.BrownianInterval(0.0, 1.0, size=shape, dtype=float32, entropy=seed, **options)
        for k in range(STEPS):
            yield bm(k / STEPS, (k + 1) / STEPS, return_U=levy != "none")

    return {
        "bare torch loop": lambda: bare_loop(shape),
        "normals alone": lambda: normals(shape),
        "fresh W, Euler loop": lambda: euler(shape, fresh("W")),
        "fresh W, fewstep.solve": lambda: solve(shape, grid, seed),
        "fresh W, Euler loop, own memory": lambda: euler(shape, fresh("W", reuse=False)),
        "fresh W,H, walked": lambda: walk(fresh("H")),
        "fresh W,H,K, walked": lambda: walk(fresh("K")),
        "path W, walked": lambda: walk(path("W")),
        "path W, Euler loop": lambda: euler(shape, path("W")),
        "path W,H, walked": lambda: walk(path("H")),
        "path W,H, Euler loop": lambda: euler(shape, path("H")),
        "path W,H,K, walked": lambda: walk(path("K")),
        "path W, seeds per sample, walked": lambda: walk(path("W", range(shape[0]))),
        "torchsde W, queries": lambda: walk(torchsde_queries("none", False)),
        "torchsde W, queries, dt hint": lambda: walk(torchsde_queries("none", True)),
        "torchsde W,U, queries": lambda: walk(torchsde_queries("space-time", False)),
        "torchsde W,U, queries, dt hint": lambda: walk(torchsde_queries("space-time", True)),
    }


def drift(y: Tensor) -> Tensor:
    return 0.05 * y


def diffusion(y: Tensor) -> Tensor:
    return 0.2 * y


def bare_loop(shape: tuple[int, ...]) -> None:
    """y + f h + g sqrt(h) randn: what a user writes by hand."""
    y, h = torch.ones(shape), 1 / STEPS
    for _ in range(STEPS):
        y = y + drift(y) * h + diffusion(y) * math.sqrt(h) * torch.randn(shape)


def normals(shape: tuple[int, ...]) -> None:
    z = torch.empty(shape)
    for _ in range(STEPS):
        z.normal_()


def euler(shape: tuple[int, ...], increments: Iterable[Increment]) -> None:
    """The bare loop on increments of the library."""
    y = torch.ones(shape)
    for inc in increments:
        y = y + drift(y) * inc.h + diffusion(y) * inc.W


def solve(shape: tuple[int, ...], grid: Tensor, seed: int) -> None:
    """The library's own loop with Euler-Maruyama on fresh increments."""
    sde = fs.SDE(lambda t, y: drift(y), lambda t, y: diffusion(y), "diagonal", "ito")
    fs.solve(sde, fs.EulerMaruyama(), y0=torch.ones(shape), grid=grid, seed=seed)


def walk(increments: Iterable[object]) -> None:
    for _ in increments:
        pass


def diffrax_series(shape: tuple[int, ...], seed: int) -> dict[str, Callable[[], None]]:
    """diffrax's VirtualBrownianTree queried for each step inside a jitted scan, and a bare scan."""
    import diffrax
    import jax
    from jax import numpy as jnp

    times = jnp.arange(STEPS, dtype=jnp.float32) / STEPS

    def queries(area: type) -> Callable[[], None]:
        tree = diffrax.VirtualBrownianTree(
            0.0, 1.0, tol=0.5 / STEPS, shape=shape, key=jax.random.key(seed), levy_area=area
        )
        kind = {} if area is diffrax.BrownianIncrement else {"use_levy": True}

        def one(total: Any, t: Any) -> Any:
            out = tree.evaluate(t, t + 1 / STEPS, **kind)
            return jax.tree.map(jnp.add, total, out.W if kind else out), None

        scan = jax.jit(lambda: jax.lax.scan(one, jnp.zeros(shape), times)[0])
        return lambda: jax.block_until_ready(scan())

    def bare(y: Any, key: Any) -> Any:
        noise = jax.random.normal(key, shape)
        return y + 0.05 * y / STEPS + 0.2 * y * math.sqrt(1 / STEPS) * noise, None

    keys = jax.random.split(jax.random.key(seed), STEPS)
    loop = jax.jit(lambda: jax.lax.scan(bare, jnp.ones(shape), keys)[0])
    found = {
        "jax bare scan": lambda: jax.block_until_ready(loop()),
        "diffrax W, queries in a scan": queries(diffrax.BrownianIncrement),
        "diffrax W,H, queries in a scan": queries(diffrax.SpaceTimeLevyArea),
    }
    for run in found.values():
        run()  # compiles
    return found


def long_walk(steps: int) -> Row:
    """Peak memory that a walk adds, and what storing its increments would take."""
    path = BrownianPath((64, 16), levy="W", dtype=torch.float32)
    grid = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    walk(path.increments(grid[:3]))

    def used() -> int:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    before, start = used(), time.perf_counter()
    walk(path.increments(grid))
    seconds, batch = time.perf_counter() - start, 4.0 * math.prod(path.shape)
    return {"steps": steps, "batch_bytes": batch, "grown_bytes": used() - before,
            "all_increments_bytes": batch * steps, "seconds": seconds}  # fmt: skip


def random_access(queries: int) -> list[Row]:
    """Milliseconds for a query at a random step of a grid of 2^k, without a cache: O(k)."""
    generator, out = torch.Generator().manual_seed(0), []
    for k in (4, 8, 12, 16, 20):
        path = BrownianPath((4096, 16), levy="W", dtype=torch.float32, cache=0)
        steps = torch.randint(2**k, (queries,), generator=generator).tolist()
        start = time.perf_counter()
        for i in steps:
            path.increment(i / 2**k, (i + 1) / 2**k)
        out.append({"log2_steps": k, "ms": (time.perf_counter() - start) / queries * 1e3})
    return out


def tables(records: dict[str, Record]) -> dict[str, str]:
    """The series, then memory and random queries."""
    data = records[NAME].data
    memory, targets = data["memory"], data["targets"]
    rows = [
        [r["series"], f"{r['to_bare_loop']:.2f}",
         f"at most {targets[r['series']]}" if r["series"] in targets else " ", f"{r['to_normals']:.2f}"]
        for r in data["rows"]
    ]  # fmt: skip
    access = ", ".join(f"{r['ms']:.1f} ms at $2^{{{r['log2_steps']}}}$" for r in data["random_access"])
    note = (
        f"torchsde {data['torchsde']}, diffrax {data['diffrax']}; jax and diffrax are compared with the bare "
        f"scan of jax. A walk over {memory['steps']} steps of a batch of {memory['batch_bytes'] / 1024:.0f} "
        f"KiB added {memory['grown_bytes'] / 2**20:.0f} MiB, 8 of them the grid's; its increments together "
        f"would take {memory['all_increments_bytes'] / 2**30:.0f} GiB. One random query, without the cache: "
        f"{access} steps."
    )
    head = ["series", "time to bare loop", "target", "time to the normals alone"]
    return {NAME: f"{table(head, rows)}\n\n{note}"}


EXPERIMENT = Experiment(NAME, __doc__, 5, BUDGETS, measure, tables)

if __name__ == "__main__":
    EXPERIMENT.main()
