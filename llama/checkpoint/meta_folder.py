"""`MetaFolder`: a checkpoint in Meta's layout, params.json and the shards of its model-parallel processes."""

from collections.abc import Collection, Iterator, Mapping
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from llama.checkpoint.config import end_ids
from llama.checkpoint.files import find_shards, open_shard
from llama.checkpoint.layout import EMBEDDING, IGNORED, shard_shape, split_axis, stored_dtype, stored_shapes
from llama.checkpoint.pages import release_pages
from llama.checkpoint.params import PADDED, read_params
from llama.checkpoint.resharding import plan
from llama.errors import CheckpointError
from llama.model.args import ModelArgs
from llama.wording import listed


class MetaFolder:
    """The tensors of consolidated.00.pth, consolidated.01.pth, …, memory-mapped; see `Source`.

    Each shard has an equal part of every tensor that has a split axis, and the whole of every other.
    """

    trained_length = window = None
    notes: tuple[str, ...] = ()
    aliases: Mapping[str, str] = {}  # nobody changes it
    facts: Mapping[str, str] = {}  # as above

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = find_shards(folder)  # a missing file is said before what is in another
        self.args, ignored = read_params(folder)
        self.ignored = [key for key in ignored if key != PADDED]
        self.pads_vocabulary = PADDED in ignored
        self.described_by = [folder / "params.json"]
        self.end_ids = end_ids(folder)
        self.shards = len(self.files)

    @cached_property
    def _shards(self) -> list[dict[str, Tensor]]:
        return [open_shard(path) for path in self.files]

    @cached_property
    def names(self) -> Collection[str]:
        return self._shards[0].keys() - IGNORED

    @property
    def vocab_size(self) -> int:
        """The rows of the embedding table."""
        table = self._shards[0].get(EMBEDDING)
        if table is None or table.dim() != 2:
            raise CheckpointError(f"{self.files[0]} has no {EMBEDDING}: it is not a Llama-2 model")
        return table.shape[0]

    def shape(self, name: str) -> tuple[int, ...]:
        axis, own = split_axis(name), self._shards[0][name].shape
        return tuple(length * len(self.files) if i == axis else length for i, length in enumerate(own))

    def dtype(self, name: str) -> torch.dtype:
        return self._shards[0][name].dtype

    def slices(self, name: str, processes: int, rank: int) -> Iterator[Tensor]:
        axis = split_axis(name)
        if axis is None:
            yield self._shards[0][name]
            return
        for piece in plan(self.shape(name)[axis], len(self.files), processes, rank):
            yield self._shards[piece.shard][name].narrow(axis, piece.start, piece.stop - piece.start)

    def is_mapped(self, name: str) -> bool:
        return True

    def release(self, piece: Tensor) -> None:
        release_pages(piece)

    def check(self, args: ModelArgs) -> None:
        """Raise CheckpointError that lists what is missing, unexpected, or of a wrong shape or dtype in a shard."""
        for path, tensors in zip(self.files, self._shards, strict=True):
            if args.n_layers > len(tensors):  # before anything grows with it
                raise CheckpointError(
                    f"{self.folder / 'params.json'} sets n_layers={args.n_layers}, but {path.name} has only"
                    f" {len(tensors)} tensors: one of them is of another model"
                )
        for path, tensors in zip(self.files, self._shards, strict=True):
            if faults := _faults(tensors, args, len(self.files)):
                raise CheckpointError(f"{path} does not fit params.json: {listed(faults, '; ')}")

    def check_dtypes(self) -> None:
        first = self._shards[0]
        for path, tensors in zip(self.files, self._shards, strict=True):
            for name, tensor in tensors.items():
                if name not in IGNORED and tensor.dtype != first[name].dtype:
                    raise CheckpointError(
                        f"{path} has {name} in {tensor.dtype}, {self.files[0].name} in {first[name].dtype}: these are"
                        " shards of different checkpoints"
                    )


def _faults(tensors: dict[str, Tensor], args: ModelArgs, shards: int) -> list[str]:
    """What is wrong with one of `shards` shards of a model of these sizes."""
    expected = stored_shapes(args)
    faults = [f"{name} is missing" for name in expected if name not in tensors]
    faults += [f"{name!r:.100} is unexpected" for name in tensors if name not in expected and name not in IGNORED]
    present = (name for name in expected if name in tensors)
    return faults + [fault for name in present if (fault := _fault(name, tensors[name], args, expected[name], shards))]


def _fault(name: str, tensor: Tensor, args: ModelArgs, whole: tuple[int, ...], shards: int) -> str | None:
    """What is wrong with a shard's part of a tensor whose whole shape is `whole`."""
    shape, axis, dtype = shard_shape(name, whole, shards), split_axis(name), stored_dtype(name, args.quantize)
    if tuple(tensor.shape) != shape:
        return f"{name} has shape {tuple(tensor.shape)!s:.100} where params.json and {shards} shards make it {shape}"
    if axis is not None and whole[axis] % shards:
        return f"{name} has {whole[axis]} rows or columns, which {shards} shards cannot share"
    if dtype is None and not tensor.dtype.is_floating_point:
        return f"{name} is {tensor.dtype}, not a floating-point tensor"
    if dtype is not None and tensor.dtype != dtype:
        return f"{name} is {tensor.dtype}, not {str(dtype).removeprefix('torch.')}"
    return None
