"""Kernels for CUDA, in Triton: products of few rows with quantised weights, attention of single queries, small things.

A decode step waits for memory: each kernel reads what it needs once, and does all that can be done with it. Letters in
shapes as in model.py; C inputs and R outputs of a matrix.
"""

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_ROWS = 64  # of a product: for more, dequantised weights and PyTorch's product are faster
_INPUTS = {8: 512, 16: 256, 32: 128, 64: 128}  # at a time, by rows of x: what of them fits
GROUP = tl.constexpr(32)  # inputs that share a scale: weight_format's
SPLIT = 256  # positions of a sequence that one program attends to
BLOCK = 64  # of them at a time
LOG2_E = tl.constexpr(1.4426950408889634)


# ------------------------------------------------------------------------------------------------- quantised products

# Four bytes of weights → numbers, times their scales, in few instructions (a conversion takes four times as long as any
# of them): an integer put into the low bits of a power of two is that power plus the integer. PTX, 32 bits a register.
# From int8 to $0 $1: the bytes are $2, the scales $3 … $6 in float32 with −32896 times them in $7 … $10, or $3 $4 in
# float16. q ^ 0x80 is q + 128.
INT8_TO_BFLOAT16 = tl.constexpr("""{ .reg .b32 u, a, b, c, d;
    xor.b32 u, $2, 0x80808080;
    prmt.b32 a, u, 0x47000000, 0x7404; prmt.b32 b, u, 0x47000000, 0x7414;
    prmt.b32 c, u, 0x47000000, 0x7424; prmt.b32 d, u, 0x47000000, 0x7434;
    fma.rn.f32 a, a, $3, $7; fma.rn.f32 b, b, $4, $8; fma.rn.f32 c, c, $5, $9; fma.rn.f32 d, d, $6, $10;
    cvt.rn.bf16x2.f32 $0, b, a; cvt.rn.bf16x2.f32 $1, d, c; }""")
INT8_TO_FLOAT16 = tl.constexpr("""{ .reg .b32 u, a, b, one, less;
    xor.b32 u, $2, 0x80808080; mov.b32 one, 0x3C003C00; mov.b32 less, 0xE480E480;
    prmt.b32 a, u, 0x64646464, 0x4140; prmt.b32 b, u, 0x64646464, 0x4342;
    fma.rn.f16x2 a, a, one, less; fma.rn.f16x2 b, b, one, less;
    mul.f16x2 $0, a, $3; mul.f16x2 $1, b, $4; }""")
# From int4 to $0 $1, the low halves of the bytes, and $2 $3, the high ones: the bytes are $4, the scales $5 $6.
_FROM_INT4 = """{ .reg .b32 t, v, a, b, c, d, one, less, zero;
    mov.b32 one, ONE; mov.b32 less, LESS; mov.b32 zero, 0x80008000;
    prmt.b32 t, $4, 0, 0x4140; prmt.b32 v, $4, 0, 0x4342;
    lop3.b32 a, t, 0x000F000F, POWER, 0xEA; lop3.b32 b, v, 0x000F000F, POWER, 0xEA;
    shr.b32 t, t, 4; shr.b32 v, v, 4;
    lop3.b32 c, t, 0x000F000F, POWER, 0xEA; lop3.b32 d, v, 0x000F000F, POWER, 0xEA;
    fma.rn.PAIR a, a, one, less; fma.rn.PAIR b, b, one, less; fma.rn.PAIR c, c, one, less; fma.rn.PAIR d, d, one, less;
    fma.rn.PAIR $0, a, $5, zero; fma.rn.PAIR $1, b, $6, zero;
    fma.rn.PAIR $2, c, $5, zero; fma.rn.PAIR $3, d, $6, zero; }"""


def _from_int4_in(pair: str, one: str, power: str, less: str) -> tl.constexpr:
    """With two numbers a register: 1, the power of two, and less the power and 8."""
    code = _FROM_INT4.replace("PAIR", pair).replace("ONE", one).replace("POWER", power).replace("LESS", less)
    return tl.constexpr(code)


INT4_TO_BFLOAT16 = _from_int4_in("bf16x2", "0x3F803F80", "0x43004300", "0xC308C308")
INT4_TO_FLOAT16 = _from_int4_in("f16x2", "0x3C003C00", "0x64006400", "0xE408E408")
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")  # the interpreter has no PTX


@triton.jit
def _from_int8(q, scale, x):
    """Integers (R, G · 32) times the float16 scales (R, G) of their groups, in the dtype of x."""
    if x.dtype == tl.bfloat16:
        wide = scale.to(tl.float32)
        numbers = tl.inline_asm_elementwise(
            INT8_TO_BFLOAT16, "=r,=r,r,r,r,r,r,r,r,r,r", [q, _spread(wide, 32), _spread(wide * -32896.0, 32)],
            dtype=tl.bfloat16, is_pure=True, pack=4,
        )  # fmt: skip
    else:
        numbers = tl.inline_asm_elementwise(
            INT8_TO_FLOAT16, "=r,=r,r,r,r", [q, _spread(scale, 32)], dtype=tl.float16, is_pure=True, pack=4
        )
    return numbers


@triton.jit
def _from_int4(q, scale):
    """The numbers of the low and of the high halves, in the dtype of the scales: bfloat16 or float16."""
    if scale.dtype == tl.bfloat16:
        low, high = tl.inline_asm_elementwise(
            INT4_TO_BFLOAT16, "=r,=r,=r,=r,r,r,r", [q, scale], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
        )
    else:
        low, high = tl.inline_asm_elementwise(
            INT4_TO_FLOAT16, "=r,=r,=r,=r,r,r,r", [q, scale], dtype=(tl.float16, tl.float16), is_pure=True, pack=4
        )
    return low, high


@triton.jit
def _spread(scale, EACH: tl.constexpr):
    """Scales (R, G) → (R, G · EACH), each EACH times."""
    wide = tl.broadcast_to(scale[:, :, None], (scale.shape[0], scale.shape[1], EACH))
    return tl.reshape(wide, (scale.shape[0], scale.shape[1] * EACH))


@triton.jit
def _numbers(q, scale, like, EACH: tl.constexpr, FOUR_BITS: tl.constexpr):
    """The numbers of bytes (R, G · EACH) with scales (R, G), in the dtype of `like`; of int8 twice the same."""
    if INTERPRETED:
        wide = _spread(scale.to(tl.float32), EACH)
        if FOUR_BITS:
            low, high = ((q & 15).to(tl.float32) - 8) * wide, ((q >> 4).to(tl.float32) - 8) * wide
        else:
            low, high = q.to(tl.float32) * wide, q.to(tl.float32) * wide
        low, high = low.to(like.dtype), high.to(like.dtype)
    elif FOUR_BITS:
        low, high = _from_int4(q, _spread(scale.to(like.dtype), EACH))
    else:
        low = _from_int8(q, scale, like)
        high = low
    return low, high


@triton.jit
def _product_kernel(
    x, weight, scales, y, n, inputs, outputs, held, groups,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, FOUR_BITS: tl.constexpr,
):  # fmt: skip
    """y (n, R) for OUTPUTS of the outputs: INPUTS of the inputs at a time, dequantised and multiplied."""
    out, row = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS), tl.arange(0, ROWS)
    there, rows_there = out[:, None] < outputs, row[None, :] < n
    total = tl.zeros((OUTPUTS, ROWS), dtype=tl.float32)
    EACH: tl.constexpr = GROUP // 2 if FOUR_BITS else GROUP  # bytes of a group
    HELD: tl.constexpr = INPUTS // GROUP * EACH
    byte, group = tl.arange(0, HELD), tl.arange(0, INPUTS // GROUP)
    w = weight + out[:, None].to(tl.int64) * held + byte[None, :]
    s = scales + out[:, None].to(tl.int64) * groups + group[None, :]
    # A byte of four bits holds input j of its group in the low half, and j + 16 in the high.
    column = x + row[None, :].to(tl.int64) * inputs + (byte // EACH * GROUP + byte % EACH)[:, None]
    for first in range(0, groups, INPUTS // GROUP):
        inside, inside_group = byte < (groups - first) * EACH, group < groups - first
        q = tl.load(w + first * EACH, mask=there & inside[None, :], other=0)
        scale = tl.load(s + first, mask=there & inside_group[None, :], other=0.0)
        low_x = tl.load(column + first * GROUP, mask=rows_there & inside[:, None], other=0.0)
        low, high = _numbers(q, scale, low_x, EACH, FOUR_BITS)
        total = tl.dot(low, low_x, total)
        if FOUR_BITS:
            high_x = tl.load(column + first * GROUP + EACH, mask=rows_there & inside[:, None], other=0.0)
            total = tl.dot(high, high_x, total)
    at = y + row[None, :].to(tl.int64) * outputs + out[:, None]
    tl.store(at, total.to(y.dtype.element_ty), mask=there & rows_there)


def product(x: Tensor, weight: Tensor, scales: Tensor, outputs: int) -> Tensor:
    """x (n, C) · W (R, C)ᵀ → (n, R), in 16 bits, from int8 (R, C) or int4 (R, C / 2) and scales (R, C / 32).

    For n up to MOST_ROWS. A program has one warp, 16 outputs and all of x: the warps of a larger one would all unpack
    the same weights.
    """
    x = x.contiguous()
    n, inputs = x.shape
    rows, outs, four_bits = max(8, triton.next_power_of_2(n)), 16, weight.dtype == torch.uint8
    y = torch.empty((n, outputs), dtype=x.dtype, device=x.device)
    _product_kernel[(triton.cdiv(outputs, outs),)](
        x, weight, scales, y, n, inputs, outputs, weight.shape[1], scales.shape[1], ROWS=rows, OUTPUTS=outs,
        INPUTS=_INPUTS[rows], FOUR_BITS=four_bits, num_warps=1, num_stages=4 if four_bits and rows == 8 else 3,
    )  # fmt: skip
    return y


@triton.jit
def _dequantize_kernel(
    weight, scales, to, inputs, outputs, held, groups,
    OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, FOUR_BITS: tl.constexpr,
):  # fmt: skip
    out = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    first = tl.program_id(1) * (INPUTS // GROUP)
    EACH: tl.constexpr = GROUP // 2 if FOUR_BITS else GROUP
    byte, group = tl.arange(0, INPUTS // GROUP * EACH), tl.arange(0, INPUTS // GROUP)
    there = (out[:, None] < outputs) & (byte < (groups - first) * EACH)[None, :]
    there_group = (out[:, None] < outputs) & (group < groups - first)[None, :]
    row = out[:, None].to(tl.int64)
    q = tl.load(weight + row * held + first * EACH + byte[None, :], mask=there, other=0)
    scale = tl.load(scales + row * groups + first + group[None, :], mask=there_group, other=0.0)
    low, high = _numbers(q, scale, tl.zeros((1,), to.dtype.element_ty), EACH, FOUR_BITS)
    at = to + row * inputs + first * GROUP + (byte // EACH * GROUP + byte % EACH)[None, :]
    tl.store(at, low, mask=there)
    if FOUR_BITS:
        tl.store(at + EACH, high, mask=there)


def dequantize(weight: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """int8 (R, C) or int4 (R, C / 2), and scales (R, C / 32) → (R, C) in a dtype of 16 bits, rounded as in products."""
    (outputs, groups), four_bits = scales.shape, weight.dtype == torch.uint8
    to = torch.empty((outputs, groups * GROUP.value), dtype=dtype, device=weight.device)
    _dequantize_kernel[(triton.cdiv(outputs, 16), triton.cdiv(groups, 8))](
        weight, scales, to, to.shape[1], outputs, weight.shape[1], groups, OUTPUTS=16, INPUTS=256,
        FOUR_BITS=four_bits, num_warps=4,
    )  # fmt: skip
    return to


# ------------------------------------------------------------------------------------------------- attention


@triton.jit
def _attend_kernel(
    q, keys, values, slots, positions, parts, weights, n_heads, stride, max_seq_len, scale,
    SHARED: tl.constexpr, PADDED: tl.constexpr, HEAD_DIM: tl.constexpr, WIDE: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One sequence, a kv head with the SHARED query heads that share it, SPLIT positions: their sum, and its weight."""
    sequence, kv_head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(positions + sequence) + 1
    first = part * SPLIT
    if first < length:
        head, i = tl.arange(0, PADDED), tl.arange(0, WIDE)
        heads_there, wide = head < SHARED, i < HEAD_DIM
        query = (sequence * n_heads + kv_head * SHARED + head).to(tl.int64)
        own = tl.load(q + query[:, None] * HEAD_DIM + i[None, :], mask=heads_there[:, None] & wide[None, :], other=0)
        base = kv_head.to(tl.int64) * stride + tl.load(slots + sequence) * max_seq_len * HEAD_DIM
        largest = tl.full((PADDED,), float("-inf"), dtype=tl.float32)
        mass = tl.zeros((PADDED,), dtype=tl.float32)
        total = tl.zeros((PADDED, WIDE), dtype=tl.float32)
        for start in range(first, tl.minimum(first + SPLIT, length), BLOCK):
            position = start + tl.arange(0, BLOCK)
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
    HEAD_DIM: tl.constexpr, WIDE: tl.constexpr, MOST: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """One query head: the sums of its parts, added by their weights."""
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


def attend(q: Tensor, keys: Tensor, values: Tensor, slots: Tensor, positions: Tensor) -> Tensor:
    """Attention of single queries: q (N, H, D), of sequences in slots (N,) at positions (N,), which they see too.

    Keys and values (K, S, P, D) are a layer's cache, of q's dtype or float8. Long sequences are split between programs,
    as many as the longest may need (https://arxiv.org/abs/2311.01282), so that nothing depends on lengths that only
    the device knows.
    """
    q = q.contiguous()
    (n, n_heads, head_dim), (n_kv_heads, _, max_seq_len, _) = q.shape, keys.shape
    n_parts, shared = triton.cdiv(max_seq_len, SPLIT), n_heads // n_kv_heads
    wide = max(16, triton.next_power_of_2(head_dim))
    parts = torch.empty((n, n_heads, n_parts, head_dim), dtype=torch.float32, device=q.device)
    weights = torch.empty((n, n_heads, n_parts), dtype=torch.float32, device=q.device)
    _attend_kernel[(n, n_kv_heads, n_parts)](
        q, keys, values, slots, positions, parts, weights, n_heads, keys.stride(0), max_seq_len,
        head_dim**-0.5 * LOG2_E.value, SHARED=shared, PADDED=max(16, triton.next_power_of_2(shared)), HEAD_DIM=head_dim,
        WIDE=wide, SPLIT=SPLIT, BLOCK=BLOCK, num_warps=4, num_stages=2,
    )  # fmt: skip
    out = torch.empty_like(q)
    _join_kernel[(n, n_heads)](
        parts, weights, positions, out, n_heads, n_parts, HEAD_DIM=head_dim, WIDE=wide,
        MOST=triton.next_power_of_2(n_parts), SPLIT=SPLIT, num_warps=4,
    )  # fmt: skip
    return out


# ------------------------------------------------------------------------------------------------- small operations


@triton.jit
def _norm_kernel(x, more, weight, total, y, dim, eps, ADDS: tl.constexpr, WIDE: tl.constexpr):
    """A row: x + more, stored as the total, and its RMSNorm."""
    at = tl.program_id(0).to(tl.int64) * dim
    i = tl.arange(0, WIDE)
    there = i < dim
    value = tl.load(x + at + i, mask=there, other=0)
    if ADDS:
        value = value + tl.load(more + at + i, mask=there, other=0)
        tl.store(total + at + i, value, mask=there)
    number = value.to(tl.float32)
    number = number * tl.rsqrt(tl.sum(number * number, axis=0) / dim + eps)
    scaled = number.to(value.dtype) * tl.load(weight + i, mask=there, other=0)
    tl.store(y + at + i, scaled, mask=there)


def add_norm(x: Tensor, more: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + more (N, dim) (x where that is None), and its RMSNorm, in float32 up to the weight."""
    x = x.contiguous()
    y = torch.empty_like(x)
    total = x if more is None else torch.empty_like(x)
    _norm_kernel[(x.shape[0],)](
        x, x if more is None else more.contiguous(), weight, total, y, x.shape[1], eps, ADDS=more is not None,
        WIDE=triton.next_power_of_2(x.shape[1]), num_warps=8,
    )  # fmt: skip
    return total, y


@triton.jit
def _gate_kernel(both, y, hidden, WIDE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    there = i < hidden
    opened = tl.load(both + row * 2 * hidden + i, mask=there, other=0)
    up = tl.load(both + row * 2 * hidden + hidden + i, mask=there, other=0)
    number = opened.to(tl.float32)
    tl.store(y + row * hidden + i, (number / (1 + tl.exp(-number))).to(opened.dtype) * up, mask=there)


def gate(both: Tensor) -> Tensor:
    """SwiGLU's product: (N, 2F) → silu(first half) · second half (N, F)."""
    both = both.contiguous()
    n, hidden = both.shape[0], both.shape[1] // 2
    y = torch.empty((n, hidden), dtype=both.dtype, device=both.device)
    _gate_kernel[(n, triton.cdiv(hidden, 1024))](both, y, hidden, WIDE=1024, num_warps=4)
    return y


@triton.jit
def _turn_kernel(
    heads, turns, q, keys, values, rows, n_heads, n_kv_heads, stride, most,
    HALF: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One head of one token: turned, unless it is a value; to the queries or to the cache."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    pair = tl.arange(0, WIDE)
    there = pair < HALF
    at = heads + (token * (n_heads + 2 * n_kv_heads) + head) * 2 * HALF + 2 * pair
    a, b = tl.load(at, mask=there, other=0).to(tl.float32), tl.load(at + 1, mask=there, other=0).to(tl.float32)
    if head < n_heads + n_kv_heads:
        c = tl.load(turns + token * 2 * HALF + 2 * pair, mask=there, other=0)
        s = tl.load(turns + token * 2 * HALF + 2 * pair + 1, mask=there, other=0)
        a, b = a * c - b * s, a * s + b * c
    if head < n_heads:
        _store_pairs(q + (token * n_heads + head) * 2 * HALF + 2 * pair, a, b, there)
    else:
        a, b = tl.clamp(a, -most, most), tl.clamp(b, -most, most)
        place = tl.load(rows + token) * 2 * HALF + 2 * pair
        if head < n_heads + n_kv_heads:
            _store_pairs(keys + (head - n_heads).to(tl.int64) * stride + place, a, b, there)
        else:
            _store_pairs(values + (head - n_heads - n_kv_heads).to(tl.int64) * stride + place, a, b, there)


@triton.jit
def _store_pairs(to, a, b, there):
    tl.store(to, a.to(to.dtype.element_ty), mask=there)
    tl.store(to + 1, b.to(to.dtype.element_ty), mask=there)


def turn_and_store(heads: Tensor, turns: Tensor, keys: Tensor, values: Tensor, rows: Tensor, n_heads: int) -> Tensor:
    """As `small.turn_and_store`; the cache may be float8, into whose range numbers are cut."""
    heads, turns, n_kv_heads = heads.contiguous(), turns.contiguous(), keys.shape[0]
    n, _, head_dim = heads.shape
    q = torch.empty((n, n_heads, head_dim), dtype=heads.dtype, device=heads.device)
    _turn_kernel[(n, n_heads + 2 * n_kv_heads)](
        heads, turns, q, keys, values, rows, n_heads, n_kv_heads, keys.stride(0), torch.finfo(keys.dtype).max,
        HALF=head_dim // 2, WIDE=triton.next_power_of_2(head_dim // 2), num_warps=1,
    )  # fmt: skip
    return q
