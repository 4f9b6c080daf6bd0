"""Our compiled library for CPUs: loading it, what its functions take, and which variant of them this processor runs."""

import ctypes
import functools
import os
import platform
from pathlib import Path

import torch
from torch import Tensor


def variants_of(machine: str) -> tuple[str, ...]:
    """The variants of kernels.h on a machine that `platform.machine` calls so, from the least to the best."""
    if machine.lower() in ("aarch64", "arm64"):
        return ("portable", "neon", "dotprod", "bf16")
    return ("portable", "avx2", "avx512", "avx512bf16", "amx")


VARIANTS = variants_of(platform.machine())
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1}  # kernels.h's FLOAT32, BFLOAT16
CACHE_CODES = {**DTYPE_CODES, torch.float8_e4m3fn: 3}  # and FLOAT8
FORMAT_CODES = {torch.int8: 0, torch.uint8: 1, torch.bfloat16: 2}  # of packed weights: kernels.h's INT8, INT4, PLAIN
STORED_CODES = {torch.float32: 3, torch.bfloat16: 4, torch.float16: 5}  # of weights as they are stored: AS_STORED + …
_POINTER, _LONG, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_ARGUMENTS = {
    "llama_variant": [],
    "llama_workspace": [_LONG] * 2 + [_INT] * 4,
    "llama_most_rows": [_INT] * 2,
    "llama_quantize": [_POINTER] * 3 + [_LONG] + [_INT] * 4,
    "llama_use_huge_pages": [_POINTER, _LONG],
    "llama_pack": [_POINTER] * 2 + [_LONG] * 3 + [_INT],
    "llama_product": [_POINTER] * 5 + [_LONG] * 3 + [_INT] * 4,
    "llama_dequantize": [_POINTER] * 3 + [_LONG] * 2 + [_INT] * 4,
    "llama_rms_norm": [_POINTER] * 3 + [_LONG] * 2 + [_FLOAT] + [_INT] * 3,
    "llama_rope": [_POINTER] * 6 + [_LONG] * 5 + [_INT] * 4,
    "llama_attend_workspace": [_LONG] * 2 + [_INT],
    "llama_attend": [_POINTER] * 8 + [_LONG] * 6 + [_INT] * 4,
    "llama_silu_and_mul": [_POINTER] * 2 + [_LONG] * 2 + [_INT] * 3,
    "llama_greedy": [_POINTER] * 3 + [_LONG] * 2 + [_INT],
    "llama_sample_workspace": [_LONG],
    "llama_sample": [_POINTER] * 5 + [_LONG] * 2 + [_INT] * 2,
    "llama_step_workspace": [_POINTER, _LONG],
    "llama_step": [_POINTER, _LONG] + [_POINTER] * 5 + [_LONG] + [_POINTER] * 2,
}
_RETURNS = {
    "llama_variant": _INT,
    **dict.fromkeys((name for name in _ARGUMENTS if name.endswith(("workspace", "most_rows"))), _LONG),
}


@functools.cache
def load() -> tuple[ctypes.CDLL | None, str]:
    """(The library, why it is not there)."""
    if os.environ.get("LLAMA_KERNELS") == "none":
        return None, "LLAMA_KERNELS=none"
    folder = Path(__file__).parent
    files = sorted((*folder.glob("cpu.*so"), *folder.glob("cpu.*pyd")))
    if not files:
        return None, "they were not compiled when the package was installed"
    try:
        _share_threads()
        library = ctypes.CDLL(str(files[0]))
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


def variant() -> int:
    """The number of the best variant for this processor, or of a lesser one that LLAMA_KERNELS names."""
    return _variant()


@functools.cache
def _variant() -> int:
    library, _ = load()
    assert library is not None
    named, best = os.environ.get("LLAMA_KERNELS"), int(library.llama_variant())
    return min(VARIANTS.index(named), best) if named in VARIANTS else best


def without_tiles(variant: int) -> int:
    """The same, or the best one that sums in the same order for any number of rows: AMX's tiles do not."""
    return min(variant, VARIANTS.index("avx512bf16"))


def on_huge_pages(tensor: Tensor) -> Tensor:
    """The same tensor, in which nothing has been written yet: on a CPU its memory will come in large pages."""
    library = load()[0]
    if library is not None and tensor.device.type == "cpu":
        library.llama_use_huge_pages(tensor.data_ptr(), tensor.nbytes)
    return tensor
