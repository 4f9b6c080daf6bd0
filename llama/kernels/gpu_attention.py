"""Attention of single queries on CUDA, in Triton: a decode step's. Letters in shapes as in transformer.py.

A sequence is split between programs, whose sums are joined by their weights (https://arxiv.org/abs/2311.01282).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

SPLIT = 256  # positions of a sequence that one program attends to
FEW, SPLIT_OF_FEW = 64, 64  # as many in a step of up to FEW sequences · kv heads, so that all cores have work
BLOCK_SIZE = 64  # positions at a time
LOG2_E = 1.4426950408889634


@triton.jit
def _attend_kernel(
    q, keys, values, slots, positions, parts, weights, n_heads, stride, max_seq_len, scale,
    SHARED: tl.constexpr, PADDED: tl.constexpr, HEAD_DIM: tl.constexpr, WIDE: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One sequence, a kv head with the SHARED query heads that share it, SPLIT positions: their sum, and its weight."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    sequence, kv_head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(positions + sequence) + 1
    first = part * SPLIT
    if first < length:
        head, i = tl.arange(0, PADDED), tl.arange(0, WIDE)
        heads_there, wide = head < SHARED, i < HEAD_DIM
        query = (sequence * n_heads + kv_head * SHARED + head).to(tl.int64)
        own = tl.load(q + query[:, None] * HEAD_DIM + i[None, :], mask=heads_there[:, None] & wide[None, :], other=0)
        # A float8 key becomes float16 in one instruction, so its bfloat16 query becomes float16 too.
        if own.dtype == tl.bfloat16 and keys.dtype.element_ty == tl.float8e4nv:
            own, scale = (own.to(tl.float32) * scale).to(tl.float16), 1.0
        base = kv_head.to(tl.int64) * stride + tl.load(slots + sequence) * max_seq_len * HEAD_DIM
        largest = tl.full((PADDED,), float("-inf"), dtype=tl.float32)
        mass = tl.zeros((PADDED,), dtype=tl.float32)
        total = tl.zeros((PADDED, WIDE), dtype=tl.float32)
        for start in range(first, tl.minimum(first + SPLIT, length), BLOCK_SIZE):
            position = start + tl.arange(0, BLOCK_SIZE)
            seen = position < length
            at = base + position[:, None].to(tl.int64) * HEAD_DIM + i[None, :]
            mask = seen[:, None] & wide[None, :]
            k = tl.load(keys + at, mask=mask, other=0.0).to(own.dtype)
            scores = tl.dot(own, tl.trans(k)) * scale
            scores = tl.where(seen[None, :], scores, float("-inf"))
            now = tl.maximum(largest, tl.max(scores, axis=1))
            shrink, each = tl.exp2(largest - now), tl.exp2(scores - now[:, None])
            v = tl.load(values + at, mask=mask, other=0.0).to(own.dtype)
            mass = mass * shrink + tl.sum(each, axis=1)
            total = total * shrink[:, None] + tl.dot(each.to(own.dtype), v)
            largest = now
        row = query * tl.num_programs(2) + part
        tl.store(
            parts + row[:, None] * HEAD_DIM + i[None, :],
            total / mass[:, None],
            mask=heads_there[:, None] & wide[None, :],
        )
        tl.store(weights + row, largest + tl.log2(mass), mask=heads_there)


@triton.jit
def _join_kernel(
    parts, weights, positions, out, n_heads, n_parts,
    HEAD_DIM: tl.constexpr, WIDE: tl.constexpr, MOST: tl.constexpr, SPLIT: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One query head: the sums of its parts, added by their weights."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    sequence, head = tl.program_id(0), tl.program_id(1)
    used = (tl.load(positions + sequence) + SPLIT) // SPLIT
    part, i = tl.arange(0, MOST), tl.arange(0, WIDE)
    there, wide = part < used, i < HEAD_DIM
    query = (sequence * n_heads + head).to(tl.int64)
    weight = tl.load(weights + query * n_parts + part, mask=there, other=float("-inf"))
    weight = tl.exp2(weight - tl.max(weight, axis=0))
    at = parts + (query * n_parts + part[:, None]) * HEAD_DIM + i[None, :]
    each = tl.load(at, mask=there[:, None] & wide[None, :], other=0)
    total = tl.sum(each * weight[:, None], axis=0) / tl.sum(weight, axis=0)
    tl.store(out + query * HEAD_DIM + i, total.to(out.dtype.element_ty), mask=wide)


def attend(
    q: Tensor, keys: Tensor, values: Tensor, slots: Tensor, positions: Tensor, early: bool = False
) -> Tensor:  # fmt: skip
    """Attention of single queries: q (N, H, D), of sequences in slots (N,) at positions (N,), which they see too.

    Keys and values (K, S, P, D) are a layer's cache, of q's dtype or float8. Long sequences are split between programs,
    as many as the longest may need, so that the launch does not depend on lengths that only the device knows. `early`:
    begin before the kernels ahead have ended, and wait for them then.
    """
    q = q.contiguous()
    (n, n_heads, head_dim), (n_kv_heads, _, max_seq_len, _) = q.shape, keys.shape
    split = SPLIT_OF_FEW if n * n_kv_heads <= FEW else SPLIT
    n_parts, shared = triton.cdiv(max_seq_len, split), n_heads // n_kv_heads
    parts = torch.empty((n, n_heads, n_parts, head_dim), dtype=torch.float32, device=q.device)
    weights = torch.empty((n, n_heads, n_parts), dtype=torch.float32, device=q.device)
    options: dict[str, int | bool] = {"launch_pdl": True} if early else {}
    options |= {"WIDE": max(16, triton.next_power_of_2(head_dim)), "SPLIT": split, "EARLY": early, "num_warps": 4}
    _attend_kernel[(n, n_kv_heads, n_parts)](
        q, keys, values, slots, positions, parts, weights, n_heads, keys.stride(0), max_seq_len,
        head_dim**-0.5 * LOG2_E, SHARED=shared, PADDED=max(16, triton.next_power_of_2(shared)), HEAD_DIM=head_dim,
        BLOCK_SIZE=BLOCK_SIZE, num_stages=2, **options,
    )  # fmt: skip
    out = torch.empty_like(q)
    _join_kernel[(n, n_heads)](
        parts, weights, positions, out, n_heads, n_parts, HEAD_DIM=head_dim, MOST=triton.next_power_of_2(n_parts),
        **options,
    )  # fmt: skip
    return out
