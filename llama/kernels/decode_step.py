"""A whole decode step in one call of our library: steps of few rows, one token a sequence, on one CPU process."""

import ctypes
from typing import Any

import torch
from torch import Tensor

from llama.kernels.dispatch import DTYPES, usable, variant
from llama.kernels.ops import MOST_HEAD_DIM
from llama.kernels.quantized import NUMBERS, is_packed

MOST_ROWS = 16  # of a step: for more, calls weigh little
_MATRICES = ("attention.wqkv", "attention.wo", "feed_forward.w13", "feed_forward.w2")


class Shape(ctypes.Structure):
    """layers.c's Shape."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("n", "dim", "hidden", "vocab", "n_heads", "n_kv_heads", "head_dim")),
        *((name, ctypes.c_int64) for name in ("max_seq_len", "slots")),
        ("eps", ctypes.c_float),
        *((name, ctypes.c_int) for name in ("dtype", "format", "output_format", "variant", "threads")),
    ]  # fmt: skip


class DecodeStep:
    """A model and a cache as tables of pointers; both must stay where they are."""

    def __init__(self, model: Any, cache: Any) -> None:
        args = model.params
        self._held = (model.rope, cache)
        self._workspace = torch.empty(0, dtype=torch.uint8)
        layers = []
        for layer, keys, values in zip(model.layers, cache.keys, cache.values, strict=True):
            wqkv, wo, w13, w2 = (layer.get_submodule(name) for name in _MATRICES)
            layers.append([
                layer.attention_norm.weight.data_ptr(), *_pointers(wqkv), *_pointers(wo),
                layer.ffn_norm.weight.data_ptr(), *_pointers(w13), *_pointers(w2), keys.data_ptr(), values.data_ptr(),
            ])  # fmt: skip
        self._layers = torch.tensor(layers, dtype=torch.int64)
        ends = [model.tok_embeddings.weight.data_ptr(), model.norm.weight.data_ptr(), *_pointers(model.output)]
        self._ends = torch.tensor([*ends, model.rope.data_ptr()], dtype=torch.int64)
        self._shape = Shape(
            dim=args.dim, hidden=args.hidden_dim, vocab=args.vocab_size, n_heads=args.n_heads,
            n_kv_heads=args.kv_heads, head_dim=args.head_dim, max_seq_len=cache.max_seq_len, slots=cache.slots,
            eps=args.norm_eps, dtype=DTYPES[model.dtype], format=NUMBERS[wo.weight.dtype],
            output_format=NUMBERS[model.output.weight.dtype], variant=variant(),
        )  # fmt: skip

    def of(self, rope: Tensor, cache: Any) -> bool:
        """Whether these are the tables of that cache, and of that table of turns."""
        return self._held[0] is rope and self._held[1] is cache

    def run(self, tokens: Tensor, slots: Tensor, positions: Tensor, longest: int) -> Tensor:
        """Tokens (N,), the next of N sequences, at `positions` of their `slots`, none of which then holds more than
        `longest` tokens → logits (N, vocab) float32. Their keys and values are in the cache then."""
        shape, n = self._shape, len(tokens)
        shape.n, shape.threads = n, torch.get_num_threads()
        library = usable(self._held[1].keys[0])
        assert library is not None
        needed = library.llama_step_workspace(ctypes.byref(shape), shape.max_seq_len)
        if self._workspace.numel() < needed:
            self._workspace = torch.empty(needed, dtype=torch.uint8)
        logits = torch.empty((n, shape.vocab), dtype=torch.float32)
        library.llama_step(
            self._layers.data_ptr(), len(self._layers), self._ends.data_ptr(), ctypes.byref(shape), tokens.data_ptr(),
            slots.data_ptr(), positions.data_ptr(), longest, logits.data_ptr(), self._workspace.data_ptr(),
        )  # fmt: skip
        return logits


def can_run(rows: int, model: Any, cache: Any) -> bool:
    """Whether `DecodeStep` can compute a step of so many rows: where the matrices are packed for our kernels."""
    keys = cache.keys[0]
    packed = is_packed(model.output.weight) and is_packed(model.layers[-1].attention.wo.weight)
    return packed and rows <= MOST_ROWS and keys.dtype == model.dtype and keys.shape[-1] <= MOST_HEAD_DIM


def _pointers(linear: Any) -> tuple[int, int]:
    return linear.weight.data_ptr(), 0 if linear.scales is None else linear.scales.data_ptr()
