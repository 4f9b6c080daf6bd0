"""What excuses a difference of tokens in other tests: rounding, and nothing else."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import save
from near_ties import FLOAT32, QUANTIZED, assert_follows, logits_of
from torch import Tensor

from llama import Llama, SamplingParams

PROMPTS = [[1, 5, 9, 20, 17], [1, 7], [1, 33, 101, 44, 80, 80, 12, 9, 5]]


def logits(tokens: list[int]) -> Tensor:
    """After every token 5 and 7 are the best by far and alike but for 1e-4; after a 9 it is the end token."""
    rows = torch.zeros(len(tokens), 12)
    rows[:, 5], rows[:, 7] = 8, 8 + 1e-4
    rows[torch.tensor(tokens) == 9, 2] = 20
    return rows


def test_what_is_fed_back_is_as_probable_as_was_said() -> None:
    best = -math.log(math.exp(-8) * 10 + 1 + math.exp(1e-4)) + 1e-4
    assert_follows([[7, 5], [7, 5]], [[best, best - 1e-4]] * 2, [[1], [9, 1]], logits, 2, FLOAT32)
    assert_follows([[7, 5], []], [[best, best - 1e-4], []], [[1], [9]], logits, 2, FLOAT32)
    wrong = [([7, 3], [best, best - 8]), ([7, 5], [best, best - 0.01]), ([7, 5], [best]), ([7], [best]), ([], [])]
    for tokens, said in wrong:
        with pytest.raises(AssertionError):
            assert_follows([tokens], [said], [[1]], logits, 2, FLOAT32)


def test_too_few_tokens_compare_nothing() -> None:
    for tokens, prompts in (([[], []], [[9], [9]]), ([], [])):
        with pytest.raises(AssertionError, match="too few"):
            assert_follows(tokens, [[] for _ in tokens], prompts, logits, 2, FLOAT32)


def another_head(weights: dict[str, Tensor]) -> None:
    values = weights["layers.1.attention.wv.weight"]
    values[:8] = values[8:16]


def no_norm(weights: dict[str, Tensor]) -> None:
    weights["layers.1.ffn_norm.weight"].fill_(1)


def a_lost_row(weights: dict[str, Tensor]) -> None:
    weights["layers.0.feed_forward.w2.weight"][3] = 0


@pytest.mark.parametrize("quantize", [None, "int8"])
@pytest.mark.parametrize("mistake", [another_head, no_norm, a_lost_row])
def test_small_mistakes_of_a_model_are_found(
    build: Callable[..., Llama], small: dict, weights: dict[str, Tensor], tmp_path: Path,
    quantize: str | None, mistake: Callable[[dict[str, Tensor]], None],
) -> None:  # fmt: skip
    """They move some log-probability by 0.6 at least, six times what is excused even where activations are rounded."""
    wrong = {name: tensor.clone() for name, tensor in weights.items()}
    mistake(wrong)
    params = SamplingParams(temperature=0, max_gen_len=20, logprobs=True)
    tolerance, right = QUANTIZED if quantize else FLOAT32, build(quantize=quantize)
    assert_follows(*right.generate(PROMPTS, params=params), PROMPTS, logits_of(right), 20, tolerance)
    found = build(save(tmp_path / "wrong", small, wrong), quantize=quantize).generate(PROMPTS, params=params)
    with pytest.raises(AssertionError):
        assert_follows(*found, PROMPTS, logits_of(right), 20, tolerance)
