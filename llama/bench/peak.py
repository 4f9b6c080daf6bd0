"""The most memory that was held: by this process, and by it on its GPU."""

import contextlib
import resource
import sys
from pathlib import Path

import torch


def forget_peak(device: torch.device) -> None:
    """Begin anew, where the system can: Linux."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak(device: torch.device) -> dict[str, int]:
    """Bytes, by name; of the process mapped files included."""
    unit = 1 if sys.platform == "darwin" else 1024
    found = {"peak memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if device.type == "cuda":
        found[f"peak memory on {device}"] = torch.cuda.max_memory_allocated(device)
    return found
