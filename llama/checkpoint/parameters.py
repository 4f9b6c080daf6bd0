"""The tensors of a checkpoint → one parameter of a model: where it lies in the files, or in memory of its own."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llama.checkpoint.layout import SCALE_DTYPE, format_of, integer_dtype, scales_of, shard_shape, stored_names
from llama.checkpoint.source import Source, checkpoint_dtype, read_slice
from llama.kernels.library import on_huge_pages
from llama.kernels.quantized import BLOCK_ROWS, can_pack, pack, pack_rows, pack_scales, quantize
from llama.model.linear import ColumnLinear
from llama.model.transformer import Transformer


@dataclass(frozen=True, slots=True)
class Held:
    """How parameters are held: vectors and embeddings in `dtype` on a device, matrices in a dtype of their own.

    With `in_place`, matrices that lie in the files as they are wanted stay there: the mapped files are the model's
    memory, which every process that runs it shares. Matrices `on_disk` are in memory only while they are used.
    """

    device: torch.device
    dtype: torch.dtype
    matrices: torch.dtype
    in_place: bool = False
    on_disk: bool = False


@dataclass(frozen=True, slots=True)
class TensorReader:
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


@dataclass(frozen=True, slots=True)
class Maker:
    """Makes the parameters of process `rank` of `processes` from a source, and gives them to the model's modules."""

    model: Transformer
    source: Source
    held: Mapping[str, Held]  # by the parameter's name
    processes: int
    rank: int

    def sizes(self, name: str) -> list[int]:
        """The bytes to read of each tensor that a parameter is made of."""
        return self._reader(name).sizes(stored_names(name))

    def in_place(self, name: str) -> list[Tensor]:
        """Give the model a matrix as parts that lie in the files, and return them; an empty list where it cannot be."""
        names, module, held = stored_names(name), self._module(name), self.held[name]
        quantized = format_of(names[0], self.model.weight_format)
        computed = held.on_disk and not all(map(self.source.is_mapped, names))  # which must not be dropped as pages are
        if not held.in_place or self.model.get_parameter(name).dim() < 2 or quantized or computed:
            return []
        parts = self._reader(name).whole_rows(names, held.matrices if hasattr(module, "scales") else held.dtype)
        if len(parts) > 1:
            if not isinstance(module, ColumnLinear):
                return []
            module.parts.extend(nn.Parameter(part, requires_grad=False) for part in parts)
        if parts:
            self._set(name, parts[0][:0] if len(parts) > 1 else parts[0])
        return parts

    def make(self, name: str) -> None:
        """Give the model a parameter in memory of its own."""
        module, held, names = self._module(name), self.held[name], stored_names(name)
        if not (name.endswith(".weight") and hasattr(module, "scales")):
            self._set(name, self._reader(name).joined(names, held.dtype))
            return
        weight, scales = _matrix(self._reader(name), names, held.dtype, held.matrices, self.model.weight_format)
        if scales is not None:
            module.scales = scales
        self._set(name, weight)

    def drop(self, name: str) -> None:
        """Let go of what `make` made of a matrix; of one that was not made yet, say in which dtype it will come."""
        module, weight = self._module(name), self.model.get_parameter(name)
        dtype = self.held[name].matrices if weight.is_meta else weight.dtype
        if isinstance(scales := getattr(module, "scales", None), Tensor):
            module.scales = torch.empty_like(scales, device="meta")
        self._set(name, torch.empty_like(weight, dtype=dtype, device="meta"))

    def _module(self, name: str) -> nn.Module:
        return self.model.get_submodule(name.rpartition(".")[0])

    def _set(self, name: str, weight: Tensor) -> None:
        setattr(self._module(name), name.rpartition(".")[2], nn.Parameter(weight, requires_grad=False))

    def _reader(self, name: str) -> TensorReader:
        return TensorReader(self.source, self.processes, self.rank, self.held[name].device)


def _matrix(
    reader: TensorReader, names: Sequence[str], dtype: torch.dtype, held: torch.dtype, weight_format: str | None
) -> tuple[Tensor, Tensor | None]:
    """A matrix of a model in `dtype`, and its scales: quantised, unless it is stored so already; packed for a CPU."""
    own_format = format_of(names[0], weight_format)
    if own_format and not reader.source.args.quantize:
        weight, scales = quantize(reader.joined(names, checkpoint_dtype(reader.source)), own_format)
        return pack(weight, scales) if can_pack(weight, dtype) else (weight, scales)
    return _stored_matrix(reader, names, dtype, held, own_format)


def _stored_matrix(
    reader: TensorReader, names: Sequence[str], dtype: torch.dtype, held: torch.dtype, own_format: str | None
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
