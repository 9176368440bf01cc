"""The MNIST data set, read from its four gzipped files. Nothing is downloaded."""

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

from fewstep import InputError, _validation

# name: magic number (unsigned bytes, number of axes), md5 of the unpacked file
FILES = {
    "train-images-idx3-ubyte": (0x803, "6bbc9ace898e44ae57da46a324031adb"),
    "train-labels-idx1-ubyte": (0x801, "a25bea736e30d166cdddb491f175f624"),
    "t10k-images-idx3-ubyte": (0x803, "2646ac647ad5339dbf082846283269ea"),
    "t10k-labels-idx1-ubyte": (0x801, "27ae3e4e09519cfbb04c329615203637"),
}


def mnist(folder: str | Path | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images and labels, then test images and labels.

    Images are (n, 1, 28, 28) float32 in [-1, 1] and labels (n,) int64; n is 60,000 and 10,000.

    Args:
        folder: the folder of the files, or its parent if it is called `mnist`; by default the environment
            variable FEWSTEP_DATA.

    Raises:
        InputError: a missing, truncated or modified file.
    """
    folder = folder or os.environ.get("FEWSTEP_DATA")
    if not folder:
        raise InputError(
            "folder: got None, expected the folder of MNIST's four files (train-images-idx3-ubyte.gz, ...). "
            "Pass it here or set the environment variable FEWSTEP_DATA."
        )
    given = _validation.check_file(folder, "folder")
    found = given / "mnist" if (given / "mnist").is_dir() else given
    parts = [_read_idx(found / f"{name}.gz", *facts) for name, facts in FILES.items()]
    train, test = parts[:2], parts[2:]
    for x, y in (train, test):
        if len(x) != len(y):
            raise InputError(f"folder: {found} has {len(x)} images for {len(y)} labels; download it again.")
    return _scale(train[0]), train[1].long(), _scale(test[0]), test[1].long()


def _scale(images: Tensor) -> Tensor:
    return images.float().div_(127.5).sub_(1).unsqueeze(1)


def _read_idx(path: Path, magic: int, md5: str) -> Tensor:
    """An IDX file of bytes: big-endian magic number and sizes, then the numbers."""
    try:
        raw = gzip.decompress(path.read_bytes())
    except FileNotFoundError as error:
        raise InputError(f"folder: {path} does not exist; expected MNIST's four files there.") from error
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"folder: {path} is not a complete gzip file ({error}); download it again.") from error
    size = 4 * (magic % 16 + 1)  # the last byte of the magic number counts the axes
    head = np.frombuffer(raw[:size], ">u4") if len(raw) >= size else np.zeros(2, np.uint32)
    body, shape = raw[size:], [int(n) for n in head[1:]]
    digest = hashlib.md5(raw, usedforsecurity=False).hexdigest()
    if head[0] != magic or len(body) != math.prod(shape) or digest != md5:
        raise InputError(f"folder: {path} is damaged or not a file of MNIST; download it again.")
    return torch.from_numpy(np.frombuffer(body, np.uint8).reshape(shape).copy())
