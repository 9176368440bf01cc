"""Run torchsde's own tests of `sdeint` with the one of `fewstep.integrations.torchsde`, and write the outcomes.

    python tests/integrations/torchsde_suite.py PATH/TO/torchsde [COMMIT]

PATH is a checkout of torchsde with its folder `tests`; nothing of it is copied. The table of outcomes is
`tests/integrations/torchsde_suite.json`.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "helpers"))

import torchsde
from other_suites import Suite, write

from fewstep.integrations.torchsde import sdeint

REASONS = {
    "DID NOT WARN": "torchsde warns about adaptive steps of Euler-Maruyama for additive noise too, which are right",
    "without space-space area": "torchsde's log-ODE method takes areas of another law",
    "log_ode.*Expected an error": "torchsde asks for areas that the log-ODE method does not use for this noise",
}

if __name__ == "__main__":
    root = Path(sys.argv[1]).resolve()

    def swap(items):
        torchsde.sdeint = sdeint

    suite = Suite([root / "tests" / "test_sdeint.py"], root, swap, REASONS)
    write(suite, "torchsde", Path(__file__).with_suffix(".json"), *sys.argv[2:] or ["unknown commit"])
