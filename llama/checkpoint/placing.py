"""What `max_memory` and `device_map` come to on this machine: its devices, what they have free, what a model needs."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from llama.checkpoint import memory
from llama.checkpoint.source import Source, checkpoint_dtype
from llama.device import choose_dtype
from llama.device_map import AUTO, DISK, on_host
from llama.errors import DeviceError, ParameterError
from llama.kernels.plain import held_dtype
from llama.model.args import ModelArgs
from llama.options import RunOptions
from llama.parallel import world_size
from llama.placement import CPU, Parts, Placement, Share, arrange, check, shares


@dataclass(frozen=True, slots=True)
class Plan:
    """A placement, which may not fit, and what it was made from."""

    placement: Placement
    dtype: torch.dtype  # of what is computed, on all devices
    parts: Parts
    limits: dict[str, int]  # bytes of each device that counts

    @property
    def shares(self) -> tuple[Share, ...]:
        return shares(self.parts, self.placement, self.limits)

    def check(self) -> None:
        """Raise DeviceError unless it fits."""
        check(self.parts, self.placement, self.limits)


def main_device(options: RunOptions) -> str:
    """The first accelerator that may be used, else the CPU: its dtype is that of all.

    Raises ParameterError where `device` says another thing than `max_memory` and `device_map`.
    """
    return next((device for device in _asked(options) if not on_host(device)), CPU)


def plan(args: ModelArgs, options: RunOptions, source: Source, device: torch.device, dtype: torch.dtype | None) -> Plan:
    """Where a model of these sizes goes, `device` being the main one, in `dtype` (None: see `choose_dtype`).

    Raises ParameterError for a device_map that is none of this model's, DeviceError for devices that are not here and
    have no limit in max_memory.
    """
    stored = checkpoint_dtype(source)
    chosen = dtype or (choose_dtype(stored, device) if is_here(str(device)) else stored)
    held = chosen if dtype or options.compile else held_dtype(stored, chosen, device)
    parts = memory.parts(
        args, chosen, memory.step_tokens(device, options.max_step_tokens),
        weight_format=options.quantize or source.args.quantize, kv_dtype=options.kv_dtype, held=held,
    )  # fmt: skip
    given = options.max_memory or {}
    limits = {name: int(given[name]) if name in given else free_bytes(name) for name in (*_asked(options), CPU)
              if name in given or name == CPU or not on_host(name)}  # fmt: skip
    return Plan(arrange(parts, options.device_map or AUTO, limits), chosen, parts, limits)


def place(
    args: ModelArgs, options: RunOptions, source: Source, device: torch.device, dtype: torch.dtype | None
) -> Placement:  # fmt: skip
    """The placement of a model that is loaded now.

    Raises DeviceError where it does not fit: into what max_memory grants, or into what is free.
    """
    if world_size() > 1:
        raise DeviceError(
            f"device_map and max_memory lay a model over the devices of one process, but {world_size()} processes are"
            " running: start it without torchrun, or leave them out"
        )
    found = plan(args, options, source, device, dtype)
    found.check()
    here = {name: free_bytes(name) for name in {CPU, *found.placement.devices} if name == CPU or not on_host(name)}
    check(found.parts, found.placement, here)
    return found.placement


def is_here(device: str) -> bool:
    """Whether this machine has it."""
    kind, _, index = device.partition(":")
    if kind == "cuda":
        return int(index or 0) < torch.cuda.device_count()
    return torch.backends.mps.is_available() if kind == "mps" else True


def check_here(device: str) -> None:
    """Raise DeviceError unless this machine has it."""
    if not is_here(device):
        kind = device.partition(":")[0]
        count = torch.cuda.device_count() if kind == "cuda" else 0
        raise DeviceError(
            f"the model is to be on {device}, but this machine has {count or 'no'} {kind.upper()}"
            f" device{'s' if count > 1 else ''}: leave it out of max_memory and device_map"
        )


def free_bytes(device: str) -> int:
    """What it has free. Raises DeviceError where it is not here."""
    check_here(device)
    return memory.free_bytes(torch.device(device))


def _asked(options: RunOptions) -> list[str]:
    """The devices that may be used beside the CPU and the disk: those that are named, else this machine's.

    In the order of their numbers. Raises ParameterError where `device` says another thing.
    """
    mapped = None if isinstance(options.device_map, str) else options.device_map
    named = {*(options.max_memory or {}), *(mapped or {}).values()} - {DISK}
    alone = None if options.device is None else str(options.device)
    if options.max_memory is None and mapped is None:
        return [device for device in _accelerators() if alone is None or _is_of(device, alone)]
    if alone is not None:
        other = sorted(device for device in named if not on_host(device) and not _is_of(device, alone))
        if other or (alone != CPU and all(map(on_host, named))):
            what = other[0] if other else "only the CPU"
            raise ParameterError(f"device={alone!r}, but max_memory or device_map names {what}: leave device out")
    return sorted(named, key=lambda device: (device.partition(":")[0], int(device.partition(":")[2] or 0)))


def _is_of(device: str, asked: str) -> bool:
    """Whether a device is the one that was asked for, or one of the kind."""
    return device == asked or device.startswith(f"{asked}:")


def _accelerators() -> Iterator[str]:
    yield from (f"cuda:{index}" for index in range(torch.cuda.device_count()))
    if torch.backends.mps.is_available():
        yield "mps"
