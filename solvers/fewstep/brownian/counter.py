"""Normals as a function of (seed, node, element) in tensor operations: equal on every device, eager or compiled.

Philox 4x32-10 (Salmon, Moraes, Dror & Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011) encrypts a
counter, which names a node of the tree and a block of elements, with the key of a seed. Box-Muller turns its four words
into four normals.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .random_normals import Draw, box_muller, key_of, keys_of

_MASK = (1 << 32) - 1
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85

Words = tuple[int | Tensor, int | Tensor]


def philox(counter: Sequence[Tensor], key: Words) -> tuple[Tensor, ...]:
    """Ten rounds of Philox 4x32 on four int64 tensors of one shape, of values below 2^32, to which the key broadcasts.

    The words returned are right in their low 32 bits.
    """
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]  # read as unsigned, exact
        c0 = (p1 >> 32).bitwise_xor_(c1).bitwise_xor_(k0).bitwise_and_(_MASK)
        c2 = (p0 >> 32).bitwise_xor_(c3).bitwise_xor_(k1).bitwise_and_(_MASK)
        c1, c3 = p1, p0
        k0, k1 = k0 + _WEYL[0], k1 + _WEYL[1]  # the mask above is theirs too
    return c0, c1, c2, c3


class CounterNormals:
    """Fields of `shape` of one seed, or with entry b of seeds[b] alone.

    The numbers of a seed and a node are one sequence, letter after letter. Sequences of one or two numbers share their
    block with those of the next nodes.
    """

    def __init__(self, shape: tuple[int, ...], seeds: list[int], each: bool, device: torch.device) -> None:
        self.shape: tuple[int, ...] = shape
        self.device: torch.device = device
        self.rows: int = len(seeds)
        self.width: int = math.prod(shape[1:] if each else shape)
        self._key: Words = (key_of(seeds[0]) & _MASK, key_of(seeds[0]) >> 32)
        if each:
            keys = keys_of(seeds).to(device).unsqueeze(-1)
            self._key = (keys & _MASK, (keys >> 32) & _MASK)

    def begin(self, letters: int) -> Draw:
        numbers = letters * self.width
        shared = max(1, 4 // max(1, numbers))  # nodes of a block

        def draw(node: int, count: int) -> list[Tensor]:
            first = node // shared
            groups = torch.arange(first, (node + count - 1) // shared + 1, device=self.device)
            drawn = self._sequences(groups, -(-shared * numbers // 4))[..., : shared * numbers]
            fields = drawn.reshape(len(groups), self.rows, shared, letters, self.width).permute(3, 0, 2, 1, 4)
            nodes = fields.reshape(letters, len(groups) * shared, self.rows * self.width)
            return list(nodes.narrow(1, node - first * shared, count).reshape(letters, count, *self.shape).unbind())

        return draw

    def _sequences(self, groups: Tensor, blocks: int) -> Tensor:
        """(groups, rows, 4 blocks) normals."""
        block, group = torch.arange(blocks, device=self.device), groups.reshape(-1, 1, 1)
        size = len(groups), self.rows, blocks
        words = (block & _MASK, block >> 32, group & _MASK, group >> 32)
        bits = philox([word.expand(size) for word in words], self._key)
        # narrowing to int32 keeps the low bits
        a, b, c, d = (word.to(torch.int32).to(torch.float32) for word in bits)
        # not joined by cat in the last dimension, which is slow where that is short
        normals = torch.stack([*box_muller(a, b), *box_muller(c, d)])
        return normals.permute(1, 2, 0, 3).reshape(len(groups), self.rows, 4 * blocks)
