"""Bad values for the arguments of every public function: an `InputError` that names the argument."""

import inspect

import pytest
import torch

pytest.importorskip("diffusers")  # the table calls all integrations
from public_calls import ALIAS, MODEL, ROWS, SDE, TIMES, name_of

import fewstep as fs


@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_bad_values_are_rejected_with_the_name_of_the_argument(row):
    call, good, wrong = row
    for argument, values in wrong.items():
        for value in values:
            with pytest.raises(fs.InputError) as error:
                call(**(good | {argument: value}))
            message = str(error.value)
            assert argument in message or ALIAS.get(argument, argument) in message, (value, message)
            assert len(message) < 900


def test_rows_cover_the_public_functions():
    rows = {name_of(row) for row in ROWS}
    assert {n for n in fs.__all__ if inspect.isfunction(getattr(fs, n))} <= rows


def test_empty_batch_is_a_batch():
    empty = torch.ones(0, 3)
    assert fs.solve(SDE, fs.EulerMaruyama(), empty, TIMES).y.shape == (0, 3)
    assert fs.solve(SDE, fs.Milstein(), empty, TIMES, path=fs.BrownianPath((0, 3))).y.shape == (0, 3)
    for solver in (fs.DDIM(), fs.ShARK()):
        assert fs.sample(MODEL, solver, shape=(0, 3), steps=2).shape == (0, 3)
