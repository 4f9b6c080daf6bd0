"""The small operations of a layer: one kernel of ours each, on a CPU or on CUDA; PyTorch's operators elsewhere."""

import torch
from torch import Tensor
from torch.nn.functional import silu

from llama.kernels.dispatch import cpu_library, gpu_kernels
from llama.kernels.library import CACHE_CODES, DTYPE_CODES, variant

WORTH_THREADS = 1 << 14  # numbers: with fewer, waking other threads takes longer than the work


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / √(mean x² + eps) · weight for rows x (N, dim), in float32 up to the weight."""
    library = cpu_library(x)
    if library is None:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        return wide.type_as(x) * weight
    x = x.contiguous()
    y = torch.empty_like(x)
    library.llama_rms_norm(
        x.data_ptr(), weight.data_ptr(), y.data_ptr(), x.shape[0], x.shape[1], eps, DTYPE_CODES[x.dtype], variant(),
        _threads(x),
    )  # fmt: skip
    return y


def add_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The `rms_norm` of residual + x (N, dim), and that sum; of x alone where there is no residual."""
    if gpu := gpu_kernels(x):
        return gpu.add_norm(x, residual, weight, eps)
    total = x if residual is None else residual + x
    return rms_norm(total, weight, eps), total


def silu_and_mul(both: Tensor) -> Tensor:
    """SwiGLU's product: (N, 2F) → silu(first half) · second half (N, F)."""
    if gpu := gpu_kernels(both):
        return gpu.silu_and_mul(both)
    library = cpu_library(both)
    if library is None:
        gate, up = both.chunk(2, dim=-1)
        return silu(gate) * up
    both = both.contiguous()
    n, hidden = both.shape[0], both.shape[1] // 2
    y = torch.empty((n, hidden), dtype=both.dtype)
    library.llama_silu_and_mul(
        both.data_ptr(), y.data_ptr(), n, hidden, DTYPE_CODES[both.dtype], variant(), _threads(both)
    )  # fmt: skip
    return y


def apply_rope(x: Tensor, freqs_cis: Tensor) -> Tensor:
    """RoPE for heads x (N, H, D), in float32: neighbouring pairs are complex numbers, multiplied by freqs_cis.

    `freqs_cis` (N, 1, D/2, 2) are the unit complex numbers of the tokens' positions.
    """
    pairs = x.float().reshape(*x.shape[:-1], -1, 2)
    if torch.compiler.is_compiling():  # which makes no code for complex numbers
        (a, b), (c, s) = pairs.unbind(-1), freqs_cis.unbind(-1)
        return torch.stack((a * c - b * s, a * s + b * c), dim=-1).flatten(-2).type_as(x)
    return torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(freqs_cis)).flatten(-2).type_as(x)


def as_stored(stored: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """The cache and numbers for it, in a dtype in which both can be copied; float8 as its bits, cut to its range."""
    if stored.dtype != torch.float8_e4m3fn:
        return stored, new
    most = torch.finfo(stored.dtype).max
    return stored.view(torch.uint8), new.clamp(-most, most).to(stored.dtype).view(torch.uint8)


def rope_and_store(
    heads: Tensor, freqs_cis: Tensor, keys: Tensor, values: Tensor, rows: Tensor, n_heads: int
) -> Tensor:  # fmt: skip
    """Apply RoPE to the queries and keys among heads (N, H + 2K, D), and store keys and values.

    The first H heads are queries, which come back as (N, H, D); then come K keys and K values. `freqs_cis`: see
    `apply_rope`; `keys` and `values` (K, S, P, D) are a layer's cache, of which token n gets row rows[n] of (S · P).
    """
    if gpu := gpu_kernels(heads):
        return gpu.rope_and_store(heads, freqs_cis, keys, values, rows, n_heads)
    library, n_kv_heads = cpu_library(heads), keys.shape[0]
    if library is None:
        rotated = apply_rope(heads[:, :-n_kv_heads], freqs_cis)
        for stored, new in ((keys, rotated[:, n_heads:]), (values, heads[:, -n_kv_heads:])):
            bits, new_bits = as_stored(stored, new)
            bits.flatten(1, 2).index_copy_(1, rows, new_bits.transpose(0, 1))
        return rotated[:, :n_heads]
    heads, freqs_cis = heads.contiguous(), freqs_cis.contiguous()
    n, _, head_dim = heads.shape
    q = torch.empty((n, n_heads, head_dim), dtype=heads.dtype)
    library.llama_rope(
        heads.data_ptr(), freqs_cis.data_ptr(), q.data_ptr(), keys.data_ptr(), values.data_ptr(), rows.data_ptr(), n,
        keys.stride(0), n_heads, n_kv_heads, head_dim, DTYPE_CODES[heads.dtype], CACHE_CODES[keys.dtype], variant(),
        _threads(heads),
    )  # fmt: skip
    return q


def attend(
    q: Tensor, keys: Tensor, values: Tensor, out: Tensor, rows: Tensor, starts: Tensor, lengths: Tensor, longest: int
) -> None:
    """Attention of n tokens' queries: out[rows[i]] (H, D) from q[rows[i]] and its slot of the cache.

    Only where there is a `cpu_library`: q and out (N, H, D) contiguous, keys and values (K, S, P, D); query i looks at
    the lengths[i] (≤ `longest`) positions that begin at row starts[i] of (S · P). Tokens of one slot, listed one after
    the other, share what is read. A row of `out` is the same to the bit whatever is beside it.
    """
    library = cpu_library(q)
    assert library is not None and q.is_contiguous() and out.is_contiguous()
    threads = torch.get_num_threads() if len(rows) * longest * q.shape[1] * q.shape[2] > WORTH_THREADS else 1
    size = library.llama_attend_workspace(longest, q.shape[2], threads)
    workspace = torch.empty(size, dtype=torch.uint8)
    library.llama_attend(
        q.data_ptr(), keys.data_ptr(), values.data_ptr(), out.data_ptr(), rows.data_ptr(), starts.data_ptr(),
        lengths.data_ptr(), workspace.data_ptr(), len(rows), longest, keys.stride(0), q.shape[1], keys.shape[0],
        q.shape[2], DTYPE_CODES[q.dtype], CACHE_CODES[keys.dtype], variant(), threads,
    )  # fmt: skip


def _threads(x: Tensor) -> int:
    return torch.get_num_threads() if x.numel() > WORTH_THREADS else 1
