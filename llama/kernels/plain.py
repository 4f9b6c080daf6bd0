"""Products with weights as they are stored, on a CPU: see plain.c."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from llama.kernels.dispatch import cpu_library
from llama.kernels.library import DTYPE_CODES, STORED_CODES, VARIANTS, variant

WIDENED_AT_ONCE = 1 << 22  # weights, 16 MB in float32


def most_rows() -> int:
    """How many rows our kernels multiply at once, unless results are to be the same for any number: for more, PyTorch's
    products may be faster."""
    return 4 if VARIANTS[variant()] == "portable" else 16


def can_multiply(weight: Tensor, dtype: torch.dtype, rows: int, invariant: bool = False) -> bool:
    """Whether our kernels multiply these weights (R, C) with so many rows of `dtype`; any number where `invariant`."""
    if weight.device.type != "cpu" or weight.dim() != 2:
        return False  # first: this is asked before each product, on a GPU too
    known = weight.dtype == dtype or (dtype == torch.float32 and weight.dtype in STORED_CODES)
    return known and cpu_library(torch.empty(0, dtype=dtype)) is not None and (invariant or rows <= most_rows())


def held_dtype(stored: torch.dtype, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which matrices are held for rows of `dtype`: 16 bits that are stored stay, where our kernels read
    them beside float32."""
    if device.type != "cpu" or stored.itemsize >= dtype.itemsize:
        return dtype
    return stored if can_multiply(torch.empty((0, 1), dtype=stored), dtype, 1) else dtype


def widened_product(x: Tensor, weight: Tensor) -> Tensor:
    """The same for any number of rows, by PyTorch, with some of the weights in x's dtype at a time."""
    parts = torch.split(weight, max(1, WIDENED_AT_ONCE // weight.shape[1]))
    return torch.cat([linear(x, part.to(x.dtype)) for part in parts], 1)


def table_of(parts: Sequence[Tensor]) -> Tensor:
    """Matrices of whole rows, which must stay where they are, as one for our kernels: kernels.h's Parts, (n, 2)."""
    assert all(part.is_contiguous() and part.dtype == parts[0].dtype for part in parts)
    return torch.tensor([(part.data_ptr(), len(part)) for part in parts])


def plain_product(x: Tensor, *parts: Tensor) -> Tensor:
    """x (N, C) · W (R, C)ᵀ → (N, R), where `can_multiply` says so; W in parts of whole rows, one below the other."""
    library = cpu_library(x)
    assert library is not None
    x, (n, inputs), table = x.contiguous(), x.shape, table_of(parts)
    y = torch.empty((n, sum(map(len, parts))), dtype=x.dtype)
    dtype, code, threads = DTYPE_CODES[x.dtype], STORED_CODES[parts[0].dtype], torch.get_num_threads()
    workspace = torch.empty(library.llama_workspace(n, inputs, dtype, code, variant(), threads), dtype=torch.uint8)
    library.llama_product(
        x.data_ptr(), table.data_ptr(), 0, y.data_ptr(), workspace.data_ptr(), n, inputs, y.shape[1], dtype, code,
        variant(), threads,
    )  # fmt: skip
    return y
