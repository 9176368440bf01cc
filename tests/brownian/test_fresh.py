"""Fresh increments: the law, repetition, and reuse of memory."""

from __future__ import annotations

import pytest
import torch

from fewstep import InputError
from fewstep.brownian import FreshIncrements

GRID = torch.tensor([0.0, 0.1, 0.5, 2.0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_law(dtype, has_mean):
    """Unit variance and no correlation, of letters and of steps."""
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


def test_a_grid_is_the_same_each_time_and_reuse_changes_no_number():
    kept = [i.W for i in FreshIncrements((9,), seed=1).increments(GRID)]
    source = FreshIncrements((9,), seed=1, reuse=True)
    for _ in range(2):
        for k, inc in enumerate(source.increments(GRID)):
            assert torch.equal(inc.W, kept[k])
    assert len({w.data_ptr() for w in kept}) == 3
    assert not torch.equal(kept[0], next(FreshIncrements((9,), seed=2).increments(GRID)).W)


def test_float64_is_float32_promoted():
    single = next(FreshIncrements((9,), seed=1, dtype=torch.float32).increments(GRID))
    double = next(FreshIncrements((9,), seed=1, dtype=torch.float64).increments(GRID))
    assert torch.equal(single.W.double(), double.W)


def test_single_draws_are_independent_and_repeat_in_a_new_object(has_mean):
    one, two = FreshIncrements((20_000,), levy="H"), FreshIncrements((20_000,), levy="H")
    a, b = one.increment(0.0, 1.0), one.increment(0.0, 1.0)
    has_mean(a.W * b.W, 0.0)
    has_mean(a.H * b.H, 0.0)
    assert torch.equal(a.W, two.increment(0.0, 1.0).W)


def test_refusals():
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
