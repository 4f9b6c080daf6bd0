"""A decode step of one sequence on CUDA, in Triton: six kernels a layer, which read the weights at the memory's rate.

A product with one row is no work for matrix units. A program has a few rows of weights and asks for all of them before
the kernel ahead of it has ended (programmatic dependent launch, from Hopper on), so that memory never rests; norms,
RoPE, SwiGLU and the residual sums are computed where their inputs are in registers anyway.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from llama.device import HOPPER, compute_capability
from llama.kernels.gpu import GROUP, INTERPRETED
from llama.kernels.gpu_attention import attend

# Four bytes of weights → float32: bits put into the mantissa of a power of two are that power and the number. What the
# power and the zero point add to a product is taken off once a group, below.
INT8_TO_FLOAT32 = tl.constexpr("""{ .reg .b32 u; xor.b32 u, $4, 0x80808080;
    prmt.b32 $0, u, 0x47000000, 0x7404; prmt.b32 $1, u, 0x47000000, 0x7414;
    prmt.b32 $2, u, 0x47000000, 0x7424; prmt.b32 $3, u, 0x47000000, 0x7434; }""")
# The low halves of the bytes to $0 … $3, the high ones to $4 … $7.
INT4_TO_FLOAT32 = tl.constexpr("""{ .reg .b32 a, b, c, d;
    shl.b32 a, $8, 12; shl.b32 b, $8, 4; shr.b32 c, $8, 4; shr.b32 d, $8, 12;
    lop3.b32 $0, a, 0x0000F000, 0x45000000, 0xEA; lop3.b32 $1, b, 0x0000F000, 0x45000000, 0xEA;
    lop3.b32 $2, c, 0x0000F000, 0x45000000, 0xEA; lop3.b32 $3, d, 0x0000F000, 0x45000000, 0xEA;
    lop3.b32 $4, a, 0x000F0000, 0x43000000, 0xEA; lop3.b32 $5, b, 0x000F0000, 0x43000000, 0xEA;
    lop3.b32 $6, c, 0x000F0000, 0x43000000, 0xEA; lop3.b32 $7, d, 0x000F0000, 0x43000000, 0xEA; }""")
BYTE, LOW, HIGH = tl.constexpr(32768.0 + 128), tl.constexpr(2048.0 + 8), tl.constexpr(128.0 + 8)  # what they add


@triton.jit
def _from_int8(q):
    if INTERPRETED:
        return q.to(tl.float32) + BYTE
    return tl.inline_asm_elementwise(INT8_TO_FLOAT32, "=&r,=&r,=&r,=&r,r", [q], dtype=tl.float32, is_pure=True, pack=4)


@triton.jit
def _from_int4(q):
    """The numbers of the low and of the high halves."""
    if INTERPRETED:
        return (q & 15).to(tl.float32) - 8 + LOW, (q >> 4).to(tl.float32) - 8 + HIGH
    return tl.inline_asm_elementwise(
        INT4_TO_FLOAT32, "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r", [q], dtype=(tl.float32, tl.float32), is_pure=True, pack=4
    )


@triton.jit
def _ask(
    weight, scales, rows,
    FIRST: tl.constexpr, INPUTS: tl.constexpr, WIDE: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Of some rows, WIDE of the weights as they are stored, from input FIRST on; and their scales."""
    PER: tl.constexpr = 2 if BITS == 4 else 1  # weights of a number
    i = FIRST // PER + tl.arange(0, WIDE // PER)
    row = rows[:, None].to(tl.int64)
    at = weight + row * (INPUTS // PER) + i[None, :]
    if FIRST + WIDE <= INPUTS:
        q = tl.load(at, eviction_policy="evict_first")
    else:
        q = tl.load(at, mask=(i < INPUTS // PER)[None, :], other=0, eviction_policy="evict_first")
    scale = 1.0
    if BITS != 16:
        group = FIRST // GROUP + tl.arange(0, WIDE // GROUP)
        at = scales + row * (INPUTS // GROUP) + group[None, :]
        scale = tl.load(at, mask=(group < INPUTS // GROUP)[None, :], other=0.0)
    return q, scale


@triton.jit
def _inputs(x, gain, i, INPUTS: tl.constexpr, NORM: tl.constexpr):
    """The inputs i, times their gains; and the sum of their squares."""
    number, squares = tl.load(x + i, mask=i < INPUTS, other=0.0).to(tl.float32), 0.0
    if NORM:
        squares = tl.sum(number * number, axis=0)
        number = number * tl.load(gain + i, mask=i < INPUTS, other=0.0).to(tl.float32)
    return number, squares


@triton.jit
def _multiply(
    q, scale, x, gain,
    FIRST: tl.constexpr, INPUTS: tl.constexpr, WIDE: tl.constexpr, BITS: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """What `_ask` got, times its inputs: numbers whose sum over the second axis is the rows' product."""
    if BITS == 16:
        number, squares = _inputs(x, gain, FIRST + tl.arange(0, WIDE), INPUTS, NORM)
        part = q.to(tl.float32) * number[None, :]
    elif BITS == 8:
        number, squares = _inputs(x, gain, FIRST + tl.arange(0, WIDE), INPUTS, NORM)
        offset = BYTE * _by_group(number[None, :], GROUP)
        part = (_by_group(_from_int8(q) * number[None, :], GROUP) - offset) * scale.to(tl.float32)
    else:
        # A byte holds input j of its group in the low half, and j + 16 in the high.
        byte = tl.arange(0, WIDE // 2)
        i = FIRST + byte // 16 * GROUP + byte % 16
        number, squares = _inputs(x, gain, i, INPUTS, NORM)
        other, other_squares = _inputs(x, gain, i + 16, INPUTS, NORM)
        offset = LOW * _by_group(number[None, :], 16) + HIGH * _by_group(other[None, :], 16)
        low, high = _from_int4(q)
        part = _by_group(low * number[None, :], 16) + _by_group(high * other[None, :], 16)
        part = (part - offset) * scale.to(tl.float32)
        squares += other_squares
    return part, squares


@triton.jit
def _by_group(numbers, EACH: tl.constexpr):
    """(R, G · EACH) → sums (R, G)."""
    return tl.sum(tl.reshape(numbers, (numbers.shape[0], numbers.shape[1] // EACH, EACH)), axis=2)


@triton.jit
def _products(
    x, gain, weight, scales, rows, eps,
    INPUTS: tl.constexpr, WIDE: tl.constexpr, BITS: tl.constexpr, NORM: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Rows of the weights times x, or its RMSNorm: float32. The first WIDE weights are asked for before x is there."""
    if EARLY:
        gdc_launch_dependents()
    q, scale = _ask(weight, scales, rows, 0, INPUTS, WIDE, BITS)
    if EARLY:
        gdc_wait()
    total, squares = _multiply(q, scale, x, gain, 0, INPUTS, WIDE, BITS, NORM)
    for chunk in tl.static_range(1, (INPUTS + WIDE - 1) // WIDE):
        q, scale = _ask(weight, scales, rows, chunk * WIDE, INPUTS, WIDE, BITS)
        part, more_squares = _multiply(q, scale, x, gain, chunk * WIDE, INPUTS, WIDE, BITS, NORM)
        total += part
        squares += more_squares
    y = tl.sum(total, axis=1)
    if NORM:
        y = y * tl.rsqrt(squares / INPUTS + eps)
    return y


@triton.jit
def _sum_kernel(
    x, gain, weight, scales, residual, y, outputs, eps,
    OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, WIDE: tl.constexpr, BITS: tl.constexpr, NORM: tl.constexpr,
    ADDS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """OUTPUTS of the outputs of a product, or of residual + product."""
    out = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    number = _products(x, gain, weight, scales, tl.minimum(out, outputs - 1), eps, INPUTS, WIDE, BITS, NORM, EARLY)
    if ADDS:
        number += tl.load(residual + out, mask=out < outputs, other=0.0).to(tl.float32)
    tl.store(y + out, number.to(y.dtype.element_ty), mask=out < outputs)


@triton.jit
def _swiglu_kernel(
    x, gain, weight, scales, y, hidden, eps,
    OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, WIDE: tl.constexpr, BITS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """OUTPUTS / 2 of the inputs of w2: silu(w1 x) · w3 x, of x's norm; w3 is below w1."""
    half, first = tl.arange(0, OUTPUTS), tl.program_id(0) * (OUTPUTS // 2)
    rows = tl.minimum(first + half // 2, hidden - 1) + half % 2 * hidden
    number = _products(x, gain, weight, scales, rows, eps, INPUTS, WIDE, BITS, True, EARLY)
    gate, up = tl.split(tl.reshape(number, (OUTPUTS // 2, 2)))
    out = first + tl.arange(0, OUTPUTS // 2)
    tl.store(y + out, (gate / (1 + tl.exp(-gate)) * up).to(y.dtype.element_ty), mask=out < hidden)


@triton.jit
def _heads_kernel(
    x, gain, weight, scales, freqs_cis, slots, positions, q, keys, values, n_heads, n_kv_heads, stride, max_seq_len,
    most, eps, HEAD_DIM: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, WIDE: tl.constexpr,
    BITS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """OUTPUTS numbers of a head, of x's norm: RoPE for a query or a key; to the queries or to the cache."""
    first = tl.program_id(0) * OUTPUTS
    number = _products(x, gain, weight, scales, first + tl.arange(0, OUTPUTS), eps, INPUTS, WIDE, BITS, True, EARLY)
    a, b = tl.split(tl.reshape(number, (OUTPUTS // 2, 2)))
    head, at = first // HEAD_DIM, first % HEAD_DIM + 2 * tl.arange(0, OUTPUTS // 2)
    position = tl.load(positions)
    if head < n_heads + n_kv_heads:
        c, s = tl.load(freqs_cis + position * HEAD_DIM + at), tl.load(freqs_cis + position * HEAD_DIM + at + 1)
        a, b = a * c - b * s, a * s + b * c
    if head < n_heads:
        _store_pairs(q + head * HEAD_DIM + at, a, b)
    else:
        a, b = tl.clamp(a, -most, most), tl.clamp(b, -most, most)
        place = (tl.load(slots) * max_seq_len + position) * HEAD_DIM + at
        if head < n_heads + n_kv_heads:
            _store_pairs(keys + (head - n_heads).to(tl.int64) * stride + place, a, b)
        else:
            _store_pairs(values + (head - n_heads - n_kv_heads).to(tl.int64) * stride + place, a, b)


@triton.jit
def _store_pairs(to, a, b):
    tl.store(to, a.to(to.dtype.element_ty))
    tl.store(to + 1, b.to(to.dtype.element_ty))


# Outputs of a program, inputs at a time, and warps, by the bits of a weight.
SHAPES = {16: (4, 4096, 8), 8: (16, 2048, 4), 4: (8, 4096, 4)}
_BITS_OF = {torch.int8: 8, torch.uint8: 4}


def can_fuse_on_gpu(rows: int, model: Any) -> bool:
    """Whether `run` can compute a step of so many rows of a model that gpu.py can compute."""
    args, most = model.params, max(outputs for outputs, *_ in SHAPES.values())
    if rows != 1 or args.has_bias or args.head_dim % most:
        return False
    return not any(inputs % GROUP.value for inputs in (args.dim, args.n_heads * args.head_dim, args.hidden_dim))


def run(model: Any, freqs_cis: Tensor, step: Any, cache: Any) -> Tensor:
    """A step of one token → its logits (1, vocab) float32. Its keys and values are in the cache then.

    The model, the step and the cache are `Any`: this package lies below theirs and may not import their types.
    """
    x, eps, early = model.tok_embeddings(step.tokens), model.params.norm_eps, _early(model.device)
    for layer, keys, values in zip(model.layers, cache.keys, cache.values, strict=True):
        attention, feed_forward = layer.attention, layer.feed_forward
        q = x.new_empty((1, attention.n_heads, attention.head_dim))
        programs, matrix, options = _launch(attention.wqkv, early)
        _heads_kernel[(programs,)](
            x, layer.attention_norm.weight, *matrix, freqs_cis, step.slots, step.positions, q, keys, values,
            attention.n_heads, attention.n_kv_heads, keys.stride(0), cache.max_seq_len, torch.finfo(keys.dtype).max,
            eps, HEAD_DIM=attention.head_dim, **options,
        )  # fmt: skip
        x = _product(attend(q, keys, values, step.slots, step.positions, early), attention.wo, early, residual=x)
        gated = x.new_empty((1, feed_forward.w2.in_features))
        programs, matrix, options = _launch(feed_forward.w13, early)
        _swiglu_kernel[(programs,)](
            x, layer.ffn_norm.weight, *matrix, gated, feed_forward.w2.in_features, eps, **options
        )  # fmt: skip
        x = _product(gated, feed_forward.w2, early, residual=x)
    return _product(x, model.output, early, gain=model.norm.weight, eps=eps)


def _product(
    x: Tensor, linear: Any, early: bool, gain: Tensor | None = None, residual: Tensor | None = None, eps: float = 0.0
) -> Tensor:
    """x, or its RMSNorm, times a matrix: added to the residual in its dtype, or alone in float32."""
    programs, matrix, options = _launch(linear, early)
    y = torch.empty((1, linear.out_features), dtype=torch.float32 if residual is None else x.dtype, device=x.device)
    _sum_kernel[(programs,)](
        x, x if gain is None else gain, *matrix, y if residual is None else residual, y, linear.out_features, eps,
        NORM=gain is not None, ADDS=residual is not None, **options,
    )  # fmt: skip
    return y


def _launch(linear: Any, early: bool) -> tuple[int, tuple[Tensor, Tensor], dict[str, int | bool]]:
    """How many programs a matrix needs; the matrix and its scales; and what else all of the kernels take."""
    weight, scales = linear.weight, linear.scales
    bits = 16 if scales is None else _BITS_OF[weight.dtype]
    outputs, wide, warps = SHAPES[bits]
    options: dict[str, int | bool] = {"EARLY": True, "launch_pdl": True} if early else {"EARLY": False}
    options |= {"INPUTS": linear.in_features, "WIDE": min(wide, triton.next_power_of_2(linear.in_features))}
    options |= {"OUTPUTS": outputs, "BITS": bits, "num_warps": warps}
    return triton.cdiv(linear.out_features, outputs), (weight, weight if scales is None else scales), options


def _early(device: torch.device) -> bool:
    """Whether a kernel can be begun before the one ahead of it has ended."""
    return compute_capability(device) >= HOPPER
