"""Attention of a packed step's queries over each sequence's own slot of the KV cache."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from llama.kernels.dispatch import gpu_kernels, load_gpu, usable
from llama.kernels.ops import MOST_HEAD_DIM, attend
from llama.model.flash_attention import Packed, can_run, flash_attention, pack
from llama.model.kv_cache import KVCache
from llama.model.step import Span, Step


@dataclass(frozen=True, slots=True)
class SpanMask:
    """A span and its mask (n, length), True where a query may look; None where SDPA needs no mask tensor."""

    span: Span
    mask: Tensor | None


@dataclass(frozen=True, slots=True)
class Singles:
    """The spans of one token each that our own kernel computes together: their rows, and where their slots begin."""

    rows: Tensor  # (n,) int64, of the step
    starts: Tensor  # (n,) int64, token rows of the cache
    lengths: Tensor  # (n,) int64
    longest: int


@dataclass(frozen=True, slots=True)
class GPUSingles:
    """The same on CUDA, where only the device may know which slots and lengths they are."""

    rows: Tensor | None  # (n,) int64, of the step; None: all
    slots: Tensor  # (n,) int64
    positions: Tensor  # (n,) int64


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """How a step's spans are computed: the same in every layer, so made once a step."""

    spans: list[SpanMask]
    singles: Singles | GPUSingles | None = None
    packed: Packed | None = None  # all spans, for the flash kernel


def plan(step: Step, cache: KVCache) -> AttentionPlan:
    """Single queries go to our kernels, in one call; on CUDA prompts go to the flash kernel. Else SDPA takes a span.

    Only a chunk that continues a prompt needs a mask: SDPA's own causal mask assumes that the first query is at
    position 0, and a single query sees all that its slot holds.
    """
    on_gpu = on_device(cache)
    if on_gpu and step.decodes:
        return AttentionPlan([], GPUSingles(None, step.slots, step.positions))
    if can_run(cache.keys[0]):
        return AttentionPlan([], packed=pack(step, cache))
    together = on_gpu or (usable(cache.keys[0]) is not None and cache.keys[0].shape[-1] <= MOST_HEAD_DIM)
    single = [span for span in step.spans if span.n == 1] if together else []
    rest = [span for span in step.spans if span.n > 1 or not together]
    masked = [SpanMask(span, _chunk_mask(span, step.tokens.device)) for span in rest]
    if not single:
        return AttentionPlan(masked)
    return AttentionPlan(masked, _gpu_singles(single, step) if on_gpu else _singles(single, cache))


def on_device(cache: KVCache) -> bool:
    """Whether our kernel for CUDA can read the cache."""
    return gpu_kernels(torch.empty(0, dtype=cache.dtype, device=cache.keys[0].device)) is not None


def _singles(spans: list[Span], cache: KVCache) -> Singles:
    facts = [(span.first_row, span.slot * cache.max_seq_len, span.length) for span in spans]
    rows, starts, lengths = torch.tensor(facts, dtype=torch.int64).T.contiguous()
    return Singles(rows, starts, lengths, max(span.length for span in spans))


def _gpu_singles(spans: list[Span], step: Step) -> GPUSingles:
    rows = torch.tensor([span.first_row for span in spans], dtype=torch.int64).to(step.tokens.device)
    return GPUSingles(rows, step.slots[rows], step.positions[rows])


def _chunk_mask(span: Span, device: torch.device) -> Tensor | None:
    if span.n == 1 or span.start == 0:
        return None
    return torch.ones(span.n, span.length, dtype=torch.bool, device=device).tril(span.start)


def attention(q: Tensor, cache: KVCache, layer: int, plan: AttentionPlan) -> Tensor:
    """Queries (N, H, D) → (N, H, D). The step's keys and values must be in the cache already.

    The H / K query heads that share a kv head never get copies of it: a single query's heads become query
    positions of that head; a longer span sees it through a view of stride 0.
    """
    keys, values = cache.keys[layer], cache.values[layer]
    if plan.packed:
        return flash_attention(q, keys, values, plan.packed)
    one, q = plan.singles, q.contiguous()
    if isinstance(one, GPUSingles) and one.rows is None:
        return load_gpu(q.device).attend(q, keys, values, one.slots, one.positions)
    out = torch.empty_like(q)
    if isinstance(one, GPUSingles):
        out[one.rows] = load_gpu(q.device).attend(q[one.rows], keys, values, one.slots, one.positions)
    elif one:
        attend(q, keys, values, out, one.rows, one.starts, one.lengths, one.longest)
    n_heads, head_dim = q.shape[1:]
    for item in plan.spans:
        span = item.span
        keys, values = cache.view(layer, span.slot, span.length)
        n_kv_heads = keys.shape[0]
        queries = q[span.rows].view(span.n, n_kv_heads, n_heads // n_kv_heads, head_dim)
        if span.n == 1:
            heads = scaled_dot_product_attention(queries, keys[None], values[None])  # (1, K, H/K, D)
            out[span.rows] = heads.reshape(1, n_heads, head_dim)  # of strides that depend on SDPA's kernel
            continue
        queries = queries.permute(1, 2, 0, 3)  # (K, H/K, n, D)
        shape = (*queries.shape[:2], span.length, head_dim)
        heads = scaled_dot_product_attention(
            queries, keys[:, None].expand(shape), values[:, None].expand(shape), item.mask, is_causal=item.mask is None
        )
        out[span.rows] = heads.permute(2, 0, 1, 3).flatten(1, 2)
    return out
