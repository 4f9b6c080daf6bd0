"""Matrices → int8 or int4 with a float16 scale for each group of a row, and back: plain functions of tensors.

Symmetric: weight ≈ scale · q. Groups of 32. int8: q in −127 … 127. int4: q in −8 … 7, stored as q + 8 in
nibbles: byte j of a group's 16 holds element j in its low and element j + 16 in its high four bits.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from llama.quantization.formats import FORMATS

ROWS = 1 << 22  # weights quantised at once, so that what is needed beside the result stays small
SMALLEST = 2.0**-24  # of the float16 numbers above 0
# Of the range of an int4 group, the part that its scale may cover: clipping one weight can place the others better.
STRETCHES = (1.0, 0.96, 0.92, 0.88, 0.84, 0.8)


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(R, C) → integers (R, C) int8 and scales (R, C / 32) float16."""
    return _by_rows(weight, _int8_rows)


def quantize_int4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(R, C) → packed integers (R, C / 2) uint8 and scales (R, C / 32) float16."""
    return _by_rows(weight, _int4_rows)


QUANTIZE = {"int8": quantize_int8, "int4": quantize_int4}


def dequantize_int8(q: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Integers (R, C) and scales (R, C / 32) → (R, C)."""
    groups = torch.unflatten(q, 1, (scales.shape[1], -1)).float()
    return (groups * scales.float()[..., None]).flatten(1).to(dtype)


def dequantize_int4(packed: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Packed integers (R, C / 2) and scales (R, C / 32) → (R, C)."""
    pairs = torch.unflatten(packed, 1, (scales.shape[1], -1))
    groups = torch.cat((pairs & 15, pairs >> 4), dim=-1).float() - 8
    return (groups * scales.float()[..., None]).flatten(1).to(dtype)


DEQUANTIZE = {"int8": dequantize_int8, "int4": dequantize_int4}


def _by_rows(weight: Tensor, quantize: Callable[[Tensor], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Quantise some rows at a time, into what is allocated once."""
    parts = [quantize(rows) for rows in torch.split(weight, max(1, ROWS // weight.shape[1]))]
    return torch.cat([q for q, _ in parts]), torch.cat([scales for _, scales in parts])


def _int8_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    groups = torch.unflatten(weight.float(), 1, (-1, FORMATS["int8"].group))
    scales = _as_stored(groups.abs().amax(-1) / 127)
    q = (groups * scales.float().reciprocal()[..., None]).round_().clamp_(-127, 127)
    return q.to(torch.int8).flatten(1), scales


def _int4_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    groups = torch.unflatten(weight.float(), 1, (-1, FORMATS["int4"].group))
    high, low = groups.amax(-1), groups.amin(-1)
    largest = torch.where(-low > high, low, high)
    integers, scales, least = _rounded(groups, largest, STRETCHES[0])
    for stretch in STRETCHES[1:]:
        q, other, error = _rounded(groups, largest, stretch)
        better = error < least
        integers = torch.where(better[..., None], q, integers)
        scales, least = torch.where(better, other, scales), torch.where(better, error, least)
    low, high = (integers + 8).to(torch.uint8).chunk(2, dim=-1)
    return (low | high << 4).flatten(1), scales


def _rounded(groups: Tensor, largest: Tensor, stretch: float) -> tuple[Tensor, Tensor, Tensor]:
    """Groups in int4 whose scale covers that part of each one's `largest`: integers, scales, squared errors."""
    scales = _as_stored(largest * (-stretch / 8))
    q = (groups * scales.float().reciprocal()[..., None]).round_().clamp_(-8, 7)
    return q, scales, (q * scales.float()[..., None] - groups).square_().sum(-1)


def _as_stored(scales: Tensor) -> Tensor:
    """Scales in float16; never 0, nor beyond what float16 holds; NaN where a weight was not finite."""
    small = scales.abs() < SMALLEST
    return (torch.where(small, SMALLEST, scales).clamp_(-65504, 65504) + scales * 0).half()
