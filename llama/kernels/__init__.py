"""Products with quantised weights on a CPU: our own kernels for few rows, PyTorch's on dequantised blocks for many.

The C library is compiled when the package is installed, if a compiler is there; without it everything runs on PyTorch's
operators. `why_not()` says why the kernels are not used.
"""

import ctypes
import functools
import os
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import linear

from llama.quantization import dequantize_int4, dequantize_int8

VARIANTS = ("portable", "avx2", "avx512", "amx")
BLOCK = 1 << 22  # weights dequantised at once, 8 MB in bfloat16: fewer take longer, and more leave the cache
_DTYPES = {torch.float32: 0, torch.bfloat16: 1}
_INT8, _INT4 = 0, 1


def product_int8(x: Tensor, q: Tensor, scales: Tensor) -> Tensor:
    """x (N, C) · (R, C)ᵀ → (N, R), from integers (R, C) int8 and scales (R, C / 32) float16."""
    return _product(x, q, scales, _INT8)


def product_int4(x: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
    """x (N, C) · (R, C)ᵀ → (N, R), from packed integers (R, C / 2) uint8 and scales (R, C / 32) float16."""
    return _product(x, packed, scales, _INT4)


def _product(x: Tensor, q: Tensor, scales: Tensor, form: int) -> Tensor:
    n, inputs = x.shape
    library = _library() if x.device.type == "cpu" and x.dtype in _DTYPES else None
    if library is None or n > library.llama_most_rows(_DTYPES[x.dtype], _variant()):
        return _by_blocks(x, q, scales, form)
    x, outputs = x.contiguous(), q.shape[0]
    y = torch.empty((n, outputs), dtype=x.dtype)
    workspace = torch.empty(library.llama_workspace(n, inputs), dtype=torch.uint8)
    library.llama_product(
        x.data_ptr(), q.data_ptr(), scales.data_ptr(), y.data_ptr(), workspace.data_ptr(), n, inputs, outputs,
        _DTYPES[x.dtype], form, _variant(), torch.get_num_threads(),
    )  # fmt: skip
    return y


def _by_blocks(x: Tensor, q: Tensor, scales: Tensor, form: int) -> Tensor:
    """The product by PyTorch, with some rows of the weights dequantised at a time."""
    rows = max(1, BLOCK // x.shape[1])
    parts = [linear(x, dequantize(a, b, x.dtype, form)) for a, b in zip(q.split(rows), scales.split(rows), strict=True)]
    return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]


def dequantize(q: Tensor, scales: Tensor, dtype: torch.dtype, form: int) -> Tensor:
    """Contiguous integers and scales → weights (R, C) in `dtype`."""
    library = _library() if q.device.type == "cpu" and dtype in _DTYPES else None
    if library is None:
        return (dequantize_int8 if form == _INT8 else dequantize_int4)(q, scales, dtype)
    weights = torch.empty((q.shape[0], scales.shape[1] * 32), dtype=dtype)
    library.llama_dequantize(
        q.data_ptr(), scales.data_ptr(), weights.data_ptr(), weights.shape[1], q.shape[0], _DTYPES[dtype], form,
        _variant(), torch.get_num_threads(),
    )  # fmt: skip
    return weights


def available() -> bool:
    """Whether the compiled kernels are there."""
    return _library() is not None


def why_not() -> str | None:
    """Why the compiled kernels are not used, in one line; None where they are."""
    return (
        None if available() else f"no compiled kernels ({_load()[1]}): PyTorch's operators are used, which are slower"
    )


@functools.cache
def _variant() -> int:
    """The number of the best variant for this processor, or of a lesser one that LLAMA_KERNELS names."""
    named = os.environ.get("LLAMA_KERNELS")
    return min(VARIANTS.index(named), _best()) if named in VARIANTS else _best()


def _best() -> int:
    return _load()[0].llama_variant()


def _library() -> ctypes.CDLL | None:
    return _load()[0]


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    """(The library, why it is not there)."""
    if os.environ.get("LLAMA_KERNELS") == "none":
        return None, "LLAMA_KERNELS=none"
    found = sorted(Path(__file__).parent.glob("quantized.*so")) + sorted(Path(__file__).parent.glob("quantized*.pyd"))
    if not found:
        return None, "no compiler was there when the package was installed"
    try:
        _share_threads()
        library = ctypes.CDLL(str(found[0]))
    except OSError as error:
        return None, str(error)
    pointer, long, integer = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    library.llama_workspace.restype = library.llama_most_rows.restype = long
    library.llama_workspace.argtypes = [long, long]
    library.llama_most_rows.argtypes = [integer, integer]
    library.llama_product.argtypes = [pointer] * 5 + [long] * 3 + [integer] * 4
    library.llama_dequantize.argtypes = [pointer] * 3 + [long] * 2 + [integer] * 4
    library.llama_product.restype = library.llama_dequantize.restype = None
    return library, ""


def _share_threads() -> None:
    """Give the library PyTorch's own OpenMP: a second pool of threads would fight with it for the cores."""
    folder = Path(torch.__file__).parent / "lib"
    for path in (*folder.glob("libgomp*"), *folder.glob("libomp*"), *folder.glob("../../torch.libs/libgomp*")):
        ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
