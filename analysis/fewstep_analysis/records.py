"""Results as JSON records: numbers with the seed, the versions and the command that made them."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from fewstep import _validation
from fewstep._serialization import read_json, write_json
from fewstep.errors import InputError

FORMAT = "fewstep-record-1"
OPTIONAL = ("torchsde", "scipy", "diffrax", "jax")


@dataclass(frozen=True)
class Record:
    """The result of a measurement.

    Attributes:
        kind: the kind of data, for instance `"strong-order"`.
        data: plain numbers, strings, lists and dicts.
        seed: the seed of the measurement.
        made: versions, device, command and commit.
    """

    kind: str
    data: dict[str, Any]
    seed: int
    made: dict[str, Any] = field(default_factory=lambda: provenance())

    def body(self) -> dict[str, Any]:
        """The content of the file."""
        return {"format": FORMAT, "kind": self.kind, "seed": self.seed, "made": self.made, "data": self.data}

    def save(self, path: str | Path) -> Path:
        """Write the record as JSON, atomically."""
        _validation.check_instance("data", self.data, dict, "a dict of plain numbers")
        write_json(path, self.body(), parents=True)
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Record:
        """Read a record.

        Raises:
            InputError: the file does not exist or is not a record.
        """
        body = read_json(path)
        kinds = {"format": str, "kind": str, "data": dict, "seed": int, "made": dict}
        wrong = [k for k, kind in kinds.items() if not isinstance(body, dict) or not isinstance(body.get(k), kind)]
        if wrong or body["format"] != FORMAT:
            raise InputError(
                f"path: {path} is not a record of this library ({(wrong or ['format'])[0]}); expected JSON with format "
                f"{FORMAT!r}. Regenerate the record with its command."
            )
        return cls(body["kind"], body["data"], body["seed"], body["made"])


def provenance(device: str = "cpu") -> dict[str, Any]:
    """Versions, device, command and commit; nothing that identifies the user or the machine."""
    # a measurement does not depend on packages that are installed but not used
    packages = ["fewstep", "torch", "numpy", *(p for p in OPTIONAL if p in sys.modules)]
    words = sys.argv if sys.argv and sys.argv[0] else ["python"]
    command = [Path(w).name if Path(w).is_absolute() else w for w in words]
    if command[0] == "__main__.py":  # python -m fewstep_analysis
        command[0] = "fewstep"
    return {
        "versions": {p: metadata.version(p) for p in packages} | {"python": platform.python_version()},
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        "threads": torch.get_num_threads(),
        "command": " ".join(command),
        "commit": _commit(),
    }


def _commit() -> str | None:
    """FEWSTEP_COMMIT, for a copy of the checkout; else its commit, with a suffix where files are modified."""
    if named := os.environ.get("FEWSTEP_COMMIT"):
        return named
    here = Path(__file__).resolve()

    def git(*words: str) -> str:
        command = ["git", "-C", str(here.parent), *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", str(here))  # fails for an installed copy
        return git("rev-parse", "--short", "HEAD") + ("-dirty" if git("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return None
