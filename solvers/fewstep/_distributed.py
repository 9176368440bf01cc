"""What the library needs of torch.distributed; every function is trivial in a single process."""

import torch
from torch import Tensor


def distributed() -> bool:
    """Whether torch.distributed runs."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def rank_and_world() -> tuple[int, int]:
    """This process's rank and the number of processes."""
    if not distributed():
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
    if distributed():
        torch.distributed.barrier()


def sum_over_processes(x: Tensor) -> Tensor:
    """The sum over processes; gradients flow through it, and are summed over processes themselves."""
    if not distributed():
        return x
    from torch.distributed.nn.functional import all_reduce

    nccl = torch.distributed.get_backend() == "nccl"  # which takes no CPU tensors
    shared: Tensor = all_reduce(x.cuda() if nccl else x)  # type: ignore[no-untyped-call]
    return shared.to(x.device)


def from_first(x: Tensor) -> Tensor:
    """The value on rank 0, in every process."""
    return sum_over_processes(x if is_first() else torch.zeros_like(x))
