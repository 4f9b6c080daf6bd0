"""The device, dtype and threads that this process computes with."""

import os
from pathlib import Path

import torch

from llama.errors import DeviceError, ParameterError
from llama.parallel import local_rank, world_size

AMPERE, ADA, HOPPER = (8, 0), (8, 9), (9, 0)  # compute capabilities
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def default_threads() -> int:
    """How many threads this process should use on a CPU: no more than the cores that its container grants.

    torchrun sets OMP_NUM_THREADS=1 for several processes, whatever the machine: they share its cores evenly instead.
    """
    together, granted = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), _granted_cores()
    if together > 1 and os.environ.get("OMP_NUM_THREADS") == "1":
        return max(1, granted // together)
    return min(torch.get_num_threads(), granted)


def _granted_cores(control_group: Path = Path("/sys/fs/cgroup")) -> int:
    """The cores that this process may run on, or fewer where a container limits its time on them (cgroup v2, or v1)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        limit, period = (control_group / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            limit, period = ((control_group / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        except OSError:
            return cores
    if not limit.strip().isdecimal():  # "max", or −1: no limit
        return cores
    return max(1, min(cores, round(int(limit) / int(period))))


def choose_device(name: str | torch.device | None) -> torch.device:
    """The device of this rank: the one asked for, else CUDA, else MPS, else the CPU. CUDA goes by LOCAL_RANK."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        if name == "mps" and world_size() > 1:
            name = "cpu"  # there is one MPS device, and no collectives between processes on it
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        raise ParameterError(f"device={name!r} is not a device: use cuda, mps or cpu") from None
    if device.type == "cuda":
        return _cuda_device(device)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise DeviceError("device='mps' was asked for, but this machine has no MPS device: use device='cpu'")
    if device.type not in ("cpu", "mps"):
        raise ParameterError(f"device={str(name)!r} is not supported: use cuda, mps or cpu")
    return device


def _cuda_device(device: torch.device) -> torch.device:
    if not torch.cuda.is_available():
        why = "this PyTorch was built without CUDA" if torch.version.cuda is None else "PyTorch sees no CUDA device"
        raise DeviceError(f"device='cuda' was asked for, but {why}: use device='cpu', or install a CUDA build")
    index = local_rank() if device.index is None else device.index
    count = torch.cuda.device_count()
    if index >= count:
        raise DeviceError(
            f"process {local_rank()} of this machine wants CUDA device {index}, but there are {count}:"
            f" start torchrun with --nproc_per_node {count} or fewer"
        )
    return torch.device("cuda", index)


def compute_capability(device: torch.device) -> tuple[int, int]:
    """(Major, minor) of a CUDA device; (0, 0) of any other."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def parse_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """A torch dtype from itself or its name; None stays None."""
    known = DTYPES.get(str(dtype).removeprefix("torch."))
    if dtype is not None and known is None:
        raise ParameterError(f"dtype={str(dtype)!r} is not supported: use {', '.join(DTYPES)}")
    return known


def choose_dtype(stored: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype to run in: the checkpoint's own where the device multiplies it in hardware, else float32.

    On CUDA devices older than Ampere bfloat16 becomes float32 too: float16 would overflow where it did not.
    """
    if stored == torch.bfloat16 and device.type == "cuda":
        fast = compute_capability(device) >= AMPERE
    elif stored == torch.bfloat16 and device.type == "cpu":
        fast = _has_mkldnn() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    elif stored == torch.float16 and device.type == "cpu":
        fast = _has_mkldnn() and torch.ops.mkldnn._is_mkldnn_fp16_supported()
    else:
        fast = True
    return stored if fast else torch.float32


def _has_mkldnn() -> bool:
    return bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call] # of PyTorch's, without types
