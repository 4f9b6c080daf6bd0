"""`HuggingFaceFolder`: a checkpoint as transformers keeps it, config.json and files of tensors; see `Source`."""

import re
from collections.abc import Collection, Iterator
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from llama.checkpoint.config import read_config
from llama.checkpoint.layout import EMBEDDING, OUTPUT, expected_shapes, renamed, split_axis
from llama.checkpoint.pages import release_pages
from llama.checkpoint.resharding import plan
from llama.checkpoint.tensor_files import find_tensor_files, open_tensors
from llama.errors import CheckpointError
from llama.model.args import ModelArgs
from llama.wording import listed

# Their name → ours, of what stands in each layer, and of what stands once.
LAYER = {
    "self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1", "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2", "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
ONCE = {"model.embed_tokens": "tok_embeddings", "model.norm": "norm", "lm_head": "output"}
_IGNORED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq|model\.rotary_emb\.inv_freq")
_OWN = {ours: theirs for theirs, ours in (LAYER | ONCE).items()}


def their_name(name: str) -> str:
    """layers.3.attention.wq.weight → model.layers.3.self_attn.q_proj.weight."""
    return renamed(name, _OWN, "model.layers")


def turns_in_halves(name: str) -> bool:
    """Whether a tensor's rows are those of heads that RoPE turns: they are stored in another order than Meta's."""
    return ".wq." in name or ".wk." in name


def to_pairs(rows: Tensor, head_dim: int) -> Tensor:
    """Rows of whole heads in transformers' order, first numbers of all pairs and then second ones → pair after pair."""
    return rows.view(-1, 2, head_dim // 2, *rows.shape[1:]).transpose(1, 2).flatten(0, 2)


def to_halves(rows: Tensor, head_dim: int) -> Tensor:
    """The other way round."""
    return rows.view(-1, head_dim // 2, 2, *rows.shape[1:]).transpose(1, 2).flatten(0, 2)


class HuggingFaceFolder:
    """The tensors of model.safetensors, of several such files with their index, or of pytorch_model.bin, mapped."""

    shards = 1
    pads_vocabulary = True
    notes: tuple[str, ...] = ()

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files, self._index = find_tensor_files(folder)
        self._config = config = read_config(folder)
        self.args, self.end_ids = config.args, config.end_ids
        self.ignored: list[str] = []
        self.window, self.trained_length = config.window, config.trained_length
        self.described_by = [p for n in ("config.json", "generation_config.json") if (p := folder / n).is_file()]

    @cached_property
    def _tensors(self) -> dict[str, Tensor]:
        return open_tensors(self.files, self._index)

    @cached_property
    def names(self) -> Collection[str]:
        """The embedding table may be the output layer too: then it goes by both names."""
        return [name for name in expected_shapes(self.args) if self._stored(name) in self._tensors]

    def _stored(self, name: str) -> str:
        return their_name(EMBEDDING if name == OUTPUT and self._config.tied else name)

    @property
    def facts(self) -> dict[str, str]:
        config, scaling = self._config, self.args.rope_scaling
        return {
            "format": f"Hugging Face, {config.architecture}",
            "RoPE": f"{scaling.kind}, factor {scaling.factor:g}" if scaling else "",
            "positions": f"{config.trained_length}" + (f", window of {config.window}" if config.window else ""),
            "end tokens": ", ".join(map(str, config.end_ids)),
            "suggested": ", ".join(f"{name} {value}" for name, value in config.suggested.items()),
        }

    @property
    def aliases(self) -> dict[str, str]:
        return {OUTPUT: EMBEDDING} if self._config.tied else {}

    @property
    def vocab_size(self) -> int:
        table = self._tensors.get(their_name(EMBEDDING))
        if table is None or table.dim() != 2:
            raise CheckpointError(f"{self.files[0]} has no {their_name(EMBEDDING)}: it is not a Llama-2 model")
        return table.shape[0]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[self._stored(name)].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[self._stored(name)].dtype

    def slices(self, name: str, processes: int, rank: int) -> Iterator[Tensor]:
        tensor, axis = self._tensors[self._stored(name)], split_axis(name)
        if axis is not None:
            (part,) = plan(tensor.shape[axis], 1, processes, rank)
            tensor = tensor.narrow(axis, part.start, part.stop - part.start)
        if not turns_in_halves(name):
            yield tensor
            return
        yield to_pairs(tensor, self.args.head_dim)
        release_pages(tensor)

    def is_mapped(self, name: str) -> bool:
        return not turns_in_halves(name)

    def release(self, piece: Tensor) -> None:
        """Let go of a piece's pages; one whose rows were put in order is not mapped, and nobody reads it again."""
        release_pages(piece)

    def check(self, args: ModelArgs) -> None:
        """Raise CheckpointError that lists what is missing, unexpected, or of a wrong shape or dtype."""
        tensors = self._tensors
        if args.n_layers > len(tensors):  # before anything grows with it
            raise CheckpointError(
                f"{self.folder / 'config.json'} sets num_hidden_layers={args.n_layers}, but there are only"
                f" {len(tensors)} tensors: one of them is of another model"
            )
        expected = {self._stored(name): shape for name, shape in expected_shapes(args).items()}
        known = expected.keys() | {their_name(OUTPUT)} if self._config.tied else expected.keys()
        faults = [f"{name} is missing" for name in expected if name not in tensors]
        faults += [f"{n!r:.100} is unexpected" for n in tensors if n not in known and not _IGNORED.fullmatch(n)]
        faults += [fault for n, shape in expected.items() if n in tensors and (fault := _fault(n, tensors[n], shape))]
        if faults:
            raise CheckpointError(f"{self.folder} does not fit its config.json: {listed(faults, '; ')}")

    def check_dtypes(self) -> None:
        """A tensor lies in one piece here."""


def _fault(name: str, tensor: Tensor, shape: tuple[int, ...]) -> str | None:
    if tuple(tensor.shape) != shape:
        return f"{name} has shape {tuple(tensor.shape)!s:.100} where config.json makes it {shape}"
    if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"{name} is {str(tensor.dtype).removeprefix('torch.')}, not float32, float16 or bfloat16"
    return None
