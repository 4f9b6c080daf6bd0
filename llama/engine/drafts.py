"""Speculation: tokens that may come next are drafted, and one step verifies them. Plain Python.

The noise of a token belongs to its request and its position. So a draft is right exactly when it is the token that the
model itself would choose there: what is kept is what would have been made without drafts, greedy or sampled.
"""

import math
from collections.abc import Sequence as Listed
from dataclasses import dataclass
from typing import Protocol

from llama.engine.scheduler import Sequence

Draft = tuple[int, ...]
_LEAST_MATCH = 2  # tokens: one that was there before says little of what comes next
_FIRST_PAUSE, _LONGEST_PAUSE = 8, 64  # steps without drafts
_HIGHEST_PRICE = 0.95  # a draft that is surely right is worth it
_WEIGHT = 0.25  # of the newest draft in the rate of right ones


class Drafter(Protocol):
    """Where drafts come from. `cost`: the time that one takes, beside a step of the model that verifies."""

    cost: float

    def propose(self, sequences: Listed[Sequence], most: Listed[int]) -> list[Draft]:
        """What may follow each sequence's tokens: at most so many tokens, perhaps none."""
        ...

    def forget(self, sequence: Sequence) -> None:
        """A sequence has ended."""
        ...


class Suffixes:
    """A suffix automaton of a list of tokens that grows: its longest suffix that was there before, and where.

    Each state stands for the parts of the list that end at the same places, and links to the longest shorter ending
    that is in more places. A token takes constant time on average (Blumer et al., 1985,
    https://doi.org/10.1016/0304-3975(85)90157-4).
    """

    def __init__(self) -> None:
        self.tokens = 0  # how many were added
        self.length = 0  # of the longest suffix that was there before
        self.end = 0  # how many tokens there were at the end of that earlier place, a recent one
        self._next: list[dict[int, int]] = [{}]
        self._link, self._lengths, self._ends = [-1], [0], [0]
        self._whole = 0  # the state of the whole list

    def add(self, token: int) -> None:
        self.tokens += 1
        state, at = self._state({}, self._lengths[self._whole] + 1, self.tokens), self._whole
        while at >= 0 and token not in self._next[at]:
            self._next[at][token] = state
            at = self._link[at]
        link = 0 if at < 0 else self._exactly(at, token)
        self._link[state], self._whole = link, state
        self.length, self.end = self._lengths[link], self._ends[link]
        self._ends[link] = self.tokens

    def _exactly(self, at: int, token: int) -> int:
        """The state of the longest part of state `at` with the token behind it, split from longer ones if need be."""
        found, length = self._next[at][token], self._lengths[at] + 1
        if self._lengths[found] == length:
            return found
        split = self._state(dict(self._next[found]), length, self._ends[found])
        self._link[split], self._link[found] = self._link[found], split
        while at >= 0 and self._next[at].get(token) == found:
            self._next[at][token] = split
            at = self._link[at]
        return split

    def _state(self, following: dict[int, int], length: int, end: int) -> int:
        self._next.append(following)
        self._link.append(-1)
        self._lengths.append(length)
        self._ends.append(end)
        return len(self._next) - 1


class Lookup:
    """Drafts from a sequence itself: what followed its longest suffix that was in it before."""

    cost = 0.0

    def __init__(self) -> None:
        self._suffixes: dict[Sequence, Suffixes] = {}

    def propose(self, sequences: Listed[Sequence], most: Listed[int]) -> list[Draft]:
        return [self._follows(sequence, n) for sequence, n in zip(sequences, most, strict=True)]

    def forget(self, sequence: Sequence) -> None:
        self._suffixes.pop(sequence, None)

    def _follows(self, sequence: Sequence, most: int) -> Draft:
        """No more than the suffix has itself: a short one may have been there by chance."""
        known, tokens = self._suffixes.setdefault(sequence, Suffixes()), sequence.tokens
        for token in tokens[known.tokens :]:
            known.add(token)
        if known.length < _LEAST_MATCH:
            return ()
        period = len(tokens) - known.end  # what follows may reach the end, and begins again there
        return tuple(tokens[known.end + n % period] for n in range(min(most, known.length)))


@dataclass(slots=True)
class Pace:
    """How many drafts a sequence is worth: as long as its drafts fail, none but for a try now and then."""

    rate: float = 0.7  # of drafts that were right where those before them were, the newest counting most
    pause: int = 0  # steps until the next try
    patience: int = _FIRST_PAUSE  # how long the next pause is

    def wanted(self, price: float) -> int:
        """So many drafts that the last of them is right with a probability of `price`; 0 in a pause."""
        if self.pause:
            self.pause -= 1
            return 0
        return int(math.log(price) / math.log(min(self.rate, 0.99))) if self.rate > price else 1

    def learn(self, drafted: int, right: int, price: float) -> None:
        """Of so many drafts the first ones were right, and the one after them was not."""
        for n in range(min(drafted, right + 1)):
            self.rate += _WEIGHT * ((n < right) - self.rate)
        if self.rate > price:
            self.patience = _FIRST_PAUSE
        else:
            self.pause, self.patience = self.patience, min(2 * self.patience, _LONGEST_PAUSE)


class Speculation:
    """Who gets how many drafts, at most `most` a sequence, in steps of at most `rows` tokens; `name`: of the way."""

    def __init__(self, name: str, drafter: Drafter, most: int, rows: int) -> None:
        self.name, self.most = name, most
        self._drafter, self._rows = drafter, rows
        self._paces: dict[Sequence, Pace] = {}

    def drafts(self, sequences: Listed[Sequence], rooms: Listed[int]) -> list[Draft]:
        """Tokens to be verified behind the next one of each sequence, which has room for so many more."""
        price, left, most = self._price(len(sequences)), self._rows - len(sequences), []
        for number, (sequence, room) in enumerate(zip(sequences, rooms, strict=True)):
            wanted = self._paces.setdefault(sequence, Pace()).wanted(price)
            most.append(max(0, min(wanted, room, self.most, left // (len(sequences) - number))))
            left -= most[-1]
        return self._drafter.propose(sequences, most)

    def learn(self, sequence: Sequence, drafted: int, right: int, sequences: int) -> None:
        """What came of a sequence's drafts in a step of so many sequences."""
        self._paces[sequence].learn(drafted, right, self._price(sequences))

    def forget(self, sequence: Sequence) -> None:
        """A sequence has ended."""
        self._paces.pop(sequence, None)
        self._drafter.forget(sequence)

    def _price(self, sequences: int) -> float:
        """What a draft costs, in tokens that its time would make without it: the more share a step, the more.

        Reading the weights takes a step as long as computing some 4 to 20 rows, by format and processor (see
        benchmarks/RESULTS.md). Making the draft takes its time too.
        """
        return min(sequences / (4 + sequences) + self._drafter.cost, _HIGHEST_PRICE)
