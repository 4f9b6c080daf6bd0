"""What a run needs and what a device has free, in bytes, before anything is allocated."""

import os
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from llama.checkpoint.layout import weight_bytes
from llama.errors import DeviceError
from llama.model.args import ModelArgs
from llama.parallel import world_size
from llama.placement import Parts
from llama.wording import in_units

STEP_TOKENS = 2048  # the most tokens of one step where nobody says how many
STEP_TOKENS_CPU = 512  # more gains a CPU nothing
DISK_RATE = 2 * 10**9  # bytes/s: of a common solid-state disk
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
    weights = sum(weight_bytes(args, weight_format, dtype, held or dtype, processes).values())
    cached = args.n_layers * _cached_in_a_layer(args, dtype, kv_dtype, processes)
    workspace = _activations(args, max_step_tokens, processes) + _logits(args, max_step_tokens)
    return Need(weights, cached, workspace)


def parts(
    args: ModelArgs, dtype: torch.dtype, max_step_tokens: int,
    *, weight_format: str | None = None, kv_dtype: str | None = None, held: torch.dtype | None = None,
) -> Parts:  # fmt: skip
    """The same, part by part, of a model that one process lays over several devices; the cache is that of all tokens
    of its `max_batch_size` sequences."""
    sizes = weight_bytes(args, weight_format, dtype, held or dtype, 1)
    cached = args.max_seq_len * args.max_batch_size * _cached_in_a_layer(args, dtype, kv_dtype, 1)
    return Parts(
        args.n_layers, sizes["tok_embeddings"], sizes["layers.0"], sizes["norm"] + sizes["output"], cached,
        _activations(args, max_step_tokens, 1), _logits(args, max_step_tokens),
    )  # fmt: skip


def _cached_in_a_layer(args: ModelArgs, dtype: torch.dtype, kv_dtype: str | None, processes: int) -> int:
    """Bytes of a token's keys and values."""
    return 2 * (args.kv_heads // processes) * args.head_dim * (1 if kv_dtype else dtype.itemsize)


def _activations(args: ModelArgs, max_step_tokens: int, processes: int) -> int:
    return max_step_tokens * (8 * args.dim + 3 * args.hidden_dim // processes) * 4


def _logits(args: ModelArgs, max_step_tokens: int) -> int:
    return 3 * max_step_tokens * args.vocab_size * 4


def free_bytes(device: torch.device) -> int:
    """The memory that this process can still take: on a CPU its share among this machine's processes."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # PyTorch keeps it for later
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    free = min(psutil.virtual_memory().available, _cgroup()[1])
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def total_bytes(device: torch.device) -> int:
    """All the memory that the device has, or that this process may use of it."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    return min(psutil.virtual_memory().total, _cgroup()[0])


# Of a control group: its limit, what it uses, and the prefix of the counters in memory.stat that count all in it.
_CGROUPS = (
    ("memory.max", "memory.current", ""),  # v2, where the limit may be "max"
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_"),  # v1, where it may be almost 2⁶³
)


def _cgroup() -> tuple[int, int]:
    """(The limit that a container has, what it leaves): the page cache that the kernel would give back is left too."""
    folder = Path("/sys/fs/cgroup")
    for limit_file, used_file, prefix in _CGROUPS:
        try:
            limit, used = (int((folder / name).read_text()) for name in (limit_file, used_file))
            lines = (folder / limit_file).with_name("memory.stat").read_text().splitlines()
            stat = dict(line.split() for line in lines)
        except (OSError, ValueError):
            continue
        cached = sum(int(stat.get(f"{prefix}{kind}_file", 0)) for kind in ("inactive", "active"))
        return limit, limit - used + cached
    return _NO_LIMIT, _NO_LIMIT


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
    fits = _what_fits(needed.room(free), max_seq_len, max_batch_size)
    raise DeviceError(f"{said}: {fits}{_from_disk(needed, cache, free, device)}")


def _what_fits(room: int, max_seq_len: int, max_batch_size: int) -> str:
    """Sizes for which there is room, so many tokens in all."""
    if room < 1:
        return "the weights alone leave no room; run on more processes or a larger device"
    fits = []
    if room >= max_seq_len:
        fits.append(f"max_batch_size={room // max_seq_len} at max_seq_len={max_seq_len}")
    if room >= max_batch_size:
        fits.append(f"max_seq_len={room // max_batch_size} at max_batch_size={max_batch_size}")
    such_as = f", such as {' or '.join(fits)}" if fits else ""
    return f"max_seq_len × max_batch_size up to {room} fits{such_as}"


def _from_disk(needed: Need, cache: int, free: int, device: torch.device) -> str:
    """That weights can be read from the disk in each step, where all else fits."""
    beside = cache + needed.workspace
    if device.type != "cpu" or beside > free or world_size() > 1:
        return ""
    left = needed.weights + beside - free
    return (
        f"; or device_map='auto' reads what does not fit from the disk in each step: {in_units(left)},"
        f" {left / DISK_RATE:.2g} s at {in_units(DISK_RATE)}/s"
    )
