"""A time keeps its float64 meaning relative to the span: at any offset, in any dtype, for every kind of query."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fewstep as fs
from fewstep.integrations.torchsde import BrownianView, sdeint

F64 = torch.float64


def exact(offset, span, n=16):
    """(offset, span, grid): times at multiples of span/n that float64 represents, on both origins."""
    ulp = math.ulp(abs(offset) + span)
    span = max(span, 2.0**20 * ulp)
    span = 2.0 ** math.ceil(math.log2(span))
    offset = round(offset / (span / n)) * (span / n) if abs(offset) < span * 2**40 else offset
    return offset, span, torch.arange(n + 1, dtype=F64) * (span / n)


offsets = st.one_of(st.floats(-1.7e9, 1.7e9), st.sampled_from([0.0, 1e5, 1e6, 1.7e9, -1e5]))
spans = st.sampled_from([1e-9, 1e-3, 0.25, 1.0, 64.0, 1e9])


def fields(increment):
    return [v for v in (increment.W, increment.H, increment.K, increment.A) if v is not None]


def same(these, those):
    for a, b in zip(these, those, strict=True):
        assert a.h == b.h
        for x, y in zip(fields(a), fields(b), strict=True):
            assert torch.equal(x, y)


@settings(deadline=None, max_examples=40)
@given(offsets, spans, st.sampled_from(["path", "knots", "area", "view"]))
def test_shifting_the_origin_changes_no_increment(offset, span, kind):
    offset, span, grid = exact(offset, span)

    def increments(t0):
        times = t0 + grid
        path = fs.BrownianPath((3,), t0, t0 + span, seed=1, levy="H", knots=times if kind == "knots" else None)
        path = fs.AreaPath(path, 8) if kind == "area" else path
        if kind == "view":
            view = BrownianView(path)
            return [fs.Increment.from_U(span / 16, *view(a, b, return_U=True)) for a, b in zip(times, times[1:])]
        return list(path.increments(times))

    same(increments(offset), increments(0.0))


@settings(deadline=None, max_examples=30)
@given(offsets, spans, st.sampled_from([fs.Heun(), fs.SlowRK(), fs.GeneralShARK(), fs.SPaRK()]))
def test_shifting_the_origin_changes_no_solve(offset, span, solver):
    """Drift and diffusion know the origin; the stage times t + h/2, 5h/6 and 3h/4 may be rounded once."""
    offset, span, grid = exact(offset, span)
    y0, rate = torch.ones(2, 3, dtype=F64), 1 / span

    def end(t0):
        sde = fs.SDE(
            lambda t, y: rate * torch.cos(rate * (t - t0)) * y,
            lambda t, y: math.sqrt(rate) * (1 + 0.3 * torch.sin(3 * rate * (t - t0))) * torch.cos(y),
            sde_type="stratonovich",
        )
        path = fs.BrownianPath((2, 3), t0, t0 + span, seed=2, levy="H", dtype=F64)
        steps = (
            sdeint(_torchsde(sde), y0, [t0, t0 + span], dt=span / 16, method=solver, bm=path)[-1]
            if span < 1e8
            else None
        )
        return fs.solve(sde, solver, y0, t0 + grid, path=path).y, steps

    (moved, steps), (plain, _) = end(offset), end(0.0)
    tol = 1e-13 + 100 * math.ulp(abs(offset) + span) / span
    torch.testing.assert_close(moved, plain, rtol=tol, atol=tol)
    if steps is not None:
        torch.testing.assert_close(steps, plain, rtol=tol, atol=tol)


class OU(torch.nn.Module):
    noise_type, sde_type = "diagonal", "ito"

    def f(self, t, y):
        return -y

    def g(self, t, y):
        return torch.full_like(y, 0.5)


@pytest.mark.parametrize(("t0", "dt"), [(1e5, 2.0**-8), (1e6, 2.0**-4), (1.7e9, 2.0**-6)])
@pytest.mark.filterwarnings("ignore:Drift and diffusion receive t in torch.float32")
@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.filterwarnings("ignore:EulerMaruyama. y grew")  # steps of 8 are unstable, and equal all the same
def test_sdeint_far_from_zero_equals_sdeint_at_zero(t0, dt, dtype):
    def ends(start, bm):
        ts = torch.tensor([start, start + 128.0], dtype=dtype) if dtype != F64 else [start, start + 1]
        span = float(ts[1]) - float(ts[0])
        path = fs.BrownianPath((2, 3), start, start + span, seed=3) if bm else None
        return sdeint(OU(), torch.ones(2, 3), ts, dt=dt * span, seed=3, method="euler", bm=path)

    for bm in (False, True):
        assert torch.equal(ends(t0 if dtype == F64 else t0 // 128 * 128, bm), ends(0.0, bm))


@pytest.mark.parametrize(("end", "dt", "dtype"), [(0.1, 1e-3, torch.float32), (0.3, 0.1, F64)])
def test_sdeint_takes_no_step_of_the_size_of_rounding(end, dt, dtype):
    times, start = [], 0.0 if dtype != F64 else 1.7e9
    sde = fs.SDE(lambda t, y: (times.append(float(t)), -y)[1], lambda t, y: 0 * y)
    sdeint(_torchsde(sde), torch.ones(1, 1), torch.tensor([start, start + end], dtype=dtype), dt=dt)
    assert len(set(times)) <= round(end / dt) * 4
    gaps = torch.tensor(sorted(set(times)), dtype=F64).diff()
    assert gaps.min() > dt / 8


def _torchsde(sde):
    class Theirs:
        noise_type, sde_type = sde.noise_type, sde.sde_type
        f, g = staticmethod(sde.drift), staticmethod(sde.diffusion)

    return Theirs()


def test_sdeint_refuses_steps_below_the_resolution_and_beyond_memory():
    for ts, dt in (([1.7e9, 1.7e9 + 1], 1e-7), ([0.0, 1e9], 1e-3)):
        with pytest.raises(fs.InputError, match=r"dt: got .* steps"):
            sdeint(OU(), torch.ones(1, 1), ts, dt=dt)


def test_a_list_of_times_equals_single_queries():
    path, times = fs.BrownianPath((4,), seed=1, levy="H"), [0.0, 0.1, 0.3]
    same(path.increments(times), [path.increment(0.0, 0.1), path.increment(0.1, 0.3)])
    assert fs.BrownianPath((4,), 1.0, 2.0, knots=[1.1])._clock.knots == (1.0, 1.1, 2.0)


def test_float32_queries_of_every_kind_agree():
    grid = torch.linspace(0, 0.3, 65)
    for make in (lambda p: p, lambda p: fs.AreaPath(p, 16)):
        path = make(fs.BrownianPath((3,), 0.0, 0.3, levy="H"))
        rounded, true = path.increments(grid), path.increments(torch.linspace(0, 0.3, 65, dtype=F64))
        single = (path.increment(a, b) for a, b in zip(grid, grid[1:]))
        for a, b, c in zip(rounded, true, single, strict=True):
            for x, y, z in zip(*map(fields, (a, b, c)), strict=True):
                assert torch.allclose(x, y, rtol=0, atol=1e-7)
                assert torch.allclose(x, z, rtol=0, atol=1e-7)


def test_neighbours_in_float32_stay_apart():
    """float32 resolves 2^-7 at 1e5: each of its 128 times in a unit span is one time of the path."""
    grid = 1e5 + torch.arange(129, dtype=F64) / 128
    path = fs.BrownianPath((3,), 1e5, 1e5 + 1, levy="H")
    same(path.increments(grid.float()), path.increments(grid))


@pytest.mark.parametrize("steps", [5, 20, 100])
def test_log_clock_keeps_every_knot(steps):
    sigmas = fs.sigma_grid(fs.VPLinear(), steps, final="sigma_min")
    taus = sigmas**-2
    path = fs.BrownianPath((1,), float(taus[0]), float(taus[-1]), clock="log", knots=taus)
    assert len(path._clock.knots) == steps + 1


def test_log_clock_is_precise_in_a_narrow_span_far_from_zero():
    path = fs.BrownianPath((1,), 1.7e9, 1.7e9 + 0.25, clock="log")
    for increment, h in zip(path.increments([1.7e9, 1.7e9 + 0.0625, 1.7e9 + 0.25]), (0.0625, 0.1875), strict=True):
        assert increment.h == pytest.approx(h, rel=1e-6)


def test_a_path_that_misses_part_of_a_distant_span_is_refused():
    """A slack relative to the time would accept 1.7e9 + 1 as 1.7e9 + 1000."""
    sde = fs.SDE(lambda t, y: -y, lambda t, y: y)
    path = fs.BrownianPath((1, 1), 1.7e9, 1.7e9 + 1)
    with pytest.raises(fs.InputError, match=r"path: got \[1.7e\+09, 1700000001.0\], expected .* 1700001000.0\]"):
        fs.solve(sde, fs.Milstein(), torch.ones(1, 1), [1.7e9, 1.7e9 + 1000], path=path)


NO_GRADIENT = {
    "path.increments": ("grid", lambda t: fs.BrownianPath((1,)).increments(torch.stack([0 * t, t]))),
    "path.increment": ("tb", lambda t: fs.BrownianPath((1,)).increment(0.0, t)),
    "knots": ("knots", lambda t: fs.BrownianPath((1,), knots=torch.stack([t / 2]))),
    "t1": ("t1", lambda t: fs.BrownianPath((1,), 0.0, t)),
    "area": ("ta, tb", lambda t: fs.AreaPath(fs.BrownianPath((1,)), 2).increment(0.0, t)),
    "fresh": ("t1", lambda t: fs.FreshIncrements((1,)).increment(0.0, t)),
    "sdeint ts": ("ts", lambda t: sdeint(OU(), torch.ones(1, 1), torch.stack([0 * t, t]))),
    "sdeint dt": ("dt", lambda t: sdeint(OU(), torch.ones(1, 1), [0.0, 1.0], dt=t / 4)),
    "plan": ("sigmas", lambda t: fs.DDIM().plan(torch.stack([t, t / 2]))),
    "sde plan": ("sigmas", lambda t: fs.ShARK().plan(torch.stack([t, t / 2]))),
    "sample": ("sigmas", lambda t: fs.sample(MODEL, fs.UniPC(), shape=(1, 1), sigmas=torch.stack([t, t / 2]))),
    "timesteps": ("timesteps", lambda t: fs.sigma_grid(fs.VPLinear(), 2, timesteps=torch.stack([t, t / 2]))),
    "schedule": ("sigma_max", lambda t: fs.EDM(0.1, t)),
    "area of a length": ("increment.h", lambda t: fs.levy_area(fs.Increment(t, torch.ones(2)))),
}
MODEL = fs.DiffusionModel(lambda x, s: x / (1 + s * s), fs.VPLinear())


@pytest.mark.parametrize("name", NO_GRADIENT)
def test_gradients_are_refused_where_none_flows(name):
    argument, call = NO_GRADIENT[name]
    t = torch.tensor(1.0, dtype=F64, requires_grad=True)
    with pytest.raises(fs.InputError, match=rf"^{argument}: got .*requires grad.*detach"):
        call(t)
    with torch.no_grad():
        call(t)


def test_increments_have_derivatives_with_respect_to_their_length():
    W, H = torch.ones(2, dtype=F64), torch.full((2,), 0.1, dtype=F64)

    def values(h):
        first = fs.Increment(h, W, H)
        return torch.cat([first.U, *first.coordinates(), *fields(first.join(fs.Increment(2 * h, W, H)).to(F64))])

    assert torch.autograd.gradcheck(values, torch.tensor(0.5, dtype=F64, requires_grad=True))


@pytest.mark.parametrize("cells", [12, 36, 300])
def test_ends_of_cells_that_are_no_cuts_of_the_path_may_be_times(cells):
    """Float64 times of a grid with non-dyadic steps: before, the path's rounding of one made an empty cell."""
    areas = fs.AreaPath(fs.BrownianPath((3, 2), levy="H", seed=1, dtype=F64), cells)
    for n in (3, 6, 12):
        parts = list(areas.increments(torch.linspace(0, 1, n + 1, dtype=F64)))
        joined = parts[0]
        for part in parts[1:]:
            joined = joined.join(part)
        torch.testing.assert_close(joined.A, areas.increment(0.0, 1.0).A, rtol=0, atol=1e-5)
