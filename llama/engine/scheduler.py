"""Who runs next, in which slot, which chunk of its tokens, and which prefix it need not compute: plain Python."""

import math
from bisect import bisect_left
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from llama.request import Request

WORTH = 16  # fewer shared tokens than this are neither copied nor waited for


@dataclass(slots=True, eq=False)
class Sequence:
    """A request in the scheduler: the tokens known so far, and how many of them its slot's cache holds."""

    request: Request
    tokens: list[int]
    reusable: int | None = None  # how many may come from a cached prefix (None: all but the last), as logits do not
    cached: int = 0
    slot: int | None = None
    waits_for: tuple["Sequence", int] | None = None  # a running sequence, and how many tokens it is to cache first

    @property
    def pending(self) -> int:
        """How many known tokens are not cached yet; the last of them gives the next token's logits."""
        return len(self.tokens) - self.cached


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens start … stop − 1 of a sequence, to be computed in this step; `drafts` may follow them and are verified."""

    sequence: Sequence
    start: int
    stop: int
    drafts: tuple[int, ...] = ()

    @property
    def slot(self) -> int:
        slot = self.sequence.slot
        assert slot is not None  # only running sequences have chunks
        return slot

    @property
    def reaches_end(self) -> bool:
        """Whether the step decides the sequence's next token."""
        return self.stop == len(self.sequence.tokens)


@dataclass(frozen=True, slots=True)
class Copy:
    """The first `length` positions of slot `source` are to be copied to slot `target` before the step."""

    source: int
    target: int
    length: int


def shared_prefix(a: list[int], b: list[int], limit: int) -> int:
    """How many tokens a and b have in common at their beginning, at most `limit`."""
    limit = min(limit, len(a), len(b))
    if a[:limit] == b[:limit]:
        return limit
    return bisect_left(range(1, limit + 1), True, key=lambda n: a[:n] != b[:n])


class Scheduler:
    """Queues of waiting and running sequences over a fixed number of slots.

    A step is: `plan`, the `copies`, the computation, `commit`. If it is interrupted, planning again is safe.
    """

    def __init__(self, slots: int, max_step_tokens: int) -> None:
        assert max_step_tokens >= slots > 0
        self.slots = slots
        self.max_step_tokens = max_step_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.free: list[int] = list(range(slots))  # least recently used first
        self.prefixes: list[list[int]] = [[] for _ in range(slots)]  # the tokens that a free slot's cache still holds
        self.copies: deque[Copy] = deque()  # the one who makes them takes them out

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def plan(self, until: float = math.inf) -> list[Chunk]:
        """Admit what can run, then share the step's token budget: decode tokens first, prompts in order of arrival.

        What was added after `until` is not admitted: something else is to have the slots before it.
        """
        self._admit(until)
        budget = self.max_step_tokens
        chunks = []
        for sequence in sorted(self.running, key=lambda s: s.pending > 1):
            n = min(sequence.pending, budget)
            if n:
                chunks.append(Chunk(sequence, sequence.cached, sequence.cached + n))
                budget -= n
        return chunks

    def commit(self, chunks: list[Chunk]) -> None:
        """The chunks' keys and values are in the cache now."""
        for chunk in chunks:
            chunk.sequence.cached = chunk.stop

    def rewind(self, chunks: list[Chunk]) -> None:
        """What a committed step gave was lost before it was used: its chunks are to be computed again."""
        for chunk in chunks:
            chunk.sequence.cached = chunk.start

    def remove(self, sequence: Sequence) -> None:
        """Take out a sequence that ended or was cancelled, wherever it is; its slot keeps what it holds."""
        if sequence in self.running:
            self.running.remove(sequence)
            slot, sequence.slot = sequence.slot, None
            assert slot is not None  # it ran
            # A copy into the slot that is still to be made stays: another may be to be made from it.
            self.prefixes[slot] = sequence.tokens[: sequence.cached]
            self.free.append(slot)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def holder(self, tokens: list[int]) -> int | None:
        """The free slot whose cache holds all of these tokens, if one does."""
        return next((slot for slot in self.free if self.prefixes[slot][: len(tokens)] == tokens), None)

    def refill(self, tokens: list[int], fill: Callable[[int], None]) -> None:
        """Have the free slot that was not used for longest hold these tokens: `fill` writes their keys and values."""
        assert self.free
        slot = self.free[0]
        self.prefixes[slot] = []  # it may fail half way
        fill(slot)
        self.prefixes[slot] = list(tokens)
        self.free.append(self.free.pop(0))

    def take_all(self) -> list[int]:
        """Every slot, forgotten and out of use until `give_back_all`; only while nothing runs."""
        assert not self.running
        self.prefixes = [[] for _ in range(self.slots)]
        slots, self.free = sorted(self.free), []
        return slots

    def give_back_all(self) -> None:
        self.free = list(range(self.slots))

    def _admit(self, until: float) -> None:
        """Give free slots to waiting sequences, first come first served, but for those that wait for a prefix."""
        passed: list[Sequence] = []
        while self.free and self.waiting and self.waiting[0].request.added <= until and len(passed) < 4 * self.slots:
            sequence = self.waiting.popleft()
            if not self._start(sequence):
                passed.append(sequence)
        self.waiting.extendleft(reversed(passed))

    def _start(self, sequence: Sequence) -> bool:
        """Put a sequence into a free slot with the longest prefix to be had; False where one is worth waiting for."""
        if sequence.waits_for:
            other, n = sequence.waits_for
            if other.slot is not None and other.cached < n:
                return False
            sequence.waits_for = None
        limit = len(sequence.tokens) - 1
        if sequence.reusable is not None:
            limit = min(limit, sequence.reusable)
        here, slot = self._best_free(sequence.tokens, limit)
        busy = self._best_running(sequence.tokens, limit)
        if busy and busy[0] >= here + WORTH:
            length, source = busy
            assert source.slot is not None  # it runs
            if source.cached < length:
                sequence.waits_for = (source, length)
                return False
            slot = self.free[0]  # not the best free one: what that holds may serve another
            self.copies.append(Copy(source.slot, slot, length))
            here = length
        self.free.remove(slot)
        sequence.slot, sequence.cached = slot, here
        self.running.append(sequence)
        return True

    def _best_free(self, tokens: list[int], limit: int) -> tuple[int, int]:
        """(Shared tokens, slot) of the free slot that shares most, the least recently used of equals."""
        best = (0, self.free[0])
        for slot in self.free:
            shared = shared_prefix(tokens, self.prefixes[slot], limit)
            if shared > best[0]:
                best = (shared, slot)
        return best

    def _best_running(self, tokens: list[int], limit: int) -> tuple[int, Sequence] | None:
        """(Shared tokens, sequence) of the running sequence that shares most, the furthest computed of equals."""
        found = [(shared_prefix(tokens, other.tokens, limit), other) for other in self.running]
        return max(found, key=lambda pair: (pair[0], pair[1].cached), default=None)
