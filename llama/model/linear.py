"""fairscale's parallel layers, made on the meta device, with the product that this device computes fastest."""

from collections.abc import Sequence
from typing import TypeVar

import torch
from fairscale.nn.model_parallel.layers import ColumnParallelLinear, ParallelEmbedding, RowParallelLinear
from fairscale.nn.model_parallel.mappings import (
    gather_from_model_parallel_region,
    reduce_from_model_parallel_region,
)
from torch import Tensor, nn
from torch.nn.functional import linear

from llama.kernels.plain import can_multiply, plain_product, widened_product
from llama.kernels.quantized import is_packed, packed_product
from llama.parallel import model_parallel_size

FEW_ROWS = 64  # up to so many a CPU multiplies half-precision weights faster from the left

Layer = TypeVar("Layer", bound=nn.Module)


def product(x: Tensor, weight: Tensor, scales: Tensor | None, outputs: int, invariant: bool = False) -> Tensor:
    """x (N, inputs) · weight (outputs, inputs)ᵀ → (N, outputs), contiguous; the weight may be quantised, or packed.

    `invariant`: a row comes out the same to the bit for any N. Only where kernels/invariance.py says that it can be.
    """
    if scales is not None or is_packed(weight):
        return packed_product(x, weight, scales, outputs, invariant)
    if can_multiply(weight, x.dtype, x.shape[0], invariant):
        return plain_product(x, weight)
    if weight.dtype != x.dtype:
        return widened_product(x, weight)
    if x.device.type == "cpu" and x.dtype != torch.float32 and x.shape[0] <= FEW_ROWS:
        if x.shape[0] == 1:
            return torch.mv(weight, x[0])[None]
        return (weight @ x.T).T.contiguous()
    return linear(x, weight)


def product_of_parts(x: Tensor, parts: Sequence[Tensor], invariant: bool = False) -> Tensor:
    """The same with a weight as it is stored, in parts of whole rows."""
    if can_multiply(parts[0], x.dtype, x.shape[0], invariant):
        return plain_product(x, *parts)
    return torch.cat([product(x, part, None, len(part)) for part in parts], 1)


class ColumnLinear(ColumnParallelLinear):  # type: ignore[misc]  # fairscale has no types
    """Each rank computes its own outputs; they are gathered where all ranks need all of them."""

    scales: Tensor | None = None
    parts: nn.ParameterList  # the weight's rows, where they lie in files as several matrices: then it has none
    invariant = False  # see `product`
    ranks: int

    def forward(self, x: Tensor) -> Tensor:
        y = (
            product_of_parts(x, tuple(self.parts), self.invariant) if len(self.parts)
            else product(x, self.weight, self.scales, self.output_size_per_partition, self.invariant)
        )  # fmt: skip
        y = _plus(y, self.bias)
        return gather_from_model_parallel_region(y) if self.gather_output and self.ranks > 1 else y


class RowLinear(RowParallelLinear):  # type: ignore[misc]  # fairscale has no types
    """Each rank has its own inputs; the partial sums are added over the ranks."""

    scales: Tensor | None = None
    invariant = False  # see `product`
    ranks: int

    def forward(self, x: Tensor) -> Tensor:
        y = product(x, self.weight, self.scales, self.out_features, self.invariant)
        return _plus(reduce_from_model_parallel_region(y) if self.ranks > 1 else y, self.bias)


def _plus(y: Tensor, bias: Tensor | None) -> Tensor:
    return y if bias is None else y + bias


def column_parallel(inputs: int, outputs: int, *, bias: bool = False, gather: bool = False) -> ColumnLinear:
    mp = model_parallel_size()
    layer = ColumnLinear(mp, mp, bias=False, gather_output=gather, init_method=lambda weight: weight)
    layer.ranks, layer.in_features, layer.out_features = mp, inputs, outputs
    layer.output_size_per_partition = outputs // mp
    layer.parts = nn.ParameterList()
    return _on_meta(layer, outputs // mp, inputs, bias)


def row_parallel(inputs: int, outputs: int, *, bias: bool = False) -> RowLinear:
    mp = model_parallel_size()
    layer = RowLinear(mp, mp, bias=False, input_is_parallel=True, init_method=lambda weight: weight)
    layer.ranks, layer.in_features, layer.out_features = mp, inputs, outputs
    layer.input_size_per_partition = inputs // mp
    return _on_meta(layer, outputs, inputs // mp, bias)


def parallel_embedding(vocab_size: int, dim: int) -> ParallelEmbedding:
    mp = model_parallel_size()
    layer = ParallelEmbedding(mp, mp, init_method=lambda weight: weight)
    layer.num_embeddings, layer.embedding_dim, layer.embedding_dim_per_partition = vocab_size, dim, dim // mp
    return _on_meta(layer, vocab_size, dim // mp)


def _on_meta(layer: Layer, rows: int, columns: int, bias: bool = False) -> Layer:
    """Give a layer that was made for size (mp, mp) its real local weight (rows, columns) and bias, on the meta device.

    fairscale's constructors allocate and fill float32 host memory, so a layer is made tiny first.
    """
    layer.weight = nn.Parameter(torch.empty(rows, columns, device="meta"), requires_grad=False)
    if bias:
        layer.bias = nn.Parameter(torch.empty(rows, device="meta"), requires_grad=False)
    return layer
