"""A token drawn from each row of probabilities on CUDA, in Triton: what sampling.py says, without sorting the row.

How many tokens have at least some probability, and how much together, one pass over the row tells; the least one that
is kept is found by halves, in the bits of float32, which are in the order of the numbers. See sample.c.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 8192  # tokens at a time, 8 a thread
WHOLE, WHOLE_SHARE = tl.constexpr(2.0**38), tl.constexpr(1 << 38)  # probability 1 as an integer: sampling.py's
NOISE_BITS = tl.constexpr(24)
SIXTEENTH = tl.constexpr(4 << 23)  # less in bits: a sixteenth of a number
LEAST = tl.constexpr((127 - 39) << 23)  # in bits: what is less has no share
NO_LIMIT = tl.constexpr((1 << 31) - 1)


@triton.jit
def _share(bits):
    """Probabilities as integers, the nearest ones: float32 from 2²³ on has no fraction."""
    x = bits.to(tl.float32, bitcast=True) * WHOLE
    return tl.where(x < 8388608.0, (x + 8388608.0) - 8388608.0, x).to(tl.int64)


@triton.jit
def _bits(row, first, vocab, BLOCK: tl.constexpr):
    """Of a block of a row; 0 beyond its end, and for NaN."""
    i = first + tl.arange(0, BLOCK)
    p = tl.load(row + i, mask=i < vocab, other=0.0)
    return tl.where(p >= 0, p, 0.0).to(tl.int32, bitcast=True)


@triton.jit
def _amount(row, vocab, least, BLOCK: tl.constexpr):
    """How many tokens have at least this probability, and their shares together."""
    count, shares = tl.zeros((BLOCK,), tl.int32), tl.zeros((BLOCK,), tl.int64)
    for first in range(0, vocab, BLOCK):
        bits = _bits(row, first, vocab, BLOCK)
        counts = bits >= least
        count += counts.to(tl.int32)
        shares += tl.where(counts, _share(bits), 0)
    return tl.sum(count, axis=0), tl.sum(shares, axis=0)


@triton.jit
def _last_kept(row, vocab, best, floor, limit, bound, BLOCK: tl.constexpr):
    """(over, ties, mass): tokens of more than `over` are kept, and the first `ties` of just that; their shares.

    None is of less than `floor`; before each come fewer than `limit`, with shares of at most `bound` together.
    """
    high, above, above_shares = best + 1, 0, tl.zeros((), tl.int64)  # all of `high` or more are kept
    low = tl.maximum(best - SIXTEENTH, floor)  # then those of `low` or more are looked at
    count, shares = _amount(row, vocab, low, BLOCK)
    while (count < limit) & (shares.to(tl.float32) <= bound) & (low > floor) & (low >= LEAST):
        high, above, above_shares = low, count, shares
        low = tl.maximum(low - SIXTEENTH, floor)
        count, shares = _amount(row, vocab, low, BLOCK)
    if (count >= limit) | (shares.to(tl.float32) > bound):
        while (count - above > 1) & (high - low > 1):
            middle = low + (high - low) // 2
            more, more_shares = _amount(row, vocab, middle, BLOCK)
            if (more < limit) & (more_shares.to(tl.float32) <= bound):
                high, above, above_shares = middle, more, more_shares
            else:
                low, count, shares = middle, more, more_shares
    over, ties, mass = low - 1, 0, shares
    if ((count >= limit) | (shares.to(tl.float32) > bound)) & (count - above > 1):
        each, few, most = _share(low), 1, count - above  # of like tokens so many are kept, and may be
        while few < most:
            half = (few + most + 1) // 2
            before = above_shares + (half - 1) * each
            if (above + half - 1 < limit) & (before.to(tl.float32) <= bound):
                few = half
            else:
                most = half - 1
        over, ties, mass = low, few, above_shares + few * each
    return over, ties, mass


@triton.jit
def _kept_shares(bits, over, ties, floor, seen):
    """The shares of a block's tokens, 0 of those that are not kept; and how many of just `over` were seen up to it."""
    like = (bits == over).to(tl.int32)
    kept = (bits > over) | ((like == 1) & (seen + tl.cumsum(like, axis=0) <= ties))
    return tl.where(kept & (bits >= floor), _share(bits), 0), seen + tl.sum(like, axis=0)


@triton.jit
def _draw_kernel(probs, numbers, top_k, tokens, vocab, stride, BLOCK: tl.constexpr):
    number = tl.program_id(0)
    row = probs + number.to(tl.int64) * vocab
    top_p, min_p = tl.load(numbers + stride + number), tl.load(numbers + 2 * stride + number)
    noise, k = tl.load(numbers + 3 * stride + number), tl.load(top_k + number)
    largest = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, vocab, BLOCK):
        largest = tl.maximum(largest, _bits(row, first, vocab, BLOCK))
    best = tl.max(largest, axis=0)
    floor = (min_p * best.to(tl.float32, bitcast=True)).to(tl.int32, bitcast=True)
    limit = tl.where(k > 0, tl.minimum(k, NO_LIMIT), NO_LIMIT).to(tl.int32)
    over, ties, mass, bound = -1, 0, tl.full((), WHOLE_SHARE, tl.int64), top_p * WHOLE
    if k > 0:  # what it keeps is renormalised
        over, ties, mass = _last_kept(row, vocab, best, 0, limit, float("inf"), BLOCK)
        bound = top_p * mass.to(tl.float32)
    if mass.to(tl.float32) > bound:
        over, ties, mass = _last_kept(row, vocab, best, floor, limit, bound, BLOCK)
    total, seen = tl.zeros((), tl.int64), 0
    for first in range(0, vocab, BLOCK):
        shares, seen = _kept_shares(_bits(row, first, vocab, BLOCK), over, ties, floor, seen)
        total += tl.sum(shares, axis=0)
    target = ((noise * 16777216.0).to(tl.int64) * total) >> NOISE_BITS
    before, token, seen = tl.zeros((), tl.int64), 0, 0
    for first in range(0, vocab, BLOCK):
        shares, seen = _kept_shares(_bits(row, first, vocab, BLOCK), over, ties, floor, seen)
        passed = before + tl.cumsum(shares, axis=0) <= target
        token += tl.sum(passed.to(tl.int32), axis=0)
        before += tl.sum(shares, axis=0)
    tl.store(tokens + number, tl.minimum(token, vocab - 1).to(tl.int64))


def draw(probs: Tensor, numbers: Tensor, top_k: Tensor) -> Tensor:
    """Tokens (R,) int64 of probs (R, V) float32; `numbers` (4, R) and `top_k` (R,) are those of `sampling.sample`."""
    probs, numbers = probs.contiguous(), numbers if numbers.stride(1) == 1 else numbers.contiguous()
    tokens = torch.empty(probs.shape[0], dtype=torch.int64, device=probs.device)
    _draw_kernel[(probs.shape[0],)](
        probs, numbers, top_k, tokens, probs.shape[1], numbers.stride(0), BLOCK=BLOCK, num_warps=32
    )
    return tokens
