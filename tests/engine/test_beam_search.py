"""Beam search agrees with Hugging Face transformers on the same weights in float32."""

import random
from collections.abc import Callable

import pytest
import reference
import torch
from torch import Tensor

from llama import Llama, SamplingParams
from llama.errors import NumericalError, ParameterError

transformers = pytest.importorskip("transformers")
from transformers_peer import transformers_model  # noqa: E402


@pytest.fixture(scope="module")
def llama(build: Callable[..., Llama]) -> Llama:
    return build(max_batch_size=6)


@pytest.fixture(scope="module")
def peer(weights: dict[str, Tensor], small: dict) -> torch.nn.Module:
    return transformers_model(weights, small)


def expected(peer: torch.nn.Module, prompt: list[int], stops: list[int], **options: object) -> list[int]:
    out = peer.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), do_sample=False, early_stopping=False,
        eos_token_id=stops, pad_token_id=stops[0], **options,
    )  # fmt: skip
    tokens = out[0, len(prompt) :].tolist()
    return tokens[: next((i for i, token in enumerate(tokens) if token in stops), len(tokens))]


@pytest.mark.parametrize("num_beams", [2, 3, 5])
@pytest.mark.parametrize("length_penalty", [1.0, 0.0, 2.0, -1.0])
def test_agrees_with_transformers(
    llama: Llama, peer: torch.nn.Module, small: dict, num_beams: int, length_penalty: float
) -> None:
    """Tokens are equal, with many end tokens so that beams end at many lengths."""
    rng = random.Random(f"{num_beams} {length_penalty}")
    for _ in range(6):
        prompt = [1] + [rng.randrange(3, small["vocab_size"]) for _ in range(rng.randrange(1, 20))]
        stops = [2, *rng.sample(range(3, small["vocab_size"]), small["vocab_size"] // 12)]
        params = SamplingParams(
            num_beams=num_beams, length_penalty=length_penalty, max_gen_len=12, stop_token_ids=stops
        )
        tokens, _ = llama.generate([prompt], params=params)
        options = {"num_beams": num_beams, "length_penalty": length_penalty, "max_new_tokens": 12}
        assert tokens[0] == expected(peer, prompt, stops, **options)
    assert llama.engine.idle


def test_logprobs_are_the_models(llama: Llama, weights: dict[str, Tensor], small: dict) -> None:
    """The logprobs of the best beam are those of the reference for the same tokens."""
    prompt = [1, 5, 9, 30]
    params = SamplingParams(num_beams=4, max_gen_len=8, logprobs=True)
    tokens, logprobs = llama.generate([prompt], params=params)
    scores = reference.prompt_logprobs(weights, small, prompt + tokens[0])
    assert logprobs[0] == pytest.approx(scores[len(prompt) - 1 :], abs=1e-4)


def test_long_prompt_in_chunks(build: Callable[..., Llama]) -> None:
    """A prompt that is prefilled in chunks gives the same beams."""
    prompt = [1, *range(3, 80)]
    params = SamplingParams(num_beams=3, max_gen_len=6)
    whole = build(max_batch_size=3).generate([prompt], params=params)
    assert build(max_batch_size=3, max_step_tokens=10).generate([prompt], params=params) == whole


def test_beside_other_requests(llama: Llama) -> None:
    """Beam and other requests in one call give what each gives alone."""
    prompts = [[1, 4, 7], [1, 9], [1, 30, 31, 32]]
    every = [SamplingParams(temperature=0, max_gen_len=6), SamplingParams(num_beams=3, max_gen_len=6),
             SamplingParams(temperature=0, max_gen_len=6)]  # fmt: skip
    together, _ = llama.generate(prompts, params=every)
    alone = [llama.generate([p], params=params)[0][0] for p, params in zip(prompts, every, strict=True)]
    assert together == alone


def test_too_many_beams_names_the_limit(llama: Llama) -> None:
    with pytest.raises(ParameterError, match="num_beams=7 is more than max_batch_size=6"):
        llama.generate([[1, 2]], params=SamplingParams(num_beams=7))
    assert llama.engine.idle


def test_beams_with_a_scored_prompt_are_refused(llama: Llama) -> None:
    with pytest.raises(ParameterError, match="num_beams=2 with echo and logprobs"):
        llama.generate([[1, 2]], echo=True, params=SamplingParams(num_beams=2, logprobs=True))
    tokens, _ = llama.generate([[1, 5]], echo=True, params=SamplingParams(num_beams=2, max_gen_len=3))
    assert tokens[0][:2] == [1, 5]


def test_failure_and_cancel_give_slots_back(build: Callable[..., Llama]) -> None:
    """After an interrupted or failed beam search the engine runs on."""
    llama = build(max_batch_size=3)
    stream = llama.stream_text("a b c", max_gen_len=8, num_beams=3)
    expected = llama.generate([[1, 5]], 5, temperature=0)[0]
    stream.close()
    assert llama.engine.idle
    seen = []

    def interrupt(index: int, text: str) -> None:
        seen.append(index)
        raise KeyboardInterrupt

    params = [SamplingParams(num_beams=2, max_gen_len=8), SamplingParams(temperature=0, max_gen_len=8)]
    with pytest.raises(KeyboardInterrupt):
        llama.text_completion(["a b", "c d"], params=params, on_text=interrupt)
    assert seen
    assert llama.engine.idle
    saved = llama.model.tok_embeddings.weight[9].clone()
    llama.model.tok_embeddings.weight[9] = float("nan")
    with pytest.raises(NumericalError, match="prompt 0"):
        llama.generate([[1, 9]], params=SamplingParams(num_beams=2, max_gen_len=4))
    llama.model.tok_embeddings.weight[9] = saved
    assert llama.engine.idle
    assert sorted(llama.engine.scheduler.free) == [0, 1, 2]
    assert llama.generate([[1, 5]], 5, temperature=0)[0] == expected
