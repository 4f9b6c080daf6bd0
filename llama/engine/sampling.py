"""From logits and one uniform number a row to tokens and their log-probabilities: pure functions, but for `adjust` and
`forbid`, which change the rows that they are given.

Letters in shapes: R rows, V vocabulary.
"""

import hashlib
import struct
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy
import torch
from numpy.typing import NDArray
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


class Behind(NamedTuple):
    """What a row of logits follows, and what its request asks of the next token."""

    params: SamplingParams
    prompt: Sequence[int]
    completion: Sequence[int]
    stop_tokens: frozenset[int]


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


def adjust(logits: Tensor, rows: Sequence[Behind]) -> None:
    """Change rows of logits (R, V) by their requests' bias, penalties and bans (the order is in `SamplingParams`)."""
    flat, vocab = logits.view(-1), logits.shape[1]
    changed = [(number * vocab, row) for number, row in enumerate(rows) if not row.params.plain]

    def at(places: list[int]) -> Tensor:
        return torch.tensor(places, dtype=torch.int64, device=logits.device)

    places = [first + token for first, row in changed for token in row.params.logit_bias]
    if places:
        biases = [bias for _, row in changed for bias in row.params.logit_bias.values()]
        flat[at(places)] += torch.tensor(biases, dtype=torch.float32, device=logits.device)
    for first, row in changed:
        if (penalty := row.params.repetition_penalty) != 1:
            seen = at([first + token for token in {*row.prompt, *row.completion}])
            values = flat[seen]
            flat[seen] = torch.where(values > 0, values / penalty, values * penalty)
    places, amounts = _counted(changed)
    if places:
        flat[at(places)] -= torch.from_numpy(numpy.concatenate(amounts)).to(logits.device)
    places = [first + token for first, row in changed for token in _banned(row)]
    if places:
        flat[at(places)] = -torch.inf


def forbid(logits: Tensor, rows: list[int], masks: list[NDArray[numpy.uint32]]) -> None:
    """Write -inf into some rows of logits (R, V), wherever their masks (W,), as `Form` makes them, have no bit."""
    vocab = logits.shape[1]
    if logits.device.type == "cpu":
        for row, mask in zip(rows, masks, strict=True):  # one at a time: a row's bits stay in the processor's cache
            banned = numpy.unpackbits((~mask).view(numpy.uint8), count=vocab, bitorder="little").view(numpy.bool_)
            numpy.copyto(logits[row].numpy(), -numpy.inf, where=banned)  # several times as fast as `masked_fill_`
        return
    words = torch.from_numpy(numpy.stack(masks).view(numpy.int32)).to(logits.device)
    at = torch.tensor(rows, device=logits.device)
    logits[at] = torch.where(_bits(words)[:, :vocab], logits[at], -torch.inf)


def _bits(words: Tensor) -> Tensor:
    """The bits (R, 32 W) of int32 words (R, W), from the lowest of each on, as bools."""
    bit = torch.arange(32, dtype=torch.int32, device=words.device)
    return (words[:, :, None] >> bit & 1).flatten(1).bool()


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


def _counted(rows: list[tuple[int, Behind]]) -> tuple[list[int], list[NDArray[numpy.float32]]]:
    """What presence and frequency penalties subtract: the places, counted from each row's first, and the amounts."""
    places, amounts = [], []
    for first, row in rows:
        if row.completion and (row.params.presence_penalty or row.params.frequency_penalty):
            counts = Counter(row.completion)
            amount = numpy.fromiter(counts.values(), numpy.float32, len(counts))
            places += [first + token for token in counts]
            amounts.append(row.params.presence_penalty + row.params.frequency_penalty * amount)
    return places, amounts


def _banned(row: Behind) -> set[int]:
    """The tokens that would complete a bad word now, and those that end a text where it is too short."""
    bad_words = row.params.bad_words
    reach = max((len(word) - 1 for word in bad_words), default=0)
    tail = (*row.prompt[max(0, len(row.prompt) - reach) :], *row.completion) if reach else ()
    banned = {word[-1] for word in bad_words if len(word) == 1 or tail[-(len(word) - 1) :] == tuple(word[:-1])}
    return banned | row.stop_tokens if len(row.completion) < row.params.min_gen_len else banned


def top_logprobs(logprobs: Tensor, k: int) -> list[dict[int, float]]:
    """Per row of log-probabilities (R, V) the k most probable tokens, best first."""
    values, ids = logprobs.topk(min(k, logprobs.shape[-1]), dim=-1)
    return [dict(zip(row_ids, row, strict=True)) for row_ids, row in zip(ids.tolist(), values.tolist(), strict=True)]
