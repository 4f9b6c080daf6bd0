"""A checkpoint folder in Meta's layout → verified weights in a `Transformer`, one tensor at a time."""

import ctypes
import math
import mmap
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from llama.checkpoint import memory
from llama.checkpoint.files import check_tensors, stored_dtype
from llama.checkpoint.layout import (
    check_groups,
    check_split,
    expected_shapes,
    format_of,
    quantized_shapes,
    scales_of,
    shard_shape,
    sources,
    split_axis,
)
from llama.checkpoint.resharding import plan
from llama.device import choose_dtype
from llama.errors import CheckpointError
from llama.kernels.quantized import LANES, can_pack, pack, pack_rows, pack_scales, quantize
from llama.model.transformer import ModelArgs, Transformer
from llama.parallel import model_parallel_rank, model_parallel_size, rank
from llama.progress import bar_of_bytes
from llama.quantization.formats import FORMATS


def fill(
    model: Transformer, shards: list[dict[str, Tensor]], device: torch.device, dtype: torch.dtype,
    stored: str | None = None,
) -> None:  # fmt: skip
    """Give every parameter of a model on the meta device this rank's slices of the shards, converted on the way.

    The shards must be memory-mapped, as `open_shard` gives them: what has been read of them is let go. Matrices of a
    quantised model are quantised one by one, unless they are `stored` so. Matrices that our kernels read are packed.
    """
    shapes = quantized_shapes(expected_shapes(model.params), stored)
    # What a tensor needs beside itself is then gone before all is there.
    largest_first = sorted(model.named_parameters(), key=lambda item: -item[1].numel())
    sizes = {name: _stored_sizes(sources(name), shapes, shards) for name, _ in largest_first}
    doing = "loading" if stored == model.params.quantize else f"loading as {model.params.quantize}"
    count, of = 0, sum(map(len, sizes.values()))
    with bar_of_bytes(doing, sum(map(sum, sizes.values())), quiet=rank() > 0) as move:
        for name, _ in largest_first:
            names, (owner, _, leaf) = sources(name), name.rpartition(".")
            module = model.get_submodule(owner)
            if hasattr(module, "scales"):
                form = format_of(names[0], model.params.quantize)
                weight, module.scales = _matrix(names, shapes, shards, device, dtype, form, stored is not None)
            else:
                weight = _joined(names, shapes, shards, dtype, device)
            setattr(module, leaf, nn.Parameter(weight, requires_grad=False))
            del weight
            count += len(sizes[name])
            move(sum(sizes[name]), f"{count} of {of} tensors")
    _return_memory()


def _stored_sizes(names: list[str], shapes: dict[str, tuple[int, ...]], shards: list[dict[str, Tensor]]) -> list[int]:
    """The bytes that this rank reads of each tensor that a parameter is made of, its scales among them."""
    mp = model_parallel_size()
    stored = (name for name in (*names, *map(scales_of, names)) if name in shapes)
    return [math.prod(shard_shape(name, shapes[name], mp)) * shards[0][name].itemsize for name in stored]


def _matrix(
    names: list[str], shapes: dict[str, tuple[int, ...]], shards: list[dict[str, Tensor]], device: torch.device,
    dtype: torch.dtype, form: str | None, stored: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """A matrix of a model in `dtype`, and its scales: in `form`, which the files may have already; packed for a CPU."""
    if form and not stored:
        weight, scales = quantize(_joined(names, shapes, shards, stored_dtype(shards), device), form)
    else:
        held = getattr(torch, FORMATS[form].dtype) if form else dtype
        scales = _joined(list(map(scales_of, names)), shapes, shards, torch.float16, device) if form else None
        rows = _whole_rows(names, shapes, shards, held)
        if rows and device.type == "cpu" and can_pack(rows[0], dtype):
            weight = pack_rows(rows)  # straight from the files
            for part in rows:
                _release(part)
            return weight, None if scales is None else pack_scales(scales)
        weight = _joined(names, shapes, shards, held, device)
    return pack(weight, scales) if can_pack(weight, dtype) else (weight, scales)


def _whole_rows(
    names: list[str], shapes: dict[str, tuple[int, ...]], shards: list[dict[str, Tensor]], dtype: torch.dtype
) -> list[Tensor]:
    """This rank's slices of several tensors, one below the other, as they lie in the files.

    An empty list where they are not whole rows of `dtype`, or one but the last ends within a block of packed weights.
    """
    found: list[Tensor] = []
    for name in names:
        for _, part in _parts(name, shapes[name], shards, model_parallel_size(), model_parallel_rank()):
            if not part.is_contiguous() or part.dtype != dtype or part.shape[1] != shapes[name][1]:
                return []
            found.append(part)
    return found if not any(len(part) % LANES for part in found[:-1]) else []


def _joined(
    names: list[str], shapes: dict[str, tuple[int, ...]], shards: list[dict[str, Tensor]], dtype: torch.dtype,
    device: torch.device,
) -> Tensor:  # fmt: skip
    """This rank's slices of several tensors, one below the other, in `dtype` on `device`."""
    mp, rank = model_parallel_size(), model_parallel_rank()
    parts = [shard_shape(name, shapes[name], mp) for name in names]
    whole = torch.empty((sum(part[0] for part in parts), *parts[0][1:]), dtype=dtype, device=device)
    row = 0
    for name, (rows, *_) in zip(names, parts, strict=True):
        read_slice(whole[row : row + rows], name, shapes[name], shards, mp, rank)
        row += rows
    return whole


def read_slice(
    into: Tensor, name: str, whole: tuple[int, ...], shards: list[dict[str, Tensor]], mp: int, rank: int
) -> None:
    """Copy what process `rank` of `mp` holds of a parameter of shape `whole`; lets go of the mapped pages it read."""
    for target, part in _parts(name, whole, shards, mp, rank):
        into[target].copy_(part)
        _release(part)


def _parts(
    name: str, whole: tuple[int, ...], shards: list[dict[str, Tensor]], mp: int, rank: int
) -> Iterator[tuple[tuple[slice, ...], Tensor]]:
    """(Where to, what) for each piece of a parameter that process `rank` of `mp` holds."""
    axis = split_axis(name)
    everything = [slice(0, length) for length in whole]
    if axis is None:
        yield tuple(everything), shards[0][name]
        return
    everything[axis] = slice(0, whole[axis] // mp)
    for piece in plan(whole[axis], len(shards), mp, rank):
        target = list(everything)
        target[axis] = slice(piece.offset, piece.offset + piece.stop - piece.start)
        yield tuple(target), shards[piece.shard][name].narrow(axis, piece.start, piece.stop - piece.start)


def _release(part: Tensor) -> None:
    """Let go of the mapped pages that a tensor was read from, so that they do not count as this process's memory."""
    if sys.platform != "linux":
        return
    page = mmap.PAGESIZE
    first = part.untyped_storage().data_ptr()
    begin, end = -(-first // page) * page, (first + part.untyped_storage().nbytes()) // page * page
    if end > begin:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_DONTNEED)


def _return_memory() -> None:
    """Give memory that the C library holds for later back to the system: loading leaves holes in it (glibc only)."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(ctypes.c_size_t(0))


def load(
    folder: Path, shards: list[dict[str, Tensor]], args: ModelArgs, device: torch.device, dtype: torch.dtype | None,
    max_step_tokens: int, quantize: str | None = None,
) -> Transformer:  # fmt: skip
    """This rank's part of the model, in `dtype` (None: see `choose_dtype`), after all that can be checked first.

    `quantize` None holds the matrices as they are stored; `args.quantize` becomes how they are held. Raises
    CheckpointError where tensors do not fit `args`, DeviceError where the processes or the free memory do not allow it
    (the room for `args.max_batch_size` sequences of `args.max_seq_len` included).
    """
    check_tensors(shards, args, folder)
    stored, args.quantize = args.quantize, quantize or args.quantize
    if stored not in (None, args.quantize):
        raise CheckpointError(
            f"{folder} is quantised as {stored}, so quantize={quantize} cannot be had of it: leave quantize out, or use"
            " the checkpoint that it was made from"
        )
    mp = model_parallel_size()
    check_split(args, len(shards), mp)
    check_groups(expected_shapes(args), args.quantize, mp)
    dtype = dtype or choose_dtype(stored_dtype(shards), device)
    needed = memory.need(args, dtype, mp, max_step_tokens)
    memory.check_fits(needed, memory.free_bytes(device), args.max_seq_len, args.max_batch_size, device)
    model = Transformer(args)
    fill(model, shards, device, dtype, stored)
    return model.eval()
