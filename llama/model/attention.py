"""Attention of a packed step's queries over each sequence's own slot of the KV cache.

How a step's attention is computed is the same in every layer, so a plan for it is made once a step and called in each
layer. Plans agree on one call: `plan(q, keys, values)` takes queries (N, H, D) and a layer's cache (K, S, P, D), which
holds the step's own keys and values already, and returns (N, H, D).

The H / K query heads that share a kv head never get copies of it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from llama.kernels.dispatch import GPUKernels, cpu_library, gpu_kernels
from llama.kernels.ops import attend
from llama.model.flash_attention import flash_kernel_reads, plan_flash
from llama.model.kv_cache import KVCache, slot_view
from llama.model.step import SHORT, Span, Step

AttentionPlan = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class GPUSingleQueries:
    """Single queries, one a sequence, by our kernel for CUDA: only the device may know their slots and positions."""

    kernels: GPUKernels
    slots: Tensor  # (N,) int64
    positions: Tensor  # (N,) int64

    def __call__(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return self.kernels.attend(q.contiguous(), keys, values, self.slots, self.positions)


class RowPlan(ABC):
    """A plan for some rows of a step, which leaves the others to further plans."""

    __slots__ = ()

    def __call__(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        q = q.contiguous()
        out = torch.empty_like(q)
        self.write(q, keys, values, out)
        return out

    @abstractmethod
    def write(self, q: Tensor, keys: Tensor, values: Tensor, out: Tensor) -> None:
        """Write this plan's rows of `out` (N, H, D); q and `out` are contiguous."""


@dataclass(frozen=True, slots=True)
class CPUQueries(RowPlan):
    """Queries by our kernel for CPUs, in one call: each token's attention is the same to the bit in any company."""

    rows: Tensor  # (n,) int64, of the step, those of a span side by side
    starts: Tensor  # (n,) int64, token rows of the cache where their slots begin
    lengths: Tensor  # (n,) int64
    longest: int

    def write(self, q: Tensor, keys: Tensor, values: Tensor, out: Tensor) -> None:
        attend(q, keys, values, out, self.rows, self.starts, self.lengths, self.longest)


@dataclass(frozen=True, slots=True)
class GatheredRows(RowPlan):
    """Some rows of a step, gathered for a plan that computes all the queries it gets."""

    rows: Tensor  # (n,) int64, of the step
    plan: AttentionPlan

    def write(self, q: Tensor, keys: Tensor, values: Tensor, out: Tensor) -> None:
        out[self.rows] = self.plan(q[self.rows], keys, values)


@dataclass(frozen=True, slots=True)
class SDPA(RowPlan):
    """PyTorch's scaled_dot_product_attention, a call for each span.

    A single query's heads become query positions of their kv head; a longer span sees it through a view of stride 0.
    `masks` (n, length) are True where a query may look. Only a chunk that continues a prompt needs one: SDPA's own
    causal mask assumes that the first query is at position 0, and a single query sees all that its slot holds.
    """

    spans: tuple[Span, ...]
    masks: tuple[Tensor | None, ...]

    def write(self, q: Tensor, keys: Tensor, values: Tensor, out: Tensor) -> None:
        n_heads, head_dim = q.shape[1:]
        for span, mask in zip(self.spans, self.masks, strict=True):
            k, v = (slot_view(stored, span.slot, span.length, q.dtype) for stored in (keys, values))
            n_kv_heads = k.shape[0]
            queries = q[span.rows].view(span.n, n_kv_heads, n_heads // n_kv_heads, head_dim)
            if span.n == 1:
                heads = scaled_dot_product_attention(queries, k[None], v[None])  # (1, K, H/K, D)
                out[span.rows] = heads.reshape(1, n_heads, head_dim)  # its strides depend on SDPA's kernel
                continue
            queries = queries.permute(1, 2, 0, 3)  # (K, H/K, n, D)
            shape = (*queries.shape[:2], span.length, head_dim)
            heads = scaled_dot_product_attention(
                queries, k[:, None].expand(shape), v[:, None].expand(shape), mask, is_causal=mask is None
            )
            out[span.rows] = heads.permute(2, 0, 1, 3).flatten(1, 2)


@dataclass(frozen=True, slots=True)
class Together(RowPlan):
    """Plans whose rows are all rows of the step."""

    plans: tuple[RowPlan, ...]

    def write(self, q: Tensor, keys: Tensor, values: Tensor, out: Tensor) -> None:
        for plan in self.plans:
            plan.write(q, keys, values, out)


def plan(step: Step, cache: KVCache, invariant: bool = False, layer: int = 0) -> AttentionPlan:
    """For the layers on the device of the step, of which `layer` is one.

    Single queries go to our kernels, in one call; prompts on CUDA to the flash kernel; SDPA takes what is left.

    On a CPU our kernel takes short spans too, so that a few drafts are computed as they are one after the other, and
    all of them where results are to be `invariant`.
    """
    gpu = gpu_kernels_for(cache, layer)
    if gpu and step.decodes:
        return GPUSingleQueries(gpu, step.slots, step.positions)
    if flash_kernel_reads(cache.keys[layer]):
        return plan_flash(step, cache)
    on_cpu = cpu_library(torch.empty(0, dtype=cache.dtype, device=step.tokens.device)) is not None
    most = 1 if gpu else 0 if not on_cpu else max(span.n for span in step.spans) if invariant else SHORT
    own, rest = (tuple(span for span in step.spans if (span.n <= most) is short) for short in (True, False))
    sdpa = SDPA(rest, tuple(_chunk_mask(span, step.tokens.device) for span in rest))
    if not own:
        return sdpa
    mine = _gpu_singles(own, step, gpu) if gpu else _cpu_queries(own, cache)
    return Together((mine, sdpa)) if rest else mine


def gpu_kernels_for(cache: KVCache, layer: int = 0) -> GPUKernels | None:
    """Our kernels for CUDA, where they can read a layer's cache."""
    return gpu_kernels(torch.empty(0, dtype=cache.dtype, device=cache.keys[layer].device))


def _cpu_queries(spans: Sequence[Span], cache: KVCache) -> CPUQueries:
    rows = torch.cat([torch.arange(span.first_row, span.first_row + span.n) for span in spans])
    lengths = torch.cat([torch.arange(span.start + 1, span.length + 1) for span in spans])
    starts = torch.tensor([span.slot * cache.max_seq_len for span in spans]).repeat_interleave(
        torch.tensor([span.n for span in spans])
    )
    return CPUQueries(rows, starts, lengths, max(span.length for span in spans))


def _gpu_singles(spans: Sequence[Span], step: Step, gpu: GPUKernels) -> GatheredRows:
    rows = torch.tensor([span.first_row for span in spans], dtype=torch.int64).to(step.tokens.device)
    return GatheredRows(rows, GPUSingleQueries(gpu, step.slots[rows], step.positions[rows]))


def _chunk_mask(span: Span, device: torch.device) -> Tensor | None:
    if span.n == 1 or span.start == 0:
        return None
    return torch.ones(span.n, span.length, dtype=torch.bool, device=device).tril(span.start)
