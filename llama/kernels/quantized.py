"""Quantising, and products with quantised and packed weights: by our kernels, or PyTorch's operators without them.

On a CPU our kernels read packed weights, 16 rows side by side (see quantized.c); elsewhere weights stay as stored.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from llama.kernels.dispatch import DTYPES, VARIANTS, gpu_kernels, load, usable, variant
from llama.quantization.formats import FORMATS
from llama.quantization.quantize import DEQUANTIZE, QUANTIZE

LANES, RUN = 16, 32  # rows of a block; inputs of a run
BLOCK = 1 << 22  # weights dequantised at once, 8 MB in bfloat16: fewer take longer, and more leave the cache
NUMBERS = {torch.int8: 0, torch.uint8: 1, torch.bfloat16: 2}  # of weights: kernels.h's INT8, INT4, PLAIN


def quantize(weight: Tensor, form: str) -> tuple[Tensor, Tensor]:
    """Weights (R, C) → integers and scales as they are stored; see quantization.py for what each format is."""
    library = usable(weight)
    if library is None:
        return QUANTIZE[form](weight)
    weight = weight.contiguous()
    shape, scales_shape = FORMATS[form].shapes(*weight.shape)
    q = torch.empty(shape, dtype=getattr(torch, FORMATS[form].dtype))
    scales = torch.empty(scales_shape, dtype=torch.float16)
    library.llama_quantize(
        weight.data_ptr(), q.data_ptr(), scales.data_ptr(), scales.numel(), DTYPES[weight.dtype], NUMBERS[q.dtype],
        variant(), torch.get_num_threads(),
    )  # fmt: skip
    return q, scales


def can_pack(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether our kernels can multiply these weights (R, C), as they are stored, with rows of `dtype`.

    bfloat16 weights are packed only where the processor has tiles for them (AMX), and so for rows of bfloat16.
    """
    if usable(torch.empty(0, dtype=dtype, device=weight.device)) is None:
        return False
    if weight.dtype != torch.bfloat16:
        return weight.dtype in NUMBERS
    return dtype == torch.bfloat16 and VARIANTS[variant()] == "amx" and weight.shape[1] % RUN == 0


def pack(weight: Tensor, scales: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Weights and scales as they are stored → as our kernels read them."""
    return pack_rows([weight]), None if scales is None else pack_scales(scales)


def pack_scales(scales: Tensor) -> Tensor:
    """(R, C / 32) → (R / 16, C / 32, 16), the last block padded with zeros."""
    padded = pad(scales, (0, 0, 0, -scales.shape[0] % LANES))
    return padded.unflatten(0, (-1, LANES)).transpose(1, 2).contiguous()


def pack_rows(parts: Sequence[Tensor]) -> Tensor:
    """Weights as they are stored, parts of whole rows one below the other → packed, the last block padded with zeros.

    int8 (R, C) → (R / 16, C / 32, 8, 64); int4 (R, C / 2) uint8 → (R / 16, C / 32, 4, 64); bfloat16 (R, C) →
    (R / 16, C / 32, 16, 32). All parts but the last have a multiple of 16 rows.
    """
    library, first = load()[0], parts[0]
    assert library is not None and not any(len(part) % LANES for part in parts[:-1])
    blocks, size = -(-sum(map(len, parts)) // LANES), first.element_size()
    fours = RUN * size // (8 if first.dtype == torch.uint8 else 4)
    runs = first.shape[1] * size // 4 // fours
    packed = torch.empty((blocks, runs, fours, LANES * 4 // size), dtype=first.dtype)
    library.llama_use_huge_pages(packed.data_ptr(), packed.nbytes)
    to = packed.data_ptr()
    for part in parts:
        assert part.is_contiguous() and part.shape[1] == first.shape[1]
        library.llama_pack(part.data_ptr(), to, len(part), runs, fours, torch.get_num_threads())
        to += part.nbytes
    return packed


def is_packed(weight: Tensor) -> bool:
    return weight.dim() == 4


def packed_product(x: Tensor, weight: Tensor, scales: Tensor | None, outputs: int) -> Tensor:
    """x (N, C) · W (outputs, C)ᵀ → (N, outputs), from quantised weights or packed ones."""
    if torch.compiler.is_compiling():
        return torch.ops.llama.packed_product(x, weight, scales, outputs)
    n, inputs = x.shape
    if gpu := gpu_kernels(x):
        few = n <= gpu.MOST_ROWS
        return gpu.product(x, weight, scales, outputs) if few else linear(x, gpu.dequantize(weight, scales, x.dtype))
    library = usable(x)
    if not is_packed(weight) or library is None or n > library.llama_most_rows(DTYPES[x.dtype], variant()):
        return _by_blocks(x, weight, scales, outputs)
    x = x.contiguous()
    y = torch.empty((n, outputs), dtype=x.dtype)
    dtype, form, threads = DTYPES[x.dtype], NUMBERS[weight.dtype], torch.get_num_threads()
    workspace = torch.empty(library.llama_workspace(n, inputs, dtype, form, variant(), threads), dtype=torch.uint8)
    library.llama_product(
        x.data_ptr(), weight.data_ptr(), 0 if scales is None else scales.data_ptr(), y.data_ptr(), workspace.data_ptr(),
        n, inputs, outputs, dtype, form, variant(), threads,
    )  # fmt: skip
    return y


def _by_blocks(x: Tensor, q: Tensor, scales: Tensor, outputs: int) -> Tensor:
    """The product by PyTorch, with some rows of the weights dequantised at a time."""
    step = max(1, BLOCK // x.shape[1] // LANES) * LANES  # rows of W
    entries = step // LANES if is_packed(q) else step
    y = torch.empty((x.shape[0], outputs), dtype=x.dtype, device=x.device)
    for first, part, own in zip(range(0, outputs, step), q.split(entries), scales.split(entries), strict=True):
        rows = min(step, outputs - first)
        y[:, first : first + rows] = linear(x, dequantize(part, own, rows, x.dtype))
    return y


def dequantize(q: Tensor, scales: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """Contiguous integers and scales, packed or as they are stored → weights (rows, C) in `dtype`."""
    if not is_packed(q):
        return DEQUANTIZE["int8" if q.dtype == torch.int8 else "int4"](q, scales, dtype)
    weights = torch.empty((rows, scales.shape[1] * 32), dtype=dtype)
    library = usable(weights)
    assert library is not None  # packed weights are for our kernels
    library.llama_dequantize(
        q.data_ptr(), scales.data_ptr(), weights.data_ptr(), weights.shape[1], rows, DTYPES[dtype],
        NUMBERS[q.dtype], variant(), torch.get_num_threads(),
    )  # fmt: skip
    return weights
