"""The next token at each of some places, from its row of logits."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from llama.engine.sampling import Behind, adjust, forbid, sample, uniform
from llama.kernels.sample import greedy
from llama.request import Request


@dataclass(frozen=True, slots=True)
class Place:
    """Where a token is to be chosen: behind a request's tokens, and behind drafts that may follow them."""

    request: Request
    key: bytes  # of the request's noise
    drafts: tuple[int, ...] = ()
    mask: NDArray[numpy.uint32] | None = None  # (W,): the tokens that the request's form allows here, a bit each

    @classmethod
    def of(cls, request: Request, key: bytes, drafts: tuple[int, ...] = ()) -> "Place":
        """With what the request's form allows there, which takes a while."""
        form = request.form
        return cls(request, key, drafts, None if form is None else form.mask(request.tokens, drafts))

    @property
    def completion(self) -> list[int]:
        return [*self.request.tokens, *self.drafts]

    @property
    def behind(self) -> Behind:
        request = self.request
        return Behind(request.params, request.prompt, self.completion, request.stop_tokens)

    @property
    def noise(self) -> float:
        return uniform(self.key, len(self.request.prompt) + len(self.request.tokens) + len(self.drafts))


@torch.inference_mode()  # else PyTorch refuses to change what a model gave
def next_tokens(places: Sequence[Place], logits: Tensor, best: list[int]) -> Iterable[int | None]:
    """The token at each place, from logits (R, V), `best` the largest of each; None where all are forbidden.

    The logits are what it works in: they are changed.
    """
    all_greedy = all(place.request.params.temperature == 0 for place in places)
    plain = all(place.request.params.plain for place in places)
    formed = {row: place.mask for row, place in enumerate(places) if place.mask is not None}
    if plain and not formed:
        return best if all_greedy else _sample(places, logits).tolist()
    if not plain:
        adjust(logits, [place.behind for place in places])
    if formed:
        forbid(logits, list(formed), list(formed.values()))
    tokens = torch.tensor(greedy(logits)[0], device=logits.device) if all_greedy else _sample(places, logits)
    none = logits.gather(1, tokens[:, None])[:, 0] == -torch.inf  # the token is any, where all are forbidden
    return [None if nothing else token for nothing, token in zip(none.tolist(), tokens.tolist(), strict=True)]


def _sample(places: Sequence[Place], logits: Tensor) -> Tensor:
    columns = [
        (params.temperature, params.top_p, params.min_p, place.noise)
        for place in places
        for params in (place.request.params,)
    ]
    draws = torch.tensor(columns, device=logits.device).T
    top_k = torch.tensor([place.request.params.top_k for place in places], device=logits.device)
    return sample(logits, draws, top_k)
