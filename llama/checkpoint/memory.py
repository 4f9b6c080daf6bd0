"""What a run needs and what a device has free, in bytes, before anything is allocated."""

import os
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from llama.checkpoint.layout import weight_bytes
from llama.errors import DeviceError
from llama.model.args import ModelArgs
from llama.wording import in_units

STEP_TOKENS = 2048  # the most tokens of one step where nobody says how many
STEP_TOKENS_CPU = 512  # more gains a CPU nothing
_NO_LIMIT = 1 << 62


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes of one process on its device."""

    weights: int
    cache_per_token: int
    workspace: int

    def room(self, free: int) -> int:
        """The most tokens, of all sequences together, whose cache fits into `free` bytes too; below 1: not one."""
        return (free - self.weights - self.workspace) // self.cache_per_token


def step_tokens(device: torch.device, asked: int | None = None) -> int:
    """The most tokens of one step: as many as were asked for, else what the device gains from."""
    return asked or (STEP_TOKENS_CPU if device.type == "cpu" else STEP_TOKENS)


def need(
    args: ModelArgs, dtype: torch.dtype, processes: int, max_step_tokens: int,
    *, weight_format: str | None = None, kv_dtype: str | None = None, held: torch.dtype | None = None,
) -> Need:  # fmt: skip
    """What one of `processes` processes needs for its weights, one cached token, and a step of `max_step_tokens`.

    `held`: the dtype of its matrices, where it is another one.
    """
    weights = weight_bytes(args, weight_format, dtype, held or dtype, processes)
    cached = 2 * args.n_layers * (args.kv_heads // processes) * args.head_dim
    activations = max_step_tokens * (8 * args.dim + 3 * args.hidden_dim // processes) * 4
    logits = 3 * max_step_tokens * args.vocab_size * 4
    return Need(weights, cached * (1 if kv_dtype else dtype.itemsize), activations + logits)


def free_bytes(device: torch.device) -> int:
    """The memory that this process can still take: on a CPU its share among this machine's processes."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # PyTorch keeps it for later
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    free = min(psutil.virtual_memory().available, _cgroup_free())
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def total_bytes(device: torch.device) -> int:
    """All the memory that the device has, or that this process may use of it."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    return min(psutil.virtual_memory().total, _cgroup_limit())


def _cgroup_limit() -> int:
    try:
        return int((Path("/sys/fs/cgroup") / "memory.max").read_text())  # "max" where there is none
    except (OSError, ValueError):
        return _NO_LIMIT


def _cgroup_free() -> int:
    """What a container's limit (cgroup v2) leaves, counting the page cache that the kernel would give back."""
    folder = Path("/sys/fs/cgroup")
    try:
        used = int((folder / "memory.current").read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return _NO_LIMIT
    return _cgroup_limit() - used + int(stat.get("inactive_file", 0)) + int(stat.get("active_file", 0))


def check_fits(needed: Need, free: int, max_seq_len: int, max_batch_size: int, device: torch.device) -> None:
    """Raise DeviceError, with the largest sizes that fit, unless weights, cache and workspace fit into `free`."""
    tokens = max_seq_len * max_batch_size
    cache = tokens * needed.cache_per_token
    if needed.weights + cache + needed.workspace <= free:
        return
    said = (
        f"not enough memory on {device}: weights {in_units(needed.weights)} + KV cache {in_units(cache)}"
        f" + workspace {in_units(needed.workspace)}, but {in_units(free)} is free"
    )
    room = needed.room(free)
    if room < 1:
        raise DeviceError(f"{said}: the weights alone leave no room; run on more processes or a larger device")
    fits = [f"max_seq_len × max_batch_size up to {room} fits"]
    if room >= max_seq_len:
        fits.append(f"max_batch_size={room // max_seq_len} at max_seq_len={max_seq_len}")
    if room >= max_batch_size:
        fits.append(f"max_seq_len={room // max_batch_size} at max_batch_size={max_batch_size}")
    raise DeviceError(f"{said}: {fits[0]}, such as {' or '.join(fits[1:])}" if fits[1:] else f"{said}: {fits[0]}")
