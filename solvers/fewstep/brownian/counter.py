"""Normals as a function of (seed, node, element) in tensor operations: equal on every device, eager or compiled.

Philox 4x32-10 (Salmon, Moraes, Dror & Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011) encrypts a
counter, which names a node of the tree and a block of elements, with the key of a seed. Box-Muller turns its four words
into four normals.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .random_normals import Draw, box_muller, key_of, keys_of, numbers_of

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
        keys = keys_of(seeds).to(device).reshape(-1, 1)
        self.key: Tensor = torch.stack([keys & _MASK, (keys >> 32) & _MASK])  # (2, rows, 1)
        # numbers cost less than tensors of one
        self._key: Words = (self.key[0], self.key[1]) if each else (key_of(seeds[0]) & _MASK, key_of(seeds[0]) >> 32)

    def begin(self, letters: int) -> Draw:
        rows = self.key.shape[1]
        width, shared = _layout(self.shape, rows, letters)

        def draw(nodes: Sequence[int]) -> list[Tensor]:
            if not isinstance(nodes, range):
                return list(fields_of(numbers_of(nodes, self.device), self._key, rows, letters, self.shape).unbind())
            node, count, first = nodes.start, len(nodes), nodes.start // shared
            groups = torch.arange(first, nodes[-1] // shared + 1, device=self.device)
            drawn = _sequences(groups, self._key, rows, shared * letters * width)
            fields = drawn.reshape(len(groups), rows, shared, letters, width).permute(3, 0, 2, 1, 4)
            each = fields.reshape(letters, len(groups) * shared, rows * width)
            return list(each.narrow(1, node - first * shared, count).reshape(letters, count, *self.shape).unbind())

        return draw


def fields_of(nodes: Tensor, key: Words, rows: int, letters: int, shape: Sequence[int]) -> Tensor:
    """The fields (letters, nodes, *shape) of int64 `nodes` and the key of a source with `rows` keys, in any order."""
    width, shared = _layout(shape, rows, letters)
    drawn = _sequences(nodes // shared, key, rows, shared * letters * width)
    if shared > 1:
        drawn = drawn.reshape(len(nodes), rows, shared, -1)[
            torch.arange(len(nodes), device=nodes.device), :, nodes % shared
        ]
    return drawn.reshape(len(nodes), rows, letters, width).permute(2, 0, 1, 3).reshape(letters, len(nodes), *shape)


def _layout(shape: Sequence[int], rows: int, letters: int) -> tuple[int, int]:
    """The numbers of a row and letter, and the nodes whose numbers share a block."""
    width = math.prod(shape) // max(1, rows)
    return width, max(1, 4 // max(1, letters * width))


def _sequences(groups: Tensor, key: Words, rows: int, numbers: int) -> Tensor:
    """The first (groups, rows, numbers) normals of each group of nodes and row."""
    blocks = -(-numbers // 4)
    block, group = torch.arange(blocks, device=groups.device), groups.reshape(-1, 1, 1)
    counter = (block & _MASK, block >> 32, group & _MASK, group >> 32)
    bits = philox([word.expand(len(groups), rows, blocks) for word in counter], key)
    # narrowing to int32 keeps the low bits
    a, b, c, d = (word.to(torch.int32).to(torch.float32) for word in bits)
    # not joined by cat in the last dimension, which is slow where that is short
    normals = torch.stack([*box_muller(a, b), *box_muller(c, d)])
    return normals.permute(1, 2, 0, 3).reshape(len(groups), rows, 4 * blocks)[..., :numbers]
