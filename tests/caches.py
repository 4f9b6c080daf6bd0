"""KV caches for tests of attention."""

import torch
from torch import Tensor

from llama.model.kv_cache import KVCache, slot_view

CPU = torch.device("cpu")


def cache_of(kv_heads: int, slots: int = 4, positions: int = 20, head_dim: int = 8, layers: int = 2) -> KVCache:
    return KVCache(layers, kv_heads, slots, positions, head_dim, torch.float32, CPU)


def write(cache: KVCache, rows: Tensor, new: Tensor) -> None:
    """Put keys and values (2, n, K, D) at token rows (n,) of layer 1."""
    for stored, own in zip((cache.keys[1], cache.values[1]), new, strict=True):
        stored.flatten(1, 2)[:, rows] = own.transpose(0, 1)


def view(cache: KVCache, layer: int, slot: int, length: int) -> tuple[Tensor, Tensor]:
    """The slot's first `length` keys and values, each (K, length, D), as attention sees them."""
    keys, values = (slot_view(stored, slot, length, cache.dtype) for stored in (cache.keys[layer], cache.values[layer]))
    return keys, values
