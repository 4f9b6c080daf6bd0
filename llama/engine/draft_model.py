"""Drafts from a smaller model of the same vocabulary, with a cache of its own: a slot for each sequence of the engine.

Each draft is drawn with the noise that the model itself will draw with at that position, and from logits that were
changed in the same way, so that the two agree wherever their distributions are near.
"""

from collections.abc import Iterator
from collections.abc import Sequence as Listed
from dataclasses import dataclass, field
from itertools import takewhile

import torch

from llama.engine.drafts import Draft
from llama.engine.next_token import Place, next_tokens
from llama.engine.sampling import noise_key
from llama.engine.scheduler import Sequence
from llama.interrupts import let_through
from llama.kernels.sample import greedy
from llama.model.step import Step
from llama.model.transformer import Transformer


@dataclass(slots=True)
class Known:
    """What the draft model knows of a sequence: its slot holds the keys and values of `tokens`."""

    slot: int
    key: bytes  # of the request's noise
    tokens: list[int] = field(default_factory=list)

    def keep_common(self, tokens: list[int]) -> None:
        """Forget what is not the beginning of `tokens`, and at least their last, whose logits are wanted."""
        pairs = zip(self.tokens, tokens[:-1], strict=False)
        del self.tokens[sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs)) :]


class DraftModel:
    """`cost`: the time of a step beside one of the model that verifies."""

    def __init__(self, model: Transformer, slots: int, max_seq_len: int, max_step_tokens: int, cost: float) -> None:
        self.cost = cost
        self._model, self._most = model, max_step_tokens
        self._cache = model.new_cache(slots, max_seq_len)
        self._free = list(range(slots))
        self._known: dict[Sequence, Known] = {}

    def propose(self, sequences: Listed[Sequence], most: Listed[int]) -> list[Draft]:
        """One draft of each sequence after the other's, in steps of all that have room for more."""
        drafts: dict[Sequence, list[int]] = {sequence: [] for sequence in sequences}
        wanted = dict(zip(sequences, most, strict=True))
        going = [sequence for sequence in sequences if wanted[sequence]]
        for sequence in going:
            self._known_of(sequence).keep_common(sequence.tokens)
        while going:
            found = self._next({sequence: [*sequence.tokens, *drafts[sequence]] for sequence in going}, drafts)
            for sequence, token in found.items():
                drafts[sequence].append(token)
            going = [
                s for s, token in found.items()
                if len(drafts[s]) < wanted[s] and token not in s.request.stop_tokens
            ]  # fmt: skip
        return [tuple(drafts[sequence]) for sequence in sequences]

    def forget(self, sequence: Sequence) -> None:
        if known := self._known.pop(sequence, None):
            self._free.append(known.slot)

    def _known_of(self, sequence: Sequence) -> Known:
        if sequence not in self._known:
            request = sequence.request
            self._known[sequence] = Known(self._free.pop(), noise_key(request.seed, request.prompt))
        return self._known[sequence]

    def _next(self, texts: dict[Sequence, list[int]], drafts: dict[Sequence, list[int]]) -> dict[Sequence, int]:
        """The token that follows each text; none where its logits are not finite, or forbid all."""
        found: dict[Sequence, int] = {}
        for ends, step in self._steps(texts):
            with let_through():
                logits = self._model(step, self._cache)
            for sequence, stop in ends.items():
                self._known[sequence].tokens = texts[sequence][:stop]
            decided = [sequence for sequence, stop in ends.items() if stop == len(texts[sequence])]
            best, finite = greedy(logits)
            places = [Place.of(s.request, self._known[s].key, tuple(drafts[s])) for s in decided]
            if not all(finite):  # nothing can be drawn from them
                logits, best = torch.zeros_like(logits), [0] * len(best)
            for sequence, token, good in zip(decided, next_tokens(places, logits, best), finite, strict=True):
                if good and token is not None:
                    found[sequence] = token
        return found

    def _steps(self, texts: dict[Sequence, list[int]]) -> Iterator[tuple[dict[Sequence, int], Step]]:
        """Steps that compute what the cache lacks of the texts, and how far into each one; logits are those of ends."""
        missing = {sequence: len(self._known[sequence].tokens) for sequence in texts}
        while missing:
            left, ends, parts = self._most, {}, []
            for sequence, start in missing.items():
                stop = min(len(texts[sequence]), start + left)
                if stop == start:
                    break
                ends[sequence], left = stop, left - (stop - start)
                parts.append((self._known[sequence].slot, start, texts[sequence][start:stop]))
            rows, rest = [], 0
            for (sequence, stop), (_, _, part) in zip(ends.items(), parts, strict=True):
                rest += len(part)
                if stop == len(texts[sequence]):
                    rows.append(rest - 1)
            yield ends, Step.pack(parts, rows, self._model.device)
            missing |= ends
            missing = {sequence: start for sequence, start in missing.items() if start < len(texts[sequence])}
