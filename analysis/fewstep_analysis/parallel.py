"""Joining the processes that `torchrun` started, for commands and scripts that run under it."""

import contextlib
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist


@contextlib.contextmanager
def processes(device: str = "cpu") -> Iterator[str]:
    """Join the other processes if torchrun started any; yields the device of this process."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or not dist.is_available() or dist.is_initialized():
        yield device
        return
    if device == "cuda":
        device = f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"
        torch.cuda.set_device(device)
    # results are gathered on the CPU, which needs gloo in addition to nccl
    dist.init_process_group("cpu:gloo,cuda:nccl" if device != "cpu" else "gloo")
    try:
        yield device
        dist.barrier()  # no process may leave while another still communicates with it
    finally:
        dist.destroy_process_group()
