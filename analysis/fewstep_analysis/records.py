"""A result is a record: numbers with the seed, the versions and the command that made them, as JSON."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from fewstep import _validation
from fewstep._serialization import atomic_write
from fewstep.errors import InputError

FORMAT = "fewstep-record-1"


@dataclass(frozen=True)
class Record:
    """What a study found.

    Attributes:
        kind: what the data is, for instance `"strong-order"`; figures are chosen by it.
        data: plain numbers, strings, lists and dicts.
        seed: what the study was seeded with.
        made: versions, device, command and commit.
    """

    kind: str
    data: dict[str, Any]
    seed: int
    made: dict[str, Any] = field(default_factory=lambda: provenance())

    def body(self) -> dict[str, Any]:
        """What the file holds."""
        facts = {"format": FORMAT, "kind": self.kind, "seed": self.seed, "made": self.made}
        return facts | {"data": self.data}

    def save(self, path: str | Path) -> Path:
        """Write the record as JSON; the file appears whole or not at all."""
        path = _validation.check_path(path)
        _validation.check_instance("data", self.data, dict, "a dict of plain numbers")
        try:
            text = json.dumps(self.body(), indent=1) + "\n"
        except (TypeError, ValueError, RecursionError) as error:
            raise InputError(f"data: got what JSON cannot hold ({error}); expected plain numbers.") from error
        with atomic_write(path) as part:
            path.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(text)
        return path

    @classmethod
    def load(cls, path: str | Path) -> Record:
        """Read a record; refuses other JSON."""
        path = _validation.check_path(path)
        try:
            body = json.loads(path.read_text())
            if body["format"] != FORMAT:
                raise KeyError("format")
            kinds = {"kind": str, "data": dict, "seed": int, "made": dict}
            if wrong := [k for k, kind in kinds.items() if not isinstance(body[k], kind)]:
                raise TypeError(f"{wrong[0]} is no {kinds[wrong[0]].__name__}")
            return cls(body["kind"], body["data"], body["seed"], body["made"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(
                f"path: {path} is not a record of this library ({error}); expected JSON with format "
                f"{FORMAT!r}. Make the record again with its command."
            ) from error


def provenance(device: str = "cpu") -> dict[str, Any]:
    """Versions, machine and command, without anything private to the machine."""
    packages = ["fewstep", "torch", "torchsde", "numpy", "scipy"]
    packages += [p for p in ("diffrax", "jax") if p in sys.modules]
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
    """The commit of this library's own checkout, marked where files differ from it."""
    here = Path(__file__).resolve()

    def git(*words: str) -> str:
        command = ["git", "-C", str(here.parent), *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", str(here))  # an installed copy lies in somebody else's project
        return git("rev-parse", "--short", "HEAD") + ("-dirty" if git("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return None
