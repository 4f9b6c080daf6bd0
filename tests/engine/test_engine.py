"""Continuous batching: what a request gets does not depend on what runs beside it, and nothing is left behind."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import reference
import torch
from engines import is_clean, prompts_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from near_ties import Logits, assert_agree, logits_of
from torch import Tensor

from llama import Llama, SamplingParams
from llama.engine.engine import Engine
from llama.errors import ParameterError, PromptError
from llama.model.step import Step
from llama.model.transformer import Transformer
from llama.request import Request


def request(prompt: list[int], eos: int = 2, **params: object) -> Request:
    return Request(prompt, SamplingParams(**{"temperature": 0, "max_gen_len": 6, **params}), 7, frozenset({eos}))


@pytest.fixture(scope="module")
def logits(weights: dict[str, Tensor], small: dict) -> Logits:
    """The reference's."""
    return lambda tokens: reference.forward(weights, small, tokens)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[Step]:
    """Every step that a model computes in this test."""
    seen: list[Step] = []
    forward = Transformer.forward
    monkeypatch.setattr(
        Transformer, "forward", lambda self, step, cache: (seen.append(step), forward(self, step, cache))[1]
    )
    return seen


def test_more_prompts_than_slots(
    build: Callable[..., Llama], weights: dict[str, Tensor], small: dict, logits: Logits
) -> None:
    """Twelve prompts of unequal length through three slots, in chunks of 16: each row is the reference's."""
    llama = build(max_batch_size=3, max_step_tokens=16)
    prompts = prompts_of([5, 40, 1, 60, 2, 33, 17, 16, 15, 8, 50, 3], small["vocab_size"])
    tokens, logprobs = llama.generate(prompts, 7, temperature=0, logprobs=True)
    expected, scores = zip(*(reference.greedy(weights, small, prompt, 7, eos=2) for prompt in prompts), strict=True)
    for n, own, other in zip(assert_agree(tokens, expected, prompts, logits), logprobs, scores, strict=True):
        assert own[:n] == pytest.approx(other[:n], abs=1e-4)
    assert is_clean(llama.engine)


def test_long_prompts_go_in_chunks_beside_decoding(build: Callable[..., Llama], small: dict, steps: list[Step]) -> None:
    """No step is larger than max_step_tokens, and a running sequence decodes a token in each while a prompt is read."""
    llama = build(max_batch_size=2, max_step_tokens=16)
    short, long = prompts_of([3, 90], small["vocab_size"])
    llama.generate([short, long], params=[SamplingParams(temperature=0, max_gen_len=8, min_gen_len=8)] * 2)
    sizes = [len(step.tokens) for step in steps]
    assert max(sizes) <= 16
    first_decode = 1
    for step in steps[first_decode : first_decode + 5]:
        assert sorted(span.n for span in step.spans)[0] == 1
        assert len(step.tokens) == 16


def test_a_free_slot_is_taken_in_the_next_step(build: Callable[..., Llama], small: dict, steps: list[Step]) -> None:
    """Two slots and requests of 1, 6 and 5 tokens take 6 steps: the third starts when the first has ended."""
    llama = build(max_batch_size=2)
    prompts = prompts_of([3, 3, 3], small["vocab_size"])
    every = [SamplingParams(temperature=0, max_gen_len=n, min_gen_len=n) for n in (1, 6, 5)]
    llama.generate(prompts, params=every)
    assert len(steps) == 6


def test_work_follows_live_sequences(build: Callable[..., Llama], small: dict, steps: list[Step]) -> None:
    """With 16 slots and one live sequence a decode step has one token, and only wanted rows get logits."""
    llama = build(max_batch_size=16)
    prompts = prompts_of([9, 4], small["vocab_size"])
    llama.generate(prompts, params=[SamplingParams(temperature=0, max_gen_len=n, min_gen_len=n) for n in (2, 5)])
    assert [len(step.tokens) for step in steps] == [13, 2, 1, 1, 1]
    assert [len(step.logit_rows) for step in steps] == [2, 2, 1, 1, 1]


def test_shared_header_is_computed_once(
    build: Callable[..., Llama], weights: dict[str, Tensor], small: dict, logits: Logits
) -> None:
    """64 prompts with a common header of 60 and 8 tokens of their own compute about 60 + 64 · 8 prompt tokens."""
    llama = build(max_batch_size=8)
    header = prompts_of([60], small["vocab_size"])[0]
    prompts = [header + own[1:] for own in prompts_of([9] * 64, small["vocab_size"], seed=1)]
    tokens, _ = llama.generate(prompts, 2, temperature=0)
    decoded = sum(len(row) for row in tokens)
    assert llama.engine.computed_tokens <= 60 + 64 * 8 + decoded + 8
    expected = [reference.greedy(weights, small, prompt, 2, eos=2)[0] for prompt in prompts[::9]]
    assert_agree(tokens[::9], expected, prompts[::9], logits)


def test_chat_turns_prefill_only_what_is_new(demo: Llama) -> None:
    """A second turn computes its new tokens, not the talk so far."""
    dialog = [{"role": "user", "content": "What sound does a cow make?"}]
    answer = demo.chat_completion([dialog], temperature=0)[0]
    longer = [*dialog, answer["generation"], {"role": "user", "content": "What is the opposite of hot?"}]
    before = demo.engine.computed_tokens
    result = demo.chat_completion([longer], temperature=0)[0]
    computed = demo.engine.computed_tokens - before
    known = answer["prompt_tokens"]
    assert computed <= result["prompt_tokens"] - known + result["completion_tokens"] + 1


def test_n_samples_share_the_prefill(build: Callable[..., Llama], small: dict) -> None:
    """Five samples of one prompt compute it once, and draw different noise."""
    llama = build(max_batch_size=5)
    prompt = prompts_of([80], small["vocab_size"])[0]
    params = SamplingParams(temperature=1.5, top_p=1.0, n=5, max_gen_len=6, min_gen_len=6)
    tokens, _ = llama.generate([prompt], params=params)
    assert len(tokens) == 5
    assert len({tuple(row) for row in tokens}) == 5
    assert llama.engine.computed_tokens <= 80 + 4 + 5 * 5


def finished(engine: Engine) -> list[Request]:
    """Run an engine until nothing is left; the requests in the order in which they ended."""
    ended: list[Request] = []
    while not engine.idle:
        ended += [one for one in engine.step() if one.finish_reason]
    return ended


def test_the_engine_alone_ends_requests_as_their_limits_say(build: Callable[..., Llama], small: dict) -> None:
    """Add requests, step until nothing is left: each ends when it is done, with its counts and times."""
    engine = build(max_batch_size=2).engine
    made = [request(prompt, max_gen_len=n, min_gen_len=n) for prompt, n in
            zip(prompts_of([4, 4, 4], small["vocab_size"]), (5, 1, 2), strict=True)]  # fmt: skip
    for one in made:
        engine.add(one)
    done = finished(engine)
    assert done == [made[1], made[2], made[0]]
    assert [len(one.tokens) for one in done] == [1, 2, 5]
    assert all(one.finish_reason == "length" and len(one.prompt) == 4 for one in done)
    assert all(one.added < one.first_token <= one.finished for one in done)


def test_what_never_fits_is_refused_and_the_others_run(build: Callable[..., Llama], small: dict) -> None:
    """`add` raises for a request that can never run, names its numbers, and leaves the queue as it was."""
    engine = build(max_seq_len=32, max_batch_size=2).engine
    good = request([1, 5, 6])
    engine.add(good)
    with pytest.raises(PromptError, match=r"has 32 tokens.*max_seq_len=32"):
        engine.add(request(prompts_of([32], small["vocab_size"])[0]))
    with pytest.raises(PromptError, match="no tokens"):
        engine.add(request([]))
    with pytest.raises(PromptError, match=r"token 99999: expected ids from 0"):
        engine.add(request([1, 99999]))
    with pytest.raises(ParameterError, match="token 99999"):
        engine.add(request([1], logit_bias={99999: 1.0}))
    assert finished(engine) == [good]
    assert is_clean(engine)


def test_max_seq_len_ends_a_row(
    build: Callable[..., Llama], weights: dict[str, Tensor], small: dict, logits: Logits
) -> None:
    """A row has max_seq_len tokens at most, prompt and completion; a prompt one short of it gets one token."""
    llama = build(max_seq_len=20)
    prompts = prompts_of([19, 10], small["vocab_size"])
    tokens, _ = llama.generate(prompts, params=SamplingParams(temperature=0, min_gen_len=0))
    assert len(tokens[0]) <= 1
    assert len(tokens[1]) <= 10
    expected = reference.greedy(weights, small, prompts[1], 100, eos=2, max_seq_len=20)[0]
    assert_agree(tokens[1:], [expected], prompts[1:], logits)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_slot_leaks_and_every_row_is_the_references(
    data: st.DataObject, model_and_answers: tuple[Transformer, list[list[int]], list[list[int]]], logits: Logits
) -> None:
    """After any mixture of finished, cancelled and refused requests all slots are free, and every row is right."""
    model, prompts, answers = model_and_answers
    engine = Engine(model, 3, 64, 12)  # a new one: what slots hold from another example would change the steps
    live: dict[Request, int] = {}
    done: list[tuple[Request, int]] = []
    for _ in range(data.draw(st.integers(1, 25))):
        action = data.draw(st.sampled_from(["add", "add", "step", "step", "step", "cancel", "reject"]))
        if action == "add":
            index = data.draw(st.integers(0, len(prompts) - 1))
            made = request(prompts[index], max_gen_len=data.draw(st.integers(1, 4)))
            engine.add(made)
            live[made] = index
        elif action == "step":
            done += [(r, live.pop(r)) for r in engine.step() if r.finish_reason]
        elif action == "cancel" and live:
            gone = data.draw(st.sampled_from(sorted(live, key=lambda r: r.added)))
            engine.finish(gone, "cancelled")
            del live[gone]
        elif action == "reject":
            with pytest.raises(PromptError):
                engine.add(request([1] * 200))
    done += [(one, live.pop(one)) for one in finished(engine)]
    assert not live
    assert is_clean(engine)
    expected = [answers[index][: one.params.max_gen_len] for one, index in done]
    assert_agree([r.tokens for r, _ in done], expected, [r.prompt for r, _ in done], logits)


@pytest.fixture(scope="module")
def model_and_answers(
    build: Callable[..., Llama], weights: dict[str, Tensor], small: dict
) -> tuple[Transformer, list[list[int]], list[list[int]]]:
    """A small model, prompts (some with shared beginnings), and the reference's four greedy tokens of each."""
    vocab = small["vocab_size"]
    header = prompts_of([30], vocab, seed=5)[0]
    prompts = prompts_of([1, 7, 25, 40], vocab, seed=6) + [
        header + p[1:] for p in prompts_of([3, 9, 20], vocab, seed=7)
    ]
    answers = [reference.greedy(weights, small, prompt, 4, eos=2)[0] for prompt in prompts]
    return build(max_seq_len=64, max_batch_size=3, max_step_tokens=12).model, prompts, answers


def test_interrupted_scores_are_whole(
    build: Callable[..., Llama], small: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores that were lost in an interrupted step are computed again, each once and in its place."""
    import llama.engine.engine as module

    engine = build(max_step_tokens=8).engine
    prompt = prompts_of([41], small["vocab_size"])[0]
    expected = Request(prompt, SamplingParams(max_gen_len=0, top_logprobs=2), 0, frozenset(), prompt_logprobs=True)
    engine.add(expected)
    finished(engine)
    real, calls = module._score, []

    def flaky(*args: object) -> None:
        calls.append(None)
        if len(calls) % 3 == 1:
            raise KeyboardInterrupt
        real(*args)
        if len(calls) % 3 == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(module, "_score", flaky)
    again = Request(prompt, expected.params, 0, frozenset(), prompt_logprobs=True)
    engine.add(again)
    while not engine.idle:
        try:
            engine.step()
        except KeyboardInterrupt:
            continue
    assert again.scores == pytest.approx(expected.scores)
    assert len(again.top_scores) == 41


@pytest.mark.parametrize("stage", ["model", "choose"])
def test_an_interrupted_step_can_be_taken_again(
    build: Callable[..., Llama],
    weights: dict[str, Tensor],
    small: dict,
    logits: Logits,
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
) -> None:
    """Ctrl-C in the middle of a step leaves the other requests right."""
    llama = build(max_batch_size=2, max_step_tokens=16)
    prompts = prompts_of([30, 12, 20], small["vocab_size"])
    made = [request(prompt) for prompt in prompts]
    for one in made:
        llama.engine.add(one)
    import llama.engine.engine as module

    where, name = (type(llama.model), "forward") if stage == "model" else (module, "next_tokens")
    real, calls = getattr(where, name), []

    def flaky(*args: object) -> object:
        calls.append(None)
        if len(calls) % 3 == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(where, name, flaky)
    while not llama.engine.idle:
        try:
            llama.engine.step()
        except KeyboardInterrupt:
            continue
    monkeypatch.undo()
    expected = [reference.greedy(weights, small, prompt, 6, eos=2)[0] for prompt in prompts]
    assert_agree([one.tokens for one in made], expected, prompts, logits)
    assert is_clean(llama.engine)


def test_noise_belongs_to_the_request(build: Callable[..., Llama], small: dict) -> None:
    """Sampled tokens are the same alone, in any batch, order, number of slots and chunk size."""
    prompts = prompts_of([4, 37, 12, 60, 25, 9, 18], small["vocab_size"])
    every = [SamplingParams(temperature=1.0, top_p=0.95, seed=100 + i, max_gen_len=10) for i in range(len(prompts))]
    llama = build(max_batch_size=8)
    expected, _ = llama.generate(prompts, params=every)
    for options in ({"max_batch_size": 1}, {"max_batch_size": 3, "max_step_tokens": 8}):
        found, _ = build(**options).generate(prompts, params=every)
        assert_agree(found, expected, prompts, logits_of(llama), every)
    order = random.Random(3).sample(range(len(prompts)), len(prompts))
    shuffled, _ = build(max_batch_size=2).generate([prompts[i] for i in order], params=[every[i] for i in order])
    found = [shuffled[order.index(i)] for i in range(len(prompts))]
    assert_agree(found, expected, prompts, logits_of(llama), every)


def test_one_seed_for_all_prompts_still_differs_by_prompt(build: Callable[..., Llama], small: dict) -> None:
    """Different prompts draw different noise even under one seed; the same prompt draws the same."""
    llama = build(max_batch_size=4)
    params = SamplingParams(temperature=100.0, top_p=1.0, seed=5, max_gen_len=8, min_gen_len=8)
    rows, _ = llama.generate([[1, 5, 9], [1, 5, 9], [1, 5, 8]], params=params)
    assert_agree(rows[:1], rows[1:2], [[1, 5, 9]], logits_of(llama), params)
    assert rows[0] != rows[2]


def test_a_program_is_reproducible_and_its_calls_differ(build: Callable[..., Llama]) -> None:
    """Without seeds of their own, requests derive them from build's seed and a counter."""
    runs = []
    for seed in (3, 3, 4):
        llama = build(seed=seed)
        runs.append([])
        for _ in range(2):
            llama.engine.clear_prefix_cache()  # so that both prefill alike, as `again` does
            runs[-1] += llama.text_completion(["a"], temperature=50.0, max_gen_len=8)
    texts = [[result["generation"] for result in run] for run in runs]
    assert texts[0] == texts[1] != texts[2]
    assert texts[0][0] != texts[0][1]
    again = build(seed=99).text_completion(["a"], temperature=50.0, max_gen_len=8, seed=runs[0][1]["seed"])
    assert again[0]["generation"] == texts[0][1]


def test_logits_of_another_request_do_not_matter(build: Callable[..., Llama], small: dict) -> None:
    """Penalties, bans and biases of one request leave its neighbours alone."""
    llama = build(max_batch_size=4)
    prompt = prompts_of([6], small["vocab_size"])[0]
    plain = SamplingParams(temperature=0, max_gen_len=6)
    expected, _ = llama.generate([prompt], params=plain)
    logits = logits_of(llama)
    ban = SamplingParams(temperature=0, max_gen_len=6, bad_words=[[expected[0][0]]], repetition_penalty=1.5)
    rows, _ = llama.generate([prompt, prompt, prompt], params=[ban, plain, ban])
    assert_agree(rows[1:2], expected, [prompt], logits, plain)
    assert_agree(rows[:1], rows[2:], [prompt], logits, ban)
    assert rows[0] != expected[0]
    assert expected[0][0] not in rows[0]


def test_a_step_runs_on_the_device_of_its_model(
    build: Callable[..., Llama], small: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though another one was chosen since: two models may be on two GPUs of a process."""
    llama, entered = build(), []
    model = llama.model

    class OnSecond:
        params, dtype = model.params, model.dtype
        device = torch.device("cuda", 1)

        def __call__(self, *args: object) -> Tensor:
            assert entered == [self.device]
            raise KeyboardInterrupt

    @contextmanager
    def device(chosen: torch.device) -> Iterator[None]:
        entered.append(chosen)
        try:
            yield
        finally:
            entered.append("left")

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr("llama.engine.engine._pack", lambda *_: None)
    llama.engine.model = OnSecond()
    llama.engine.add(request(prompts_of([5], small["vocab_size"])[0]))
    with pytest.raises(KeyboardInterrupt):
        llama.engine.step()
    assert entered == [OnSecond.device, "left"]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_agrees_with_the_reference(
    build: Callable[..., Llama], weights: dict[str, Tensor], small: dict, logits: Logits
) -> None:
    """Greedy rows on CUDA in float32 are the reference's."""
    prompts = prompts_of([5, 40, 1, 60], small["vocab_size"])
    tokens, _ = build(device="cuda", max_batch_size=2, max_step_tokens=16).generate(prompts, 7, temperature=0)
    expected = [reference.greedy(weights, small, prompt, 7, eos=2)[0] for prompt in prompts]
    assert_agree(tokens, expected, prompts, logits)
