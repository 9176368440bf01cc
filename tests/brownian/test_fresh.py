"""`FreshIncrements`: the law, repetition, and reuse of memory."""

from __future__ import annotations

import pytest
import torch

from fewstep import InputError
from fewstep.brownian import FreshIncrements

GRID = torch.tensor([0.0, 0.1, 0.5, 2.0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_letters_and_steps_are_independent_with_unit_variance(dtype, has_mean):
    source = FreshIncrements((50_000,), levy="K", seed=3, dtype=dtype)
    incs = list(source.increments(GRID))
    assert [i.h for i in incs] == pytest.approx([0.1, 0.4, 1.5])
    xi = torch.stack([torch.stack(i.coordinates()) for i in incs]).double()
    assert incs[0].W.dtype == dtype
    for z in xi.flatten(0, 1):
        has_mean(z, 0.0)
        has_mean(z * z, 1.0)
        has_mean(z**4, 3.0)
    flat = xi.flatten(0, 1)
    for i in range(len(flat)):
        for j in range(i):
            has_mean(flat[i] * flat[j], 0.0)


def test_repeated_grids_give_the_same_numbers_with_and_without_reuse():
    kept = [i.W for i in FreshIncrements((9,), seed=1).increments(GRID)]
    source = FreshIncrements((9,), seed=1, reuse=True)
    for _ in range(2):
        for k, inc in enumerate(source.increments(GRID)):
            assert torch.equal(inc.W, kept[k])
    assert len({w.data_ptr() for w in kept}) == 3
    assert not torch.equal(kept[0], next(FreshIncrements((9,), seed=2).increments(GRID)).W)


def test_float64_draws_equal_those_of_float32():
    single = next(FreshIncrements((9,), seed=1, dtype=torch.float32).increments(GRID))
    double = next(FreshIncrements((9,), seed=1, dtype=torch.float64).increments(GRID))
    assert torch.equal(single.W.double(), double.W)


def test_single_draws_are_independent_and_repeat_in_a_new_object(has_mean):
    one, two = FreshIncrements((20_000,), levy="H"), FreshIncrements((20_000,), levy="H")
    a, b = one.increment(0.0, 1.0), one.increment(0.0, 1.0)
    has_mean(a.W * b.W, 0.0)
    has_mean(a.H * b.H, 0.0)
    assert torch.equal(a.W, two.increment(0.0, 1.0).W)


def test_fresh_areas_repeat_and_have_the_right_variance(has_mean):
    source = FreshIncrements((20_000, 2), "H", seed=3, dtype=torch.float64, area=True)
    one, two, three = source.increments(GRID)
    again = next(source.increments(GRID))
    assert torch.equal(one.A, again.A)
    assert torch.equal(one.W, next(FreshIncrements((20_000, 2), "H", 3, torch.float64).increments(GRID)).W)
    for inc in (one, two, three, source.increment(0.0, 0.3)):
        has_mean(inc.A[:, 0, 1] ** 2, inc.h**2 / 4)
    has_mean(one.A[:, 0, 1] * two.A[:, 0, 1], 0.0)


def test_bad_input_is_rejected():
    with pytest.raises(InputError, match="increasing"):
        FreshIncrements((3,)).increment(1.0, 1.0)
    with pytest.raises(InputError, match="increasing"):
        FreshIncrements((3,)).increments([0.0, 1.0, 0.5])
    with pytest.raises(InputError, match="grid"):
        FreshIncrements((3,)).increments([0.0])
    with pytest.raises(InputError, match="levy"):
        FreshIncrements((3,), levy="A")
    with pytest.raises(InputError, match="dtype"):
        FreshIncrements((3,), dtype=torch.bfloat16)
