"""From logits and one uniform number a row to tokens and their log-probabilities: pure functions.

Letters in shapes: R rows, V vocabulary.
"""

import hashlib
import struct
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy
import torch
from torch import Tensor

from llama.errors import ParameterError
from llama.kernels.dispatch import cpu_library, gpu_sampling
from llama.kernels.sample import draw
from llama.request import Request, SamplingParams

NOISE_BITS = 24  # of a number of noise: as many as float32 has
WHOLE = 1 << 38  # probability 1 in whole numbers, whose sums are the same in every order; times noise it fits 63 bits


class Draws(NamedTuple):
    """What decides each row's draw beside its logits: views (R,) of one tensor (4, R), which kernels take whole."""

    temperature: Tensor
    top_p: Tensor
    min_p: Tensor
    noise: Tensor


def noise_key(seed: int, prompt: Sequence[int]) -> bytes:
    """The key of a request's noise: another one for another seed or another prompt, whoever shares its batch."""
    return hashlib.blake2b(struct.pack(f"<Q{len(prompt)}q", seed, *prompt), digest_size=16).digest()


def uniform(key: bytes, position: int) -> float:
    """The request's number in [0, 1) for the token at `position`: a counter-based generator (keyed BLAKE2b)."""
    digest = hashlib.blake2b(struct.pack("<q", position), digest_size=8, key=key).digest()
    return (int.from_bytes(digest, "little") >> 64 - NOISE_BITS) * 2.0**-NOISE_BITS


def sample(logits: Tensor, draws: Tensor, top_k: Tensor) -> Tensor:
    """Draw a token (R,) int64 for each row of logits (R, V).

    `draws` (4, R) float32 has the rows of `Draws`; `top_k` is (R,) int64. Temperature 0 takes the largest logit. The
    filters are those of `SamplingParams`; of equal tokens they keep the lower one. Lay the kept tokens side by side in
    the order of their ids, each as wide as its probability: the drawn one lies at noise · (width of all).
    """
    return draw(logits, draws, top_k) if cpu_library(logits) else sample_all(logits, draws, top_k)


def sample_all(logits: Tensor, draws: Tensor, top_k: Tensor) -> Tensor:
    """The same without the kernels for a CPU. The host never waits for the device, so a CUDA graph may hold it."""
    temperature = Draws(*draws).temperature
    drawn = temperature > 0
    # Subtract the largest logit before dividing: a logit divided by a tiny temperature would be infinite.
    spread = logits - logits.amax(-1, keepdim=True)
    probs = torch.softmax(spread / torch.where(drawn, temperature, 1.0)[:, None], dim=-1)
    gpu = gpu_sampling(logits.device)
    tokens = gpu.draw(probs, draws, top_k) if gpu else _draw_sorted(probs, draws, top_k)
    return torch.where(drawn, tokens, logits.argmax(-1))


def _draw_sorted(probs: Tensor, draws: Tensor, top_k: Tensor) -> Tensor:
    """Draw from what the filters keep of probs (R, V), by PyTorch's operators."""
    _, top_p, min_p, noise = Draws(*draws)
    return _draw(torch.where(_kept(probs, top_p, top_k, min_p), probs, 0.0), noise)


def _kept(probs: Tensor, top_p: Tensor, top_k: Tensor, min_p: Tensor) -> Tensor:
    """Which tokens of probs (R, V) the filters keep, told by a stable sort."""
    best, order = torch.sort(probs, dim=-1, descending=True, stable=True)
    rank, shares = torch.arange(probs.shape[1], device=probs.device), _shares(best)
    limited = top_k > 0
    kept = ~limited[:, None] | (rank < top_k[:, None])
    cumulative = torch.where(kept, shares, 0).cumsum(-1)
    # What top_k keeps is renormalised before top_p; without it a row's mass is 1, however its sum is rounded.
    mass = torch.where(limited, cumulative[:, -1], WHOLE)
    kept &= cumulative - shares <= (top_p * mass)[:, None]
    kept &= best >= min_p[:, None] * best[:, :1]
    kept |= ((top_p == 1) & ~limited & (min_p == 0))[:, None]
    return torch.empty_like(kept).scatter_(1, order, kept)


def _draw(probs: Tensor, noise: Tensor) -> Tensor:
    """Draw from all of probs (R, V), in the order of the tokens.

    Not in the order of probability: there a rounding error that swaps two like tokens would change the draw.
    """
    cumulative = _shares(probs).cumsum(-1)
    target = (noise[:, None] * 2**NOISE_BITS).long() * cumulative[:, -1:] >> NOISE_BITS
    drawn = torch.searchsorted(cumulative, target, right=True)[:, 0]
    return drawn.clamp(max=probs.shape[1] - 1)  # beyond, where logits are not finite: such rows are refused later


def _shares(probs: Tensor) -> Tensor:
    """Probabilities as whole numbers, so that their sum is the same in whatever order they are added.

    A GPU adds the numbers of a row in an order that may change from run to run. The rounding errors of a float sum
    would change with it, and so would draws. They could also let a sum grow at a token of probability 0, and draw it.
    """
    return (probs * WHOLE).round().long()


def adjust(
    logits: Tensor,
    params: SamplingParams,
    prompt: Sequence[int],
    completion: Sequence[int],
    stop_tokens: frozenset[int],
) -> Tensor:
    """One row of logits (V,) after the request's bias, penalties and bans (the order is in `SamplingParams`)."""
    logits = logits.clone()

    def at(tokens: Sequence[int]) -> Tensor:
        return torch.tensor(tokens, dtype=torch.int64, device=logits.device)

    if params.logit_bias:
        logits[at(list(params.logit_bias))] += torch.tensor(list(params.logit_bias.values()), device=logits.device)
    if params.repetition_penalty != 1:
        seen = at(sorted({*prompt, *completion}))
        values = logits[seen]
        logits[seen] = torch.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
    if completion and (params.presence_penalty or params.frequency_penalty):
        counts = Counter(completion)
        amount = torch.tensor(list(counts.values()), dtype=torch.float32, device=logits.device)
        logits[at(list(counts))] -= params.presence_penalty + params.frequency_penalty * amount
    banned = _banned(params.bad_words, prompt, completion)
    if len(completion) < params.min_gen_len:
        banned |= stop_tokens
    if banned:
        logits[at(sorted(banned))] = -torch.inf
    return logits


def forbid(logits: Tensor, banned: Tensor) -> None:
    """Write -inf into a row of logits (V,) where `banned` (V,), a bool tensor on a CPU, is true."""
    if logits.device.type == "cpu":
        numpy.copyto(logits.numpy(), -numpy.inf, where=banned.numpy())  # several times as fast as `masked_fill_`
    else:
        logits.masked_fill_(banned.to(logits.device), -torch.inf)


def no_token(request: Request) -> ParameterError:
    """The error of a request that forbids every token somewhere."""
    if request.form and request.form.fault:
        return ParameterError(f"{request.name}: {request.form.fault}")
    if request.params.form:
        return ParameterError(
            f"{request.name}: its {request.params.form[0]} with its logit_bias, bad_words and min_gen_len forbids every"
            " token at some place: allow one"
        )
    return ParameterError(
        f"{request.name}: its logit_bias, bad_words and min_gen_len forbid every token at some place: allow one"
    )


def _banned(bad_words: Sequence[Sequence[int]], prompt: Sequence[int], completion: Sequence[int]) -> set[int]:
    """The tokens that would complete a bad word now."""
    reach = max((len(word) - 1 for word in bad_words), default=0)
    tail = (*prompt[max(0, len(prompt) - reach) :], *completion)
    return {word[-1] for word in bad_words if len(word) == 1 or tail[-(len(word) - 1) :] == tuple(word[:-1])}


def top_logprobs(logprobs: Tensor, k: int) -> list[dict[int, float]]:
    """Per row of log-probabilities (R, V) the k most probable tokens, best first."""
    values, ids = logprobs.topk(min(k, logprobs.shape[-1]), dim=-1)
    return [dict(zip(row_ids, row, strict=True)) for row_ids, row in zip(ids.tolist(), values.tolist(), strict=True)]
