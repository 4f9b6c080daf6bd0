"""Beam search: it keeps the `num_beams` most probable beginnings, and returns the best completion among them.

The rules are those of Hugging Face transformers with early_stopping=False. A beam that ends among the best num_beams
scores log p / length ** length_penalty. The search ends when no running beam can beat the worst ending that it keeps.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llama.engine.sampling import Behind, adjust, no_token, top_logprobs
from llama.errors import NumericalError
from llama.model.kv_cache import KVCache
from llama.model.step import Step
from llama.model.transformer import Transformer
from llama.request import Request


@dataclass(frozen=True, slots=True)
class Beam:
    """A beginning: its tokens after the prompt, their log-probability, and the cache slot that has all but the last."""

    tokens: list[int] = field(default_factory=list)
    score: float = 0.0
    slot: int = 0
    logprobs: list[float] = field(default_factory=list)  # of the model itself, one a token
    tops: list[dict[int, float]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Ending:
    """A beam that ended, with its score by length; `stopped` tells an end token, which is then its last."""

    beam: Beam
    score: float
    stopped: bool


def beam_search(
    model: Transformer, cache: KVCache, request: Request, slots: list[int], max_step_tokens: int
) -> Iterator[int]:
    """Run one request in `slots`, which are its own meanwhile, writing the best completion into it at the end.

    Yields after each pass through the model how many tokens it computed. Raises NumericalError on logits that are
    not finite, ParameterError where the request forbids every token.
    """
    params = request.params
    room = cache.max_seq_len - len(request.prompt)
    most = room if params.max_gen_len is None else min(room, params.max_gen_len)
    logits: Tensor  # of the last pass: a prompt has a token at least
    for start in range(0, len(request.prompt), max_step_tokens):
        chunk = request.prompt[start : start + max_step_tokens]
        logits = model(Step.pack([(slots[0], start, chunk)], [len(chunk) - 1], model.device), cache)
        yield len(chunk)
    beams: list[Beam] = [Beam(slot=slots[0])]
    endings: list[Ending] = []
    while len(beams[0].tokens) < most:
        candidates = _continuations(beams, request, logits)
        endings = _endings(candidates, endings, request, most)
        running = [beam for beam in candidates if beam.tokens[-1] not in request.stop_tokens][: params.num_beams]
        length = len(beams[0].tokens) + 1
        dead = not running or running[0].score == -math.inf
        if dead or length == most or not _can_improve(running[0].score, length, endings, request):
            break
        beams = _move(beams, running, slots[: params.num_beams], len(request.prompt), cache)
        parts = [(beam.slot, len(request.prompt) + length - 1, beam.tokens[-1:]) for beam in beams]
        logits = model(Step.pack(parts, range(len(parts)), model.device), cache)
        yield len(parts)
    if endings and endings[0].score > -math.inf:
        _write(request, endings[0])
    elif most:
        raise no_token(request)


def _continuations(beams: list[Beam], request: Request, logits: Tensor) -> list[Beam]:
    """The best continuations of all beams by one token, best first; in each, `slot` is still its parent's."""
    if not logits.isfinite().all():
        raise NumericalError(f"the model gave NaN or infinite logits for {request.name}: verify the weights")
    params = request.params
    raw = torch.log_softmax(logits, dim=-1)
    scores = raw
    if not params.plain:
        scores = raw.clone()
        adjust(scores, [Behind(params, request.prompt, beam.tokens, request.stop_tokens) for beam in beams])
    total = (scores + torch.tensor([[beam.score] for beam in beams], device=raw.device)).flatten()
    # Even if every end token is among the best of each beam, num_beams continuations that go on are left.
    count = min((1 + len(request.stop_tokens)) * params.num_beams, len(total))
    values, places = total.topk(count)
    tops = top_logprobs(raw, params.top_logprobs) if params.top_logprobs else None
    found = []
    for value, place in zip(values.tolist(), places.tolist(), strict=True):
        row, token = divmod(place, raw.shape[-1])
        parent = beams[row]
        found.append(
            Beam(
                [*parent.tokens, token], value, parent.slot, [*parent.logprobs, raw[row, token].item()],
                [*parent.tops, tops[row]] if tops else [],
            )
        )  # fmt: skip
    return found


def _endings(candidates: list[Beam], endings: list[Ending], request: Request, most: int) -> list[Ending]:
    """The num_beams best endings, best first: those before, and the best candidates that end here."""
    params = request.params
    for beam in candidates[: params.num_beams]:
        stopped = beam.tokens[-1] in request.stop_tokens
        if stopped or len(beam.tokens) == most:
            endings = [*endings, Ending(beam, beam.score / len(beam.tokens) ** params.length_penalty, stopped)]
    return sorted(endings, key=lambda ending: -ending.score)[: params.num_beams]


def _can_improve(best: float, length: int, endings: list[Ending], request: Request) -> bool:
    full = len(endings) == request.params.num_beams
    return not full or best / length**request.params.length_penalty > endings[-1].score


def _move(parents: list[Beam], children: list[Beam], slots: list[int], prompt: int, cache: KVCache) -> list[Beam]:
    """Give every child a slot with its parent's keys: a parent's first child stays in place, others get copies."""
    taken: set[int] = set()
    stays = []
    for child in children:
        stays.append(child.slot not in taken)
        taken.add(child.slot)
    free = [slot for slot in slots if slot not in taken]
    moved = []
    first_copy = 0 if len(parents) == 1 else prompt  # later on all slots hold the prompt already
    for child, stay in zip(children, stays, strict=True):
        slot = child.slot if stay else free.pop()
        if not stay:
            cache.copy_prefix(child.slot, slot, prompt + len(child.tokens) - 1, first_copy)
        moved.append(Beam(child.tokens, child.score, slot, child.logprobs, child.tops))
    return moved


def _write(request: Request, best: Ending) -> None:
    kept = len(best.beam.tokens) - best.stopped
    request.tokens = best.beam.tokens[:kept]
    request.logprobs = best.beam.logprobs[:kept]
    request.top_logprobs = best.beam.tops[:kept]
    request.finish_reason = "stop" if best.stopped else "length"
