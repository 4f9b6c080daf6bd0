"""Whether results can be the same to the bit whatever shares a step, and whether they are without being asked to.

Our kernels for CPUs compute a row in one order of operations, whatever is beside it. PyTorch's do not, nor do AMX's
tiles (see tiles.c): they are used where they are faster, unless `invariant` results are wanted.
"""

import torch

from llama.kernels.dispatch import why_not
from llama.kernels.library import DTYPE_CODES, VARIANTS, variant


def why_not_invariant(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a model of that dtype cannot have invariant results on that device, in a few words; None where it can."""
    if device.type != "cpu":
        return f"on {device} they depend on what shares a step"
    if dtype not in DTYPE_CODES:
        return f"our kernels do not compute in {str(dtype).removeprefix('torch.')}"
    return why_not(device)


def costs_nothing(dtype: torch.dtype) -> bool:
    """Whether our kernels are as fast as what they stand for, so that results are invariant without being asked to.

    Figures: benchmarks/RESULTS.md, batch_invariant. PyTorch has no fast products in bfloat16 where a processor has AVX2
    and no more.
    """
    name = VARIANTS[variant()]
    return name in ("avx512", "avx512bf16") or name == ("amx" if dtype == torch.float32 else "avx2")
