"""The blocks of GGUF's types → numbers: vectors of whole tensors at once.

Each function takes bytes (blocks, bytes of a block) and gives float32 (blocks, numbers of a block). The types are those
of ggml (https://github.com/ggml-org/ggml): a block has a scale, some a second number that is added, and small integers;
K-types have scales of 4 or 6 bits for parts of 16 or 32, which the block's own scale multiplies.
"""

from collections.abc import Callable

import torch
from torch import Tensor

# What IQ4_NL's sixteen integers stand for.
_NON_LINEAR = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def _half(blocks: Tensor, at: int) -> Tensor:
    """A float16 in each block (N, 1)."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def _shifted(packed: Tensor, shifts: tuple[int, ...], bits: int) -> Tensor:
    """Bytes (N, P, B) → the integers of so many bits at each shift (N, P · shifts, B)."""
    by = torch.tensor(shifts, dtype=torch.uint8).view(1, 1, -1, 1)
    return (packed[:, :, None] >> by & (1 << bits) - 1).flatten(1, 2)


def _nibbles(blocks: Tensor, at: int, size: int, part: int) -> Tensor:
    """Four-bit integers (N, P, part): of each `part` bytes first all low halves, then all high ones."""
    return _shifted(torch.unflatten(blocks[:, at : at + size], 1, (-1, part)), (0, 4), 4)


def _fifth_bits(blocks: Tensor, at: int) -> Tensor:
    """The 32 bits of four bytes (N, 2, 16)."""
    bytes_ = blocks[:, at : at + 4, None] >> torch.arange(8, dtype=torch.uint8) & 1
    return bytes_.view(-1, 2, 16)


def _q4_0(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * (_nibbles(blocks, 2, 16, 16).flatten(1).float() - 8)


def _q4_1(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * _nibbles(blocks, 4, 16, 16).flatten(1).float() + _half(blocks, 2)


def _q5_0(blocks: Tensor) -> Tensor:
    q = _nibbles(blocks, 6, 16, 16) | _fifth_bits(blocks, 2) << 4
    return _half(blocks, 0) * (q.flatten(1).float() - 16)


def _q5_1(blocks: Tensor) -> Tensor:
    q = _nibbles(blocks, 8, 16, 16) | _fifth_bits(blocks, 4) << 4
    return _half(blocks, 0) * q.flatten(1).float() + _half(blocks, 2)


def _q8_0(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * blocks[:, 2:].view(torch.int8).float()


def _iq4_nl(blocks: Tensor) -> Tensor:
    table = torch.tensor(_NON_LINEAR, dtype=torch.float32)
    return _half(blocks, 0) * table[_nibbles(blocks, 2, 16, 16).flatten(1).int()]


def _q2_k(blocks: Tensor) -> Tensor:
    """Sixteen parts of 16, each with four bits of scale and four of what is subtracted."""
    q = _shifted(torch.unflatten(blocks[:, 16:80], 1, (2, 32)), (0, 2, 4, 6), 2).reshape(-1, 16, 16).float()
    scales = _half(blocks, 80) * (blocks[:, :16] & 15).float()
    less = _half(blocks, 82) * (blocks[:, :16] >> 4).float()
    return (scales[..., None] * q - less[..., None]).flatten(1)


def _q3_k(blocks: Tensor) -> Tensor:
    """Sixteen parts of 16; a bit of each integer stands apart, and says that 4 is not to be subtracted."""
    low = _shifted(torch.unflatten(blocks[:, 32:96], 1, (2, 32)), (0, 2, 4, 6), 2)
    high = _shifted(blocks[:, None, :32], tuple(range(8)), 1)
    q = (low.int() - 4 * (1 - high.int())).reshape(-1, 16, 16)
    packed = blocks[:, 96:108]
    four = _shifted(packed[:, None, :8], (0, 4), 4).reshape(-1, 16)
    two = _shifted(packed[:, None, 8:], (0, 2, 4, 6), 2).reshape(-1, 16)
    scales = _half(blocks, 108) * ((four | two << 4).int() - 32).float()
    return (scales[..., None] * q.float()).flatten(1)


def _scales_k(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Twelve bytes → the six-bit scales of eight parts, and what is subtracted of each (N, 8)."""
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = torch.cat((first & 63, third & 15 | first >> 6 << 4), 1)
    return scales.float(), torch.cat((second & 63, third >> 4 | second >> 6 << 4), 1).float()


def _of_eight(blocks: Tensor, q: Tensor) -> Tensor:
    """Q4_K's and Q5_K's integers (N, 8, 32), times their scales."""
    scales, less = _scales_k(blocks[:, 4:16])
    scales, less = _half(blocks, 0) * scales, _half(blocks, 2) * less
    return (scales[..., None] * q.float() - less[..., None]).flatten(1)


def _q4_k(blocks: Tensor) -> Tensor:
    return _of_eight(blocks, _nibbles(blocks, 16, 128, 32))


def _q5_k(blocks: Tensor) -> Tensor:
    high = _shifted(blocks[:, None, 16:48], tuple(range(8)), 1)
    return _of_eight(blocks, _nibbles(blocks, 48, 128, 32) | high << 4)


def _q6_k(blocks: Tensor) -> Tensor:
    """Sixteen parts of 16 with scales of a byte; four bits of each integer, and two that stand apart."""
    low = _nibbles(blocks, 0, 128, 64).reshape(-1, 8, 32)
    high = _shifted(torch.unflatten(blocks[:, 128:192], 1, (2, 32)), (0, 2, 4, 6), 2)
    q = ((low | high << 4).int() - 32).reshape(-1, 16, 16)
    scales = _half(blocks, 208) * blocks[:, 192:208].contiguous().view(torch.int8).float()
    return (scales[..., None] * q.float()).flatten(1)


BLOCKS: dict[str, Callable[[Tensor], Tensor]] = {
    "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q8_0": _q8_0, "IQ4_NL": _iq4_nl, "Q2_K": _q2_k,
    "Q3_K": _q3_k, "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k,
}  # fmt: skip
