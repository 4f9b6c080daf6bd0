"""Speculation changes no result: tokens, log-probabilities and ends are those without drafts, to the bit.

That holds where a row is computed alike in any company, as by our kernels for int8 and int4 on a CPU, and where prompts
are read in the same way: here in steps of at most 8 tokens, of which each is computed as if it were alone. Elsewhere
texts agree up to near-ties.
"""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import random_weights, save
from conftest import DEMO
from engines import is_clean, prompts_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from near_ties import assert_agree, logits_of

from llama import Llama, SamplingParams
from llama.engine import engine as engine_module
from llama.engine.drafts import Draft, Lookup, Pace, Speculation
from llama.engine.engine import Engine
from llama.engine.scheduler import Sequence as Running
from llama.errors import NumericalError
from llama.kernels import library
from llama.kernels.decode_step import rows_alike
from llama.model.step import Step
from llama.model.transformer import Transformer
from llama.request import Request

needs_library = pytest.mark.skipif(library.load()[0] is None, reason=f"no compiled kernels: {library.load()[1]}")
SLOTS, LENGTH, EOS = 4, 64, 2
FORMATS = [("int8", "bfloat16"), ("int8", "float32"), ("int4", "bfloat16"), ("int4", "float32")]


class Told:
    """Drafts of what is known to come, of which some are made wrong; behind an end come other tokens."""

    cost = 0.0

    def __init__(self, vocab: int, right: float, rng: random.Random) -> None:
        self.coming: dict[tuple[tuple[int, ...], int], list[int]] = {}
        self._vocab, self._right, self._rng = vocab, right, rng

    def know(self, request: Request) -> None:
        ended = [min(request.stop_tokens)] if request.finish_reason == "stop" else []
        self.coming[tuple(request.prompt), request.seed] = request.tokens + ended

    def propose(self, sequences: Sequence[Running], most: Sequence[int]) -> list[Draft]:
        return [self._draft(sequence.request, n) for sequence, n in zip(sequences, most, strict=True)]

    def forget(self, sequence: Running) -> None:
        assert sequence.request.finish_reason is None, "it is told before others are"

    def _draft(self, request: Request, most: int) -> Draft:
        true = self.coming.get((tuple(request.prompt), request.seed), [])[len(request.tokens) :][:most]
        padded = true + self._rng.choices(range(self._vocab), k=most - len(true))
        return tuple(t if self._rng.random() < self._right else self._rng.randrange(self._vocab) for t in padded)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, small: dict) -> Path:
    """Weights of which some are so large that few tokens are likely, and texts soon repeat."""
    weights = random_weights(small, seed=3)
    return save(tmp_path_factory.mktemp("speculation") / "model", small, weights)


@pytest.fixture(scope="module", params=FORMATS if library.load()[0] else [], ids="-".join)
def alike(request: pytest.FixtureRequest, folder: Path) -> Llama:
    """A model whose rows are computed alike in any company, in steps of at most 8 tokens."""
    quantize, dtype = request.param
    return built(folder, quantize=quantize, dtype=dtype)


def built(folder: Path, **options: Any) -> Llama:
    options = {"max_step_tokens": 8, **options}
    return Llama.build(str(folder), str(DEMO / "tokenizer.model"), LENGTH, SLOTS, device="cpu", **options)


def speculating(llama: Llama, drafter: Any, most: int = 7) -> Llama:
    """The same model with drafts."""
    speculation = Speculation("told", drafter, most, min(16, rows_alike(llama.model)))
    return Llama(llama.model, llama.tokenizer, max_step_tokens=8, speculation=speculation)


def engine_of(llama: Llama, drafter: Any = None, most: int = 7) -> Engine:
    speculation = Speculation("told", drafter, most, min(16, rows_alike(llama.model))) if drafter else None
    return Engine(llama.model, SLOTS, LENGTH, 8, speculation)


def run(engine: Engine, requests: list[Request]) -> list[Request]:
    for one in requests:
        engine.add(one)
    while not engine.idle:
        engine.step()
    assert is_clean(engine)
    return requests


def requests_of(prompts: list[list[int]], params: list[SamplingParams]) -> list[Request]:
    return [
        Request(list(prompt), own, seed, frozenset({EOS, *own.stop_token_ids}))
        for seed, (prompt, own) in enumerate(zip(prompts, params, strict=True))
    ]


def results(requests: list[Request]) -> list[Any]:
    """All that a caller may see, but for times and what came of drafts."""
    return [
        (one.tokens, one.logprobs, one.top_logprobs, one.scores, one.finish_reason, str(one.error)) for one in requests
    ]


@st.composite
def params(draw: st.DrawFn) -> SamplingParams:
    """Of every kind: greedy and sampled, with penalties, bans, biases, ends and log-probabilities."""
    least = draw(st.sampled_from([0, 0, 5]))
    some = st.integers(0, 60)
    return SamplingParams(
        temperature=draw(st.sampled_from([0.0, 0.0, 0.7, 1.5])),
        top_p=draw(st.sampled_from([0.9, 1.0])),
        top_k=draw(st.sampled_from([0, 5])),
        min_p=draw(st.sampled_from([0.0, 0.05])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.0, 1.3])),
        presence_penalty=draw(st.sampled_from([0.0, 0.0, 0.8])),
        frequency_penalty=draw(st.sampled_from([0.0, 0.0, 0.4])),
        min_gen_len=least,
        max_gen_len=draw(st.one_of(st.none(), st.integers(least, 24))),
        stop_token_ids=draw(st.lists(some, max_size=3)),
        bad_words=draw(st.lists(st.lists(some, min_size=1, max_size=2), max_size=3)),
        logit_bias=draw(st.dictionaries(some, st.sampled_from([-5.0, 3.0, float("-inf")]), max_size=3)),
        logprobs=draw(st.booleans()),
        top_logprobs=draw(st.sampled_from([0, 0, 2])),
    )


@needs_library
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.data())
def test_any_batch_gets_what_it_gets_without(
    alike: Llama, data: st.DataObject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests of every kind in any mixture; right and wrong drafts, as many as can be or as they pay."""
    vocab = alike.model.params.vocab_size
    lists = st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=30), min_size=1, max_size=7)
    prompts = data.draw(lists, "prompts")
    every = [data.draw(params(), f"params {i}") for i in range(len(prompts))]
    expected = run(engine_of(alike), requests_of(prompts, every))
    right = data.draw(st.sampled_from([0.0, 0.6, 0.9, 1.0]), "right")
    told = Told(vocab, right, random.Random(data.draw(st.integers(0, 99), "seed")))
    for one in expected:
        told.know(one)
    drafter = data.draw(st.sampled_from([told, told, Lookup()]), "drafter")
    engine = engine_of(alike, drafter, data.draw(st.sampled_from([1, 3, 7, 15]), "most"))
    with monkeypatch.context() as patch:
        if data.draw(st.booleans(), "as many as can be"):
            patch.setattr(Pace, "wanted", lambda self, price: 99)
        found = run(engine, requests_of(prompts, every))
    assert results(found) == results(expected)
    assert all(0 <= one.counts.accepted <= one.counts.drafted for one in found)


@needs_library
def test_right_drafts_take_fewer_steps(alike: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """24 tokens: the prompt's step gives one, seven drafts and one more a step make the others in three."""
    monkeypatch.setattr(Pace, "wanted", lambda self, price: 99)
    every = [SamplingParams(temperature=1.0, max_gen_len=25, min_gen_len=25)]
    prompts = prompts_of([6], alike.model.params.vocab_size)
    told = Told(alike.model.params.vocab_size, 1.0, random.Random(0))
    told.know(*run(engine_of(alike), requests_of(prompts, every)))
    engine = engine_of(alike, told)
    (made,) = run(engine, requests_of(prompts, every))
    assert (made.counts.steps, made.counts.drafted, made.counts.accepted) == (4, 21, 21) and len(made.tokens) == 25
    assert made.counts == engine.counts and engine.counts.tokens_per_step == 6.25
    assert engine.computed_tokens == 6 + 24


@needs_library
def test_wrong_drafts_take_as_many_steps_as_none(alike: Llama) -> None:
    every = [SamplingParams(temperature=0, max_gen_len=25, min_gen_len=25)] * 2
    prompts = prompts_of([6, 4], alike.model.params.vocab_size)
    made = run(engine_of(alike, Told(1, 0.0, random.Random(0))), requests_of(prompts, every))  # all are token 0
    assert [one.counts.steps for one in made] == [25, 25] and not any(one.counts.accepted for one in made)
    assert all(0 < one.counts.drafted < 25 for one in made)


@needs_library
@pytest.mark.parametrize("length", [LENGTH - 1, LENGTH - 2, LENGTH - 5, LENGTH - 9])
def test_drafts_stay_within_the_context(alike: Llama, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to its last token, with no position beyond it."""
    monkeypatch.setattr(Pace, "wanted", lambda self, price: 99)
    seen: list[Step] = []
    forward = Transformer.forward
    monkeypatch.setattr(Transformer, "forward", lambda self, s, cache: (seen.append(s), forward(self, s, cache))[1])
    every = [SamplingParams(temperature=0, min_gen_len=20), SamplingParams(temperature=0, max_gen_len=3, min_gen_len=3)]
    prompts = prompts_of([length, length // 2], alike.model.params.vocab_size)
    expected = run(engine_of(alike), requests_of(prompts, every))
    told = Told(alike.model.params.vocab_size, 1.0, random.Random(0))
    for one in expected:
        told.know(one)
    found = run(engine_of(alike, told), requests_of(prompts, every))
    assert results(found) == results(expected)
    assert len(found[0].tokens) == LENGTH - length and len(found[1].tokens) == 3
    assert max(int(step.positions.max()) for step in seen) == LENGTH - 2
    assert max(len(step.tokens) for step in seen) <= 16


@needs_library
def test_a_slot_keeps_what_was_verified(alike: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever goes on from a text, or from its beginning, gets what an engine gives that never had drafts."""
    monkeypatch.setattr(Pace, "wanted", lambda self, price: 99)
    vocab, rng = alike.model.params.vocab_size, random.Random(0)
    told = Told(vocab, 0.7, rng)
    every = [SamplingParams(temperature=0.9, max_gen_len=n, min_gen_len=n) for n in (9, 14, 20)]
    prompts = prompts_of([6, 11, 20], vocab)
    first = run(engine_of(alike), requests_of(prompts, every))
    for one in first:
        told.know(one)
    engine = engine_of(alike, told)
    run(engine, requests_of(prompts, every))
    assert engine.counts.drafted > engine.counts.accepted > 0
    longer = [[*one.prompt, *one.tokens, 5, 6] for one in first] + [[*one.prompt, *one.tokens[:4], 9] for one in first]
    greedy = [SamplingParams(temperature=0, max_gen_len=8, logprobs=True)] * len(longer)
    before = engine.computed_tokens
    found = run(engine, requests_of(longer, greedy))
    assert engine.computed_tokens - before < sum(map(len, longer)), "some of it was in the slots"
    assert results(found) == results(run(engine_of(alike), requests_of(longer, greedy)))


@needs_library
def test_a_request_may_be_cancelled_between_drafts(alike: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its observer, in the middle of a step's tokens; the others, and who takes the slot next, lose nothing."""
    monkeypatch.setattr(Pace, "wanted", lambda self, price: 99)
    vocab = alike.model.params.vocab_size
    prompts, every = prompts_of([6, 9, 7], vocab), [SamplingParams(temperature=0, max_gen_len=20, min_gen_len=20)] * 3
    expected = run(engine_of(alike), requests_of(prompts, every))
    told = Told(vocab, 1.0, random.Random(0))
    for one in expected:
        told.know(one)
    engine = engine_of(alike, told)
    found, seen = requests_of(prompts, every), []

    def observe(request: Request) -> None:
        seen.append(list(request.tokens))
        if len(request.tokens) == 5 and not request.finish_reason:
            engine.finish(request, "cancelled")

    engine.add(found[0], observe)
    run(engine, found[1:])
    assert found[0].finish_reason == "cancelled" and found[0].tokens == expected[0].tokens[:5]
    assert seen == [expected[0].tokens[:n] for n in (1, 2, 3, 4, 5, 5)], "each token is seen by itself"
    assert results(found[1:]) == results(expected[1:])
    again = requests_of(prompts[:1], every[:1])
    assert results(run(engine, again)) == results(expected[:1])


@needs_library
@pytest.mark.parametrize("where", ["before", "after"])
def test_an_interrupted_step_is_taken_again(alike: Llama, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """Ctrl-C while tokens are chosen, or while they are handed out: what was made by then stays."""
    monkeypatch.setattr(Pace, "wanted", lambda self, price: 99)
    vocab = alike.model.params.vocab_size
    prompts, every = prompts_of([6, 12], vocab), [SamplingParams(temperature=0, max_gen_len=20, min_gen_len=20)] * 2
    expected = run(engine_of(alike), requests_of(prompts, every))
    told = Told(vocab, 0.9, random.Random(0))
    for one in expected:
        told.know(one)
    engine, calls = engine_of(alike, told), []
    owner, name = (engine_module, "next_tokens") if where == "before" else (Engine, "_give_token")
    real = getattr(owner, name)

    def flaky(*args: Any) -> Any:
        calls.append(None)
        if len(calls) % 5 == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(owner, name, flaky)
    found = requests_of(prompts, every)
    for one in found:
        engine.add(one)
    while not engine.idle:
        try:
            engine.step()
        except KeyboardInterrupt:
            continue
    assert [one.tokens for one in found] == [one.tokens for one in expected] and is_clean(engine)


@needs_library
def test_logits_behind_a_wrong_draft_do_not_matter(alike: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """They may be anything, even not finite; behind a right one they end the request as they would without drafts."""
    monkeypatch.setattr(Pace, "wanted", lambda self, price: 99)
    vocab = alike.model.params.vocab_size
    prompts, every = prompts_of([6], vocab), [SamplingParams(temperature=0, max_gen_len=12, min_gen_len=12)]
    expected = run(engine_of(alike), requests_of(prompts, every))
    forward = Transformer.forward

    def damaged(self: Transformer, step: Step, cache: Any) -> torch.Tensor:
        logits = forward(self, step, cache).clone()
        logits[1:] = torch.nan
        return logits

    monkeypatch.setattr(Transformer, "forward", damaged)
    found = run(engine_of(alike, Told(1, 0.0, random.Random(0))), requests_of(prompts, every))
    assert results(found) == results(expected)
    told = Told(vocab, 1.0, random.Random(0))
    told.know(expected[0])
    (failed,) = run(engine_of(alike, told), requests_of(prompts, every))
    assert failed.finish_reason == "error" and isinstance(failed.error, NumericalError)
    assert failed.tokens == expected[0].tokens[:2]


@needs_library
def test_texts_ends_and_samples_are_those_without(folder: Path) -> None:
    """Stop strings, n samples, echo and beam search, through `Llama`, whole and as they come."""
    plain = built(folder, quantize="int8")
    drafting = built(folder, quantize="int8", speculate="lookup")
    every: list[dict[str, Any]] = [
        {"temperature": 0, "max_gen_len": 40},
        {"temperature": 0, "max_gen_len": 40, "stop": ["e", "a "], "min_gen_len": 3},
        {"temperature": 0.3, "max_gen_len": 30, "n": 3, "logprobs": True},
        {"temperature": 0, "max_gen_len": 20, "echo": True, "logprobs": True, "top_logprobs": 2},
        {"temperature": 0, "max_gen_len": 20, "num_beams": 2},
    ]
    pieces: list[list[tuple[int, str]]] = [[], []]
    for own in every:
        both = [
            llama.text_completion(
                ["the the the cat", "a"], on_text=lambda i, text, n=n: pieces[n].append((i, text)), **own
            )
            for n, llama in enumerate((plain, drafting))
        ]
        assert without_drafts(both[1]) == without_drafts(both[0])
        texts = [["".join(text for i, text in said if i == index) for index in (0, 1)] for said in pieces]
        assert texts[0] == texts[1]
        assert all("drafted_tokens" not in result for result in both[0])
        beams = "num_beams" in own
        assert all((result["tokens_per_step"] == 0) == beams for result in both[1])
    assert len(pieces[1]) <= len(pieces[0]), "a step's tokens come together"
    assert drafting.engine.counts.accepted > 0, "texts of such a model repeat"
    assert drafting.score(["a b c"]) == plain.score(["a b c"])


def without_drafts(predictions: list[Any]) -> list[Any]:
    own = {"time", "time_to_first_token", "drafted_tokens", "accepted_tokens", "tokens_per_step"}
    return [
        {k: without_drafts(v) if k == "samples" else v for k, v in prediction.items() if k not in own}
        for prediction in predictions
    ]


@pytest.mark.parametrize("options", [{"dtype": "float32"}, {"dtype": "float32", "kv_dtype": "fp8"}], ids=str)
def test_where_rows_round_by_their_number_texts_agree_up_to_near_ties(folder: Path, options: dict[str, Any]) -> None:
    """PyTorch's products in float32 sum in an order that depends on the number of rows."""
    plain, drafting = (built(folder, speculate=way, max_step_tokens=None, **options) for way in (None, "lookup"))
    prompts = [*prompts_of([5, 40, 1, 30, 9, 22], plain.model.params.vocab_size), [1, *([7, 8, 9] * 8)]]
    every = [SamplingParams(temperature=t, max_gen_len=20, seed=n) for n, t in enumerate((0, 0, 0.5, 0.5, 0, 1, 0))]
    expected, _ = plain.generate(prompts, params=every)
    found, _ = drafting.generate(prompts, params=every)
    tolerance = 0.1 if "kv_dtype" in options else 1e-3
    assert_agree(found, expected, prompts, logits_of(plain), every, tolerance)
    assert drafting.engine.counts.drafted > 0
