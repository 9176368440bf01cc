"""Run the test files of another library with parts of this one in place of its own, and write the outcomes."""

import json
import os
import re
import sys
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import pytest

QUIET = [
    *("-q", "-p", "no:cacheprovider", "-p", "no:warnings", "--tb=line", "--no-header", "-rN", "--show-capture=no"),
    *("-o", "addopts=", "-c", os.devnull),
]


class Suite:
    """A plugin of pytest: calls `swap(items)` after collection and keeps the outcome of each test.

    Args:
        files: the test files.
        root: the checkout that holds them.
        swap: puts the parts of this library into the collected tests.
        reasons: {pattern of a failure's first line or test name: why the test does not pass here}.
    """

    def __init__(self, files, root, swap, reasons):
        self.files, self.root, self.swap, self.reasons, self.outcomes = files, root, swap, reasons, {}

    def pytest_collection_finish(self, session):
        self.swap(session.items)

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed":
            why = "" if report.passed else self.reason(report)
            self.outcomes[report.nodeid.rpartition("/")[2]] = (report.outcome, why)

    def reason(self, report):
        if report.skipped:
            return f"skipped there: {report.longrepr[2].removeprefix('Skipped: ')}"
        text = getattr(report.longrepr, "reprcrash", None)
        line = (text.message if text else str(report.longrepr)).split("\n")[0][:300]
        found = [why for pattern, why in self.reasons.items() if re.search(pattern, f"{report.nodeid}: {line}")]
        return found[0] if found else f"NOT EXPLAINED: {line}"

    def run(self):
        sys.path.insert(0, str(self.root))
        pytest.main([*QUIET, "--rootdir", str(self.root), *map(str, self.files)], plugins=[self])
        return self.outcomes


def write(suite, package, out, commit):
    """Write the table: counts, and by reason the tests that do not pass."""
    found = suite.run()
    by_reason = {}
    for test, (outcome, why) in sorted(found.items()):
        if outcome != "passed":
            by_reason.setdefault(why, []).append(test)
    counts = Counter(outcome for outcome, _ in found.values())
    table = {package: version(package), "tests of": commit, "tests": len(found), **counts}
    shown = {  # a parametrized test once, with its count
        why: [f"{name} ({n})" if n > 1 else name for name, n in Counter(t.partition("[")[0] for t in tests).items()]
        for why, tests in sorted(by_reason.items())
    }
    Path(out).write_text(json.dumps({**table, "not passed": shown}, indent=1) + "\n")
    print(dict(counts), *(f"{len(tests):4} {why}" for why, tests in sorted(by_reason.items())), sep="\n")
