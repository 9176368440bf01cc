"""Real data for studies, loaded from what is installed; nothing is downloaded."""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.errors import InputError

HELD_OUT = 500


def digits(seed: int = 0) -> tuple[Tensor, Tensor]:
    """scikit-learn's 1,797 handwritten digits, (n, 1, 8, 8) float32 in [-1, 1]: training and 500 held out."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise InputError(
            "digits: scikit-learn is not installed; run: pip install 'fewstep[demo]'"
        ) from error
    images = torch.from_numpy(load_digits().images).float().div(8).sub(1).unsqueeze(1)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    return images[order[HELD_OUT:]], images[order[:HELD_OUT]]
