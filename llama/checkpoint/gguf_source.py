"""`GGUFFile`: a checkpoint as llama.cpp keeps it; see `Source`.

A file whose matrices are all Q8_0 is one that is quantised in int8 here, one of Q4_0 in int4: their blocks are our
groups, and are taken as they are. Other types become numbers again.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, lru_cache
from pathlib import Path

import torch
from torch import Tensor

from llama.checkpoint.gguf_args import read_args
from llama.checkpoint.gguf_blocks import BLOCKS
from llama.checkpoint.huggingface import to_pairs, turns_in_halves
from llama.checkpoint.layout import (
    EMBEDDING,
    OUTPUT,
    SCALE_DTYPE,
    expected_shapes,
    format_of,
    integer_dtype,
    renamed,
    split_axis,
    stored_shapes,
)  # fmt: skip
from llama.checkpoint.pages import release_pages
from llama.checkpoint.resharding import plan
from llama.errors import CheckpointError
from llama.gguf import Entry, files_of, read_header
from llama.kernels.quantized import quantize
from llama.model.args import ModelArgs
from llama.wording import listed

NAMES = {
    "attention.wq": "attn_q", "attention.wk": "attn_k", "attention.wv": "attn_v", "attention.wo": "attn_output",
    "feed_forward.w1": "ffn_gate", "feed_forward.w2": "ffn_down", "feed_forward.w3": "ffn_up",
    "attention_norm": "attn_norm", "ffn_norm": "ffn_norm",
    "tok_embeddings": "token_embd", "norm": "output_norm", "output": "output",
}  # fmt: skip
PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
LOSSLESS = {"Q8_0": "int8", "Q4_0": "int4"}  # type of all matrices → our format, which has the same blocks
FACTORS = "rope_freqs.weight"
AT_ONCE = 1 << 22  # numbers that are computed together


def their_name(name: str) -> str:
    """layers.3.attention.wq.weight → blk.3.attn_q.weight."""
    return renamed(name, NAMES, "blk")


class GGUFFile:
    """The tensors of a GGUF file, and of the parts that follow it, memory-mapped."""

    shards = 1
    pads_vocabulary = True
    window = None

    def __init__(self, path: Path) -> None:
        self.folder, self.files = path, files_of(path)
        self.described_by: Sequence[Path] = self.files[:1]
        self.ignored: list[str] = []
        headers = [read_header(file) for file in self.files]
        self._metadata = metadata = headers[0].metadata
        self._entries: dict[str, Entry] = {name: entry for one in headers for name, entry in one.tensors.items()}
        self._architecture = metadata.get("general.architecture")
        args = read_args(metadata, path, self.vocab_size, self._factors())
        length = metadata.get(f"{self._architecture}.context_length")
        self.trained_length = length if isinstance(length, int) else None
        self.end_ids = tuple(
            token
            for key in ("eos", "eot", "eom")
            if isinstance(token := metadata.get(f"tokenizer.ggml.{key}_token_id"), int)
        )
        self.aliases: Mapping[str, str] = {} if their_name(OUTPUT) in self._entries else {OUTPUT: EMBEDDING}
        self.args = replace(args, quantize=self._stored_format(args))

    def _factors(self) -> tuple[float, ...]:
        entry = self._entries.get(FACTORS)
        if entry is None:
            return ()
        if entry.kind.name != "F32" or len(entry.shape) != 1:
            raise CheckpointError(f"{entry.path} has {FACTORS} in a form that is not known here")
        return tuple(self._plain(entry).tolist())

    def _stored_format(self, args: ModelArgs) -> str | None:
        """Ours, where the matrices of all layers have its blocks."""
        if args.n_layers > len(self._entries):
            return None  # `check` says so
        matrices = [name for name in expected_shapes(args) if format_of(name, "int8") and name != OUTPUT]
        kinds = {self._entries[own].kind.name for name in matrices if (own := their_name(name)) in self._entries}
        return LOSSLESS.get(kinds.pop()) if len(kinds) == 1 else None

    def _entry(self, name: str) -> Entry:
        return self._entries[their_name(self.aliases.get(name, name))]

    @property
    def vocab_size(self) -> int:
        table = self._entries.get(their_name(EMBEDDING))
        if table is None or len(table.shape) != 2:
            raise CheckpointError(f"{self.folder} has no {their_name(EMBEDDING)}: it is not a Llama-2 model")
        return table.shape[0]

    @property
    def names(self) -> Collection[str]:
        return self._stored_shapes.keys()

    @cached_property
    def _stored_shapes(self) -> dict[str, tuple[int, ...]]:
        return stored_shapes(self.args)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._stored_shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        """Of numbers that are stored in blocks: bfloat16, which holds them nearly."""
        if name.endswith(".scales"):
            return SCALE_DTYPE
        if own_format := format_of(name, self.args.quantize):
            return integer_dtype(own_format)
        # Norms are in full precision in every such file: they are as precise as the rest of the model.
        own = EMBEDDING if len(self._entry(name).shape) == 1 else name
        return PLAIN.get(self._entry(own).kind.name, torch.bfloat16)

    @property
    def notes(self) -> list[str]:
        kinds = Counter(self._entry(name).kind.name for name in expected_shapes(self.args) if format_of(name, "int8"))
        output = self._entry(OUTPUT).kind.name
        if self.args.quantize:
            return [] if output == "Q8_0" else [f"the output layer, stored as {output}, is held in int8"]
        blocks = sorted(set(kinds) - PLAIN.keys())
        return [f"matrices stored as {', '.join(blocks)} become bfloat16, which rounds them: quantize holds them in"
                " fewer bits"] if blocks else []  # fmt: skip

    @property
    def facts(self) -> dict[str, str]:
        kinds = Counter(entry.kind.name for entry in self._entries.values())
        scaling = self.args.rope_scaling
        return {
            "format": f"GGUF, {self._architecture}: " + ", ".join(f"{n} {kind}" for kind, n in kinds.most_common()),
            "RoPE": f"{scaling.kind}, factor {scaling.factor:g}" if scaling else "",
            "positions": str(self.trained_length or ""),
            "end tokens": ", ".join(map(str, self.end_ids)),
        }

    def slices(self, name: str, processes: int, rank: int) -> Iterator[Tensor]:
        if format_of(name.removesuffix("scales").removesuffix("weight") + "weight", self.args.quantize):
            yield from self._quantized(name, processes, rank)
            return
        entry, axis = self._entry(name), split_axis(name)
        for piece in self._numbers(entry, axis, processes, rank):
            yield to_pairs(piece, self.args.head_dim) if self._turned(name) else piece

    def _turned(self, name: str) -> bool:
        """Whether rows are in transformers' order: those of a llama are in Meta's."""
        return self._architecture != "llama" and turns_in_halves(name)

    def _quantized(self, name: str, processes: int, rank: int) -> Iterator[Tensor]:
        """The integers of a matrix, or its scales."""
        weight = name.removesuffix("scales").removesuffix("weight") + "weight"
        own_format, entry = format_of(weight, self.args.quantize), self._entry(weight)
        assert own_format is not None
        if LOSSLESS.get(entry.kind.name) == own_format:
            blocks = self._blocks(entry)  # (rows, blocks, bytes)
            if name.endswith(".scales"):
                whole = blocks[:, :, :2].contiguous().view(torch.float16).flatten(1)
            else:
                whole = blocks[:, :, 2:].contiguous().view(integer_dtype(own_format)).flatten(1)
            release_pages(blocks)
        else:
            whole = self._requantized(weight, own_format)[name.endswith(".scales")]
        whole = to_pairs(whole, self.args.head_dim) if self._turned(weight) else whole
        axis = split_axis(name)
        (part,) = plan(whole.shape[axis or 0], 1, processes, rank)
        yield whole.narrow(axis or 0, part.start, part.stop - part.start)

    @lru_cache(maxsize=1)  # noqa: B019  # a matrix's scales are asked for right before its integers
    def _requantized(self, weight: str, own_format: str) -> tuple[Tensor, Tensor]:
        return quantize(torch.cat(list(self._numbers(self._entry(weight), 0, 1, 0))), own_format)

    def _numbers(self, entry: Entry, axis: int | None, processes: int, rank: int) -> Iterator[Tensor]:
        """What a process has of a tensor, in pieces along the axis."""
        if axis is None or len(entry.shape) == 1:
            whole = self._plain(entry)
            (part,) = plan(len(whole), 1, 1 if axis is None else processes, 0 if axis is None else rank)
            yield whole[part.start : part.stop]
            return
        (part,) = plan(entry.shape[axis], 1, processes, rank)
        if entry.kind.name in PLAIN:
            yield self._plain(entry).narrow(axis, part.start, part.stop - part.start)
            return
        blocks, per = self._blocks(entry), entry.kind.numbers
        step = max(1, AT_ONCE // entry.shape[1 - axis])
        step = -(-step // self.args.head_dim) * self.args.head_dim if axis == 0 else max(per, step // per * per)
        for begin in range(part.start, part.stop, step):
            end = min(begin + step, part.stop)
            some = blocks[begin:end] if axis == 0 else blocks[:, begin // per : -(-end // per)]
            numbers = BLOCKS[entry.kind.name](some.flatten(0, 1)).view(len(some), -1)
            release_pages(some)
            yield numbers if axis == 0 else numbers[:, begin % per : begin % per + end - begin]

    def _plain(self, entry: Entry) -> Tensor:
        if entry.kind.name not in PLAIN:
            return BLOCKS[entry.kind.name](self._bytes(entry).view(-1, entry.kind.size)).view(entry.shape)
        data, dtype = self._bytes(entry), PLAIN[entry.kind.name]
        return (data if data.data_ptr() % dtype.itemsize == 0 else data.clone()).view(dtype).view(entry.shape)

    def _blocks(self, entry: Entry) -> Tensor:
        """(rows, blocks, bytes of a block)"""
        return self._bytes(entry).view(entry.shape[0], -1, entry.kind.size)

    def _bytes(self, entry: Entry) -> Tensor:
        return self._mapped[entry.path][entry.begin : entry.begin + entry.size]

    @cached_property
    def _mapped(self) -> dict[Path, Tensor]:
        """The bytes of each file."""
        sizes = {path: path.stat().st_size for path in self.files}
        return {path: torch.from_file(str(path), size=size, dtype=torch.uint8) for path, size in sizes.items()}

    def is_mapped(self, name: str) -> bool:
        """Plain numbers, in an order and at a place as they are wanted."""
        dtype = PLAIN.get(self._entry(name).kind.name)
        return dtype is not None and not self._turned(name) and not self._entry(name).begin % dtype.itemsize

    def release(self, piece: Tensor) -> None:
        """Let go of a piece's pages; one that was computed is not mapped, and nobody reads it again."""
        release_pages(piece)

    def check(self, args: ModelArgs) -> None:
        """Raise CheckpointError that lists what is missing, unexpected, or of a wrong shape."""
        if args.n_layers > len(self._entries):  # before anything grows with it
            raise CheckpointError(f"{self.folder} says {args.n_layers} layers, and has {len(self._entries)} tensors")
        expected = {their_name(self.aliases.get(name, name)): shape for name, shape in expected_shapes(args).items()}
        faults = [f"{name} is missing" for name in expected if name not in self._entries]
        faults += [f"{name!r:.100} is unexpected" for name in self._entries if name not in expected and name != FACTORS]
        faults += [
            f"{name} has shape {self._entries[name].shape!s:.100} where the file makes it {shape}"
            for name, shape in expected.items()
            if name in self._entries and self._entries[name].shape != shape
        ]
        if faults:
            raise CheckpointError(f"{self.folder} does not fit what it says of itself: {listed(faults, '; ')}")

    def check_dtypes(self) -> None:
        """A tensor lies in one piece here."""
