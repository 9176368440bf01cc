"""What Brownian increments cost, as ratios to a bare torch loop taken in one run.

The batch is 4096 x 16 in float32, 256 steps, one thread. All series take turns and the fastest turn of each
is kept, so that other work on the machine falls on all alike.
"""

from __future__ import annotations

import importlib.util
import math
import os
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from pathlib import Path

import torch
import torchsde
from torch import Tensor

import fewstep as fs
from fewstep.brownian import BrownianPath, FreshIncrements, Increment
from fewstep_analysis.records import Record

TAKES = "5 min"
STEPS = 256
TARGETS = {
    "fresh W, Euler loop": 1.0,
    "path W, walked": 1.2,
    "path W,H, walked": 2.3,
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


def euler(shape: tuple[int, ...], increments: Iterable[Increment]) -> None:
    """The same loop on increments of the library."""
    y = torch.ones(shape)
    for inc in increments:
        y = y + drift(y) * inc.h + diffusion(y) * inc.W


def solved(shape: tuple[int, ...], grid: Tensor, seed: int) -> None:
    """The library's own loop: `solve` with Euler-Maruyama on fresh increments."""
    sde = fs.SDE(
        drift=lambda t, y: drift(y), diffusion=lambda t, y: diffusion(y),
        noise_type="diagonal", sde_type="ito",
    )  # fmt: skip
    fs.solve(sde, fs.EulerMaruyama(), y0=torch.ones(shape), grid=grid, seed=seed)


def walk(increments: Iterable[object]) -> None:
    for _ in increments:
        pass


def normals(shape: tuple[int, ...]) -> None:
    z = torch.empty(shape)
    for _ in range(STEPS):
        z.normal_()


def torchsde_queries(shape: tuple[int, ...], levy: str, hint: bool, seed: int) -> Iterator[object]:
    """torchsde's BrownianInterval asked for each step in turn; `dt` is its hint for the tree."""
    bm = torchsde.BrownianInterval(
        0.0, 1.0, size=shape, dtype=torch.float32, entropy=seed,
        levy_area_approximation=levy, dt=1 / STEPS if hint else None,
    )  # fmt: skip
    for k in range(STEPS):
        yield bm(k / STEPS, (k + 1) / STEPS, return_U=levy != "none")


def diffrax_series(shape: tuple[int, ...], seed: int) -> dict[str, Callable[[], None]]:
    """diffrax's VirtualBrownianTree asked for each step inside a jitted scan, beside a bare scan."""
    import diffrax
    import jax
    from jax import numpy as jnp

    times = jnp.arange(STEPS, dtype=jnp.float32) / STEPS

    def queries(area: type) -> Callable[[], None]:
        tree = diffrax.VirtualBrownianTree(
            0.0, 1.0, tol=0.5 / STEPS, shape=shape, key=jax.random.key(seed), levy_area=area
        )
        kind = {} if area is diffrax.BrownianIncrement else {"use_levy": True}

        def one(total, t):  # type: ignore[no-untyped-def]
            out = tree.evaluate(t, t + 1 / STEPS, **kind)
            return jax.tree.map(jnp.add, total, out.W if kind else out), None

        scan = jax.jit(lambda: jax.lax.scan(one, jnp.zeros(shape), times)[0])
        return lambda: jax.block_until_ready(scan())

    def bare(y, key):  # type: ignore[no-untyped-def]
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


def series(shape: tuple[int, ...], seed: int) -> dict[str, Callable[[], None]]:
    grid = torch.linspace(0, 1, STEPS + 1)

    def path(levy: str, seeds: range | None = None) -> Iterator[Increment]:
        return BrownianPath(shape, seed=seed, levy=levy, dtype=torch.float32, seeds=seeds).increments(grid)

    def fresh(levy: str, reuse: bool = True) -> Iterator[Increment]:
        source = FreshIncrements(shape, levy, seed=seed, dtype=torch.float32, reuse=reuse)
        return source.increments(grid)

    return {
        "bare torch loop": lambda: bare_loop(shape),
        "normals alone": lambda: normals(shape),
        "fresh W, Euler loop": lambda: euler(shape, fresh("W")),
        "fresh W, fewstep.solve": lambda: solved(shape, grid, seed),
        "fresh W, Euler loop, own memory": lambda: euler(shape, fresh("W", reuse=False)),
        "fresh W,H, walked": lambda: walk(fresh("H")),
        "fresh W,H,K, walked": lambda: walk(fresh("K")),
        "path W, walked": lambda: walk(path("W")),
        "path W, Euler loop": lambda: euler(shape, path("W")),
        "path W,H, walked": lambda: walk(path("H")),
        "path W,H, Euler loop": lambda: euler(shape, path("H")),
        "path W,H,K, walked": lambda: walk(path("K")),
        "path W, seeds per sample, walked": lambda: walk(path("W", range(shape[0]))),
        "torchsde W, queries": lambda: walk(torchsde_queries(shape, "none", False, seed)),
        "torchsde W, queries, dt hint": lambda: walk(torchsde_queries(shape, "none", True, seed)),
        "torchsde W,U, queries": lambda: walk(torchsde_queries(shape, "space-time", False, seed)),
        "torchsde W,U, queries, dt hint": lambda: walk(torchsde_queries(shape, "space-time", True, seed)),
    }


def measure(shape: tuple[int, ...], repeats: int, seed: int) -> list[dict[str, float | str]]:
    """Seconds and ratio to the bare loop of every series; slow ones are run fewer times."""
    runs = series(shape, seed)
    if importlib.util.find_spec("diffrax"):
        runs |= diffrax_series(shape, seed)
    best = dict.fromkeys(runs, math.inf)
    for turn in range(repeats):
        for name, run in runs.items():
            if name.startswith(("torchsde", "diffrax")) and turn >= max(1, repeats // 4):
                continue
            start = time.perf_counter()
            run()
            best[name] = min(best[name], time.perf_counter() - start)
    bare, drawn = best["bare torch loop"], best["normals alone"]
    jax = best.get("jax bare scan", bare)  # each against the bare loop of its own framework
    return [
        {"series": n, "seconds": s, "to_bare_loop": s / (jax if n[:3] in ("jax", "dif") else bare),
         "to_normals": s / drawn}
        for n, s in best.items()
    ]  # fmt: skip


def long_walk(steps: int) -> dict[str, float]:
    """Peak memory that a walk adds, and what keeping its increments would take."""
    shape = (64, 16)
    path = BrownianPath(shape, levy="W", dtype=torch.float32)
    grid = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    walk(path.increments(grid[:3]))
    unit = 1 if sys.platform == "darwin" else 1024
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    start = time.perf_counter()
    walk(path.increments(grid))
    seconds = time.perf_counter() - start
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit - before
    return {
        "steps": steps, "batch_bytes": 4.0 * math.prod(shape), "grown_bytes": grown,
        "all_increments_bytes": 4.0 * math.prod(shape) * steps, "seconds": seconds,
    }  # fmt: skip


def random_access(queries: int) -> list[dict[str, float]]:
    """Milliseconds for a query at a random step of a grid of 2^k, without a cache: O(k)."""
    shape, out = (4096, 16), []
    generator = torch.Generator().manual_seed(0)
    for k in (4, 8, 12, 16, 20):
        path = BrownianPath(shape, levy="W", dtype=torch.float32, cache=0)
        places = torch.randint(2**k, (queries,), generator=generator).tolist()
        start = time.perf_counter()
        for i in places:
            path.increment(i / 2**k, (i + 1) / 2**k)
        out.append({"log2_steps": k, "ms": (time.perf_counter() - start) / queries * 1e3})
    return out


def markdown(record: Record) -> str:
    """The series as a table, then memory and random queries."""
    lines = ["| series | time to bare loop | target | time to the normals alone |", "| --- " * 4 + "|"]
    for row in record.data["rows"]:
        target = record.data["targets"].get(row["series"])
        expected = "" if target is None else f"at most {target}"
        lines.append(
            f"| {row['series']} | {row['to_bare_loop']:.2f} | {expected} | {row['to_normals']:.2f} |"
        )
    memory = record.data["memory"]
    access = ", ".join(f"{r['ms']:.1f} ms at $2^{{{r['log2_steps']}}}$" for r in record.data["random_access"])
    note = (
        f"torchsde {record.data['torchsde']}, diffrax {record.data['diffrax']}; jax and diffrax are held "
        f"against the bare scan of jax. A walk over {memory['steps']} steps of a batch of "
        f"{memory['batch_bytes'] / 1024:.0f} KiB added {memory['grown_bytes'] / 2**20:.0f} MiB, 8 of them "
        f"the grid's; its increments together would take {memory['all_increments_bytes'] / 2**30:.0f} GiB. "
        f"One query at random, without the cache: {access} steps."
    )
    return "\n".join([*lines, "", note])


def run(out: Path, *, budget: str = "paper", seed: int = 0, device: torch.device | str = "cpu") -> list[str]:
    """Write the record; returns the table."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")
    try:
        memory = long_walk(2**20 if budget == "paper" else 2**12)
        shape, repeats = ((4096, 16), 12) if budget == "paper" else ((64, 2), 1)
        data = {
            "shape": list(shape), "dtype": "float32", "steps": STEPS, "threads": 1,
            "torchsde": metadata.version("torchsde"), "targets": TARGETS,
            "diffrax": metadata.version("diffrax") if importlib.util.find_spec("diffrax") else None,
            "rows": measure(shape, repeats, seed), "memory": memory, "random_access": random_access(20),
        }  # fmt: skip
    finally:
        torch.set_num_threads(threads)
    record = Record("brownian-speed", data, seed)
    record.save(out / "records" / "brownian-speed.json")
    return markdown(record).splitlines()
