"""`BrownianPath`: the exact law of every partition, and the same numbers in every query."""

from __future__ import annotations

import copy
import math
import pickle
import random
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import reduce
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peak_memory import numbers_of

import fewstep as fs
from fewstep import InputError
from fewstep.brownian import BrownianPath, Increment
from fewstep.brownian.counter import CounterNormals, philox
from fewstep.brownian.random_normals import GeneratorNormals, HashedNormals, mix, mix_, node_seed

VARIANCES = {"W": (1.0,), "H": (1.0, 1 / 12), "K": (1.0, 1 / 12, 1 / 720)}
levies = st.sampled_from("WHK")
generators = st.sampled_from(["torch", "counter"])
BOTH = pytest.mark.parametrize("generator", ["torch", "counter"])


def letters(inc: Increment) -> list[torch.Tensor]:
    return [v for v in (inc.W, inc.H, inc.K) if v is not None]


def same(a: Increment, b: Increment) -> bool:
    return all(torch.equal(u, v) for u, v in zip(letters(a), letters(b), strict=True))


def close(a: Increment, b: Increment, tol: float) -> bool:
    pairs = zip(letters(a), letters(b), strict=True)
    return all(torch.allclose(u, v, rtol=tol, atol=tol * math.sqrt(a.h)) for u, v in pairs)


MOST = 14 * 48 * 3  # normals: at most 14 times, up to 48 cuts per time, one normal per letter


class UnitVectors:
    """In place of normals: a unit vector per node and letter, so outputs are coefficients."""

    def __init__(self, dimension: int) -> None:
        self.dimension, self.index = dimension, {}

    def begin(self, levels):
        def draw(nodes):
            out = torch.zeros(levels, len(nodes), self.dimension, dtype=torch.float64)
            for level in range(levels):
                for i, node in enumerate(nodes):
                    key = (node, level)
                    out[level, i, self.index.setdefault(key, len(self.index))] = 1.0
            return list(out)

        return draw


@settings(deadline=None, max_examples=40)
@given(
    levies,
    st.sampled_from(["linear", "log"]),
    st.lists(st.floats(0.01, 100), min_size=1, max_size=6),
    st.sets(st.integers(1, 47), max_size=12),
    st.booleans(),
)
def test_every_partition_has_exactly_the_law_of_brownian_motion(levy, clock, gaps, places, one_by_one):
    """Covariance diag(h, h/12, h/720), for any knots, clock and kind of query."""
    knots = [0.5 + sum(gaps[:i]) for i in range(len(gaps) + 1)]
    kind = {"levy": levy, "clock": clock, "knots": knots, "dtype": torch.float64}
    path = BrownianPath((MOST,), knots[0], knots[-1], **kind)
    path._normals = UnitVectors(MOST)
    eighth = path._clock.end // len(gaps) // 8
    inner = sorted(p * eighth for p in places if p < 8 * len(gaps))
    times = [path._clock.time(p) for p in (0, *inner, path._clock.end)]
    if one_by_one:
        intervals = list(pairwise(times))
        random.Random(0).shuffle(intervals)
        incs = [path.increment(a, b) for a, b in intervals]
    else:
        incs = list(path.increments(times))
    rows = [v / math.sqrt(inc.h * s) for inc in incs for v, s in zip(letters(inc), VARIANCES[levy], strict=True)]
    gram = torch.stack(rows) @ torch.stack(rows).mT
    assert torch.allclose(gram, torch.eye(len(rows), dtype=torch.float64), atol=1e-9)


@settings(deadline=None, max_examples=8)
@given(
    levies,
    st.sampled_from([torch.float32, torch.float64]),
    st.lists(st.floats(0.0, 3.0, width=32), min_size=2, max_size=5, unique=True),
    st.integers(0, 2**63),
    st.booleans(),
    generators,
    st.randoms(use_true_random=False),
)
def test_values_do_not_depend_on_the_order_of_queries(levy, dtype, times, seed, per_sample, generator, rng):
    times = sorted(times)
    if min(b - a for a, b in pairwise(times)) < 1e-5:
        return
    seeds = [seed, 1, -7] if per_sample else None

    def fresh(cache=128):
        return BrownianPath((3, 2), 0.0, 3.0, seed, levy, dtype, seeds=seeds, cache=cache, generator=generator)

    walked = list(fresh().increments(times))
    pairs = list(pairwise(times))
    order = list(range(len(pairs)))
    rng.shuffle(order)
    warm = fresh()
    warm.increment(times[0], times[-1])
    for i in order:
        assert same(warm.increment(*pairs[i]), walked[i])
        assert same(fresh(cache=0).increment(*pairs[i]), walked[i])
    joined = reduce(Increment.join, walked)
    tol = 2e-5 if dtype == torch.float32 else 1e-11
    assert close(warm.increment(times[0], times[-1]), joined, tol)


@settings(deadline=None, max_examples=15)
@given(levies, st.integers(1, 9), st.sampled_from([(1,), (5,), (7, 3), ()]), st.booleans(), generators)
def test_many_cuts_in_one_call_give_the_same_bits_as_single_cuts(levy, log2n, shape, per_sample, generator):
    """Small batches are cut many times in one call; single queries must agree to the bit."""
    seeds = list(range(shape[0])) if per_sample and shape else None
    path = BrownianPath(shape, -1.0, 1.0, seed=4, levy=levy, seeds=seeds, generator=generator)
    grid = torch.linspace(-1, 1, 2**log2n + 1)
    for i, inc in enumerate(path.increments(grid)):
        if i % 7 == 0:
            assert same(inc, path.increment(float(grid[i]), float(grid[i + 1])))
            assert inc.h == float(grid[i + 1] - grid[i])


@BOTH
@pytest.mark.parametrize("levy", ["W", "H", "K"])
def test_refinement_preserves_coarse_increments(levy, generator):
    path = BrownianPath((16, 3), 0.0, 1.0, seed=2, levy=levy, dtype=torch.float64, generator=generator)
    full = path.increment(0.0, 1.0)
    for n in (2, 3, 10, 64):
        parts = list(path.increments(torch.linspace(0, 1, n + 1, dtype=torch.float64)))
        assert close(reduce(Increment.join, parts), full, 1e-11)


@BOTH
@pytest.mark.parametrize("levy", ["W", "H", "K"])
def test_float32_and_float64_give_one_path(levy, generator):
    options = {"t0": 0.0, "t1": 1.0, "seed": 9, "levy": levy, "generator": generator}
    single = BrownianPath((50, 2), dtype=torch.float32, **options)
    double = BrownianPath((50, 2), dtype=torch.float64, **options)
    grid = torch.linspace(0, 1, 129)
    for a, b in zip(single.increments(grid), double.increments(grid), strict=True):
        assert a.W.dtype == torch.float32
        assert b.W.dtype == torch.float64
        assert close(a.to(torch.float64), b, 1e-5)
    assert BrownianPath((1,)).dtype == torch.get_default_dtype()


def test_float32_path_is_additive_over_2_to_the_12_steps():
    n = 2**12
    path = BrownianPath((4,), 0.0, 1.0, seed=1, levy="H")
    total = torch.zeros(4, dtype=torch.float64)
    for inc in path.increments(torch.linspace(0, 1, n + 1, dtype=torch.float64)):
        total += inc.W
    full = path.increment(0.0, 1.0).W.double()
    assert ((total - full).abs() <= 1e-5 * full.abs().clamp(min=0.1)).all()


@pytest.mark.parametrize("levy", ["W", "H", "K"])
def test_log_clock_keeps_relative_precision_over_ten_decades(levy, has_mean):
    """float32 and float64 agree from 1e-4 to 1e6, relative to the size of each increment."""
    options = {"t0": 1e-4, "t1": 1e6, "seed": 5, "levy": levy, "clock": "log"}
    single = BrownianPath((500,), dtype=torch.float32, **options)
    double = BrownianPath((500,), dtype=torch.float64, **options)
    grid = torch.logspace(-4, 6, 11, dtype=torch.float64)
    for i, (a, b) in enumerate(zip(single.increments(grid), double.increments(grid), strict=True)):
        assert a.h == pytest.approx(float(grid[i + 1] - grid[i]), rel=1e-9)
        for u, v, s in zip(letters(a), letters(b), VARIANCES[levy], strict=True):
            assert (u - v).abs().max() < 3e-5 * math.sqrt(a.h * s)
            has_mean(v * v / (a.h * s), 1.0)


def test_knots_make_any_grid_cheap_and_float32_grids_find_them():
    calls = 0

    class Counting(GeneratorNormals):
        def begin(self, levels):
            draw = super().begin(levels)

            def counted(nodes):
                nonlocal calls
                calls += len(nodes)
                return draw(nodes)

            return counted

    grid = torch.linspace(0, 1, 101)
    for knots, most in ((grid, 101), (grid.double(), 101), (None, 101 * 45)):
        calls = 0
        path = BrownianPath((2,), 0.0, 1.0, knots=knots)
        path._normals = Counting((2,), 0, path.device)
        assert len(list(path.increments(grid))) == 100
        assert calls <= most
    # random access: O(log), and less with adjacent intervals in the cache
    calls = 0
    path.increment(0.3, 0.7)
    assert calls <= 2 * 49
    first, calls = calls, 0
    path.increment(0.3, 0.7)
    assert calls == 0 < first


def test_a_long_grid_that_costs_many_cuts_is_advised_to_be_knots():
    grid = torch.linspace(0, 1, 101, dtype=torch.float64)
    with pytest.warns(UserWarning, match=r"grid: each of its 101 times .* knots=grid"):
        BrownianPath((2,)).increments(grid)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        BrownianPath((2,), knots=grid.tolist()).increments(grid)
        BrownianPath((2,)).increments(torch.linspace(0, 1, 1025))
        BrownianPath((2,)).increments(grid[::20])


def test_queries_in_inference_mode_and_outside_share_a_path():
    path, other = BrownianPath((3,), levy="H"), BrownianPath((3,), levy="H")
    with torch.inference_mode():
        first = path.increment(0.1, 0.3)
    assert same(path.increment(0.2, 0.7), other.increment(0.2, 0.7))
    with torch.inference_mode():
        assert same(path.increment(0.1, 0.3), first)
        assert same(other.increment(0.1, 0.3), first)


def test_knots_at_dyadic_times_change_nothing():
    plain = BrownianPath((3,), seed=1, levy="H")
    knotted = BrownianPath((3,), seed=1, levy="H", knots=torch.linspace(0, 1, 17))
    assert same(plain.increment(0.125, 0.75), knotted.increment(0.125, 0.75))


@BOTH
def test_per_sample_seeds_do_not_depend_on_the_batch(generator):
    """The numbers of a sample depend only on its seed, not on the batch's size or order."""
    grid = torch.tensor([0.0, 0.25, 0.4375, 0.7, 1.0])
    seeds = [5, 17, 3, 2**40, -1]
    for row in ((3, 2), (), (7,)):
        options = {"levy": "K", "generator": generator}
        batch = BrownianPath((5, *row), seeds=seeds, **options)
        alone = BrownianPath((1, *row), seeds=[3], **options)
        turned = BrownianPath((5, *row), seeds=seeds[::-1], **options)
        for a, b, c in zip(*(p.increments(grid) for p in (batch, alone, turned)), strict=True):
            for x, y, z in zip(letters(a), letters(b), letters(c), strict=True):
                assert torch.equal(x[2], y[0])
                assert torch.equal(x, z.flip(0))
    twice = BrownianPath((2, 4), seeds=[8, 8], generator=generator).increment(0.0, 0.3).W
    assert torch.equal(twice[0], twice[1])


SOURCES = {
    "torch": (GeneratorNormals, 3), "seeds": (HashedNormals, list(range(200))),
    "counter": (CounterNormals, [3], False), "counter, seeds": (CounterNormals, list(range(200)), True),
}  # fmt: skip


def source_of(name, shape):
    kind, *args = SOURCES[name]
    return kind(shape, *args, torch.device("cpu"))


@pytest.mark.parametrize("shape", [(200, 51), (200, 1)])
@pytest.mark.parametrize("name", SOURCES)
def test_normals_are_independent_and_normal(name, shape, has_mean):
    """Moments to the sixth; products of adjacent entries along nodes, letters, seeds and columns."""
    draw = source_of(name, shape).begin(2 if shape[1] > 1 else 1)
    fields = [[z.clone()[0].double() for z in draw([node])] for node in range(1, 9)]
    z = torch.stack([torch.stack(f) for f in fields])  # (nodes, levels, rows, width)
    assert bool(z.isfinite().all())
    for power, moment in ((1, 0), (2, 1), (3, 0), (4, 3), (6, 15)):
        has_mean(z**power, moment)
    for axis in (axis for axis in range(4) if z.shape[axis] > 1):
        has_mean(z.narrow(axis, 0, z.shape[axis] - 1) * z.narrow(axis, 1, z.shape[axis] - 1), 0.0)
        squares = z * z - 1
        has_mean(
            squares.narrow(axis, 0, z.shape[axis] - 1) * squares.narrow(axis, 1, z.shape[axis] - 1),
            0.0,
        )
    has_mean((z.abs() > 3.0).double(), math.erfc(3 / math.sqrt(2)))


@pytest.mark.parametrize("name", SOURCES)
def test_normals_have_the_distribution_of_kolmogorov(name):
    """The largest distance of the empirical distribution has level 1e-9: P(D > d) < 2 exp(-2 n d^2)."""
    draw = source_of(name, (200, 50)).begin(1)
    z = torch.cat([draw([node])[0].clone().flatten() for node in (1, 2, 3, 2**40)]).double().sort().values
    n = len(z)
    distance = (torch.special.ndtr(z) - torch.arange(n, dtype=torch.float64) / n).abs().max() + 1 / n
    assert distance < math.sqrt(math.log(2e9) / 2 / n)


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)  # fmt: skip
def test_philox_gives_the_published_vectors(counter, key, words):
    """kat_vectors of Random123 1.14, philox4x32 with ten rounds."""
    found = philox([torch.tensor([c]) for c in counter], key)
    assert " ".join(f"{int(w) & 0xFFFFFFFF:08x}" for w in found) == words


def test_the_sources_of_a_seed_are_other_paths():
    options = [{}, {"generator": "counter"}, {"seeds": [0] * 3}, {"seeds": [0] * 3, "generator": "counter"}]
    paths = [BrownianPath((3, 8), **o) for o in options]
    found = [path.increment(0.0, 0.5).W for path in paths]
    assert all(not torch.equal(a, b) for i, a in enumerate(found) for b in found[:i])
    assert ["generator='counter'" in repr(path) for path in paths] == [False, True, False, True]


@pytest.mark.parametrize("shape", [(4096, 3), (7,), ()])
def test_the_numbers_of_counters_fix_the_path(shape):
    """A hand-made copy from Philox and Box-Muller, at a node above 2^32."""
    node, size = 2**41 + 5, max(1, math.prod(shape))
    (z,) = CounterNormals(shape, [3], False, torch.device("cpu")).begin(1)([node])
    per = max(1, 4 // size)
    blocks, key = -(-per * size // 4), mix(3 + 0x9E3779B97F4A7C15)
    block, group = torch.arange(blocks), torch.full((blocks,), node // per)
    low = 2**32 - 1
    words = philox((block, 0 * block, group & low, group >> 32), (key & low, key >> 32))
    k = torch.stack(words).to(torch.int32).double()
    radius, angle = (-2 * (k[::2].abs() / 2**31 + 2.0**-33).log()).sqrt(), k[1::2] * math.pi / 2**31
    want = torch.stack([radius * angle.cos(), radius * angle.sin()], 1).flatten()[node % per * size :][:size]
    torch.testing.assert_close(z.flatten().double(), want, rtol=1e-5, atol=1e-5)


@given(st.integers(0, 2**64 - 1))
def test_hash_of_integers_and_of_tensors_agree(x):
    signed = x - 2**64 if x >= 2**63 else x
    assert int(mix_(torch.tensor([signed]))[0]) % 2**64 == mix(x)


def test_node_seeds_differ_in_the_32_bits_that_torch_keeps():
    low = [node_seed(12345, node) & 0xFFFFFFFF for node in range(1, 2**15)]
    assert len(set(low)) == len(low)
    a, b = torch.Generator().manual_seed(7), torch.Generator().manual_seed(7 + 2**32)
    assert torch.equal(torch.randn(4, generator=a), torch.randn(4, generator=b))  # the reason


@BOTH
def test_pickled_and_shared_paths_give_the_same_numbers(generator):
    path = BrownianPath((8, 3), 0.0, 1.0, seed=6, levy="H", generator=generator)
    path.increment(0.1, 0.2)
    copy = pickle.loads(pickle.dumps(path))
    asks = [(i / 50, (i + 1 + i % 5) / 55 + i / 500 + 0.02) for i in range(12)]
    expected = [copy.increment(*ask) for ask in asks]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda ask: path.increment(*ask), asks * 2))
    assert all(same(a, b) for a, b in zip(found, expected * 2, strict=True))
    assert "levy='H'" in repr(path)


def test_writing_to_an_increment_does_not_change_the_path():
    path = BrownianPath((3,), levy="H")
    before = path.increment(0.25, 0.5)
    kept = before.W.clone()
    before.W.zero_()
    assert torch.equal(path.increment(0.25, 0.5).W, kept)
    first, *_ = path.increments([0.0, 0.5, 1.0])
    first.W.zero_()
    assert not torch.equal(path.increment(0.0, 0.5).W, first.W)


def test_global_random_state_is_unchanged():
    before = torch.random.get_rng_state()
    BrownianPath((3,)).increment(0.0, 0.5)
    BrownianPath((3,), seeds=[1, 2, 3]).increment(0.0, 0.5)
    assert torch.equal(before, torch.random.get_rng_state())


WALK = """
import torch, fewstep as fs
path = fs.BrownianPath({shape}, levy="H")
grid = torch.linspace(0, 1, {steps} + 1, dtype=torch.float64)[:{taken}]
next(path.increments(grid))
before, count = peak(), 0
for _ in path.increments(grid):
    count += 1
print(peak() - before, count)
"""


@pytest.mark.parametrize(
    ("steps", "taken", "shape"),
    [(2**15, 2**11, (512, 16)), pytest.param(2**20, 2**20 + 1, (16, 16), marks=pytest.mark.slow)],
)
def test_peak_memory_does_not_grow_with_the_steps(steps, taken, shape):
    """It grows by less than 64 MiB, where all increments together would take more."""
    grown, count = numbers_of(WALK.format(shape=shape, steps=steps, taken=taken))
    assert grown < 64 * 2**20 < count * math.prod(shape) * 8
    assert count == taken - 1


def test_portable_path_on_cpu_is_the_cpu_path():
    a = BrownianPath((3, 2), seed=1, levy="H").increment(0.1, 0.4)
    b = BrownianPath((3, 2), seed=1, levy="H", portable=True).increment(0.1, 0.4)
    assert same(a, b)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_portable_is_the_cpu_path_and_seeds_agree_to_rounding():
    grid = torch.linspace(0, 1, 9)
    counters = {"generator": "counter"}
    for options in ({"portable": True}, {"seeds": [1, 2, 3]}, counters, {"seeds": [1, 2, 3], **counters}):
        cpu = BrownianPath((3, 2), levy="K", **options)
        gpu = BrownianPath((3, 2), levy="K", device="cuda", **options)
        for a, b in zip(cpu.increments(grid), gpu.increments(grid), strict=True):
            assert b.W.is_cuda
            assert close(a, b.to(device="cpu"), 1e-5)


@BOTH
def test_empty_and_scalar_shapes_are_supported(generator):
    assert BrownianPath((0, 3), levy="K", generator=generator).increment(0.0, 0.3).K.shape == (0, 3)
    assert len(list(BrownianPath((0, 3), generator=generator).increments(torch.linspace(0, 1, 5)))) == 4
    assert BrownianPath((), generator=generator).increment(0.0, 0.3).W.shape == ()
    assert BrownianPath((3, 0), seeds=[1, 2, 3], generator=generator).increment(0.0, 0.3).W.shape == (3, 0)


def test_times_rounded_to_float32_are_found_exactly():
    path = BrownianPath((3,), 0.0, 0.3, levy="H")
    exact = list(path.increments(torch.linspace(0, 0.3, 65, dtype=torch.float64)))
    rounded = list(path.increments(torch.linspace(0, 0.3, 65)))
    assert all(same(a, b) for a, b in zip(exact, rounded, strict=True))


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"t0": 1.0, "t1": 1.0}, "t0 < t1"),
        ({"t0": 0.0, "t1": math.inf}, "finite"),
        ({"levy": "h"}, "levy"),
        ({"clock": "logarithmic"}, "clock"),
        ({"clock": "log"}, "t0 > 0"),
        ({"dtype": torch.float16}, "dtype"),
        ({"seeds": [1, 2]}, "seeds"),
        ({"knots": [0.0, 0.7, 0.3, 1.0]}, "knots"),
        ({"knots": [0.0, 2.0]}, "knots"),
        ({"shape": (-1,)}, "shape"),
        ({"shape": 3}, "shape"),
        *(({"generator": g}, "generator: got") for g in ("philox", "Counter", None, 3, ["counter"])),
    ],
)
def test_bad_arguments_are_rejected(arguments, word):
    with pytest.raises(InputError, match=word):
        BrownianPath(**{"shape": (3,), "t0": 0.0, "t1": 1.0, **arguments})


@pytest.mark.parametrize(
    ("times", "word"),
    [
        ((0.5, 0.5), "increasing"),
        ((0.5, 0.25), "increasing"),
        ((-0.1, 0.25), "t0 and t1"),
        ((0.5, 1.1), "t0 and t1"),
        ((0.5, 0.5 + 1e-15), "resolution"),
        ((math.nan, 0.5), "got (time |\\[)?nan"),
    ],
)
def test_bad_times_are_rejected(times, word):
    with pytest.raises(InputError, match=word):
        BrownianPath((3,)).increment(*times)
    with pytest.raises(InputError, match=word):
        BrownianPath((3,)).increments(list(times))


def test_bad_grids_are_rejected():
    for grid in ([0.5], [[0.0, 1.0]]):
        with pytest.raises(InputError, match="grid"):
            BrownianPath((3,)).increments(grid)


def test_gradients_flow_through_a_solve_on_a_path_of_any_size():
    """Increments are not written to after they are returned: autograd checks their version."""
    sigma = torch.tensor(0.3, requires_grad=True)
    sde = fs.SDE(lambda t, y: 0.1 * y, lambda t, y: sigma * torch.sin(y))
    for shape in ((4, 1), (2000, 1), (40000, 1)):
        path = fs.BrownianPath(shape, levy="H", seed=1)
        grid = torch.linspace(0, 1, 17)
        fs.solve(sde, fs.DerivativeFreeMilstein(), torch.ones(shape), grid, path=path).y.sum().backward()
    assert sigma.grad.isfinite()


@pytest.mark.parametrize("options", [{}, {"clock": "log"}, {"seeds": [3, 4, 5, 6], "levy": "K"}], ids=str)
def test_nearby_increments_are_those_of_times_moved_by_a_millionth_of_the_clock(options):
    path = fs.BrownianPath((4, 3), 0.01, 50.0, seed=2, dtype=torch.float64, **{"levy": "H", **options})
    times = torch.logspace(-2, math.log10(50), 9, dtype=torch.float64)
    times[4:6] = times[4] + torch.tensor([0.0, 1e-7], dtype=torch.float64)  # one node: exact
    clock = torch.log if path._clock.log else lambda t: t
    span = clock(times[-1]) - clock(times[0])
    moved, found = [path.t0], list(path.nearby(times))
    for inc in found:
        moved.append(moved[-1] + inc.h)
    gaps = (clock(torch.tensor(moved, dtype=torch.float64)) - clock(times)).abs() / span
    assert float(gaps.max()) < 2.0**-20
    assert abs(found[4].h - 1e-7) < 1e-12
    assert float(gaps[2]) > 0  # it does move
    for a, b, inc in zip(moved, moved[1:], found):
        exact = path.increment(a, b)
        for name in ("W", "H"):
            torch.testing.assert_close(getattr(inc, name), getattr(exact, name), rtol=1e-5, atol=2e-6)


def test_a_walk_can_be_copied_between_increments():
    path = fs.BrownianPath((3, 2), seed=1, levy="H")
    grid = torch.rand(9, generator=torch.Generator().manual_seed(0)).sort().values
    walk = path.increments(grid)
    want = list(path.increments(grid))
    got = [next(walk) for _ in range(3)]
    twin = copy.deepcopy(walk)
    for rest in (list(walk), list(twin)):
        assert all(torch.equal(a.H, b.H) for a, b in zip([*got, *rest], want, strict=True))
