"""Products with quantised weights: our kernels for few rows, PyTorch's product on dequantised blocks for many."""

import torch
from torch import Tensor
from torch.nn.functional import linear

from llama.kernels.library import DTYPES, usable, variant
from llama.quantization import dequantize_int4, dequantize_int8

BLOCK = 1 << 22  # weights dequantised at once, 8 MB in bfloat16: fewer take longer, and more leave the cache
_INT8, _INT4 = 0, 1


def product_int8(x: Tensor, q: Tensor, scales: Tensor) -> Tensor:
    """x (N, C) · (R, C)ᵀ → (N, R), from integers (R, C) int8 and scales (R, C / 32) float16."""
    return _product(x, q, scales, _INT8)


def product_int4(x: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
    """x (N, C) · (R, C)ᵀ → (N, R), from packed integers (R, C / 2) uint8 and scales (R, C / 32) float16."""
    return _product(x, packed, scales, _INT4)


def _product(x: Tensor, q: Tensor, scales: Tensor, form: int) -> Tensor:
    n, inputs = x.shape
    library = usable(x)
    if library is None or n > library.llama_most_rows(DTYPES[x.dtype], variant()):
        return _by_blocks(x, q, scales, form)
    x, outputs = x.contiguous(), q.shape[0]
    y = torch.empty((n, outputs), dtype=x.dtype)
    workspace = torch.empty(library.llama_workspace(n, inputs), dtype=torch.uint8)
    library.llama_product(
        x.data_ptr(), q.data_ptr(), scales.data_ptr(), y.data_ptr(), workspace.data_ptr(), n, inputs, outputs,
        DTYPES[x.dtype], form, variant(), torch.get_num_threads(),
    )  # fmt: skip
    return y


def _by_blocks(x: Tensor, q: Tensor, scales: Tensor, form: int) -> Tensor:
    """The product by PyTorch, with some rows of the weights dequantised at a time."""
    rows = max(1, BLOCK // x.shape[1])
    parts = [linear(x, dequantize(a, b, x.dtype, form)) for a, b in zip(q.split(rows), scales.split(rows), strict=True)]
    return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]


def dequantize(q: Tensor, scales: Tensor, dtype: torch.dtype, form: int) -> Tensor:
    """Contiguous integers and scales → weights (R, C) in `dtype`."""
    weights = torch.empty((q.shape[0], scales.shape[1] * 32), dtype=dtype, device=q.device)
    library = usable(weights)
    if library is None:
        return (dequantize_int8 if form == _INT8 else dequantize_int4)(q, scales, dtype)
    library.llama_dequantize(
        q.data_ptr(), scales.data_ptr(), weights.data_ptr(), weights.shape[1], q.shape[0], DTYPES[dtype], form,
        variant(), torch.get_num_threads(),
    )  # fmt: skip
    return weights
