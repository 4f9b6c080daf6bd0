"""Windows over long texts: each token once, with enough before it, and as a plain forward of each window scores it."""

import math
from collections.abc import Callable

import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from llama import Llama
from llama.errors import ParameterError, PromptError
from llama.model.kv_cache import KVCache
from llama.model.step import Step
from llama.request import Prompt
from llama.windows import Windows, bits_per_byte

LONG = "Once upon a time there was a small fox named Tom. Ben wanted a red kite. " * 8


@given(st.integers(1, 200), st.integers(2, 40), st.data())
def test_each_token_is_scored_once_with_enough_before_it(n: int, context: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, context - 1))
    scored: list[int] = []
    for window in Windows(stride, context).over(list(range(n))):
        tokens = window.tokens
        assert tokens == list(range(tokens[0], tokens[0] + len(tokens))) and len(tokens) <= context
        assert tokens[0] == 0 or window.scored_from >= context - stride
        scored += tokens[window.scored_from :]
    assert scored == list(range(1, n))


def test_the_example_of_the_docstring() -> None:
    windows = Windows(2, 4).over(list(range(7)))
    assert [(w.tokens, w.scored_from) for w in windows] == [([0, 1, 2, 3], 1), ([2, 3, 4, 5], 2), ([4, 5, 6], 2)]


@pytest.mark.parametrize(("stride", "context"), [(8, 24), (23, 24), (1, 128), (None, 40), (50, None)])
def test_scores_are_those_of_a_plain_forward_of_each_window(
    build: Callable[..., Llama], weights: dict[str, Tensor], small: dict, stride: int | None, context: int | None
) -> None:
    """In float32; with the sums that follow from them. A short text beside the long one is scored as ever."""
    llama = build(max_seq_len=128)
    score, short = llama.score([LONG, "a b"], stride=stride, context=context, top_logprobs=2)
    tokens = llama.tokenizer.encode(LONG, bos=True, eos=False)
    assert len(tokens) > 130
    context = context or 128
    stride = stride or context // 2
    expected: list[float] = []
    for begin in range(0, len(tokens), stride):
        window = tokens[begin : begin + context]
        own = reference.prompt_logprobs(weights, small, window)
        expected += own[begin and len(expected) - begin :]
        if begin + context >= len(tokens):
            break
    assert score["tokens"] == tokens and "".join(score["pieces"]) == LONG
    assert score["logprobs"][0] is None and score["logprobs"][1:] == pytest.approx(expected, abs=1e-4)
    assert len(score["top_logprobs"]) == len(tokens) and all(len(top) == 2 for top in score["top_logprobs"][1:])
    assert score["perplexity"] == pytest.approx(math.exp(-sum(expected) / len(expected)), rel=1e-3)
    assert score["bits_per_byte"] == pytest.approx(-sum(expected) / math.log(2) / len(LONG), rel=1e-3)
    assert short["logprobs"][1:] == pytest.approx(llama.score(["a b"])[0]["logprobs"][1:], abs=1e-4)


def test_windows_of_one_text_are_computed_together(
    build: Callable[..., Llama], monkeypatch: pytest.MonkeyPatch
) -> None:
    llama = build(max_seq_len=128)
    sequences, forward = [], llama.model.forward

    def counting(step: Step, cache: KVCache) -> Tensor:
        sequences.append(len(step.spans))
        return forward(step, cache)

    monkeypatch.setattr(llama.model, "forward", counting)
    llama.score([LONG], stride=8, context=24)
    assert max(sequences) == 4 == llama.engine.cache.slots


@pytest.mark.parametrize("step_tokens", [4, 512])
def test_scores_of_tokens_begin_where_asked_and_share_what_is_before(
    build: Callable[..., Llama], weights: dict[str, Tensor], small: dict, step_tokens: int
) -> None:
    """As the plain forward has them; whether they are the most probable ones; a beginning in common is computed once;
    max_seq_len and one more token may be scored, for the last is not read."""
    llama = build(max_seq_len=64, max_step_tokens=step_tokens)
    common = [1, *range(300, 350)]
    (best, *_), _ = reference.greedy(weights, small, common, 1, eos=2)
    ends = [[best], [best + 1], [7, 8, 9], [*range(40, 54)]]
    prompts = [Prompt(common + end, scored_from=len(common)) for end in ends]
    assert len(prompts[-1].tokens) == 65
    before = llama.engine.computed_tokens
    found = dict(llama.score_tokens(prompts))
    assert llama.engine.computed_tokens - before == len(common) + 3 + (1 + 1 + 3 + 14) - 4
    assert [found[n].is_greedy for n in range(4)] == [True, False, False, False]
    for n, end in enumerate(ends):
        expected = reference.prompt_logprobs(weights, small, common + end)[-len(end) :]
        assert found[n].logprobs == pytest.approx(expected, abs=1e-4)
    ((_, too_long),) = llama.score_tokens([Prompt([1] * 66)])
    assert isinstance(too_long, PromptError)


def test_errors_are_said_before_anything_runs(build: Callable[..., Llama]) -> None:
    llama = build(max_seq_len=128)
    for options, said in [
        ({"context": 129}, "context=129 is out of range: expected an integer from 2 to 128 .max_seq_len."),
        ({"context": 1}, "context=1 is out of range"),
        ({"stride": 128}, "stride=128 is out of range: expected an integer from 1 to 127 .context - 1."),
        ({"stride": 0, "context": 8}, "stride=0 is out of range"),
        ({"stride": 1.5}, "stride=1.5 is out of range"),
        ({"stride": True}, "stride=True is out of range"),
    ]:
        with pytest.raises(ParameterError, match=said):
            llama.score([LONG], **options)
    before = llama.engine.computed_tokens
    with pytest.raises(PromptError, match="text 1 is int, not a string"):
        llama.score([LONG, 5], stride=8)
    assert llama.engine.computed_tokens == before
    good, bad = llama.score_each([LONG, "\ud800"], stride=8)
    assert good["perplexity"] > 1 and isinstance(bad, PromptError)


def test_bits_per_byte() -> None:
    assert bits_per_byte([None, -math.log(2), -math.log(4)], "é.") == 1
    assert bits_per_byte([None], "") is None
