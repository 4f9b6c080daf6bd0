"""A token drawn from each row of probabilities on CUDA, in Triton, as engine/sampling.py defines, without sorting it.

One pass over the row counts the tokens of at least some probability and sums their shares. A binary search over that
probability finds the last token that is kept; it works on the bits of float32 numbers, which are ordered as the
numbers are. Shares are probabilities as whole numbers, so that sums are the same in every order: see sample.c.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_SIZE = 8192  # tokens at a time, 8 a thread
WHOLE, WHOLE_SHARE = tl.constexpr(2.0**38), tl.constexpr(1 << 38)  # the share of probability 1: engine/sampling.py's
NOISE_BITS = tl.constexpr(24)
SIXTEENTH = tl.constexpr(4 << 23)  # bits minus this are the bits of a sixteenth of the number
LEAST = tl.constexpr((127 - 39) << 23)  # the bits of 2⁻³⁹: less probable tokens have share 0
NO_LIMIT = tl.constexpr((1 << 31) - 1)


@triton.jit
def _share(bits):
    """The shares of probabilities: p · WHOLE, rounded. A float32 from 2²³ on has no fraction, so adding 2²³ rounds."""
    x = bits.to(tl.float32, bitcast=True) * WHOLE
    return tl.where(x < 8388608.0, (x + 8388608.0) - 8388608.0, x).to(tl.int64)


@triton.jit
def _bits(row, first, vocab, BLOCK_SIZE: tl.constexpr):
    """The bits of a block of a row's probabilities; 0 beyond the row's end, and for NaN."""
    i = first + tl.arange(0, BLOCK_SIZE)
    p = tl.load(row + i, mask=i < vocab, other=0.0)
    return tl.where(p >= 0, p, 0.0).to(tl.int32, bitcast=True)


@triton.jit
def _amount(row, vocab, least, BLOCK_SIZE: tl.constexpr):
    """How many tokens have at least this probability, and their shares together."""
    count, shares = tl.zeros((BLOCK_SIZE,), tl.int32), tl.zeros((BLOCK_SIZE,), tl.int64)
    for first in range(0, vocab, BLOCK_SIZE):
        bits = _bits(row, first, vocab, BLOCK_SIZE)
        counts = bits >= least
        count += counts.to(tl.int32)
        shares += tl.where(counts, _share(bits), 0)
    return tl.sum(count, axis=0), tl.sum(shares, axis=0)


@triton.jit
def _last_kept(row, vocab, best, floor, limit, bound, BLOCK_SIZE: tl.constexpr):
    """(over, ties, mass): tokens of more than `over` are kept, `ties` of exactly that too; mass: their shares.

    A kept token has at least `floor`, and fewer than `limit` tokens come before it, with shares of at most `bound`.
    """
    high, above, above_shares = best + 1, 0, tl.zeros((), tl.int64)  # tokens of `high` or more are kept
    low = tl.maximum(best - SIXTEENTH, floor)  # the last kept token has `low` or more
    count, shares = _amount(row, vocab, low, BLOCK_SIZE)
    while (count < limit) & (shares.to(tl.float32) <= bound) & (low > floor) & (low >= LEAST):
        high, above, above_shares = low, count, shares
        low = tl.maximum(low - SIXTEENTH, floor)
        count, shares = _amount(row, vocab, low, BLOCK_SIZE)
    if (count >= limit) | (shares.to(tl.float32) > bound):
        while (count - above > 1) & (high - low > 1):
            middle = low + (high - low) // 2
            more, more_shares = _amount(row, vocab, middle, BLOCK_SIZE)
            if (more < limit) & (more_shares.to(tl.float32) <= bound):
                high, above, above_shares = middle, more, more_shares
            else:
                low, count, shares = middle, more, more_shares
    over, ties, mass = low - 1, 0, shares
    if ((count >= limit) | (shares.to(tl.float32) > bound)) & (count - above > 1):
        each, few, most = _share(low), 1, count - above  # of equally probable tokens: kept for certain, and at most
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
    """The shares of a block's tokens, 0 for those not kept; and how many of exactly `over` the row has so far."""
    like = (bits == over).to(tl.int32)
    kept = (bits > over) | ((like == 1) & (seen + tl.cumsum(like, axis=0) <= ties))
    return tl.where(kept & (bits >= floor), _share(bits), 0), seen + tl.sum(like, axis=0)


@triton.jit
def _draw_kernel(probs, numbers, top_k, tokens, vocab, stride, BLOCK_SIZE: tl.constexpr):
    number = tl.program_id(0)
    row = probs + number.to(tl.int64) * vocab
    top_p, min_p = tl.load(numbers + stride + number), tl.load(numbers + 2 * stride + number)
    noise, k = tl.load(numbers + 3 * stride + number), tl.load(top_k + number)
    largest = tl.zeros((BLOCK_SIZE,), tl.int32)
    for first in range(0, vocab, BLOCK_SIZE):
        largest = tl.maximum(largest, _bits(row, first, vocab, BLOCK_SIZE))
    best = tl.max(largest, axis=0)
    floor = (min_p * best.to(tl.float32, bitcast=True)).to(tl.int32, bitcast=True)
    limit = tl.where(k > 0, tl.minimum(k, NO_LIMIT), NO_LIMIT).to(tl.int32)
    over, ties, mass, bound = -1, 0, tl.full((), WHOLE_SHARE, tl.int64), top_p * WHOLE
    if k > 0:  # top_p is of what top_k keeps
        over, ties, mass = _last_kept(row, vocab, best, 0, limit, float("inf"), BLOCK_SIZE)
        bound = top_p * mass.to(tl.float32)
    if mass.to(tl.float32) > bound:
        over, ties, mass = _last_kept(row, vocab, best, floor, limit, bound, BLOCK_SIZE)
    total, seen = tl.zeros((), tl.int64), 0
    for first in range(0, vocab, BLOCK_SIZE):
        shares, seen = _kept_shares(_bits(row, first, vocab, BLOCK_SIZE), over, ties, floor, seen)
        total += tl.sum(shares, axis=0)
    target = ((noise * 16777216.0).to(tl.int64) * total) >> NOISE_BITS
    before, token, seen = tl.zeros((), tl.int64), 0, 0
    for first in range(0, vocab, BLOCK_SIZE):
        shares, seen = _kept_shares(_bits(row, first, vocab, BLOCK_SIZE), over, ties, floor, seen)
        passed = before + tl.cumsum(shares, axis=0) <= target
        token += tl.sum(passed.to(tl.int32), axis=0)
        before += tl.sum(shares, axis=0)
    tl.store(tokens + number, tl.minimum(token, vocab - 1).to(tl.int64))


def draw(probs: Tensor, numbers: Tensor, top_k: Tensor) -> Tensor:
    """Tokens (R,) int64 of probs (R, V) float32; `numbers` (4, R) and `top_k` (R,) are those of `sampling.sample`."""
    probs, numbers = probs.contiguous(), numbers if numbers.stride(1) == 1 else numbers.contiguous()
    tokens = torch.empty(probs.shape[0], dtype=torch.int64, device=probs.device)
    _draw_kernel[(probs.shape[0],)](
        probs, numbers, top_k, tokens, probs.shape[1], numbers.stride(0), BLOCK_SIZE=BLOCK_SIZE, num_warps=32
    )
    return tokens
