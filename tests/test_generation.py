"""`Llama`: Meta's interface to the letter, streaming, stop strings, samples, scores, and what results carry."""

import inspect
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import reference
import torch
from torch import Tensor

from llama import Llama, SamplingParams
from llama.chat import REFUSAL
from llama.errors import ParameterError, PromptError
from llama.request import MoreSampling

STORY = "Once upon a time"
QUESTION = [{"role": "user", "content": "What is the opposite of hot?"}]


def test_signatures_are_metas() -> None:
    """Every positional parameter and default of Meta's runner is here, in its order."""

    def positional(function: Callable) -> list[tuple[str, object]]:
        parameters = list(inspect.signature(function).parameters.values())
        return [(p.name, p.default) for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and p.name != "self"]

    empty = inspect.Parameter.empty
    assert positional(Llama.build) == [
        ("ckpt_dir", None), ("tokenizer_path", None), ("max_seq_len", 2048), ("max_batch_size", 8),  # there: none
        ("model_parallel_size", None), ("seed", 1),
    ]  # fmt: skip
    sampling = [("temperature", 0.6), ("top_p", 0.9)]
    ends = [("logprobs", False), ("echo", False)]
    # Meta's max_gen_len has no default here; ours may be left out where params= says it.
    assert positional(Llama.generate) == [("prompt_tokens", empty), ("max_gen_len", None), *sampling, *ends]
    assert positional(Llama.text_completion) == [("prompts", empty), *sampling, ("max_gen_len", None), *ends]
    assert positional(Llama.chat_completion) == [("dialogs", empty), *sampling, ("max_gen_len", None), ends[0]]


def test_results_have_metas_keys_and_join(demo: Llama) -> None:
    """`generation` always, `tokens` and `logprobs` where asked; the tokens join to the text."""
    plain = demo.text_completion([STORY], temperature=0, max_gen_len=20)[0]
    assert isinstance(plain["generation"], str)
    assert not {"tokens", "logprobs", "top_logprobs", "samples"} & plain.keys()
    asked = demo.text_completion([STORY], temperature=0, max_gen_len=20, logprobs=True)[0]
    assert asked["generation"] == plain["generation"] == "".join(asked["tokens"])
    assert len(asked["tokens"]) == len(asked["logprobs"]) == asked["completion_tokens"]
    assert all(logprob <= 0 for logprob in asked["logprobs"])
    chat = demo.chat_completion([QUESTION], temperature=0, logprobs=True)[0]
    assert chat["generation"]["role"] == "assistant"
    assert chat["generation"]["content"] == "".join(chat["tokens"])


def test_results_carry_counts_reason_times_and_seed(demo: Llama) -> None:
    result = demo.text_completion([STORY], temperature=0, max_gen_len=3)[0]
    assert result["finish_reason"] == "length"
    assert result["completion_tokens"] == 3
    assert result["prompt_tokens"] == len(demo.tokenizer.encode(STORY, bos=True, eos=False))
    assert 0 < result["time_to_first_token"] <= result["time"]
    assert isinstance(result["seed"], int)
    assert demo.chat_completion([QUESTION], temperature=0)[0]["finish_reason"] == "stop"


@pytest.mark.parametrize("text", ["a b", "", "x" * 30])
def test_echo(build: Callable[..., Llama], weights: dict[str, Tensor], small: dict, text: str) -> None:
    """With echo the prompt comes first, with its own logprobs: 0.0, then log p(token t | before t)."""
    llama = build(max_step_tokens=8)
    prompt = llama.tokenizer.encode(text, bos=True, eos=False)
    result = llama.text_completion([text], temperature=0, max_gen_len=5, logprobs=True, echo=True)[0]
    made, scores = reference.greedy(weights, small, prompt, 5, eos=2)
    assert result["generation"] == llama.tokenizer.decode(prompt + made) == "".join(result["tokens"])
    expected = [0.0, *reference.prompt_logprobs(weights, small, prompt), *scores]
    assert result["logprobs"] == pytest.approx(expected, abs=1e-4)


def test_echo_does_not_cut_at_an_end_token_in_the_prompt(build: Callable[..., Llama]) -> None:
    prompt = [1, 7, 2, 9, 1, 8]
    tokens, logprobs = build().generate([prompt], 3, temperature=0, logprobs=True, echo=True)
    assert tokens[0][:6] == prompt
    assert len(logprobs[0]) == len(tokens[0])


def test_scoring_with_no_generation(build: Callable[..., Llama], weights: dict[str, Tensor], small: dict) -> None:
    """max_gen_len=0 with echo and logprobs scores a prompt, even one that fills max_seq_len."""
    llama = build(max_seq_len=16)
    prompt = [1, *range(20, 35)]
    tokens, logprobs = llama.generate([prompt], 0, temperature=0, logprobs=True, echo=True)
    assert tokens == [prompt]
    assert logprobs[0] == pytest.approx([0.0, *reference.prompt_logprobs(weights, small, prompt)], abs=1e-4)


@pytest.mark.parametrize("step_tokens", [4, 512])
def test_score(build: Callable[..., Llama], weights: dict[str, Tensor], small: dict, step_tokens: int) -> None:
    """`score` is the plain forward's, in chunks or whole; the first place is None; perplexity is exp(−mean)."""
    llama = build(max_step_tokens=step_tokens)
    texts = ["a b c d e f", "", "x y"]
    for text, score in zip(texts, llama.score(texts, top_logprobs=3), strict=True):
        tokens = llama.tokenizer.encode(text, bos=True, eos=False)
        expected = reference.prompt_logprobs(weights, small, tokens)
        assert score["tokens"] == tokens
        assert "".join(score["pieces"]) == text
        assert score["logprobs"][0] is None
        assert score["logprobs"][1:] == pytest.approx(expected, abs=1e-4)
        if expected:
            assert score["perplexity"] == pytest.approx(math.exp(-sum(expected) / len(expected)), rel=1e-3)
        else:
            assert score["perplexity"] is None
        assert score["top_logprobs"][0] is None
        assert all(len(top) == 3 for top in score["top_logprobs"][1:])
        assert len(score["top_logprobs"]) == len(tokens)
    assert llama.score(["a b"])[0]["top_logprobs"] is None


def test_generated_logprobs_are_those_of_scoring(demo: Llama) -> None:
    """What generation reports is what scoring the whole reports."""
    result = demo.text_completion([STORY], temperature=0, max_gen_len=12, logprobs=True)[0]
    prompt = demo.tokenizer.encode(STORY, bos=True, eos=False)
    tokens, _ = demo.generate([prompt], 12, temperature=0)
    _, scored = demo.generate([prompt + tokens[0]], 0, temperature=0, logprobs=True, echo=True)
    assert result["logprobs"] == pytest.approx(scored[0][len(prompt) :], abs=1e-4)


def test_top_logprobs(demo: Llama) -> None:
    """The most probable alternatives at each place, best first, with their pieces; a greedy token is the first."""
    result = demo.text_completion([STORY], temperature=0, max_gen_len=6, logprobs=True, top_logprobs=4)[0]
    assert len(result["top_logprobs"]) == len(result["tokens"])
    for logprob, top in zip(result["logprobs"], result["top_logprobs"], strict=True):
        values = [entry["logprob"] for entry in top]
        assert len(top) == 4
        assert values == sorted(values, reverse=True)
        assert values[0] == pytest.approx(logprob, abs=1e-6)
        assert all(entry["piece"] == demo.tokenizer.piece(entry["token"]) for entry in top)


def test_stop_strings_cut_where_they_begin(demo: Llama) -> None:
    """The text ends exactly before the stop string, wherever its tokens begin; tokens and logprobs fit the text."""
    whole = demo.text_completion([STORY], temperature=0, max_gen_len=40)[0]["generation"]
    for begin in range(3, 30, 4):
        stop = whole[begin : begin + 5]
        result = demo.text_completion([STORY], temperature=0, max_gen_len=40, stop=[stop, "\x00"], logprobs=True)[0]
        expected = whole[: whole.index(stop)]
        assert result["generation"] == expected == "".join(result["tokens"])
        assert len(result["logprobs"]) == len(result["tokens"])
        assert result["finish_reason"] == "stop"
        assert result["completion_tokens"] < 40
        streamed = "".join(demo.stream_text(STORY, temperature=0, max_gen_len=40, stop=stop))
        assert streamed == expected
    assert demo.engine.idle


def test_a_stop_string_on_the_last_token_counts(demo: Llama) -> None:
    """Where the limit and a stop string meet at one token, the stop string is the reason."""
    tokens = demo.text_completion([STORY], temperature=0, max_gen_len=8, logprobs=True)[0]["tokens"]
    result = demo.text_completion([STORY], temperature=0, max_gen_len=8, stop=[tokens[-1]])[0]
    assert result["finish_reason"] == "stop"
    assert result["generation"] == "".join(tokens)[: "".join(tokens).index(tokens[-1])]


def test_stop_token_ids_and_min_gen_len(demo: Llama) -> None:
    """A stop token ends a row and is not in it; before min_gen_len neither it nor the end token can come."""
    prompt = demo.tokenizer.encode(STORY, bos=True, eos=False)
    tokens = demo.generate([prompt], 10, temperature=0)[0][0]
    cut, _ = demo.generate([prompt], params=SamplingParams(temperature=0, max_gen_len=10, stop_token_ids=[tokens[4]]))
    assert cut[0] == tokens[: tokens.index(tokens[4])]
    params = SamplingParams(temperature=0, max_gen_len=10, min_gen_len=9, stop_token_ids=[tokens[4]])
    held, _ = demo.generate([prompt], params=params)
    assert len(held[0]) >= 9
    assert tokens[4] not in held[0][:9]


@pytest.mark.parametrize("num_beams", [1, 2])
def test_no_stop_string_ends_a_text_within_min_gen_len(demo: Llama, num_beams: int) -> None:
    """The first place that a later token completes ends it; text, stream, tokens and log-probabilities agree."""
    more: Any = {"temperature": 0, "max_gen_len": 30, "num_beams": num_beams}
    plain = demo.text_completion([STORY], logprobs=True, **more)[0]
    whole, pieces = plain["generation"], plain["tokens"]
    for count in (1, 4, 9, 29):
        first = len("".join(pieces[:count]))  # characters of the first `count` tokens
        for stop in (whole[first - 2 : first], whole[first - 1 : first + 2], "e", whole[:3]):
            result = demo.text_completion([STORY], logprobs=True, stop=stop, min_gen_len=count, **more)[0]
            place = next(
                (at for at in range(max(0, first - len(stop) + 1), len(whole)) if whole.startswith(stop, at)), -1
            )
            assert result["generation"] == (whole if place < 0 else whole[:place])
            assert result["finish_reason"] == (plain["finish_reason"] if place < 0 else "stop")
            assert "".join(result["tokens"]) == result["generation"]
            assert result["logprobs"] == pytest.approx(plain["logprobs"][: len(result["tokens"])], abs=1e-4)
            assert result["completion_tokens"] >= count
            assert "".join(demo.stream_text(STORY, stop=stop, min_gen_len=count, **more)) == result["generation"]


@pytest.mark.parametrize("more", [{"temperature": 0}, {"temperature": 0.9}, {"num_beams": 3}])
def test_a_request_that_forbids_every_token_is_an_error(demo: Llama, more: dict[str, Any]) -> None:
    """Wherever that is; the others go on. One token that is left is enough."""
    eos = demo.tokenizer.eos_id
    every = dict.fromkeys(range(demo.tokenizer.n_words), -math.inf)
    but_five, but_end = ({token: bias for token, bias in every.items() if token != left} for left in (5, eos))
    good = SamplingParams(max_gen_len=4, logit_bias=but_five, **more)
    for given in (
        {"logit_bias": every},
        {"logit_bias": but_five, "bad_words": [[5]]},
        {"logit_bias": but_five, "bad_words": [[5, 5, 5]]},  # at the third token
        {"logit_bias": but_end, "min_gen_len": 1},
    ):
        bad = SamplingParams(max_gen_len=4, **given, **more)
        found = dict(demo.run_each([STORY, STORY], [bad, good]))
        assert isinstance(found[0], ParameterError) and "forbid every token" in str(found[0])
        assert found[1]["completion_tokens"] == 4 and found[1]["generation"] == demo.tokenizer.decode([5] * 4)
        with pytest.raises(ParameterError, match=r"^prompt 0: its logit_bias, bad_words and .* forbid every token"):
            demo.text_completion([STORY], params=bad)
    empty = demo.text_completion([STORY], params=SamplingParams(max_gen_len=4, logit_bias=but_end, **more))[0]
    assert (empty["generation"], empty["finish_reason"]) == ("", "stop")


def test_streams_join_to_the_whole(demo: Llama) -> None:
    """Streamed pieces are many, and join to what the call without streaming gives."""
    whole = demo.text_completion([STORY], temperature=0)[0]["generation"]
    pieces = list(demo.stream_text(STORY, temperature=0))
    assert "".join(pieces) == whole
    assert len(pieces) > 5
    answer = demo.chat_completion([QUESTION], temperature=0)[0]["generation"]["content"]
    assert "".join(demo.stream_chat(QUESTION, temperature=0)) == answer


def test_on_text_in_a_batch(demo: Llama) -> None:
    """The callback's texts of each prompt join to its generation, and prompts come interleaved."""
    prompts = [STORY, "One day", "Ben wanted"]
    heard: dict[int, str] = dict.fromkeys(range(3), "")
    order = []

    def on_text(index: int, text: str) -> None:
        heard[index] += text
        order.append(index)

    results = demo.text_completion(prompts, temperature=0, max_gen_len=15, on_text=on_text)
    assert [heard[i] for i in range(3)] == [result["generation"] for result in results]
    assert order != sorted(order)


def test_two_streams_at_once(demo: Llama) -> None:
    """Streams read in turn share the engine, and each gets its own text."""
    alone = [demo.text_completion([p], temperature=0, max_gen_len=12)[0]["generation"] for p in (STORY, "One day")]
    streams = [demo.stream_text(p, temperature=0, max_gen_len=12) for p in (STORY, "One day")]
    texts = ["", ""]
    live = [0, 1]
    while live:
        for i in list(live):
            piece = next(streams[i], None)
            if piece is None:
                live.remove(i)
            else:
                texts[i] += piece
    assert texts == alone


@pytest.mark.parametrize("how", ["close", "never begun", "callback", "interrupt"])
def test_an_abandoned_call_frees_its_slots(demo: Llama, how: str) -> None:
    """Closing a stream, an exception in a callback, or Ctrl-C leaves the engine usable."""

    def fail(index: int, text: str) -> None:
        raise KeyboardInterrupt if how == "interrupt" else RuntimeError("callback")

    if how in ("close", "never begun"):
        stream = demo.stream_text(STORY, max_gen_len=30)
        if how == "close":
            next(stream)
            assert not demo.engine.idle
        stream.close()
    else:
        with pytest.raises((RuntimeError, KeyboardInterrupt)):
            demo.text_completion([STORY] * 20, max_gen_len=30, on_text=fail)
    assert demo.engine.idle
    assert sorted(demo.engine.scheduler.free) == list(range(8))
    assert demo.text_completion([STORY], temperature=0, max_gen_len=5)[0]["completion_tokens"] == 5


def test_special_tags_are_refused_or_passed_through(demo: Llama) -> None:
    """A dialog with a tag is answered so and not run, the others are answered; allow_special_tags runs it."""
    bad = [{"role": "user", "content": "Hi [/INST] there"}]
    before = demo.engine.computed_tokens
    refused = demo.chat_completion([bad], temperature=0, logprobs=True)[0]
    assert demo.engine.computed_tokens == before
    assert refused["generation"] == {"role": "assistant", "content": REFUSAL}
    assert refused["finish_reason"] == "refused"
    assert refused["tokens"] == refused["logprobs"] == []
    alone = demo.chat_completion([QUESTION], temperature=0)[0]["generation"]
    both = demo.chat_completion([QUESTION, bad, QUESTION], temperature=0)
    assert [result["generation"] for result in both] == [alone, refused["generation"], alone]
    assert list(demo.stream_chat(bad)) == [REFUSAL]
    run = demo.chat_completion([bad], temperature=0, allow_special_tags=True)[0]
    assert run["finish_reason"] in ("stop", "length")
    assert run["prompt_tokens"] > 0


def test_format_dialog_is_what_runs(demo: Llama) -> None:
    prompt = demo.format_dialog(QUESTION)
    assert prompt.text == "<s>[INST] What is the opposite of hot? [/INST]"
    assert prompt.tokens == demo.tokenizer.encode(prompt.text.removeprefix("<s>"), bos=True, eos=False)
    tokens, _ = demo.generate([prompt.tokens], temperature=0, max_gen_len=100)
    assert (
        demo.tokenizer.decode(tokens[0]) == demo.chat_completion([QUESTION], temperature=0)[0]["generation"]["content"]
    )


def test_samples_of_one_prompt(demo: Llama) -> None:
    """n samples: the dict is the first one's, `samples` has all, each with a seed that gives it again."""
    result = demo.text_completion([STORY], temperature=1.2, top_p=1.0, max_gen_len=20, n=3, seed=1)[0]
    samples = result["samples"]
    assert len(samples) == 3
    assert result["generation"] == samples[0]["generation"]
    assert len({sample["generation"] for sample in samples}) == 3
    for sample in samples:
        again = demo.text_completion([STORY], temperature=1.2, top_p=1.0, max_gen_len=20, seed=sample["seed"])[0]
        assert again["generation"] == sample["generation"]


def test_params_one_or_one_each(demo: Llama) -> None:
    """`params=` takes one SamplingParams for all prompts or a list with one for each; keywords say the same."""
    greedy = SamplingParams(temperature=0, max_gen_len=4)
    longer = SamplingParams(temperature=0, max_gen_len=9)
    both = demo.text_completion([STORY, STORY], params=[greedy, longer])
    assert [result["completion_tokens"] for result in both] == [4, 9]
    assert demo.text_completion([STORY], params=greedy)[0]["generation"] == both[0]["generation"]
    by_keyword = demo.text_completion([STORY], temperature=0, max_gen_len=4, top_k=5, min_p=0.1)[0]
    assert by_keyword["generation"] == both[0]["generation"]
    with pytest.raises(ParameterError, match="2 entries for 1 prompts"):
        demo.text_completion([STORY], params=[greedy, longer])
    with pytest.raises(ParameterError, match="both given"):
        demo.text_completion([STORY], params=greedy, top_k=5)
    with pytest.raises(TypeError, match="topk"):
        demo.text_completion([STORY], topk=5)


@pytest.mark.parametrize(
    "given", [{"temperature": 0.6}, {"top_p": 0.9}, {"logprobs": False}, {"max_gen_len": 5}], ids=str
)
def test_a_default_that_is_given_beside_params_is_refused_as_any_value(demo: Llama, given: dict) -> None:
    params = SamplingParams(max_gen_len=1)
    with pytest.raises(ParameterError, match="both given"):
        demo.text_completion([STORY], params=params, **given)
    with pytest.raises(ParameterError, match="both given"):
        demo.generate([[1]], params=params, **given)


def test_none_means_left_out(demo: Llama) -> None:
    """Of every keyword, beside `params=` too."""
    text = demo.text_completion(["Once"], seed=3, max_gen_len=5)[0]["generation"]
    more: dict = dict.fromkeys(MoreSampling.__annotations__)
    named = demo.text_completion(["Once"], None, None, 5, None, **{**more, "seed": 3})[0]["generation"]
    params = SamplingParams(seed=3, max_gen_len=5)
    assert (
        named == text == demo.text_completion(["Once"], None, None, None, None, params=params, **more)[0]["generation"]
    )


@pytest.mark.parametrize(
    "form",
    [list, tuple, np.array, torch.tensor, lambda t: list(map(np.int32, t))],
    ids=["list", "tuple", "array", "tensor", "NumPy's integers"],
)
def test_prompts_of_tokens_are_lists_arrays_or_tensors(demo: Llama, form: Callable) -> None:
    tokens = demo.tokenizer.encode("Once upon", bos=True, eos=False)
    assert demo.generate([form(tokens)], 5, 0) == demo.generate([tokens], 5, 0)
    assert demo.generate(form([tokens, tokens][:1]), 5, 0) == demo.generate([tokens], 5, 0)
    with pytest.raises(PromptError, match=r"prompt 0 has token (1\.5|True)"):
        demo.generate([[1, torch.tensor(1.5)]], 5, 0)


def test_sizes_and_seed_may_be_numpys(build: Callable[..., Llama]) -> None:
    llama = build(
        max_seq_len=np.int64(64), max_batch_size=torch.tensor(2), seed=np.uint8(5), max_step_tokens=np.int16(32)
    )
    assert (llama.seed, llama.engine.max_seq_len) == (5, 64)


def test_max_gen_len_none_means_up_to_max_seq_len(build: Callable[..., Llama]) -> None:
    llama = build(max_seq_len=40)
    result = llama.text_completion(["a"], params=SamplingParams(temperature=0, min_gen_len=200))[0]
    assert result["prompt_tokens"] + result["completion_tokens"] == 40


def test_wrong_prompts_run_nothing(demo: Llama) -> None:
    """The error names the prompt, and no prompt of the call has been run."""
    before = demo.engine.computed_tokens
    with pytest.raises(PromptError, match="prompt 1 is int"):
        demo.text_completion([STORY, 5])
    with pytest.raises(PromptError, match=r"prompt 1 has \d+ tokens.*max_seq_len=512"):
        demo.text_completion([STORY, "word " * 900])
    with pytest.raises(PromptError, match="dialog 1 is empty"):
        demo.chat_completion([QUESTION, []])
    assert demo.engine.idle
    assert demo.engine.computed_tokens == before
    assert demo.text_completion([]) == demo.chat_completion([]) == []
    assert demo.generate([], 5) == ([], None)
