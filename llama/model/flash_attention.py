"""PyTorch's flash kernel over the KV cache: all queries of a step in one call, on CUDA.

The cache is not copied. Its (S · P) token rows are the kernel's axis of keys: a sequence's keys begin at row slot · P,
and there are as many as its length says. So slots need not be next to each other, nor full.
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

FLASH_MAX_HEAD_DIM = 256


@dataclass(frozen=True, slots=True)
class FlashAttention:
    """An attention plan (see attention.py) for all of a step: where its n sequences' queries and keys are."""

    query_starts: Tensor  # (n + 1,) int32, rows of the step where each one's queries begin; the last: where all end
    key_starts: Tensor  # (n + 1,) int32, token rows of the cache where each one's keys begin; the last is not used
    lengths: Tensor  # (n,) int32, the keys that each one's last query sees; those before it see one less each
    most_queries: int
    most_keys: int

    def __call__(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Each query of q (N, H, D) attends up to its own position in keys and values (K, S, P, D) → (N, H, D)."""
        keys, values = keys.flatten(1, 2).transpose(0, 1), values.flatten(1, 2).transpose(0, 1)  # (S · P, K, D), views
        where = (self.query_starts, self.key_starts, self.most_queries, self.most_keys)
        if varlen_attn := _varlen_attn():
            out = varlen_attn(
                q, keys, values, *where, window_size=(-1, 0), enable_gqa=q.shape[1] != keys.shape[1],
                seqused_k=self.lengths,
            )  # fmt: skip
            assert isinstance(out, Tensor)  # it adds more only where it is asked to
            return out
        # Dropout, whether causal, whether to return the mask.
        attended: Tensor = torch.ops.aten._flash_attention_forward(
            q, keys, values, *where, 0.0, True, False, seqused_k=self.lengths
        )[0]
        return attended


def flash_kernel_reads(keys: Tensor) -> bool:
    """Whether the kernel reads a cache like these keys (K, S, P, D): 16 bits, on an Ampere GPU or a later one."""
    head_dim = keys.shape[-1]
    if keys.device.type != "cuda" or keys.dtype not in (torch.bfloat16, torch.float16):
        return False
    return head_dim <= FLASH_MAX_HEAD_DIM and head_dim % 8 == 0 and compute_capability(keys.device) >= AMPERE


def plan_flash(step: Step, cache: KVCache) -> FlashAttention:
    """A decode step's plan is made on the device alone, from tensors whose numbers a CUDA graph may find changed."""
    if step.decodes:
        n, device = len(step.tokens), step.tokens.device
        key_starts = pad(cache.rows(step.slots, torch.zeros_like(step.slots)), (0, 1)).int()
        query_starts = torch.arange(n + 1, dtype=torch.int32, device=device)
        return FlashAttention(query_starts, key_starts, (step.positions + 1).int(), 1, cache.max_seq_len)
    columns = [(span.first_row, span.slot * cache.max_seq_len, span.length) for span in step.spans]
    columns.append((len(step.tokens), 0, 0))
    starts = torch.tensor(columns, dtype=torch.int32).T.contiguous().to(step.tokens.device)
    return FlashAttention(
        starts[0], starts[1], starts[2][:-1], max(span.n for span in step.spans), cache.max_seq_len
    )  # fmt: skip


@functools.cache
def _varlen_attn() -> Callable[..., Tensor | tuple[Tensor, Tensor]] | None:
    """PyTorch's public function, where it takes the lengths of slots (2.12 and later).

    Older versions have only the operator beneath it, which then is called directly.
    """
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn if "seqused_k" in inspect.signature(varlen_attn).parameters else None
