"""What the library needs of torch.distributed; every function is trivial in a single process."""

import torch
from torch import Tensor


def rank_and_world() -> tuple[int, int]:
    """This process's rank and the number of processes."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def is_first() -> bool:
    """True on rank 0, which writes files and shows progress."""
    return rank_and_world()[0] == 0


def part() -> slice:
    """The entries of a minibatch that this process takes: rank, rank + world, ..."""
    rank, world = rank_and_world()
    return slice(rank, None, world)


def barrier() -> None:
    """Wait for all processes."""
    if rank_and_world()[1] > 1:
        torch.distributed.barrier()


def sum_over_processes(x: Tensor) -> Tensor:
    """The sum over processes, through which no gradient flows."""
    if rank_and_world()[1] == 1:
        return x
    nccl = torch.distributed.get_backend() == "nccl"  # which takes no CPU tensors
    total = x.detach().to("cuda" if nccl else x.device, copy=True)
    torch.distributed.all_reduce(total)
    return total.to(x.device)


def from_first(x: Tensor) -> Tensor:
    """The value on rank 0, in every process."""
    return sum_over_processes(x if is_first() else torch.zeros_like(x))
