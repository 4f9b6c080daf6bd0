"""The scheduler alone, over a cache that is a list of tokens a slot: what it believes to be cached is there."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama.engine.scheduler import WORTH, Chunk, Scheduler, Sequence, shared_prefix
from llama.request import Request, SamplingParams


def sequence(tokens: list[int], reusable: bool = True) -> Sequence:
    return Sequence(Request(tokens, SamplingParams(), 0, frozenset()), list(tokens), None if reusable else 0)


class Simulation:
    """A scheduler with a pretended cache and model: each sequence makes `want` tokens after its prompt."""

    def __init__(self, slots: int, max_step_tokens: int) -> None:
        self.scheduler = Scheduler(slots, max_step_tokens)
        self.cache: list[list[int]] = [[] for _ in range(slots)]
        self.want: dict[Sequence, int] = {}
        self.prompt: dict[Sequence, int] = {}
        self.computed = 0
        self.made = random.Random(0)

    def add(self, tokens: list[int], want: int, reusable: bool = True) -> Sequence:
        added = sequence(tokens, reusable)
        self.want[added], self.prompt[added] = want, len(tokens)
        self.scheduler.add(added)
        return added

    def remove(self, gone: Sequence) -> None:
        self.scheduler.remove(gone)
        del self.want[gone]

    def step(self, interrupted: bool = False) -> list[Chunk]:
        decoding = [s for s in self.scheduler.running if s.pending == 1]
        chunks = self.scheduler.plan()
        self.check(chunks, decoding)
        while self.scheduler.copies:
            copy = self.scheduler.copies[0]
            self.cache[copy.target][: copy.length] = self.cache[copy.source][: copy.length]
            self.scheduler.copies.popleft()
        for chunk in chunks:
            known, tokens = self.cache[chunk.sequence.slot], chunk.sequence.tokens
            assert known[: chunk.start] == tokens[: chunk.start], "what is believed to be cached is there"
            known[chunk.start :] = tokens[chunk.start : chunk.stop]
        if interrupted:
            return chunks
        self.scheduler.commit(chunks)
        self.computed += sum(chunk.stop - chunk.start for chunk in chunks)
        for chunk in chunks:
            if chunk.reaches_end:
                self.decide(chunk.sequence)
        return chunks

    def decide(self, one: Sequence) -> None:
        one.tokens.append(self.made.randrange(9))
        if len(one.tokens) - self.prompt[one] >= self.want[one]:
            self.remove(one)

    def check(self, chunks: list[Chunk], decoding: list[Sequence]) -> None:
        running = self.scheduler.running
        slots = [one.slot for one in running]
        assert sorted(slots + self.scheduler.free) == list(range(self.scheduler.slots)), "each slot has one owner"
        assert sum(chunk.stop - chunk.start for chunk in chunks) <= self.scheduler.max_step_tokens
        assert set(decoding) <= {chunk.sequence for chunk in chunks}, "decode tokens ride along in every step"
        assert chunks or not (running or self.scheduler.waiting), "there is always progress"

    def run(self) -> None:
        for _ in range(10_000):
            if not self.want:
                return
            self.step()
        raise AssertionError("some sequence never ends")


HEADERS = [[1], [1, *range(100, 120)], [1, *range(100, 117), *range(200, 230)]]


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_any_schedule(data: st.DataObject) -> None:
    """Random arrivals, cancellations and interruptions: nothing is lost, nobody waits for ever, all slots come back."""
    simulation = Simulation(data.draw(st.integers(1, 4), "slots"), data.draw(st.sampled_from([4, 9, 40]), "budget"))
    for _ in range(data.draw(st.integers(1, 40))):
        action = data.draw(st.sampled_from(["add", "add", "step", "step", "interrupted step", "cancel"]))
        if action == "add":
            own = data.draw(st.lists(st.integers(300, 303), max_size=25))
            tokens = data.draw(st.sampled_from(HEADERS)) + own
            simulation.add(tokens, data.draw(st.integers(1, 5)), data.draw(st.sampled_from([True, True, True, False])))
        elif action == "cancel" and simulation.want:
            simulation.remove(data.draw(st.sampled_from(list(simulation.want))))
        elif "step" in action:
            simulation.step(interrupted="interrupted" in action)
    simulation.run()
    assert sorted(simulation.scheduler.free) == list(range(simulation.scheduler.slots))
    assert not simulation.scheduler.waiting
    assert not simulation.scheduler.copies


@pytest.mark.parametrize("budget", [64, 512, 4096])
def test_a_shared_header_is_computed_once(budget: int) -> None:
    """64 prompts of a 500-token header and 20 tokens of their own, through 16 slots: 500 + 64 · 20 tokens."""
    simulation = Simulation(16, budget)
    header = [1, *range(1000, 1499)]
    for i in range(64):
        simulation.add([*header, *range(2000 + 100 * i, 2020 + 100 * i)], 1)
    simulation.run()
    assert simulation.computed == 500 + 64 * 20


def test_samples_of_one_prompt_compute_it_once() -> None:
    simulation = Simulation(8, 512)
    for _ in range(8):
        simulation.add([1, *range(100, 199)], 1)
    simulation.run()
    assert simulation.computed == 100 + 7


def test_a_later_turn_starts_where_the_talk_ended() -> None:
    """In place: the slot that holds the talk so far is taken, and nothing is copied."""
    simulation = Simulation(3, 64)
    first = simulation.add([1, *range(50, 80)], 4)
    simulation.add([1, *range(80, 90)], 2)
    simulation.run()
    before = simulation.computed
    simulation.add([*first.tokens, 7, 8, 9], 1)
    simulation.run()
    assert simulation.computed - before == 3 + 1  # its last token was made, but never read


def test_a_sequence_that_wants_every_logit_starts_from_nothing() -> None:
    simulation = Simulation(2, 64)
    simulation.add([1, *range(50, 80)], 1)
    simulation.add([1, *range(50, 80)], 1, reusable=False)
    simulation.run()
    assert simulation.computed == 62


def test_cancelling_what_another_waits_for() -> None:
    """A sequence that waits for a prefix goes on alone when the one that computes it is cancelled."""
    simulation = Simulation(2, 8)
    first = simulation.add([1, *range(50, 90)], 1)
    second = simulation.add([1, *range(50, 90), 5], 1)
    simulation.step()
    assert second.slot is None
    simulation.remove(first)
    simulation.run()


def test_an_undecided_token_is_computed_again() -> None:
    """After an interruption between `commit` and the choice of the next token, the chunk runs again."""
    scheduler = Scheduler(1, 8)
    one = sequence([1, 2, 3])
    scheduler.add(one)
    chunks = scheduler.plan()
    scheduler.commit(chunks)
    assert one.pending == 0
    scheduler.rewind(chunks)
    assert scheduler.plan() == chunks


def test_all_slots_can_be_taken_and_given_back() -> None:
    scheduler = Scheduler(3, 8)
    assert scheduler.take_all() == [0, 1, 2]
    scheduler.add(sequence([1, 2]))
    assert scheduler.plan() == []
    scheduler.give_back_all()
    assert len(scheduler.plan()) == 1


def test_taken_slots_are_forgotten() -> None:
    """What a beam search wrote into them is not what they held before."""
    simulation = Simulation(2, 64)
    for _ in range(2):
        simulation.add([1, *range(50, 80)], 1)
        simulation.run()
        simulation.scheduler.take_all()
        simulation.scheduler.give_back_all()
    assert simulation.computed == 62


def test_those_that_waited_for_a_prefix_keep_their_order() -> None:
    """A sequence that shares nothing goes ahead; then first come, first served."""
    simulation = Simulation(2, 8)
    header = [1, *range(100, 140)]
    simulation.add(header, 1)
    waiting = [simulation.add([*header, 200 + i], 1) for i in range(4)]
    other, late = simulation.add([2, 3], 20), simulation.add([2, 4], 1)
    simulation.step()
    assert other.slot is not None
    started: list[Sequence] = []
    while simulation.want:
        chunks = simulation.step()
        started += [c.sequence for c in chunks if c.start < len(c.sequence.request.prompt)]
    assert [one for one in started if one in [*waiting, late]] == [*waiting, late]


def test_the_least_recently_used_slot_is_taken() -> None:
    """What is unlike all that the slots hold overwrites the one that was left first; what is like one finds it."""
    simulation = Simulation(3, 64)
    for first in (10, 20, 30):
        simulation.add([first, *range(100, 120)], 1)
        simulation.run()
    simulation.add([40, *range(100, 120)], 1)
    simulation.run()
    before = simulation.computed
    for first in (20, 30, 40):
        simulation.add([first, *range(100, 120)], 1)
        simulation.run()
    assert simulation.computed - before == 3  # the last token of each, for its logits
    assert [held[0] for held in simulation.cache] == [40, 20, 30]


def test_a_copy_does_not_overwrite_what_may_serve_another() -> None:
    """It goes to the least recently used slot, not to the free one that shares a little."""
    simulation = Simulation(3, 64)
    shared = [1, *range(100, 110)]
    simulation.add([2, 3], 1)
    simulation.run()
    simulation.add([*shared, *range(200, 230)], 1)
    simulation.run()
    simulation.add([*shared, *range(300, 330)], 50, reusable=False)
    simulation.step()
    assert [held[:1] for held in simulation.cache] == [[2], [1], [1]]
    third = simulation.add([*shared, *range(300, 330), 5], 2)
    simulation.step()
    assert third.slot == 0
    assert simulation.cache[1] == [*shared, *range(200, 230)]


def test_a_few_shared_tokens_are_not_worth_a_copy() -> None:
    simulation = Simulation(2, 64)
    shared = list(range(WORTH - 1))
    simulation.add([*shared, 100, 101], 5)
    simulation.step()
    simulation.add([*shared, 200, 201], 1)
    assert sum(chunk.stop - chunk.start for chunk in simulation.step()) == 1 + WORTH + 1


def test_of_like_prefixes_the_one_that_is_computed_is_copied() -> None:
    """Nobody waits for a prefix that another running sequence has already."""
    simulation = Simulation(3, 8)
    header = [1, *range(100, 140)]
    simulation.add(header, 1)
    simulation.run()
    simulation.add([*header, 6], 1, reusable=False)
    simulation.add([*header, 7], 50)
    third = simulation.add([*header, 8], 1)
    simulation.scheduler.plan()
    assert third.slot is not None


def test_cancelling_between_plans_harms_no_copy() -> None:
    """Planned twice without being computed: a copy of a copy is right though the sequence between is cancelled."""
    simulation = Simulation(3, 64)
    header = [1, *range(100, 120)]
    source = simulation.add([*header, 5, 5], 9)
    simulation.step()
    between = simulation.add([*header, 6], 1)
    simulation.scheduler.plan()
    simulation.remove(source)
    for own in (7, 8):
        simulation.add([*header, own], 1)
    simulation.scheduler.plan()
    simulation.remove(between)
    simulation.run()


@given(st.lists(st.integers(0, 2), max_size=12), st.lists(st.integers(0, 2), max_size=12), st.integers(0, 14))
def test_shared_prefix_is_the_naive_one(a: list[int], b: list[int], limit: int) -> None:
    n = 0
    while n < min(len(a), len(b), limit) and a[n] == b[n]:
        n += 1
    assert shared_prefix(a, b, limit) == n
