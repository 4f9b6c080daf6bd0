"""The tensors of a checkpoint → verified weights in a `Transformer`, one tensor at a time."""

import ctypes
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llama.checkpoint import memory
from llama.checkpoint.layout import (
    SCALE_DTYPE,
    check_groups,
    check_split,
    expected_shapes,
    format_of,
    integer_dtype,
    scales_of,
    shard_shape,
    stored_names,
)
from llama.checkpoint.pages import fetch_pages
from llama.checkpoint.source import Source, checkpoint_dtype, read_slice
from llama.device import choose_dtype
from llama.errors import CheckpointError, DeviceError
from llama.kernels.invariance import costs_nothing, why_not_invariant
from llama.kernels.library import on_huge_pages
from llama.kernels.plain import can_multiply, held_dtype
from llama.kernels.quantized import BLOCK_ROWS, can_pack, pack, pack_rows, pack_scales, quantize
from llama.model.args import ModelArgs
from llama.model.linear import ColumnLinear
from llama.model.transformer import Transformer
from llama.options import RunOptions
from llama.parallel import model_parallel_rank, model_parallel_size
from llama.placement import Placement
from llama.progress import bar_of_bytes


def load(
    source: Source, args: ModelArgs, options: RunOptions, device: torch.device, dtype: torch.dtype | None,
    placement: Placement | None = None,
) -> Transformer:  # fmt: skip
    """This rank's part of a model of these sizes, in `dtype` (None: see `choose_dtype`) on `device`.

    All that can be checked is checked first. Raises CheckpointError where the tensors do not fit `args`, DeviceError
    where the processes or the free memory do not allow it, the room for the KV cache included.
    """
    source.check(args)
    weight_format = _weight_format(source, options.quantize)
    processes = model_parallel_size()
    check_split(args, source.shards, processes)
    check_groups(expected_shapes(args), weight_format, processes)
    stored, asked = checkpoint_dtype(source), dtype
    dtype = asked or choose_dtype(stored, device)
    held = dtype if asked or options.compile else held_dtype(stored, dtype, device)
    needed = memory.need(
        args, dtype, processes, memory.step_tokens(device, options.max_step_tokens),
        weight_format=weight_format, kv_dtype=options.kv_dtype, held=held,
    )  # fmt: skip
    memory.check_fits(needed, memory.free_bytes(device), options.max_seq_len, options.max_batch_size, device)
    model = Transformer(
        args, weight_format=weight_format, kv_dtype=options.kv_dtype,
        batch_invariant=_batch_invariant(options, device, dtype, processes),
    )  # fmt: skip
    fill(model, source, device, dtype, held, not options.compile and _reads_as_stored(args.dim, device, dtype, held))
    return model.eval()


def _reads_as_stored(dim: int, device: torch.device, dtype: torch.dtype, held: torch.dtype) -> bool:
    """Whether our kernels multiply rows of `dtype` with weights in `held` as they lie in a file."""
    weight = torch.empty((0, dim), dtype=held, device=device)
    return can_multiply(weight, dtype, 1) and not can_pack(weight, dtype)


def _batch_invariant(options: RunOptions, device: torch.device, dtype: torch.dtype, processes: int) -> bool:
    """Whether results are to be the same to the bit in any batch: where that is asked for, or costs nothing."""
    reason = (
        "torch.compile's code is not made for it" if options.compile
        else "more than two processes add their sums in an order that depends on it" if processes > 2
        else why_not_invariant(device, dtype)
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


def fill(
    model: Transformer, source: Source, device: torch.device, dtype: torch.dtype, held: torch.dtype | None = None,
    in_place: bool = False,
) -> None:  # fmt: skip
    """Give every parameter of a model on the meta device this rank's slices of the source, converted to `dtype`, or
    matrices to `held` where it is not None.

    With `in_place`, matrices that lie in the files as they are wanted stay there: the mapped files are the model's
    memory, which every process that runs it shares. What has been read of the others is let go. Matrices of a quantised
    model are quantised one by one, unless they are stored so. Matrices that our kernels read in blocks are packed.
    """
    reader = _Reader(source, model_parallel_size(), model_parallel_rank(), device)
    # What a tensor needs beside itself is then gone before all is there.
    largest_first = sorted(model.named_parameters(), key=lambda item: -item[1].numel())
    shared = {} if held not in (None, dtype) else _shared(model, source, device, dtype)
    sizes = {name: reader.sizes(stored_names(name)) for name, _ in largest_first if name not in shared}
    doing = "loading" if source.args.quantize == model.weight_format else f"loading as {model.weight_format}"
    count, of = 0, sum(map(len, sizes.values()))
    with bar_of_bytes(doing, sum(map(sum, sizes.values()))) as move:
        for name in sizes:
            owner, _, leaf = name.rpartition(".")
            module = model.get_submodule(owner)
            own_dtype = (held or dtype) if hasattr(module, "scales") else dtype
            if in_place and (parts := _parts_in_place(reader, name, model, own_dtype)):
                weight = parts[0]
                if len(parts) > 1:
                    assert isinstance(module, ColumnLinear)
                    module.parts.extend(nn.Parameter(part, requires_grad=False) for part in parts)
                    weight = weight[:0]
            elif leaf == "weight" and hasattr(module, "scales"):
                weight, scales = _matrix(reader, stored_names(name), dtype, held or dtype, model.weight_format)
                if scales is not None:
                    module.scales = scales
            else:
                weight = reader.joined(stored_names(name), dtype)
            setattr(module, leaf, nn.Parameter(weight, requires_grad=False))
            del weight
            count += len(sizes[name])
            move(sum(sizes[name]), f"{count} of {of} tensors")
    for name, other in shared.items():
        model.get_submodule(name.removesuffix(".weight")).weight = model.get_parameter(other)
    _return_memory()


def _parts_in_place(reader: "_Reader", name: str, model: Transformer, dtype: torch.dtype) -> list[Tensor]:
    """A matrix as parts that lie in the files, in memory by now; an empty list where it cannot be had so."""
    names = stored_names(name)
    if model.get_parameter(name).dim() < 2 or format_of(names[0], model.weight_format):
        return []
    parts = reader.whole_rows(names, dtype)
    if len(parts) > 1 and not isinstance(model.get_submodule(name.rpartition(".")[0]), ColumnLinear):
        return []
    for part in parts:
        fetch_pages(part)
    return parts


def _shared(model: Transformer, source: Source, device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """Parameters that can be those of other names: where both are whole, and neither is quantised or packed."""
    if model.weight_format or model_parallel_size() > 1:
        return {}
    like = torch.empty((0, model.params.dim), dtype=dtype, device=device)
    return {} if can_pack(like, dtype) else dict(source.aliases)


def _matrix(
    reader: "_Reader", names: Sequence[str], dtype: torch.dtype, held: torch.dtype, weight_format: str | None
) -> tuple[Tensor, Tensor | None]:
    """A matrix of a model in `dtype`, and its scales: quantised, unless it is stored so already; packed for a CPU."""
    own_format = format_of(names[0], weight_format)
    if own_format and not reader.source.args.quantize:
        weight, scales = quantize(reader.joined(names, checkpoint_dtype(reader.source)), own_format)
        return pack(weight, scales) if can_pack(weight, dtype) else (weight, scales)
    return _stored_matrix(reader, names, dtype, held, own_format)


def _stored_matrix(
    reader: "_Reader", names: Sequence[str], dtype: torch.dtype, held: torch.dtype, own_format: str | None
) -> tuple[Tensor, Tensor | None]:
    """The same where the files have it in the format that is wanted: where it can be, packed straight from them."""
    scales = reader.joined(list(map(scales_of, names)), SCALE_DTYPE) if own_format else None
    own_dtype = integer_dtype(own_format) if own_format else held
    rows = reader.whole_rows(names, own_dtype)
    whole_blocks = not any(len(piece) % BLOCK_ROWS for piece in rows[:-1])
    if rows and whole_blocks and reader.device.type == "cpu" and can_pack(rows[0], dtype):
        weight = pack_rows(rows)
        for piece in rows:
            reader.source.release(piece)
        return weight, None if scales is None else pack_scales(scales)
    weight = reader.joined(names, own_dtype)
    return pack(weight, scales) if can_pack(weight, dtype) else (weight, scales)


@dataclass(frozen=True, slots=True)
class _Reader:
    """Process `rank` of `processes` at a source: its slices of several tensors, one below the other, on `device`."""

    source: Source
    processes: int
    rank: int
    device: torch.device

    def sizes(self, names: Sequence[str]) -> list[int]:
        """The bytes to read of each tensor that a parameter is made of, its scales among them."""
        stored = (name for name in (*names, *map(scales_of, names)) if name in self.source.names)
        return [math.prod(self._shape(name)) * self.source.dtype(name).itemsize for name in stored]

    def joined(self, names: Sequence[str], dtype: torch.dtype) -> Tensor:
        """The slices in one new tensor of `dtype`."""
        shapes = [self._shape(name) for name in names]
        size = (sum(shape[0] for shape in shapes), *shapes[0][1:])
        whole = on_huge_pages(torch.empty(size, dtype=dtype, device=self.device))
        for name, part in zip(names, torch.split(whole, [shape[0] for shape in shapes]), strict=True):
            read_slice(part, self.source, name, self.processes, self.rank)
        return whole

    def whole_rows(self, names: Sequence[str], dtype: torch.dtype) -> list[Tensor]:
        """The slices as they lie in the files; an empty list where they are not whole rows of `dtype`."""
        rows: list[Tensor] = []
        for name in names:
            for piece in self.source.slices(name, self.processes, self.rank):
                whole = piece.is_contiguous() and piece.shape[1] == self.source.shape(name)[1]
                if not whole or piece.dtype != dtype or piece.data_ptr() % dtype.itemsize:
                    return []
                rows.append(piece)
        return rows

    def _shape(self, name: str) -> tuple[int, ...]:
        return shard_shape(name, self.source.shape(name), self.processes)


def _return_memory() -> None:
    """Give unused memory of the C library's back to the system: loading leaves holes in it (glibc only)."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(ctypes.c_size_t(0))
