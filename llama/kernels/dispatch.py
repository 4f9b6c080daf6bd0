"""Which of our kernels can compute with a tensor, the CPU library or Triton's for CUDA, and why a device has none."""

import ctypes
import functools
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor

from llama.device import AMPERE, compute_capability
from llama.kernels.library import DTYPE_CODES, load

OLDEST_TRITON = (3, 5)  # PyTorch 2.9 has it
OLDEST_GPU = AMPERE
_HALF = (torch.bfloat16, torch.float16)


class GPUKernels(Protocol):
    """What gpu.py has, for those who may not import it: it needs Triton."""

    MOST_ROWS: int

    def product(self, x: Tensor, weight: Tensor, scales: Tensor, outputs: int) -> Tensor: ...
    def dequantize(self, weight: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor: ...
    def add_norm(
        self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]: ...  # fmt: skip
    def silu_and_mul(self, both: Tensor) -> Tensor: ...
    def rope_and_store(
        self, heads: Tensor, freqs_cis: Tensor, keys: Tensor, values: Tensor, rows: Tensor, n_heads: int
    ) -> Tensor: ...
    def attend(self, q: Tensor, keys: Tensor, values: Tensor, slots: Tensor, positions: Tensor) -> Tensor: ...


def cpu_library(x: Tensor) -> ctypes.CDLL | None:
    """The library, where it can compute with x: on a CPU, in bfloat16 or float32, and not for torch.compile."""
    if x.device.type != "cpu" or x.dtype not in DTYPE_CODES or torch.compiler.is_compiling():
        return None
    return load()[0]


def gpu_kernels(x: Tensor) -> GPUKernels | None:
    """gpu.py, where it can compute with x: in 16 bits, on CUDA with Triton, and not for torch.compile."""
    if x.device.type != "cuda" or x.dtype not in _HALF or torch.compiler.is_compiling():
        return None
    return load_gpu(x.device)


def gpu_step(rows: int, model: Any, cache: Any) -> Callable[[Any, Tensor, Any, Any], Tensor] | None:
    """gpu_step.py's `run`, where it can compute a decode step of so many rows."""
    if gpu_kernels(cache.keys[0].new_empty(0, dtype=model.dtype)) is None:
        return None
    from llama.kernels import gpu_step

    return gpu_step.run if gpu_step.can_fuse_on_gpu(rows, model) else None


def gpu_sampling(device: torch.device) -> ModuleType | None:
    """gpu_sampling.py, where it can draw: on CUDA with Triton."""
    if device.type != "cuda" or no_gpu(device):
        return None
    from llama.kernels import gpu_sampling

    return gpu_sampling


def why_not(device: torch.device) -> str | None:
    """Why this device has no kernels of ours, in one line; None where it has."""
    missing = no_gpu(device) if device.type == "cuda" else None if load()[0] or device.type != "cpu" else load()[1]
    if missing is None:
        return None
    return f"no compiled kernels ({missing}): PyTorch's operators are used, which are slower"


@functools.cache
def no_gpu(device: torch.device) -> str | None:
    """Why gpu.py cannot be used on a CUDA device; None where it can."""
    if missing := no_triton():
        return missing
    own = compute_capability(device)
    if own < OLDEST_GPU:
        return f"compute capability {own[0]}.{own[1]} is less than {OLDEST_GPU[0]}.{OLDEST_GPU[1]}"
    try:  # Triton needs a C compiler, Python's headers and more: only a launch shows whether all of it is there
        _gpu().silu_and_mul(torch.zeros(1, 32, dtype=torch.bfloat16, device=device))
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


@functools.cache
def no_triton() -> str | None:
    """Why gpu.py cannot be imported; None where it can."""
    if os.environ.get("LLAMA_KERNELS") == "none":
        return "LLAMA_KERNELS=none"
    try:
        import triton
    except ImportError:
        return "Triton is not installed"
    if tuple(map(int, triton.__version__.split(".")[:2])) < OLDEST_TRITON:
        return f"Triton {triton.__version__} is older than {'.'.join(map(str, OLDEST_TRITON))}"
    return None


def load_gpu(device: torch.device) -> GPUKernels | None:
    """gpu.py, where it can be used on this CUDA device."""
    return None if no_gpu(device) else _gpu()


def _gpu() -> GPUKernels:
    from llama.kernels import gpu

    return gpu
