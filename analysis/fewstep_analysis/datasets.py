"""Real data for the demo and the experiments, loaded from installed packages. Nothing is downloaded."""

import torch
from torch import Tensor

from fewstep import InputError, _validation

HELD_OUT = 500


def digits(seed: int = 0) -> tuple[Tensor, Tensor]:
    """scikit-learn's 1,797 handwritten digits, split into training images and 500 held-out images.

    Returns:
        two tensors (n, 1, 8, 8), float32 in [-1, 1]; each contains the ten digits in equal shares.

    Raises:
        InputError: scikit-learn is not installed.
    """
    seed = _validation.check_int("seed", seed, 0, 2**32 - 1)
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise InputError(f"digits: scikit-learn cannot be imported ({error}). Run: pip install scikit-learn") from error
    images, labels = load_digits(return_X_y=True)
    split = train_test_split(images, test_size=HELD_OUT, random_state=seed, stratify=labels)
    train, held_out = (torch.from_numpy(x).float().div(8).sub(1).reshape(-1, 1, 8, 8) for x in split)
    return train, held_out
