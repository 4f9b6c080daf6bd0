"""The next token at each of some places, from its row of logits: pure functions."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llama.engine.sampling import adjust, forbid, sample, uniform
from llama.kernels.sample import greedy
from llama.request import Request


@dataclass(frozen=True, slots=True)
class Place:
    """Where a token is to be chosen: behind a request's tokens, and behind drafts that may follow them."""

    request: Request
    key: bytes  # of the request's noise
    drafts: tuple[int, ...] = ()
    banned: Tensor | None = None  # (V,) bool: the tokens that the request's form does not allow here

    @classmethod
    def of(cls, request: Request, key: bytes, drafts: tuple[int, ...] = ()) -> "Place":
        """With what the request's form does not allow there, which takes a while."""
        form = request.form
        return cls(
            request, key, drafts, None if form is None else torch.from_numpy(form.banned(request.tokens, drafts))
        )

    @property
    def completion(self) -> list[int]:
        return [*self.request.tokens, *self.drafts]

    @property
    def noise(self) -> float:
        return uniform(self.key, len(self.request.prompt) + len(self.request.tokens) + len(self.drafts))


def next_tokens(places: Sequence[Place], logits: Tensor, best: list[int]) -> Iterable[int | None]:
    """The token at each place, from logits (R, V), `best` the largest of each; None where all are forbidden."""
    all_greedy = all(place.request.params.temperature == 0 for place in places)
    if all(place.request.params.plain and place.banned is None for place in places):
        return best if all_greedy else _sample(places, logits)
    logits = logits.clone()
    for row, place in zip(logits, places, strict=True):
        request = place.request
        if not request.params.plain:
            row.copy_(adjust(row, request.params, request.prompt, place.completion, request.stop_tokens))
        if place.banned is not None:
            forbid(row, place.banned)
    empty = (logits.amax(-1) == -torch.inf).tolist()
    if any(empty):
        logits[empty] = 0
    tokens = greedy(logits)[0] if all_greedy else _sample(places, logits)
    return [None if none else token for none, token in zip(empty, tokens, strict=True)]


def _sample(places: Sequence[Place], logits: Tensor) -> list[int]:
    columns = [
        (params.temperature, params.top_p, params.min_p, place.noise)
        for place in places
        for params in (place.request.params,)
    ]
    draws = torch.tensor(columns, device=logits.device).T
    top_k = torch.tensor([place.request.params.top_k for place in places], device=logits.device)
    tokens: list[int] = sample(logits, draws, top_k).tolist()
    return tokens
