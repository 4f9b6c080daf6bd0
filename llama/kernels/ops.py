"""The small operations of a step: one kernel of ours each, on a CPU or on CUDA; PyTorch's operators elsewhere."""

import torch
from torch import Tensor
from torch.nn.functional import silu

from llama.kernels.dispatch import DTYPES, gpu_kernels, usable, variant

MOST_HEAD_DIM = 256  # of `attend`
WORTH_THREADS = 1 << 14  # numbers: below it, waking other threads takes longer than the work


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / √(mean x² + eps) · weight for rows x (N, dim), in float32 up to the weight."""
    library = usable(x)
    if library is None:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        return wide.type_as(x) * weight
    x = x.contiguous()
    y = torch.empty_like(x)
    library.llama_rms_norm(
        x.data_ptr(), weight.data_ptr(), y.data_ptr(), x.shape[0], x.shape[1], eps, DTYPES[x.dtype], variant(),
        _threads(x),
    )  # fmt: skip
    return y


def add_norm(x: Tensor, more: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + more (N, dim), or x where that is None; and its `rms_norm`."""
    if gpu := gpu_kernels(x):
        return gpu.add_norm(x, more, weight, eps)
    total = x if more is None else x + more
    return total, rms_norm(total, weight, eps)


def gate(both: Tensor) -> Tensor:
    """SwiGLU's product: (N, 2F) → silu(first half) · second half (N, F)."""
    if gpu := gpu_kernels(both):
        return gpu.gate(both)
    library = usable(both)
    if library is None:
        opened, up = both.chunk(2, dim=-1)
        return silu(opened) * up
    both = both.contiguous()
    n, hidden = both.shape[0], both.shape[1] // 2
    y = torch.empty((n, hidden), dtype=both.dtype)
    library.llama_gate(
        both.data_ptr(), y.data_ptr(), n, hidden, DTYPES[both.dtype], variant(), _threads(both)
    )  # fmt: skip
    return y


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """Turn heads x (N, H, D) by the turns (N, 1, D/2, 2) of their positions, in float32."""
    pairs = x.float().unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():  # which makes no code for complex numbers
        (a, b), (c, s) = pairs.unbind(-1), turns.unbind(-1)
        return torch.stack((a * c - b * s, a * s + b * c), dim=-1).flatten(-2).type_as(x)
    return torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(turns)).flatten(-2).type_as(x)


def as_stored(stored: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """The cache and numbers for it, in a dtype in which both can be copied; float8 as its bits, cut to its range."""
    if stored.dtype != torch.float8_e4m3fn:
        return stored, new
    most = torch.finfo(stored.dtype).max
    return stored.view(torch.uint8), new.clamp(-most, most).to(stored.dtype).view(torch.uint8)


def turn_and_store(
    heads: Tensor, turns: Tensor, keys: Tensor, values: Tensor, rows: Tensor, n_heads: int
) -> Tensor:  # fmt: skip
    """Heads (N, H + 2K, D): the first H, turned, come back as (N, H, D); the next K, turned, and the last K are stored.

    `turns` (N, 1, D/2, 2) float32 are those of the tokens' positions; `keys` and `values` (K, S, P, D) a layer's cache,
    of which token n gets row rows[n] of (S · P).
    """
    if gpu := gpu_kernels(heads):
        return gpu.turn_and_store(heads, turns, keys, values, rows, n_heads)
    library, n_kv_heads = usable(heads), keys.shape[0]
    if library is None or keys.dtype != heads.dtype:
        turned = rotate(heads[:, :-n_kv_heads], turns)
        for stored, new in ((keys, turned[:, n_heads:]), (values, heads[:, -n_kv_heads:])):
            bits, new_bits = as_stored(stored, new)
            bits.flatten(1, 2).index_copy_(1, rows, new_bits.transpose(0, 1))
        return turned[:, :n_heads]
    heads, turns = heads.contiguous(), turns.contiguous()
    n, _, head_dim = heads.shape
    q = torch.empty((n, n_heads, head_dim), dtype=heads.dtype)
    library.llama_turn(
        heads.data_ptr(), turns.data_ptr(), q.data_ptr(), keys.data_ptr(), values.data_ptr(), rows.data_ptr(), n,
        keys.stride(0), n_heads, n_kv_heads, head_dim, DTYPES[heads.dtype], variant(), _threads(heads),
    )  # fmt: skip
    return q


def attend(
    q: Tensor, keys: Tensor, values: Tensor, out: Tensor, rows: Tensor, starts: Tensor, lengths: Tensor, longest: int
) -> None:
    """Attention of single queries, one a sequence: out[rows[i]] (H, D) from q[rows[i]] and its slot of the cache.

    Only where `usable`: q and out (N, H, D) contiguous, keys and values (K, S, P, D); query i looks at the lengths[i]
    (≤ `longest`) positions that begin at row starts[i] of (S · P).
    """
    library = usable(q)
    assert library is not None and q.is_contiguous() and out.is_contiguous()
    threads = torch.get_num_threads() if len(rows) * longest * q.shape[1] * q.shape[2] > WORTH_THREADS else 1
    scores = torch.empty(threads * longest, dtype=torch.float32)
    library.llama_attend(
        q.data_ptr(), keys.data_ptr(), values.data_ptr(), out.data_ptr(), rows.data_ptr(), starts.data_ptr(),
        lengths.data_ptr(), scores.data_ptr(), len(rows), longest, keys.stride(0), q.shape[1], keys.shape[0],
        q.shape[2], DTYPES[q.dtype], variant(), threads,
    )  # fmt: skip


def choose(logits: Tensor) -> tuple[list[int], list[bool]]:
    """Of each row of logits (R, V) float32: the first of the largest, and whether all are finite."""
    library = usable(logits)
    if library is None:
        return logits.argmax(-1).tolist(), logits.sum(-1).isfinite().tolist()
    logits = logits.contiguous()
    tokens, finite = torch.empty(len(logits), dtype=torch.int64), torch.empty(len(logits), dtype=torch.bool)
    library.llama_choose(
        logits.data_ptr(), tokens.data_ptr(), finite.data_ptr(), logits.shape[0], logits.shape[1], variant()
    )  # fmt: skip
    return tokens.tolist(), finite.tolist()


def draw(logits: Tensor, numbers: Tensor, top_k: Tensor) -> Tensor:
    """`sampling.sample`, where `usable`: `numbers` (4, R) are temperature, top_p, min_p and noise."""
    library = usable(logits)
    assert library is not None
    logits, numbers, (rows, vocab) = logits.contiguous(), numbers.contiguous(), logits.shape
    tokens, threads = torch.empty(rows, dtype=torch.int64), min(rows, torch.get_num_threads())
    workspace = torch.empty(threads * library.llama_sample_workspace(vocab), dtype=torch.uint8)
    library.llama_sample(
        logits.data_ptr(), numbers.data_ptr(), top_k.data_ptr(), tokens.data_ptr(), workspace.data_ptr(), rows, vocab,
        variant(), threads,
    )  # fmt: skip
    return tokens


def _threads(x: Tensor) -> int:
    return torch.get_num_threads() if x.numel() > WORTH_THREADS else 1
