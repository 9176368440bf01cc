"""Real data for studies, loaded from what is installed; nothing is downloaded."""

from __future__ import annotations

import gzip
import hashlib
import math
import os
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fewstep import _validation
from fewstep.errors import InputError

HELD_OUT = 500
# name: magic number (unsigned bytes, number of axes), md5 of the unpacked file
MNIST = {
    "train-images-idx3-ubyte": (0x803, "6bbc9ace898e44ae57da46a324031adb"),
    "train-labels-idx1-ubyte": (0x801, "a25bea736e30d166cdddb491f175f624"),
    "t10k-images-idx3-ubyte": (0x803, "2646ac647ad5339dbf082846283269ea"),
    "t10k-labels-idx1-ubyte": (0x801, "27ae3e4e09519cfbb04c329615203637"),
}


def digits(seed: int = 0) -> tuple[Tensor, Tensor]:
    """scikit-learn's 1,797 handwritten digits, (n, 1, 8, 8) float32 in [-1, 1]: training and 500 held out.

    Both parts hold the ten digits in equal shares.
    """
    _validation.check_int("seed", seed, 0, 2**32 - 1)
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise InputError("digits: scikit-learn is not installed; run: pip install 'fewstep[demo]'") from error
    images, labels = load_digits(return_X_y=True)
    split = train_test_split(images, test_size=HELD_OUT, random_state=seed, stratify=labels)
    train, held_out = (torch.from_numpy(x).float().div(8).sub(1).reshape(-1, 1, 8, 8) for x in split)
    return train, held_out


def mnist(folder: str | Path | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """MNIST from its four gzipped files: training images and labels, then the test set's.

    Images are (n, 1, 28, 28) float32 in [-1, 1], labels (n,) int64; n is 60,000 and 10,000.

    Args:
        folder: the one with the files, or one that holds it as `mnist`; by default the environment
            variable FEWSTEP_DATA.
    """
    folder = folder or os.environ.get("FEWSTEP_DATA")
    if not folder:
        raise InputError(
            "folder: MNIST is not shipped. Name the folder of its four files, train-images-idx3-ubyte.gz "
            "and so on, here (--data on the command line) or in the environment variable FEWSTEP_DATA."
        )
    given = _validation.check_path(folder, "folder")
    found = given / "mnist" if (given / "mnist").is_dir() else given
    parts = [_idx(found / f"{name}.gz", *facts) for name, facts in MNIST.items()]
    train, test = parts[:2], parts[2:]
    for x, y in (train, test):
        if len(x) != len(y):
            raise InputError(f"folder: {found} has {len(x)} images for {len(y)} labels; fetch it again.")
    return _scaled(train[0]), train[1].long(), _scaled(test[0]), test[1].long()


def _scaled(images: Tensor) -> Tensor:
    return images.float().div_(127.5).sub_(1).unsqueeze(1)


def _idx(path: Path, magic: int, md5: str) -> Tensor:
    """An IDX file of bytes: big-endian magic number and sizes, then the numbers."""
    try:
        raw = gzip.decompress(path.read_bytes())
    except FileNotFoundError as error:
        raise InputError(f"folder: {path} does not exist; expected MNIST's four files there.") from error
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"folder: {path} is not a whole gzip file ({error}); fetch it again.") from error
    size = 4 * (magic % 16 + 1)  # the last byte of the magic number counts the axes
    head = np.frombuffer(raw[:size], ">u4") if len(raw) >= size else np.zeros(2, np.uint32)
    body, shape = raw[size:], [int(n) for n in head[1:]]
    if head[0] != magic or len(body) != math.prod(shape) or _md5(raw) != md5:
        raise InputError(f"folder: {path} is damaged or not MNIST's; fetch it again.")
    return torch.from_numpy(np.frombuffer(body, np.uint8).reshape(shape).copy())


def _md5(raw: bytes) -> str:
    return hashlib.md5(raw, usedforsecurity=False).hexdigest()
