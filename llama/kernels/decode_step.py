"""A whole decode step in one call of our library: steps of few rows, on one CPU process."""

import ctypes
from typing import Any

import torch
from torch import Tensor

from llama.kernels.dispatch import cpu_library
from llama.kernels.library import (
    CACHE_CODES,
    DTYPE_CODES,
    FORMAT_CODES,
    STORED_CODES,
    load,
    variant,
    without_tiles,
)
from llama.kernels.plain import can_multiply, most_rows, table_of
from llama.kernels.quantized import is_packed

ANY = 1 << 30
MOST_ROWS = 16  # of a step: with more, calls take little of its time
_MATRICES = ("attention.wqkv", "attention.wo", "feed_forward.w13", "feed_forward.w2")


class Shape(ctypes.Structure):
    """decode_step.c's Shape."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("n", "dim", "hidden", "vocab", "n_heads", "n_kv_heads", "head_dim")),
        *((name, ctypes.c_int64) for name in ("max_seq_len", "slots")),
        ("eps", ctypes.c_float),
        *((name, ctypes.c_int) for name in ("dtype", "stored", "format", "output_format", "variant", "threads")),
    ]  # fmt: skip


class DecodeStep:
    """A model, its RoPE table and a cache as tables of pointers; their memory must stay where it is.

    The model and the cache are `Any`: this package lies below theirs and may not import their types.
    """

    def __init__(self, model: Any, freqs_cis: Tensor, cache: Any) -> None:
        args = model.params
        self._freqs_cis, self._cache = freqs_cis, cache
        self._workspace = torch.empty(0, dtype=torch.uint8)
        self._tables: list[Tensor] = []  # of weights as they are stored
        layers = []
        for layer, keys, values in zip(model.layers, cache.keys, cache.values, strict=True):
            wqkv, wo, w13, w2 = (layer.get_submodule(name) for name in _MATRICES)
            layers.append([
                layer.attention_norm.weight.data_ptr(), *self._pointers(wqkv), *self._pointers(wo),
                layer.ffn_norm.weight.data_ptr(), *self._pointers(w13), *self._pointers(w2),
                keys.data_ptr(), values.data_ptr(),
            ])  # fmt: skip
        self._layers = torch.tensor(layers, dtype=torch.int64)
        ends = [model.tok_embeddings.weight.data_ptr(), model.norm.weight.data_ptr(), *self._pointers(model.output)]
        self._ends = torch.tensor([*ends, freqs_cis.data_ptr()], dtype=torch.int64)
        self._shape = Shape(
            dim=args.dim, hidden=args.hidden_dim, vocab=args.vocab_size, n_heads=args.n_heads,
            n_kv_heads=args.kv_heads, head_dim=args.head_dim, max_seq_len=cache.max_seq_len, slots=cache.slots,
            eps=args.norm_eps, dtype=DTYPE_CODES[model.dtype], stored=CACHE_CODES[cache.keys[0].dtype],
            format=_code(wo.weight), output_format=_code(model.output.weight),
            variant=without_tiles(variant()) if model.batch_invariant else variant(),
        )  # fmt: skip

    def _pointers(self, linear: Any) -> tuple[int, int]:
        """llama_product's `w` and `scales`."""
        if is_packed(linear.weight):
            return linear.weight.data_ptr(), 0 if linear.scales is None else linear.scales.data_ptr()
        self._tables.append(table_of(tuple(getattr(linear, "parts", ())) or (linear.weight,)))
        return self._tables[-1].data_ptr(), 0

    def is_of(self, freqs_cis: Tensor, cache: Any) -> bool:
        """Whether these pointers are those of that RoPE table and cache."""
        return self._freqs_cis is freqs_cis and self._cache is cache

    def run(self, tokens: Tensor, slots: Tensor, positions: Tensor, longest: int) -> Tensor:
        """Tokens (N,) at `positions` of their `slots`, none of which then holds more than `longest` tokens → logits
        (N, vocab) float32. Their keys and values are in the cache then; tokens of one slot see those before them."""
        shape, n = self._shape, len(tokens)
        shape.n, shape.threads = n, torch.get_num_threads()
        library = load()[0]
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


def can_fuse_on_cpu(rows: int, model: Any, cache: Any) -> bool:
    """Whether `DecodeStep` can compute a step of so many rows: where our kernels read the matrices."""
    keys, matrices = cache.keys[0], (model.output.weight, model.layers[-1].attention.wo.weight)
    if model.params.has_bias or not all(
        is_packed(w) or can_multiply(w, model.dtype, rows, model.batch_invariant) for w in matrices
    ):
        return False
    return rows <= MOST_ROWS and keys.dtype in CACHE_CODES


def rows_alike(model: Any) -> int:
    """How many rows a step may have of which each is computed as if it were alone, as far as our kernels compute it."""
    if model.batch_invariant:
        return ANY
    library = cpu_library(model.norm.weight)
    if library is None:
        return MOST_ROWS
    packed = min(MOST_ROWS, int(library.llama_most_rows(DTYPE_CODES[model.dtype], variant())))
    if model.placement:  # weights on the disk are not there yet
        return min(packed, most_rows())
    return packed if is_packed(model.output.weight) else most_rows()


def _code(weight: Tensor) -> int:
    return FORMAT_CODES[weight.dtype] if is_packed(weight) else STORED_CODES[weight.dtype]
