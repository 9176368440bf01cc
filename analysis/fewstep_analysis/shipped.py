"""How the networks that the package ships are written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from fewstep._serialization import atomic_write


def write_half(path: str | Path, meta: dict[str, Any], network: nn.Module) -> Path:
    """Weights in half precision: twice the network in the megabyte, loaded as float32."""
    from safetensors.torch import save_file

    weights = {k: v.half().contiguous() for k, v in network.state_dict().items()}
    # of an editable install the shipped files are links
    with atomic_write(Path(path).resolve()) as part:
        save_file(weights, str(part), {"fewstep": json.dumps(meta)})
    return Path(path)
