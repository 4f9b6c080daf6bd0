"""All layers of a decode step in one call of our library, for steps of few rows on one CPU process."""

import ctypes
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from llama.kernels.library import DTYPES, VARIANTS, usable, variant

MOST_ROWS = 8  # of a step: for more, calls weigh little
MOST_PLAIN_ROWS = 2  # the same for bfloat16 weights: for more, PyTorch's product of bfloat16 is faster
_PLAIN = 2  # the format of weights that are not quantised
_MATRICES = ("attention.wqkv", "attention.wo", "feed_forward.w13", "feed_forward.w2")


class Shape(ctypes.Structure):
    """layers.c's Shape."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("n", "longest", "dim", "hidden", "n_heads", "n_kv_heads", "head_dim")),
        ("stride", ctypes.c_int64),
        ("eps", ctypes.c_float),
        *((name, ctypes.c_int) for name in ("dtype", "format", "variant", "threads")),
    ]  # fmt: skip


class Layers:
    """The layers of a model and a cache as a table of pointers; both must stay where they are."""

    def __init__(self, layers: Iterable[Any], keys: list[Tensor], values: list[Tensor], eps: float) -> None:
        self._held = (keys, values)
        table, form = [], _PLAIN
        for layer, own_keys, own_values in zip(layers, keys, values, strict=True):
            wqkv, wo, w13, w2 = (layer.get_submodule(name) for name in _MATRICES)
            if wo.scales is not None:
                form = 0 if wo.weight.dtype == torch.int8 else 1
            table.append([
                layer.attention_norm.weight.data_ptr(), *_pointers(wqkv), *_pointers(wo),
                layer.ffn_norm.weight.data_ptr(), *_pointers(w13), *_pointers(w2),
                own_keys.data_ptr(), own_values.data_ptr(),
            ])  # fmt: skip
        self._table = torch.tensor(table, dtype=torch.int64)
        n_kv_heads, _, _, head_dim = keys[0].shape
        dim = layer.ffn_norm.weight.shape[0]
        self._shape = Shape(
            dim=dim, hidden=w13.weight.shape[0] // 2, n_heads=layer.attention.n_heads, n_kv_heads=n_kv_heads,
            head_dim=head_dim, stride=keys[0].stride(0), eps=eps, dtype=DTYPES[keys[0].dtype], format=form,
            variant=variant(),
        )  # fmt: skip

    def of(self, keys: list[Tensor]) -> bool:
        """Whether this is the table of that cache."""
        return self._held[0] is keys

    def run(self, x: Tensor, turns: Tensor, places: Tensor, singles: Any) -> Tensor:
        """x (N, dim) after all layers, in place. Row n is a sequence's next token; see attention.Singles, and
        small.turn_and_store for `turns` and `places`."""
        library, shape = usable(x), self._shape
        assert library is not None and x.is_contiguous()
        shape.n, shape.longest, shape.threads = x.shape[0], singles.longest, torch.get_num_threads()
        angles = torch.view_as_real(turns).contiguous()
        workspace = torch.empty(library.llama_layers_workspace(ctypes.byref(shape)), dtype=torch.uint8)
        library.llama_layers(
            self._table.data_ptr(), len(self._table), ctypes.byref(shape), x.data_ptr(), angles.data_ptr(),
            singles.rows.data_ptr(), places.data_ptr(), singles.starts.data_ptr(), singles.lengths.data_ptr(),
            workspace.data_ptr(),
        )  # fmt: skip
        return x


def can_run(x: Tensor, quantized: bool) -> bool:
    """Whether `Layers` can compute a step of rows x (N, dim): bfloat16 weights need instructions for them."""
    if x.shape[0] > (MOST_ROWS if quantized else MOST_PLAIN_ROWS) or usable(x) is None:
        return False
    return quantized or (x.dtype == torch.bfloat16 and VARIANTS[variant()] == "amx")


def _pointers(linear: Any) -> tuple[int, int]:
    return linear.weight.data_ptr(), 0 if linear.scales is None else linear.scales.data_ptr()
