"""Kernels for CUDA, in Triton: products of few rows with quantised weights, and the small operations of a layer.

A decode step waits for memory: each kernel reads what it needs once, and does all that can be done with it. Letters in
shapes as in transformer.py; C inputs and R outputs of a matrix.
"""

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from llama.kernels.gpu_attention import attend as attend

MOST_ROWS = 64  # of a product: for more, dequantised weights and PyTorch's product are faster
# Outputs and inputs of a program at a time, warps, stages of the loop: by whether weights have four bits, and by rows.
TILES = {
    False: {8: (64, 256, 4, 3), 16: (64, 128, 2, 3), 32: (64, 128, 2, 3), 64: (128, 128, 4, 3)},
    True: {8: (64, 256, 4, 3), 16: (64, 128, 2, 3), 32: (128, 64, 4, 4), 64: (128, 128, 4, 3)},
}
WARPS = 1056  # a product should have so many: 8 for each multiprocessor of an H100
GROUP = tl.constexpr(32)  # inputs that share a scale: those of quantization/formats.py


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
    x, weight, scales, y, n, inputs, outputs, row_bytes, groups, part,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, FOUR_BITS: tl.constexpr,
):  # fmt: skip
    """y (parts, n, R) for OUTPUTS outputs and a part of the groups: INPUTS at a time, dequantised and multiplied."""
    out, row = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS), tl.arange(0, ROWS)
    there, rows_there = out[:, None] < outputs, row[None, :] < n
    total = tl.zeros((OUTPUTS, ROWS), dtype=tl.float32)
    EACH: tl.constexpr = GROUP // 2 if FOUR_BITS else GROUP  # bytes of a group
    BYTES: tl.constexpr = INPUTS // GROUP * EACH
    byte, group = tl.arange(0, BYTES), tl.arange(0, INPUTS // GROUP)
    w = weight + out[:, None].to(tl.int64) * row_bytes + byte[None, :]
    s = scales + out[:, None].to(tl.int64) * groups + group[None, :]
    # A byte of four bits holds input j of its group in the low half, and j + 16 in the high.
    column = x + row[None, :].to(tl.int64) * inputs + (byte // EACH * GROUP + byte % EACH)[:, None]
    begin = tl.program_id(1) * part
    end = tl.minimum(begin + part, groups)
    for first in range(begin, end, INPUTS // GROUP):
        inside, inside_group = byte < (end - first) * EACH, group < end - first
        q = tl.load(w + first * EACH, mask=there & inside[None, :], other=0)
        scale = tl.load(s + first, mask=there & inside_group[None, :], other=0.0)
        low_x = tl.load(column + first * GROUP, mask=rows_there & inside[:, None], other=0.0)
        low, high = _numbers(q, scale, low_x, EACH, FOUR_BITS)
        total = tl.dot(low, low_x, total)
        if FOUR_BITS:
            high_x = tl.load(column + first * GROUP + EACH, mask=rows_there & inside[:, None], other=0.0)
            total = tl.dot(high, high_x, total)
    at = y + (tl.program_id(1) * n + row[None, :]).to(tl.int64) * outputs + out[:, None]
    tl.store(at, total.to(y.dtype.element_ty), mask=there & rows_there)


@triton.jit
def _add_kernel(parts, y, size, PARTS: tl.constexpr, WIDE: tl.constexpr):
    """The sum of the parts of a product."""
    i = tl.program_id(0) * WIDE + tl.arange(0, WIDE)
    total = tl.load(parts + i, mask=i < size, other=0)
    for part in tl.static_range(1, PARTS):
        total += tl.load(parts + part * size + i, mask=i < size, other=0)
    tl.store(y + i, total.to(y.dtype.element_ty), mask=i < size)


def product(x: Tensor, weight: Tensor, scales: Tensor, outputs: int) -> Tensor:
    """x (n, C) · W (R, C)ᵀ → (n, R), in 16 bits, from int8 (R, C) or int4 (R, C / 2) and scales (R, C / 32).

    For n up to MOST_ROWS. A matrix of few outputs is also split along its inputs, so that every core has warps enough;
    the order of the sums depends on nothing but the sizes.
    """
    x = x.contiguous()
    (n, inputs), groups = x.shape, scales.shape[1]
    rows, four_bits = max(8, triton.next_power_of_2(n)), weight.dtype == torch.uint8
    outs, wide, warps, stages = TILES[four_bits][rows]
    programs, step = triton.cdiv(outputs, outs), wide // GROUP.value
    part = triton.cdiv(groups * programs * warps, max(WARPS, programs * warps))  # groups of a part
    part = min(triton.cdiv(part, step) * step, groups)
    parts = triton.cdiv(groups, part)
    y = torch.empty((n, outputs), dtype=x.dtype, device=x.device)
    to = y if parts == 1 else torch.empty((parts, n, outputs), dtype=torch.float32, device=x.device)
    _product_kernel[(programs, parts)](
        x, weight, scales, to, n, inputs, outputs, weight.shape[1], groups, part, ROWS=rows, OUTPUTS=outs, INPUTS=wide,
        FOUR_BITS=four_bits, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    if parts > 1:
        _add_kernel[(triton.cdiv(y.numel(), 1024),)](to, y, y.numel(), PARTS=parts, WIDE=1024, num_warps=4)
    return y


@triton.jit
def _dequantize_kernel(
    weight, scales, to, inputs, outputs, row_bytes, groups,
    OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, FOUR_BITS: tl.constexpr,
):  # fmt: skip
    out = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    first = tl.program_id(1) * (INPUTS // GROUP)
    EACH: tl.constexpr = GROUP // 2 if FOUR_BITS else GROUP
    byte, group = tl.arange(0, INPUTS // GROUP * EACH), tl.arange(0, INPUTS // GROUP)
    there = (out[:, None] < outputs) & (byte < (groups - first) * EACH)[None, :]
    there_group = (out[:, None] < outputs) & (group < groups - first)[None, :]
    row = out[:, None].to(tl.int64)
    q = tl.load(weight + row * row_bytes + first * EACH + byte[None, :], mask=there, other=0)
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


# ------------------------------------------------------------------------------------------------- small operations


@triton.jit
def _norm_kernel(x, residual, weight, total, y, dim, eps, ADDS: tl.constexpr, WIDE: tl.constexpr):
    """A row: residual + x, stored as the total, and its RMSNorm."""
    at = tl.program_id(0).to(tl.int64) * dim
    i = tl.arange(0, WIDE)
    there = i < dim
    value = tl.load(residual + at + i, mask=there, other=0)
    if ADDS:
        value = value + tl.load(x + at + i, mask=there, other=0)
        tl.store(total + at + i, value, mask=there)
    number = value.to(tl.float32)
    number = number * tl.rsqrt(tl.sum(number * number, axis=0) / dim + eps)
    scaled = number.to(value.dtype) * tl.load(weight + i, mask=there, other=0)
    tl.store(y + at + i, scaled, mask=there)


def add_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As `ops.add_norm`: the RMSNorm of residual + x (N, dim), and that sum; of x alone where there is no residual."""
    x = x.contiguous()
    y = torch.empty_like(x)
    total = x if residual is None else torch.empty_like(x)
    _norm_kernel[(x.shape[0],)](
        x, x if residual is None else residual.contiguous(), weight, total, y, x.shape[1], eps,
        ADDS=residual is not None, WIDE=triton.next_power_of_2(x.shape[1]), num_warps=8,
    )  # fmt: skip
    return y, total


@triton.jit
def _silu_and_mul_kernel(both, y, hidden, WIDE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    there = i < hidden
    gate = tl.load(both + row * 2 * hidden + i, mask=there, other=0)
    up = tl.load(both + row * 2 * hidden + hidden + i, mask=there, other=0)
    number = gate.to(tl.float32)
    tl.store(y + row * hidden + i, (number / (1 + tl.exp(-number))).to(gate.dtype) * up, mask=there)


def silu_and_mul(both: Tensor) -> Tensor:
    """SwiGLU's product: (N, 2F) → silu(first half) · second half (N, F)."""
    both = both.contiguous()
    n, hidden = both.shape[0], both.shape[1] // 2
    y = torch.empty((n, hidden), dtype=both.dtype, device=both.device)
    _silu_and_mul_kernel[(n, triton.cdiv(hidden, 1024))](both, y, hidden, WIDE=1024, num_warps=4)
    return y


@triton.jit
def _rope_kernel(
    heads, freqs_cis, q, keys, values, rows, n_heads, n_kv_heads, stride, most,
    HEADS: tl.constexpr, HALF: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """HEADS heads of one token: RoPE for queries and keys; queries go to q, keys and values to the cache."""
    token = tl.program_id(0).to(tl.int64)
    head, i = tl.program_id(1) * HEADS + tl.arange(0, HEADS), tl.arange(0, 2 * WIDE)
    n, pair = n_heads + 2 * n_kv_heads, tl.arange(0, WIDE)
    head, wide = head[:, None], i[None, :] < 2 * HALF
    number = tl.load(heads + (token * n + head) * 2 * HALF + i[None, :], mask=wide & (head < n), other=0)
    a, b = tl.split(tl.reshape(number.to(tl.float32), (HEADS, WIDE, 2)))
    cis, there = freqs_cis + (token * 2 * HALF + 2 * pair)[None, :], pair[None, :] < HALF
    c, s = tl.load(cis, mask=there, other=0), tl.load(cis + 1, mask=there, other=0)
    rotates = head < n_heads + n_kv_heads
    first, second = tl.where(rotates, a * c - b * s, a), tl.where(rotates, a * s + b * c, b)
    number = tl.reshape(tl.join(first, second), (HEADS, 2 * WIDE))
    at = (token * n_heads + head) * 2 * HALF + i[None, :]
    tl.store(q + at, number.to(q.dtype.element_ty), mask=wide & (head < n_heads))
    number = tl.clamp(number, -most, most).to(keys.dtype.element_ty)
    key, value = head - n_heads, head - n_heads - n_kv_heads
    place = tl.load(rows + token) * 2 * HALF + i[None, :]
    tl.store(keys + key.to(tl.int64) * stride + place, number, mask=wide & (key >= 0) & (value < 0))
    tl.store(values + value.to(tl.int64) * stride + place, number, mask=wide & (value >= 0) & (head < n))


def rope_and_store(
    heads: Tensor, freqs_cis: Tensor, keys: Tensor, values: Tensor, rows: Tensor, n_heads: int
) -> Tensor:  # fmt: skip
    """As `ops.rope_and_store`; the cache may be float8, into whose range numbers are cut."""
    heads, freqs_cis, n_kv_heads = heads.contiguous(), freqs_cis.contiguous(), keys.shape[0]
    n, _, head_dim = heads.shape
    q = torch.empty((n, n_heads, head_dim), dtype=heads.dtype, device=heads.device)
    _rope_kernel[(n, triton.cdiv(n_heads + 2 * n_kv_heads, 8))](
        heads, freqs_cis, q, keys, values, rows, n_heads, n_kv_heads, keys.stride(0), torch.finfo(keys.dtype).max,
        HEADS=8, HALF=head_dim // 2, WIDE=triton.next_power_of_2(head_dim // 2), num_warps=4,
    )  # fmt: skip
    return q
