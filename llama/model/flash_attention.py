"""PyTorch's flash kernel over the KV cache: all queries of a step in one call, on CUDA.

The cache is not copied: its (S · P) token rows are the kernel's axis of keys, in which a sequence's begin at row
slot · P and are as many as its length says, so slots need not be next to each other, nor full.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from llama.device import AMPERE, compute_capability
from llama.model.kv_cache import KVCache
from llama.model.step import Step

MOST_HEAD_DIM = 256


@dataclass(frozen=True, slots=True)
class Packed:
    """Where n sequences' queries and keys are."""

    queries: Tensor  # (n + 1,) int32, rows of the step where each one's begin; the last: where all end
    keys: Tensor  # (n + 1,) int32, token rows of the cache where each one's begin; the last is not used
    lengths: Tensor  # (n,) int32, the keys that each one's last query sees; those before it see one less each
    most_queries: int
    most_keys: int


def can_run(keys: Tensor) -> bool:
    """Whether the kernel reads a cache like these keys (K, S, P, D): 16 bits, on an Ampere GPU or a later one."""
    head_dim = keys.shape[-1]
    if keys.device.type != "cuda" or keys.dtype not in (torch.bfloat16, torch.float16):
        return False
    return head_dim <= MOST_HEAD_DIM and head_dim % 8 == 0 and compute_capability(keys.device) >= AMPERE


def pack(step: Step, cache: KVCache) -> Packed:
    """For a decode step all of it is made on the device, from tensors that a CUDA graph may find changed."""
    if step.decodes:
        n, device = len(step.tokens), step.tokens.device
        keys = pad(cache.rows(step.slots, torch.zeros_like(step.slots)), (0, 1)).int()
        each = torch.arange(n + 1, dtype=torch.int32, device=device)
        return Packed(each, keys, (step.positions + 1).int(), 1, cache.max_seq_len)
    facts = [(span.first_row, span.slot * cache.max_seq_len, span.length) for span in step.spans]
    facts.append((len(step.tokens), 0, 0))
    queries, keys, lengths = torch.tensor(facts, dtype=torch.int32).T.contiguous().to(step.tokens.device)
    return Packed(queries, keys, lengths[:-1], max(span.n for span in step.spans), cache.max_seq_len)


def flash_attention(q: Tensor, keys: Tensor, values: Tensor, packed: Packed) -> Tensor:
    """Queries (N, H, D) over a layer's keys and values (K, S, P, D) → (N, H, D), each query up to its own position."""
    keys, values = keys.flatten(1, 2).transpose(0, 1), values.flatten(1, 2).transpose(0, 1)  # (S · P, K, D), views
    where = (packed.queries, packed.keys, packed.most_queries, packed.most_keys)
    if varlen_attn := _varlen_attn():
        return varlen_attn(
            q, keys, values, *where, window_size=(-1, 0), enable_gqa=q.shape[1] != keys.shape[1],
            seqused_k=packed.lengths,
        )  # fmt: skip
    # Dropout, whether causal, whether to return the mask.
    return torch.ops.aten._flash_attention_forward(
        q, keys, values, *where, 0.0, True, False, seqused_k=packed.lengths
    )[0]  # fmt: skip


@functools.cache
def _varlen_attn() -> Callable[..., Tensor] | None:
    """PyTorch's public function, where it takes the lengths of slots (2.12 and later); else what it calls is called."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn if "seqused_k" in inspect.signature(varlen_attn).parameters else None
