"""Attention of a packed step's queries over each sequence's own slot of the KV cache."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from llama.kv_cache import KVCache
from llama.step import Span, Step


@dataclass(frozen=True, slots=True)
class SpanMask:
    """A span and its mask (n, length), True where a query may look; None where SDPA needs no mask tensor."""

    span: Span
    mask: Tensor | None


def span_masks(step: Step) -> list[SpanMask]:
    """The mask of each span: the same for every layer, so made once a step.

    Only a chunk that continues a prompt needs one: SDPA's own causal mask assumes that the first query is at
    position 0, and a single query sees all that its slot holds.
    """
    return [SpanMask(span, _chunk_mask(span, step.tokens.device)) for span in step.spans]


def _chunk_mask(span: Span, device: torch.device) -> Tensor | None:
    if span.n == 1 or span.start == 0:
        return None
    return torch.ones(span.n, span.length, dtype=torch.bool, device=device).tril(span.start)


def attention(q: Tensor, cache: KVCache, layer: int, masks: list[SpanMask]) -> Tensor:
    """Queries (N, H, D) → (N, H, D). The step's keys and values must be in the cache already.

    The H / K query heads that share a kv head never get copies of it: a single query's heads become query
    positions of that head; a longer span sees it through a view of stride 0.
    """
    out = torch.empty_like(q)
    n_heads, head_dim = q.shape[1:]
    for item in masks:
        span = item.span
        keys, values = cache.view(layer, span.slot, span.length)
        n_kv_heads = keys.shape[0]
        queries = q[span.rows].view(span.n, n_kv_heads, n_heads // n_kv_heads, head_dim)
        if span.n == 1:
            heads = scaled_dot_product_attention(queries, keys[None], values[None])  # (1, K, H/K, D)
            out[span.rows] = heads.view(1, n_heads, head_dim)
            continue
        queries = queries.permute(1, 2, 0, 3)  # (K, H/K, n, D)
        shape = (*queries.shape[:2], span.length, head_dim)
        heads = scaled_dot_product_attention(
            queries, keys[:, None].expand(shape), values[:, None].expand(shape), item.mask, is_causal=item.mask is None
        )
        out[span.rows] = heads.permute(2, 0, 1, 3).flatten(1, 2)
    return out
