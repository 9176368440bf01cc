"""Run experiments again and compare their numbers with the committed records.

    python analysis/experiments/regenerate.py                     run all that take at most 5 minutes
    python analysis/experiments/regenerate.py --minutes 15        all that take at most 15
    python analysis/experiments/regenerate.py dode-ring           these alone
    python analysis/experiments/regenerate.py --list              what there is, cheap and expensive

Records, figures and checkpoints go to --out, from which an interrupted run resumes. --accept copies records
and figures into the checkout. Timings and memory are not compared; other numbers must agree to --tolerance.
"""

from __future__ import annotations

import argparse
import base64
import math
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from base import FIGURES, NAMES, RECORDS, Record, load

# keys whose values are measured times or bytes, or sentences
IGNORED = re.compile(
    "seconds|cpu_seconds|cost|.*_bytes|ms|ours|theirs|bare_us_per_step|(fewstep|scheduler|diffusers)_ratio"
    "|to_bare_loop|to_normals|seconds of the last call|threads|memory|verdict|us_per_step|share|.*_per_second|note"
)
ABSOLUTE = 1e-7  # numbers that are zero but for rounding


def differences(old: Any, new: Any, tolerance: float, place: str = "") -> Iterator[tuple[str, float]]:
    """(place, relative difference) of each value that differs; infinity where values have no difference."""
    if isinstance(old, dict) and "bytes" in old and isinstance(new, dict):  # packed images
        a, b = (base64.b64decode(x["bytes"]) for x in (old, new))
        if (gap := max((abs(x - y) for x, y in zip(a, b)), default=0)) > 1 or len(a) != len(b):
            yield place, gap / 255
    elif isinstance(old, dict) and isinstance(new, dict):
        for key in old:
            if not IGNORED.fullmatch(key):
                inside = f"{place}.{key}"
                if key in new:
                    yield from differences(old[key], new[key], tolerance, inside)
                else:
                    yield inside, math.inf
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for k, (a, b) in enumerate(zip(old, new)):
            yield from differences(a, b, tolerance, f"{place}[{k}]")
    elif isinstance(old, int | float) and isinstance(new, int | float) and not isinstance(old, bool):
        gap = abs(old - new)
        if not (gap <= tolerance * max(abs(old), abs(new)) + ABSOLUTE or (old != old and new != new)):
            yield place, gap / max(abs(old), abs(new))
    elif old != new:
        yield place, math.inf


def compare(name: str, new: Record, tolerance: float) -> list[str]:
    """Lines that say how a record differs from the committed one."""
    file = RECORDS / f"{name}.json"
    if not file.exists():
        return [f"{name}: no committed record"]
    found = sorted(differences(Record.load(file).data, new.data, tolerance), key=lambda f: -f[1])
    if not found:
        return [f"{name}: agrees"]
    return [f"{name}: {len(found)} values differ", *(f"    {place}: {gap:.1e}" for place, gap in found[:8])]


def accept(out: Path) -> None:
    """Copy the new records and figures into the checkout."""
    for folder, target in ((out / "records", RECORDS), (out / "figures", FIGURES)):
        for file in folder.glob("*"):
            shutil.copy(file, target / file.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="experiments; default: those that are cheap")
    parser.add_argument("--minutes", type=int, default=5, help="what counts as cheap (default: 5)")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="relative (default: 1e-4)")
    parser.add_argument("--out", type=Path, help="folder of the new files (default: a temporary one)")
    parser.add_argument("--accept", action="store_true", help="copy the new files into the checkout")
    parser.add_argument("--list", action="store_true", help="list the experiments and stop")
    asked = parser.parse_args()
    known = {name: load(name) for name in asked.names or NAMES}
    if asked.list:
        for name, e in known.items():
            kind = "cheap" if e.minutes <= asked.minutes else "expensive"
            print(f"{kind:<10}{e.minutes:>4} min  {name}{'; needs ' + e.needs if e.needs else ''}")
        return
    chosen = {n: e for n, e in known.items() if asked.names or e.minutes <= asked.minutes}
    for name in [n for n, e in chosen.items() if e.device == "cuda" and not torch.cuda.is_available()]:
        print(f"{name}: not run, because there is no CUDA device")
        del chosen[name]
    out, failed = asked.out or Path(tempfile.mkdtemp(prefix="fewstep-")), False
    for experiment in chosen.values():
        for name, record in experiment.run("paper", out).items():
            lines = compare(name, record, asked.tolerance)
            failed |= not lines[0].endswith("agrees")
            print("\n".join(lines), flush=True)
    if asked.accept:
        accept(out)
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
