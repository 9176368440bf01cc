"""Normals that are a function of a key: no generator, no state, the same on every device up to rounding.

A 64-bit counter runs through the finaliser of SplitMix64 (Steele, Lea & Flood, OOPSLA 2014; it passes BigCrush) and
each 64-bit word becomes two float32 normals by Box and Muller. Against one re-seeded ``torch.Generator`` a node this
costs 1.3 times as much on one CPU core, and buys: 64-bit seeds (torch's CPU generator keeps 32 bits, so that among 2^20
nodes some hundred would repeat another's numbers), many nodes in one call, per-sample seeds at no cost, and no state to
lock or to pickle.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import InputError

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_M1 = 0xBF58476D1CE4E5B9
_M2 = 0x94D049BB133111EB


def _signed(x: int) -> int:
    x &= _MASK
    return x - (1 << 64) if x >> 63 else x


def mix(x: int) -> int:
    """SplitMix64's finaliser on a Python integer, a bijection of [0, 2^64)."""
    x &= _MASK
    x = ((x ^ (x >> 30)) * _M1) & _MASK
    x = ((x ^ (x >> 27)) * _M2) & _MASK
    return x ^ (x >> 31)


def mix_(x: Tensor) -> Tensor:
    """The same bijection in place on an int64 tensor read as unsigned."""
    t = torch.bitwise_right_shift(x, 30)
    # torch's shift of int64 copies the sign bit; the mask makes it the logical shift.
    x.bitwise_xor_(t.bitwise_and_((1 << 34) - 1)).mul_(_signed(_M1))
    torch.bitwise_right_shift(x, 27, out=t)
    x.bitwise_xor_(t.bitwise_and_((1 << 37) - 1)).mul_(_signed(_M2))
    torch.bitwise_right_shift(x, 31, out=t)
    return x.bitwise_xor_(t.bitwise_and_((1 << 33) - 1))


def key_of(seed: int) -> int:
    """The 64-bit key of a user's seed: any Python integer."""
    return mix(seed + _GOLDEN)


class KeyedNormals:
    """Standard normals of a given shape, one independent field for every (key, node, level).

    ``shape``: shape of a field. ``seeds``: one integer for the whole field, or a list with one for each entry of the
    leading axis, whose numbers then do not depend on the other entries. Holds only constants: safe to share and pickle.
    """

    def __init__(self, shape: tuple[int, ...], seeds: int | list[int], device: torch.device):
        if isinstance(seeds, list) and (not shape or len(seeds) != shape[0]):
            raise InputError(
                f"seeds: got {len(seeds)}, wanted one for each entry of the leading axis of shape {shape}."
            )
        self.shape = shape
        self.rows = len(seeds) if isinstance(seeds, list) else 1
        self.width = math.prod(shape) // self.rows if self.rows else 0
        self.half = (self.width + 1) // 2
        self.device = device
        keys = [key_of(s) for s in seeds] if isinstance(seeds, list) else [key_of(seeds)]
        self._key = keys[0]
        self._keys = torch.tensor([_signed(k) for k in keys], dtype=torch.int64, device=device)
        counter = torch.arange(self.half, dtype=torch.int64, device=device)
        self._counter = counter.mul_(_signed(_GOLDEN))

    def draw(self, node: int, count: int, levels: int) -> list[Tensor]:
        """``levels`` float32 tensors ``(count, *shape)``: the fields of nodes node, node+1, ..., node+count-1."""
        if count == 1 and self.rows == 1:
            key = mix(self._key ^ mix(node))
            stream = [self._counter + _signed(mix(key + level)) for level in range(levels)]
            return [self._normals(x, 1) for x in stream]
        nodes = torch.arange(node, node + count, dtype=torch.int64, device=self.device)
        keys = mix_(mix_(nodes).unsqueeze(-1) ^ self._keys)
        out = []
        for level in range(levels):
            start = mix_(keys + level)
            out.append(self._normals(start.unsqueeze(-1) + self._counter, count))
        return out

    def _normals(self, counter: Tensor, count: int) -> Tensor:
        """Box-Muller on the two 32-bit halves of each hashed counter; consumes ``counter``."""
        bits = mix_(counter).view(torch.int32).view(count, self.rows, 2, self.half)
        unit = bits.to(torch.float32)
        radius, angle = unit[:, :, 0], unit[:, :, 1]
        # |k| 2^-31 + 2^-33 keeps the full 31 bits near 0, where the tails come from, and cannot be 0.
        radius.abs_().mul_(2.0**-31).add_(2.0**-33).log_().mul_(-2.0).sqrt_()
        angle.mul_(math.pi * 2.0**-31)
        out = torch.empty_like(unit)
        torch.cos(angle, out=out[:, :, 0]).mul_(radius)
        torch.sin(angle, out=out[:, :, 1]).mul_(radius)
        flat = out.view(count, self.rows, 2 * self.half)
        if 2 * self.half != self.width:
            flat = flat[..., : self.width]
        return flat.reshape(count, *self.shape)
