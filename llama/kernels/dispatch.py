"""The kernels of this machine: where they are, which variant of them it runs, and why they may be missing."""

import ctypes
import functools
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from llama.device import AMPERE, compute_capability

VARIANTS = ("portable", "avx2", "avx512", "amx")
DTYPES = {torch.float32: 0, torch.bfloat16: 1}
OLDEST_TRITON = (3, 5)  # PyTorch 2.9 has it
OLDEST_GPU = AMPERE
_HALF = (torch.bfloat16, torch.float16)
_POINTER, _LONG, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_ARGUMENTS = {
    "llama_workspace": [_LONG] * 2 + [_INT] * 4,
    "llama_most_rows": [_INT] * 2,
    "llama_quantize": [_POINTER] * 3 + [_LONG] + [_INT] * 4,
    "llama_use_huge_pages": [_POINTER, _LONG],
    "llama_pack": [_POINTER] * 2 + [_LONG] * 3 + [_INT],
    "llama_product": [_POINTER] * 5 + [_LONG] * 3 + [_INT] * 4,
    "llama_dequantize": [_POINTER] * 3 + [_LONG] * 2 + [_INT] * 4,
    "llama_rms_norm": [_POINTER] * 3 + [_LONG] * 2 + [_FLOAT] + [_INT] * 3,
    "llama_turn": [_POINTER] * 6 + [_LONG] * 5 + [_INT] * 3,
    "llama_attend": [_POINTER] * 8 + [_LONG] * 6 + [_INT] * 3,
    "llama_gate": [_POINTER] * 2 + [_LONG] * 2 + [_INT] * 3,
    "llama_choose": [_POINTER] * 3 + [_LONG] * 2 + [_INT],
    "llama_sample_workspace": [_LONG],
    "llama_sample": [_POINTER] * 5 + [_LONG] * 2 + [_INT] * 2,
    "llama_step_workspace": [_POINTER, _LONG],
    "llama_step": [_POINTER, _LONG] + [_POINTER] * 5 + [_LONG] + [_POINTER] * 2,
}
_RETURNS = dict.fromkeys(
    ("llama_workspace", "llama_most_rows", "llama_step_workspace", "llama_sample_workspace"), _LONG
)


def usable(x: Tensor) -> ctypes.CDLL | None:
    """The library, where it can compute with x: on a CPU, in bfloat16 or float32, and not for torch.compile."""
    if x.device.type != "cpu" or x.dtype not in DTYPES or torch.compiler.is_compiling():
        return None
    return load()[0]


def gpu_kernels(x: Tensor) -> ModuleType | None:
    """gpu.py, where it can compute with x: in 16 bits, on CUDA with Triton, and not for torch.compile."""
    if x.device.type != "cuda" or x.dtype not in _HALF or torch.compiler.is_compiling():
        return None
    return load_gpu(x.device)


def gpu_step(rows: int, model: Any, cache: Any) -> ModuleType | None:
    """gpu_step.py, where it can compute a decode step of so many rows."""
    if gpu_kernels(cache.keys[0].new_empty(0, dtype=model.dtype)) is None:
        return None
    from llama.kernels import gpu_step

    return gpu_step if gpu_step.can_run(rows, model, cache) else None


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
    found = compute_capability(device)
    if found < OLDEST_GPU:
        return f"compute capability {found[0]}.{found[1]} is less than {OLDEST_GPU[0]}.{OLDEST_GPU[1]}"
    try:  # Triton needs a C compiler, Python's headers and more: what is missing shows at a first launch
        _gpu().gate(torch.zeros(1, 32, dtype=torch.bfloat16, device=device))
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


def load_gpu(device: torch.device) -> ModuleType | None:
    return None if no_gpu(device) else _gpu()


def _gpu() -> ModuleType:
    from llama.kernels import gpu

    return gpu


def variant() -> int:
    """The number of the best variant for this processor, or of a lesser one that LLAMA_KERNELS names."""
    return _variant()


@functools.cache
def _variant() -> int:
    named, best = os.environ.get("LLAMA_KERNELS"), load()[0].llama_variant()
    return min(VARIANTS.index(named), best) if named in VARIANTS else best


@functools.cache
def load() -> tuple[ctypes.CDLL | None, str]:
    """(The library, why it is not there)."""
    if os.environ.get("LLAMA_KERNELS") == "none":
        return None, "LLAMA_KERNELS=none"
    folder = Path(__file__).parent
    found = sorted((*folder.glob("cpu.*so"), *folder.glob("cpu.*pyd")))
    if not found:
        return None, "they were not compiled when the package was installed"
    try:
        _share_threads()
        library = ctypes.CDLL(str(found[0]))
        for name, arguments in _ARGUMENTS.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, _RETURNS.get(name)
    except (OSError, AttributeError) as error:
        return None, str(error)
    return library, ""


def _share_threads() -> None:
    """Give the library PyTorch's own OpenMP: a second pool of threads would fight with it for the cores."""
    folder = Path(torch.__file__).parent
    for path in (*folder.glob("lib/libgomp*"), *folder.glob("lib/libomp*"), *folder.glob("../torch.libs/libgomp*")):
        ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
