"""`Source`: the tensors of a checkpoint, by Meta's names, whatever files they lie in."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from llama.checkpoint.gguf_source import GGUFFile
from llama.checkpoint.huggingface import HuggingFaceFolder
from llama.checkpoint.layout import EMBEDDING, split_axis
from llama.checkpoint.meta_folder import MetaFolder
from llama.gguf import find_gguf
from llama.model.args import ModelArgs


class Source(Protocol):
    """A checkpoint that can be read: its sizes, and its tensors' names, shapes, dtypes and slices.

    Making one finds its files and reads its sizes; the tensors are opened when one of them is first asked for. Those
    who read it do not need to know how the tensors are distributed over files, which may be damaged: whatever is asked
    for may raise CheckpointError.
    """

    @property
    def folder(self) -> Path: ...

    @property
    def files(self) -> Sequence[Path]:
        """The files in which the tensors lie, to be described."""

    @property
    def described_by(self) -> Sequence[Path]:
        """The small files that say what the tensors are."""

    @property
    def shards(self) -> int:
        """Into how many equal parts the tensors are split."""

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The tokens that end a text, beside the tokenizer's own."""

    @property
    def trained_length(self) -> int | None:
        """How many positions the model was made for, where that is said."""

    @property
    def window(self) -> int | None:
        """How many tokens attention looks back, where that is not to the beginning: longer texts cannot be run."""

    @property
    def pads_vocabulary(self) -> bool:
        """Whether the tables may have more rows than the tokenizer has tokens."""

    @property
    def aliases(self) -> Mapping[str, str]:
        """Names of tensors that are those of other names: one of the two is enough, where both are held alike."""

    @property
    def notes(self) -> Sequence[str]:
        """What is to be said when it is loaded, a line each."""

    @property
    def facts(self) -> Mapping[str, str]:
        """What else people may want to know of the checkpoint: name → words."""

    @property
    def args(self) -> ModelArgs:
        """The sizes, as they are declared; a vocabulary of −1 is left to the tensors."""

    @property
    def ignored(self) -> Sequence[str]:
        """What is declared beside the sizes, and has no effect."""

    @property
    def names(self) -> Collection[str]: ...

    @property
    def vocab_size(self) -> int:
        """The rows of the embedding table, whatever `args` says."""

    def shape(self, name: str) -> tuple[int, ...]:
        """The whole shape of a tensor."""

    def dtype(self, name: str) -> torch.dtype: ...

    def slices(self, name: str, processes: int, rank: int) -> Iterator[Tensor]:
        """What process `rank` of `processes` has of a tensor: pieces that follow one another along its split axis.

        They are on the CPU and only to be read. Where the file allows it they are views of the mapped file.
        """

    def is_mapped(self, name: str) -> bool:
        """Whether `slices` gives views of the mapped file, of which nothing is computed."""

    def release(self, piece: Tensor) -> None:
        """Give the memory of a piece that has been read back to the system, if the file can be read again."""

    def check(self, args: ModelArgs) -> None:
        """Raise CheckpointError unless the tensors are those of a model of these sizes, in names, shapes and dtypes."""

    def check_dtypes(self) -> None:
        """Raise CheckpointError unless each tensor has one dtype, wherever its pieces lie."""


def open_source(folder: Path) -> Source:
    """The checkpoint at a path: in Meta's layout, in that of transformers (with a config.json), or a GGUF file."""
    if gguf := find_gguf(folder):
        return GGUFFile(gguf)
    if not any(folder.glob("consolidated.*.pth")) and (folder / "config.json").is_file():
        return HuggingFaceFolder(folder)
    return MetaFolder(folder)


def open_checked(folder: Path) -> tuple[Source, ModelArgs]:
    """The checkpoint in a folder, and its sizes, which its tensors fit; they say the vocabulary where it is open."""
    source = open_source(folder)
    args = source.args if source.args.vocab_size != -1 else replace(source.args, vocab_size=source.vocab_size)
    source.check(args)
    return source, args


def checkpoint_dtype(source: Source) -> torch.dtype:
    """The dtype of a checkpoint, of which some tensors may differ: that of its embedding table."""
    return source.dtype(EMBEDDING)


def read_slice(into: Tensor, source: Source, name: str, processes: int, rank: int) -> None:
    """Copy what process `rank` of `processes` has of a tensor into one of that shape, in its dtype on its device."""
    axis, begin = split_axis(name) or 0, 0
    for piece in source.slices(name, processes, rank):
        length = piece.shape[axis]
        into.narrow(axis, begin, length).copy_(piece)
        source.release(piece)
        begin += length
