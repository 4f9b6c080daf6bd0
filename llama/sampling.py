"""From logits and one uniform number a row to tokens and their log-probabilities: pure functions.

Letters in shapes: R rows, V vocabulary.
"""

import hashlib
import struct
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llama.request import SamplingParams

NOISE_BITS = 24  # of a number of noise: as many as float32 has
WHOLE = 1 << 38  # probability 1 in whole numbers, whose sums are the same in every order; times noise it fits 63 bits
CANDIDATES = 256  # a CPU sorts so many first, and all of them only for rows whose kept tokens reach further


def noise_key(seed: int, prompt: Sequence[int]) -> bytes:
    """The key of a request's noise: another one for another seed or another prompt, whoever shares its batch."""
    return hashlib.blake2b(struct.pack(f"<Q{len(prompt)}q", seed, *prompt), digest_size=16).digest()


def uniform(key: bytes, position: int) -> float:
    """The request's number in [0, 1) for the token at `position`: a counter-based generator (keyed BLAKE2b)."""
    digest = hashlib.blake2b(struct.pack("<q", position), digest_size=8, key=key).digest()
    return (int.from_bytes(digest, "little") >> 64 - NOISE_BITS) * 2.0**-NOISE_BITS


def sample(logits: Tensor, temperature: Tensor, top_p: Tensor, top_k: Tensor, min_p: Tensor, noise: Tensor) -> Tensor:
    """Draw a token (R,) int64 for each row of logits (R, V); all else is (R,), float32 but for int64 top_k.

    Temperature 0 takes the largest logit. The filters are those of `SamplingParams`, ties going to the lower
    token; of the kept tokens, in the order of their ids, the one is taken in which noise · kept mass falls.
    """
    if logits.device.type == "cuda":
        return sample_all(logits, temperature, top_p, top_k, min_p, noise)
    tokens = logits.argmax(-1)
    drawn = (temperature > 0).nonzero().flatten()
    if len(drawn) == 0:
        return tokens
    # Less the largest first: divided by a tiny temperature it would be infinite.
    spread = logits[drawn] - logits[drawn].amax(-1, keepdim=True)
    probs = torch.softmax(spread / temperature[drawn, None], dim=-1)
    tokens[drawn] = _draw(probs, _Filters(top_p, top_k, min_p, noise).of(drawn))
    return tokens


def sample_all(
    logits: Tensor, temperature: Tensor, top_p: Tensor, top_k: Tensor, min_p: Tensor, noise: Tensor
) -> Tensor:
    """The same, with every row sorted: the host never waits for the device, so a CUDA graph may hold it."""
    drawn = temperature > 0
    spread = logits - logits.amax(-1, keepdim=True)
    probs = torch.softmax(spread / torch.where(drawn, temperature, 1.0)[:, None], dim=-1)
    return torch.where(drawn, _draw_sorted(probs, _Filters(top_p, top_k, min_p, noise)), logits.argmax(-1))


@dataclass(frozen=True, slots=True)
class _Filters:
    """The filters and the noise of R rows, each (R,)."""

    top_p: Tensor
    top_k: Tensor
    min_p: Tensor
    noise: Tensor

    @property
    def open(self) -> Tensor:
        """Which rows keep every token."""
        return (self.top_p == 1) & (self.top_k == 0) & (self.min_p == 0)

    def of(self, rows: Tensor) -> "_Filters":
        return _Filters(self.top_p[rows], self.top_k[rows], self.min_p[rows], self.noise[rows])


def _draw(probs: Tensor, filters: _Filters) -> Tensor:
    """Draw from probs (R, V), each row by the cheapest way that is exact for it.

    A row without filters is not sorted. A CPU takes the best CANDIDATES of a row, where they surely hold all kept
    tokens. Everything else is a full sort. Which way a row goes depends on that row alone.
    """
    tokens = torch.empty(len(probs), dtype=torch.int64, device=probs.device)
    open_rows = filters.open
    few = torch.zeros_like(open_rows)
    if probs.device.type == "cpu" and probs.shape[1] > CANDIDATES:
        few = ~open_rows & _candidates_suffice(probs, filters)
    for chosen, draw in ((open_rows, _draw_open), (few, _draw_few), (~(open_rows | few), _draw_sorted)):
        rows = chosen.nonzero().flatten()
        if len(rows):
            tokens[rows] = draw(probs[rows], filters.of(rows))
    return tokens


def _candidates_suffice(probs: Tensor, filters: _Filters) -> Tensor:
    """Whether the CANDIDATES best of each row (R,) hold all that its filters keep, and no tie reaches beyond them."""
    best = probs.topk(CANDIDATES + 1, dim=-1).values
    last, beyond = best[:, CANDIDATES - 1], best[:, CANDIDATES]
    by_k = (filters.top_k > 0) & (filters.top_k <= CANDIDATES)
    by_mass = (filters.top_k == 0) & (_shares(best[:, :CANDIDATES]).sum(-1) > filters.top_p * WHOLE)
    return (last > beyond) & (by_k | by_mass | (beyond < filters.min_p * best[:, 0]) & (filters.top_k == 0))


def _draw_few(probs: Tensor, filters: _Filters) -> Tensor:
    ids = probs.topk(CANDIDATES, dim=-1).indices.sort(dim=-1).values
    return ids.gather(1, _draw_sorted(probs.gather(1, ids), filters)[:, None])[:, 0]


def _draw_sorted(probs: Tensor, filters: _Filters) -> Tensor:
    """Draw from probs (R, C), after a stable sort that tells which tokens the filters keep."""
    best, order = torch.sort(probs, dim=-1, descending=True, stable=True)
    rank, shares = torch.arange(probs.shape[1], device=probs.device), _shares(best)
    limited = filters.top_k > 0
    kept = ~limited[:, None] | (rank < filters.top_k[:, None])
    cumulative = torch.where(kept, shares, 0).cumsum(-1)
    # What top_k keeps is renormalised before top_p; without it a row's mass is 1, even if only candidates are here.
    mass = torch.where(limited, cumulative[:, -1], WHOLE)
    kept &= cumulative - shares <= (filters.top_p * mass)[:, None]
    kept &= best >= filters.min_p[:, None] * best[:, :1]
    kept |= filters.open[:, None]  # to the last token, however the sum is rounded
    return _draw_open(probs * torch.empty_like(kept).scatter_(1, order, kept), filters)


def _draw_open(probs: Tensor, filters: _Filters) -> Tensor:
    """Draw from all of probs (R, C), in the order of the columns.

    Not in the order of probability: there a rounding error that swaps two like tokens would change the draw.
    """
    cumulative = _shares(probs).cumsum(-1)
    target = (filters.noise[:, None] * 2**NOISE_BITS).long() * cumulative[:, -1:] >> NOISE_BITS
    drawn = torch.searchsorted(cumulative, target, right=True)[:, 0]
    return drawn.clamp(max=probs.shape[1] - 1)  # beyond, where logits are not finite: such rows are refused later


def _shares(probs: Tensor) -> Tensor:
    """Probabilities as integers. A GPU adds a row's numbers in parts, and of a single row in another order each time.

    Rounded, a sum could also grow at a token of probability 0, which might then be drawn.
    """
    return (probs * WHOLE).long()


def adjust(
    logits: Tensor, params: SamplingParams, prompt: Sequence[int], made: Sequence[int], stop_tokens: frozenset[int]
) -> Tensor:
    """One row of logits (V,) after the request's bias, penalties and bans (the order is in `SamplingParams`)."""
    logits = logits.clone()

    def at(tokens: Sequence[int]) -> Tensor:
        return torch.tensor(tokens, dtype=torch.int64, device=logits.device)

    if params.logit_bias:
        logits[at(list(params.logit_bias))] += torch.tensor(list(params.logit_bias.values()), device=logits.device)
    if params.repetition_penalty != 1:
        seen = at(sorted({*prompt, *made}))
        values = logits[seen]
        logits[seen] = torch.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
    if made and (params.presence_penalty or params.frequency_penalty):
        counts = Counter(made)
        amount = torch.tensor(list(counts.values()), dtype=torch.float32, device=logits.device)
        logits[at(list(counts))] -= params.presence_penalty + params.frequency_penalty * amount
    banned = _banned(params.bad_words, prompt, made)
    if len(made) < params.min_gen_len:
        banned |= stop_tokens
    if banned:
        logits[at(sorted(banned))] = -torch.inf
    return logits


def _banned(bad_words: Sequence[Sequence[int]], prompt: Sequence[int], made: Sequence[int]) -> set[int]:
    """The tokens that would complete a bad word now."""
    reach = max((len(word) - 1 for word in bad_words), default=0)
    tail = (*prompt[max(0, len(prompt) - reach) :], *made)
    return {word[-1] for word in bad_words if len(word) == 1 or tail[-(len(word) - 1) :] == tuple(word[:-1])}


def top_logprobs(logprobs: Tensor, k: int) -> list[dict[int, float]]:
    """Per row of log-probabilities (R, V) the k most probable tokens, best first."""
    values, ids = logprobs.topk(min(k, logprobs.shape[-1]), dim=-1)
    return [dict(zip(row_ids, row, strict=True)) for row_ids, row in zip(ids.tolist(), values.tolist(), strict=True)]
