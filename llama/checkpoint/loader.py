"""The tensors of a checkpoint → verified weights in a `Transformer`, one tensor at a time."""

import ctypes
import sys
from collections.abc import Mapping, Sequence

import torch

from llama.checkpoint import memory
from llama.checkpoint.disk import stay_on_disk
from llama.checkpoint.layout import check_groups, check_split, expected_shapes
from llama.checkpoint.pages import fetch_pages
from llama.checkpoint.parameters import Held, Maker
from llama.checkpoint.source import Source, checkpoint_dtype
from llama.device import choose_dtype
from llama.device_map import DISK
from llama.errors import CheckpointError, DeviceError
from llama.kernels.invariance import costs_nothing, why_not_invariant
from llama.kernels.plain import can_multiply, held_dtype
from llama.kernels.quantized import can_pack
from llama.model.args import ModelArgs
from llama.model.stages import device_of
from llama.model.transformer import Transformer
from llama.options import RunOptions
from llama.parallel import model_parallel_rank, model_parallel_size
from llama.placement import Placement
from llama.progress import bar_of_bytes
from llama.wording import listed


def load(
    source: Source, args: ModelArgs, options: RunOptions, device: torch.device, dtype: torch.dtype | None,
    placement: Placement | None = None,
) -> Transformer:  # fmt: skip
    """This rank's part of a model of these sizes, in `dtype` (None: see `choose_dtype`) on `device`, or as placed.

    All that can be checked is checked first. Raises CheckpointError where the tensors do not fit `args`, DeviceError
    where the processes or the free memory do not allow it, the room for the KV cache included; whoever makes a
    placement knows that it fits.
    """
    source.check(args)
    weight_format = _weight_format(source, options.quantize)
    processes = model_parallel_size()
    check_split(args, source.shards, processes)
    check_groups(expected_shapes(args), weight_format, processes)
    if placement and len(placement.devices) == 1 and placement.devices != (DISK,):
        device, placement = device_of(placement.devices[0]), None
    stored, asked = checkpoint_dtype(source), dtype
    dtype = asked or choose_dtype(stored, device)

    def held_on(device: torch.device, on_disk: bool = False) -> Held:
        held = dtype if asked or options.compile else held_dtype(stored, dtype, device)
        in_place = not options.compile and _reads_as_stored(args.dim, device, dtype, held)
        return Held(device, dtype, held, in_place, on_disk)

    if placement is None:
        held = held_on(device)
        needed = memory.need(
            args, dtype, processes, memory.step_tokens(device, options.max_step_tokens),
            weight_format=weight_format, kv_dtype=options.kv_dtype, held=held.matrices,
        )  # fmt: skip
        memory.check_fits(needed, memory.free_bytes(device), options.max_seq_len, options.max_batch_size, device)
    else:
        _check_placed(placement, source, options, weight_format)
    devices = [device] if placement is None else [device_of(name) for name in placement.devices]
    model = Transformer(
        args, weight_format=weight_format, kv_dtype=options.kv_dtype,
        batch_invariant=_batch_invariant(options, devices, dtype, processes), placement=placement,
    )  # fmt: skip
    parameters = [name for name, _ in model.named_parameters()]
    if placement is None:
        fill(model, source, dict.fromkeys(parameters, held))
    else:
        ways = {name: held_on(device_of(name), name == DISK) for name in placement.devices}
        fill(model, source, {name: ways[_where(placement, name)] for name in parameters})
    return model.eval()


def _where(placement: Placement, name: str) -> str:
    """Where a parameter of the model is placed."""
    part, *rest = name.split(".")
    if part == "tok_embeddings":
        return placement.embeddings
    return placement.layers[int(rest[0])] if part == "layers" else placement.output


def _check_placed(placement: Placement, source: Source, options: RunOptions, weight_format: str | None) -> None:
    """Raise DeviceError where several devices cannot share the model, or it cannot be read from the disk."""
    assert model_parallel_size() == 1  # checked where the placement was made
    if options.compile:
        raise DeviceError(
            f"compile=True compiles a model for one device, but this one is on {listed(list(placement.devices))}: leave"
            " compile out, or device_map and max_memory"
        )
    if DISK in placement.devices and weight_format != source.args.quantize:
        raise DeviceError(
            f"quantize={weight_format} would quantise what stays on the disk anew in every step: write it once, by"
            f" llama quantize CKPT OUT --quantize {weight_format}, and run that"
        )


def _reads_as_stored(dim: int, device: torch.device, dtype: torch.dtype, held: torch.dtype) -> bool:
    """Whether our kernels multiply rows of `dtype` with weights in `held` as they lie in a file."""
    weight = torch.empty((0, dim), dtype=held, device=device)
    return can_multiply(weight, dtype, 1) and not can_pack(weight, dtype)


def _batch_invariant(
    options: RunOptions, devices: Sequence[torch.device], dtype: torch.dtype, processes: int
) -> bool:  # fmt: skip
    """Whether results are to be the same to the bit in any batch: where that is asked for, or costs nothing."""
    reason = (
        "torch.compile's code is not made for it" if options.compile
        else "more than two processes add their sums in an order that depends on it" if processes > 2
        else next((why for device in devices if (why := why_not_invariant(device, dtype))), None)
    )  # fmt: skip
    if not options.batch_invariant:
        return reason is None and costs_nothing(dtype)
    if reason:
        raise DeviceError(f"batch_invariant=True: results cannot be the same in any batch ({reason}): leave it out")
    return True


def _weight_format(source: Source, asked: str | None) -> str | None:
    """The format that the matrices of the model will have."""
    stored = source.args.quantize
    if stored and asked not in (None, stored):
        raise CheckpointError(
            f"{source.folder} is quantised as {stored}, so quantize={asked} cannot be had of it: leave quantize out, or"
            " use the checkpoint that it was made from"
        )
    return asked or stored


def fill(model: Transformer, source: Source, held: Mapping[str, Held]) -> None:
    """Give every parameter of a model on the meta device this rank's slices of the source, as it is to be held.

    What has been read of those that do not stay in the files is let go. Matrices of a quantised model are quantised one
    by one, unless they are stored so. Matrices that our kernels read in blocks are packed.
    """
    maker = Maker(model, source, held, model_parallel_size(), model_parallel_rank())
    # What a tensor needs beside itself is then gone before all is there.
    largest_first = sorted(model.named_parameters(), key=lambda item: -item[1].numel())
    on_disk = [name for name, own in model.named_parameters() if held[name].on_disk and own.dim() > 1]
    shared = _shared(model, source, held)
    sizes = {name: maker.sizes(name) for name, _ in largest_first if name not in (*shared, *on_disk)}
    doing = "loading" if source.args.quantize == model.weight_format else f"loading as {model.weight_format}"
    count, of = 0, sum(map(len, sizes.values()))
    with bar_of_bytes(doing, sum(map(sum, sizes.values()))) as move:
        for name in sizes:
            if parts := maker.in_place(name):
                for part in parts:
                    fetch_pages(part)
            else:
                maker.make(name)
            count += len(sizes[name])
            move(sum(sizes[name]), f"{count} of {of} tensors")
    for name, other in shared.items():
        model.get_submodule(name.removesuffix(".weight")).weight = model.get_parameter(other)
    stay_on_disk(maker, on_disk)
    _return_memory()


def _shared(model: Transformer, source: Source, held: Mapping[str, Held]) -> dict[str, str]:
    """Parameters that can be those of other names: where both are whole, and neither is quantised or packed."""
    if model.weight_format or model_parallel_size() > 1:
        return {}

    def alike(one: Held, other: Held) -> bool:
        like = torch.empty((0, model.params.dim), dtype=one.dtype, device=one.device)
        return one == other and one.matrices == one.dtype and not one.on_disk and not can_pack(like, one.dtype)

    return {name: other for name, other in source.aliases.items() if alike(held[name], held[other])}


def _return_memory() -> None:
    """Give unused memory of the C library's back to the system: loading leaves holes in it (glibc only)."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(ctypes.c_size_t(0))
