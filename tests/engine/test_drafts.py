"""Drafts without a model: the longest suffix that was there before, how many drafts a text is worth, who gets them."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama.engine.drafts import Draft, Lookup, Pace, Speculation, Suffixes
from llama.engine.scheduler import Sequence
from llama.request import Request, SamplingParams


def sequence(tokens: list[int]) -> Sequence:
    return Sequence(Request(tokens, SamplingParams(), 0, frozenset()), list(tokens))


def longest_known_suffix(tokens: list[int]) -> int:
    """By trying all."""

    def known(n: int) -> bool:
        return any(tokens[end - n : end] == tokens[len(tokens) - n :] for end in range(n, len(tokens)))

    return max((n for n in range(1, len(tokens)) if known(n)), default=0)


@given(st.lists(st.integers(0, 2), max_size=40))
def test_the_longest_suffix_that_was_there_before_is_found(tokens: list[int]) -> None:
    """After each token; and it ends where it is said to end, before the end of all."""
    suffixes = Suffixes()
    for count, token in enumerate(tokens, 1):
        suffixes.add(token)
        n, end, known = suffixes.length, suffixes.end, tokens[:count]
        assert n == longest_known_suffix(known) and suffixes.tokens == count
        assert n == 0 or (n <= end < count and known[end - n : end] == known[count - n :])


def test_of_two_places_the_later_one_counts() -> None:
    """What followed it last is likelier to follow again."""
    suffixes = Suffixes()
    for token in [7, 8, 1, 7, 8, 2, 7, 8]:
        suffixes.add(token)
    assert (suffixes.length, suffixes.end) == (2, 5)


def test_a_long_text_takes_little_for_each_token() -> None:
    """Whatever repeats in it: an automaton has at most twice as many states as tokens, and its links are few."""
    for tokens in ([5] * 5000, [1, 2] * 2500, random.Random(0).choices(range(3), k=5000)):
        suffixes = Suffixes()
        for token in tokens:
            suffixes.add(token)
        assert len(suffixes._next) <= 2 * len(tokens)
        assert sum(map(len, suffixes._next)) <= 3 * len(tokens)


@pytest.mark.parametrize(
    ("tokens", "most", "expected"),
    [
        ([1, 5, 6, 7, 8, 9, 5, 6, 7], 9, (8, 9, 5)),  # as many as were there before
        ([1, 5, 6, 7, 8, 9, 5, 6, 7], 2, (8, 9)),
        ([1, 5, 6, 7, 8, 9, 5, 6, 7], 0, ()),
        ([1, 5, 6, 7, 8, 9, 7], 9, ()),  # one token says too little
        ([1, 5, 6, 5, 6, 5, 6], 4, (5, 6, 5, 6)),  # what follows reaches the end, and begins again
        ([4, 4, 4, 4], 3, (4, 4, 4)),
        ([1, 2, 3], 5, ()),
        ([1], 5, ()),
    ],
)
def test_a_lookup_gives_what_followed(tokens: list[int], most: int, expected: Draft) -> None:
    assert Lookup().propose([sequence(tokens)], [most]) == [expected]


def test_a_lookup_goes_on_where_a_sequence_has_grown() -> None:
    """And knows nothing of other sequences, nor of one that has ended."""
    lookup, first, second = Lookup(), sequence([1, 5, 6, 7]), sequence([5, 6])
    assert lookup.propose([first, second], [3, 3]) == [(), ()]
    first.tokens += [5, 6]
    assert lookup.propose([first, second], [3, 3]) == [(7, 5), ()]
    lookup.forget(first)
    lookup.forget(sequence([1]))
    assert list(lookup._suffixes) == [second]


def test_a_text_whose_drafts_fail_is_left_alone_but_for_a_try_now_and_then() -> None:
    pace, wanted = Pace(), []
    for _ in range(400):
        wanted.append(pace.wanted(0.2))
        if wanted[-1]:
            pace.learn(wanted[-1], 0, 0.2)
    assert wanted[0] > 1 and sum(wanted[:20]) < 20
    assert 3 <= sum(wanted[100:]) <= 8 and set(wanted[100:]) == {0, 1}


def test_a_text_whose_drafts_are_right_again_gets_more_at_once() -> None:
    pace = Pace()
    for _ in range(20):
        if n := pace.wanted(0.2):
            pace.learn(n, 0, 0.2)
    wanted = []
    for _ in range(80):
        wanted.append(pace.wanted(0.2))
        if wanted[-1]:
            pace.learn(wanted[-1], wanted[-1], 0.2)
    tries = [n for n in wanted if n]
    assert tries[0] == 1 and tries == sorted(tries) and tries[6] >= 7


@given(right=st.floats(0, 1), price=st.floats(0.1, 0.5), seed=st.integers(0, 99))
def test_a_pace_follows_the_rate_of_right_drafts(right: float, price: float, seed: int) -> None:
    """Where far fewer are right than they cost, most steps have none; where far more are, most steps have some."""
    pace, rng, drafted = Pace(), random.Random(seed), 0
    for _ in range(500):
        n = min(pace.wanted(price), 8)
        drafted += n > 0
        if n:
            pace.learn(n, next((i for i in range(n) if rng.random() >= right), n), price)
        assert 0 <= pace.rate <= 1
    assert drafted < 200 if right < price / 4 else drafted > 300 if right > (7 + price) / 8 else True


@given(
    rooms=st.lists(st.integers(0, 9), min_size=1, max_size=20), most=st.integers(1, 15), rows=st.integers(1, 16)
)  # fmt: skip
def test_drafts_fit_the_step(rooms: list[int], most: int, rows: int) -> None:
    """At most `rows` tokens with one of each sequence, `most` a sequence, and none beyond a sequence's room."""
    sequences = [sequence([4] * 30) for _ in rooms]
    drafts = Speculation("lookup", Lookup(), most, rows).drafts(sequences, rooms)
    assert len(drafts) == len(rooms)
    assert all(len(draft) <= min(room, most) for draft, room in zip(drafts, rooms, strict=True))
    assert sum(map(len, drafts)) <= max(0, rows - len(rooms))
    if len(rooms) == 1 and rooms[0] and rows > 1:
        assert drafts[0]
