"""Several processes, one result: `torchrun` starts them, each takes its share of the blocks of paths."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


@contextlib.contextmanager
def processes(device: str = "cpu") -> Iterator[str]:
    """Join the other processes that torchrun started, if it did; yields this process's device."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or not dist.is_available() or dist.is_initialized():
        yield device
        return
    if device == "cuda":
        device = f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"
        torch.cuda.set_device(device)
    # results are gathered on the CPU, so that gloo is expected beside nccl
    dist.init_process_group("cpu:gloo,cuda:nccl" if device != "cpu" else "gloo")
    try:
        yield device
        dist.barrier()  # none leaves while another still talks to it
    finally:
        dist.destroy_process_group()


def progress(items: Iterable[T], unit: str) -> Iterable[T]:
    """The items with a bar on a terminal; none in a pipe, nor where another process has it."""
    from tqdm import tqdm

    shown: Iterable[T] = tqdm(items, unit=unit, leave=False, disable=None if is_first() else True)
    return shown


def place() -> tuple[int, int]:
    """This process's number and how many there are."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def is_first() -> bool:
    """Whether this process is the one that prints and writes."""
    return place()[0] == 0


def gathered(parts: Tensor) -> Tensor:
    """The sum over processes of tensors that are nought in all but one: to the bit what one would have."""
    if place()[1] > 1:
        dist.all_reduce(parts)
    return parts
