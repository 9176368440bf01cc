"""The numbers that the library gave when they were last looked at: a change of one shows here, wherever its cause is.

`tests/data/numbers.json` holds four sums of every result. A change that is meant is recorded by
`FEWSTEP_RECORD_NUMBERS=1 pytest -m "slow or not slow" tests/test_devices.py` and stated under "Numerics" in the change
log. A tolerance of 0.1 % leaves room for the rounding of other processors and versions of torch.
"""

import json
import os
from collections import defaultdict
from pathlib import Path

import torch

FILE = Path(__file__).parents[1] / "data" / "numbers.json"
TOLERANCE = 1e-3
KNOWN = json.loads(FILE.read_text())
MADE = defaultdict(list)  # by test, in the order in which it makes them


def sums(value):
    """The size, the mean, the root mean square and a weighted mean that sees order and signs."""
    x = value.detach().double().flatten()
    weights = torch.arange(1, len(x) + 1, dtype=torch.float64).cos() / max(len(x), 1)
    return [len(x), *(float(f"{float(s):.6g}") for s in (x.mean(), x.square().mean().sqrt(), weights @ x))]


def check_number(value):
    """The value is that on record for this call of the running test."""
    test = os.environ["PYTEST_CURRENT_TEST"].partition("::")[2].rpartition(" ")[0]
    found = sums(value)
    MADE[test].append(found)
    if "FEWSTEP_RECORD_NUMBERS" in os.environ:
        KNOWN[test] = MADE[test]
        lines = (f"{json.dumps(name)}: {json.dumps(KNOWN[name])}" for name in sorted(KNOWN))
        FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
        return
    place, known = len(MADE[test]), KNOWN.get(test, [])
    assert place <= len(known), f"{test} makes more numbers than {FILE.name} has. See {Path(__file__).name}."
    expected = known[place - 1]
    near = all(abs(a - b) <= TOLERANCE * max(abs(b), expected[2]) + 1e-9 for a, b in zip(found, expected, strict=True))
    assert near, f"number {place}: got {found}, and {FILE.name} has {expected}. See {Path(__file__).name}."
