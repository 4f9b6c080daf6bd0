"""Quantising, and products with quantised and packed weights: by our kernels, or PyTorch's operators without them.

On a CPU our kernels read packed weights, 16 rows side by side (see quantized.c); elsewhere weights stay as stored.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from llama.kernels.dispatch import cpu_library, gpu_kernels
from llama.kernels.library import DTYPE_CODES, FORMAT_CODES, VARIANTS, load, on_huge_pages, variant, without_tiles
from llama.quantization.formats import FORMATS
from llama.quantization.quantize import DEQUANTIZE, QUANTIZE

BLOCK_ROWS, GROUP = 16, 32  # rows of a block; inputs that share a scale: both as in kernels.h
DEQUANTIZED_AT_ONCE = 1 << 22  # weights, 8 MB in bfloat16: fewer take longer, and more do not fit the cache


def quantize(weight: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Weights (R, C) → integers and scales as they are stored; quantization/formats.py says what each format is."""
    library = cpu_library(weight)
    if library is None:
        return QUANTIZE[name](weight)
    weight = weight.contiguous()
    shape, scales_shape = FORMATS[name].shapes(*weight.shape)
    q = torch.empty(shape, dtype=getattr(torch, FORMATS[name].dtype))
    scales = torch.empty(scales_shape, dtype=torch.float16)
    library.llama_quantize(
        weight.data_ptr(), q.data_ptr(), scales.data_ptr(), scales.numel(), DTYPE_CODES[weight.dtype],
        FORMAT_CODES[q.dtype], variant(), torch.get_num_threads(),
    )  # fmt: skip
    return q, scales


def can_pack(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether our kernels can multiply these weights (R, C), as they are stored, with rows of `dtype`.

    bfloat16 weights are packed only where the processor has tiles for them (AMX), and so for rows of bfloat16.
    """
    if cpu_library(torch.empty(0, dtype=dtype, device=weight.device)) is None:
        return False
    if weight.dtype != torch.bfloat16:
        return weight.dtype in FORMAT_CODES
    return dtype == torch.bfloat16 and VARIANTS[variant()] == "amx" and weight.shape[1] % GROUP == 0


def pack(weight: Tensor, scales: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Weights and scales as they are stored → as our kernels read them."""
    return pack_rows([weight]), None if scales is None else pack_scales(scales)


def pack_scales(scales: Tensor) -> Tensor:
    """(R, C / 32) → (R / 16, C / 32, 16), the last block padded with zeros."""
    padded = pad(scales, (0, 0, 0, -scales.shape[0] % BLOCK_ROWS))
    return padded.reshape(-1, BLOCK_ROWS, scales.shape[1]).transpose(1, 2).contiguous()


def pack_rows(parts: Sequence[Tensor]) -> Tensor:
    """Weights as they are stored, parts of whole rows one below the other → packed, the last block padded with zeros.

    int8 (R, C) → (R / 16, C / 32, 8, 64); int4 (R, C / 2) uint8 → (R / 16, C / 32, 4, 64); bfloat16 (R, C) →
    (R / 16, C / 32, 16, 32). All parts but the last have a multiple of 16 rows.
    """
    library, first = load()[0], parts[0]
    assert library is not None and not any(len(part) % BLOCK_ROWS for part in parts[:-1])
    blocks, size = -(-sum(map(len, parts)) // BLOCK_ROWS), first.element_size()
    fours = GROUP * size // (8 if first.dtype == torch.uint8 else 4)
    groups = first.shape[1] * size // 4 // fours
    packed = on_huge_pages(torch.empty((blocks, groups, fours, BLOCK_ROWS * 4 // size), dtype=first.dtype))
    to = packed.data_ptr()
    for part in parts:
        assert part.is_contiguous() and part.shape[1] == first.shape[1]
        library.llama_pack(part.data_ptr(), to, len(part), groups, fours, torch.get_num_threads())
        to += part.nbytes
    return packed


def is_packed(weight: Tensor) -> bool:
    return weight.dim() == 4


def packed_product(
    x: Tensor, weight: Tensor, scales: Tensor | None, outputs: int, invariant: bool = False
) -> Tensor:  # fmt: skip
    """x (N, C) · W (outputs, C)ᵀ → (N, outputs), from quantised weights or packed ones. `invariant`: see linear.py."""
    if torch.compiler.is_compiling():
        y: Tensor = torch.ops.llama.packed_product(x, weight, scales, outputs)
        return y
    n, inputs = x.shape
    if gpu := gpu_kernels(x):
        assert scales is not None  # only a CPU has packed weights that are not quantised
        few = n <= gpu.MOST_ROWS
        return gpu.product(x, weight, scales, outputs) if few else linear(x, gpu.dequantize(weight, scales, x.dtype))
    library, most = cpu_library(x), variant()
    if invariant:
        most = without_tiles(most)
    elif library and n > library.llama_most_rows(DTYPE_CODES[x.dtype], most):
        library = None
    if not is_packed(weight) or library is None:
        assert scales is not None  # the library multiplies any number of rows with packed bfloat16 weights
        return _by_blocks(x, weight, scales, outputs)
    x = x.contiguous()
    y = torch.empty((n, outputs), dtype=x.dtype)
    dtype, code, threads = DTYPE_CODES[x.dtype], FORMAT_CODES[weight.dtype], torch.get_num_threads()
    workspace = torch.empty(library.llama_workspace(n, inputs, dtype, code, most, threads), dtype=torch.uint8)
    library.llama_product(
        x.data_ptr(), weight.data_ptr(), 0 if scales is None else scales.data_ptr(), y.data_ptr(), workspace.data_ptr(),
        n, inputs, outputs, dtype, code, most, threads,
    )  # fmt: skip
    return y


def _by_blocks(x: Tensor, q: Tensor, scales: Tensor, outputs: int) -> Tensor:
    """The product by PyTorch, with some rows of the weights dequantised at a time."""
    step = max(1, DEQUANTIZED_AT_ONCE // x.shape[1] // BLOCK_ROWS) * BLOCK_ROWS  # rows of W
    entries = step // BLOCK_ROWS if is_packed(q) else step
    y = torch.empty((x.shape[0], outputs), dtype=x.dtype, device=x.device)
    parts = zip(torch.split(q, entries), torch.split(scales, entries), strict=True)
    for first, (part, own) in zip(range(0, outputs, step), parts, strict=True):
        rows = min(step, outputs - first)
        y[:, first : first + rows] = linear(x, dequantize(part, own, rows, x.dtype))
    return y


def dequantize(q: Tensor, scales: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """Contiguous integers and scales, packed or as they are stored → weights (rows, C) in `dtype`."""
    if not is_packed(q):
        return DEQUANTIZE["int8" if q.dtype == torch.int8 else "int4"](q, scales, dtype)
    weights = torch.empty((rows, scales.shape[1] * 32), dtype=dtype)
    library = cpu_library(weights)
    assert library is not None  # packed weights are for our kernels
    library.llama_dequantize(
        q.data_ptr(), scales.data_ptr(), weights.data_ptr(), weights.shape[1], rows, DTYPE_CODES[dtype],
        FORMAT_CODES[q.dtype], variant(), torch.get_num_threads(),
    )  # fmt: skip
    return weights
