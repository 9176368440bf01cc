"""Normals as a function of (seed, node), independent of the order in which they are drawn.

There are two sources here, and one in `counter.py`. With one seed for the batch, a torch.Generator is seeded for
every node: a seeding costs a microsecond, and the draws run at torch's speed. With one seed per sample, SplitMix64's
finaliser runs over a counter (Steele, Lea & Flood, OOPSLA 2014) and Box-Muller turns each 64-bit word into two float32
normals, at twice the cost or more on one CPU core (six times for rows of four).
"""

import math
from array import array
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from .._tracing import new_generator

_MASK32 = (1 << 32) - 1
_MASK64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_M1 = 0xBF58476D1CE4E5B9
_M2 = 0x94D049BB133111EB

# draw(nodes): one tensor (len(nodes), *shape) per letter, overwritten by the next call; many at once cost less
Draw = Callable[[Sequence[int]], list[Tensor]]


class Normals(Protocol):
    """A source of independent float32 N(0, 1) fields, one per node and letter."""

    def begin(self, letters: int) -> Draw:
        """Return a function that draws the fields of nodes, a range if they follow one another, for one thread."""


class GeneratorNormals:
    """Fields of `shape` from the generator of `device`, seeded for each node."""

    def __init__(self, shape: tuple[int, ...], seed: int, device: torch.device) -> None:
        self.shape: tuple[int, ...] = shape
        self.device: torch.device = device
        self._key = key_of(seed)

    def begin(self, letters: int) -> Draw:
        # one generator per traversal, not per node: creating it costs 40 microseconds
        source = new_generator(self.device)

        def empty(count: int) -> list[Tensor]:
            return list(torch.empty(letters, count, *self.shape, dtype=torch.float32, device=self.device))

        single = empty(1)

        def draw(nodes: Sequence[int]) -> list[Tensor]:
            out = single if len(nodes) == 1 else empty(len(nodes))
            columns = (out,) if len(nodes) == 1 else zip(*(field.unbind() for field in out), strict=True)
            for node, fields in zip(nodes, columns, strict=True):
                source.manual_seed(node_seed(self._key, node))
                for field in fields:
                    field.normal_(generator=source)
            return out

        return draw


class HashedNormals:
    """Fields of `shape` whose entry b depends only on seeds[b], not on the rest of the batch."""

    def __init__(self, shape: tuple[int, ...], seeds: list[int], device: torch.device) -> None:
        self.shape: tuple[int, ...] = shape
        self.device: torch.device = device
        self.width: int = math.prod(shape[1:])
        self.half: int = (self.width + 1) // 2
        self._keys = keys_of(seeds).to(device)
        self._counter = torch.arange(self.half, dtype=torch.int64, device=device).mul_(_signed(_GOLDEN))

    def begin(self, letters: int) -> Draw:
        numbers = torch.arange(letters, dtype=torch.int64, device=self.device).reshape(-1, 1, 1)

        def draw(nodes: Sequence[int]) -> list[Tensor]:
            keys = mix_(mix_(numbers_of(nodes, self.device)).unsqueeze(-1) ^ self._keys)
            bits = mix_(mix_(keys + numbers).unsqueeze(-1) + self._counter)
            return list(self._normals(bits).reshape(letters, len(nodes), *self.shape).unbind())

        return draw

    def _normals(self, bits: Tensor) -> Tensor:
        """Apply Box-Muller to the 32-bit halves of bits (..., half), row by row."""
        unit = bits.view(torch.int32).to(torch.float32)
        radius, angle = unit[..., : self.half].contiguous(), unit[..., self.half :].contiguous()
        pairs = torch.cat(box_muller(radius, angle), -1)
        return pairs[..., : self.width]


def numbers_of(nodes: Sequence[int], device: torch.device) -> Tensor:
    """The numbers of nodes, int64."""
    if isinstance(nodes, range) or len(nodes) == 1:  # made on the device
        return torch.arange(nodes[0], nodes[-1] + 1, dtype=torch.int64, device=device)
    return torch.tensor(nodes, dtype=torch.int64, device=device)


def box_muller(radius: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    """Two normals from two float32 tensors of uniform int32 values k, which are overwritten."""
    # |k| / 2^31 + 2^-33 keeps all bits near 0, where the tails come from, and is never 0
    radius.abs_().mul_(2.0**-31).add_(2.0**-33).log_().mul_(-2.0).sqrt_()
    angle.mul_(math.pi * 2.0**-31)
    return torch.cos(angle).mul_(radius), angle.sin_().mul_(radius)


def node_seed(key: int, node: int) -> int:
    """A 64-bit seed for a node of the tree, distinct in its low half for the first 2^32 nodes of a path.

    torch's CPU generator keeps the low 32 bits of a seed. With a random hash about a hundred of 2^20 nodes would
    repeat the normals of another, so the low half is a permutation of the node number, chosen by the key.
    """
    high = mix(key ^ mix(node))
    if node > _MASK32:
        return high
    low = _permute(_permute(node ^ (key & _MASK32)) ^ (key >> 32))
    return (high & ~_MASK32) | low


def key_of(seed: int) -> int:
    """The 64-bit key of a seed; seeds that agree modulo 2^64 have one key."""
    return mix(seed + _GOLDEN)


def keys_of(seeds: list[int]) -> Tensor:
    """The keys of many seeds, int64 read as unsigned, on the CPU."""
    # hashing Python integers one by one takes longer than a draw
    words = array("Q", [seed & _MASK64 for seed in seeds])
    return mix_(torch.frombuffer(words, dtype=torch.int64) + _signed(_GOLDEN))


def wrapped(seed: int) -> int:
    """The seed in [0, 2^64) that has the key of a sum of a seed and an offset."""
    return seed & _MASK64


def mix(x: int) -> int:
    """SplitMix64's finaliser, a bijection of [0, 2^64), for a Python integer."""
    x &= _MASK64
    x = ((x ^ (x >> 30)) * _M1) & _MASK64
    x = ((x ^ (x >> 27)) * _M2) & _MASK64
    return x ^ (x >> 31)


def mix_(x: Tensor) -> Tensor:
    """The same bijection as `mix`, in place, for an int64 tensor read as unsigned."""
    # torch's right shift copies the sign bit; the masks remove the copies
    t = torch.bitwise_right_shift(x, 30)
    x.bitwise_xor_(t.bitwise_and_((1 << 34) - 1)).mul_(_signed(_M1))
    torch.bitwise_right_shift(x, 27, out=t)
    x.bitwise_xor_(t.bitwise_and_((1 << 37) - 1)).mul_(_signed(_M2))
    torch.bitwise_right_shift(x, 31, out=t)
    return x.bitwise_xor_(t.bitwise_and_((1 << 33) - 1))


def _permute(x: int) -> int:
    """A bijection of [0, 2^32): Wellons' hash lowbias32."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK32
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK32
    return x ^ (x >> 16)


def _signed(x: int) -> int:
    x &= _MASK64
    return x - (1 << 64) if x >> 63 else x
