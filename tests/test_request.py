"""`SamplingParams`: every field out of its range names itself, its value and its range."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from llama.errors import ParameterError
from llama.request import SamplingParams

NAN, INF = math.nan, math.inf
BAD = {
    "temperature": [-0.1, NAN, INF, 10**400, "1", True], "top_p": [0, 1.01, -1, NAN, "0.9", False],
    "top_k": [-1, 2**63, 1.5, "3", True], "min_p": [-0.1, 1.1, NAN], "repetition_penalty": [0, -1, NAN, INF],
    "presence_penalty": [NAN, INF, "1"], "frequency_penalty": [NAN, -INF], "length_penalty": [NAN, INF],
    "min_gen_len": [-1, 1.0], "max_gen_len": [-1, 2.5, "8", True], "stop": [5, [""], ["a", 3], b"x"],
    "stop_token_ids": [5, [-1], ["a"], [True]], "bad_words": [[[]], [5], ["ab"], [[1, -2]]],
    "logit_bias": [[1], {"a": 1.0}, {1: NAN}, {1: INF}, {-1: 0.0}, {1: "x"}, {"1_0": 1}, {" 6 ": 1}, {"06": 1},
                   {True: 1}],
    "json_schema": ["{}", [1], 5], "regex": [5, ["a"], b"x"], "grammar": [5, ["a"]],
    "choices": [5, [""], ["a", 3], b"x"],
    "seed": [-1, 2**64, 1.0, "7"],
    "n": [0, -1, 1.5], "num_beams": [0, 2.0], "logprobs": ["yes", 1], "top_logprobs": [-1, True, 1.5],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in BAD.items() for value in values], ids=lambda x: f"{x!r:.20}"
)
def test_out_of_range_names_itself_its_value_and_its_range(name: str, value: object) -> None:
    with pytest.raises(ParameterError) as error:
        SamplingParams(**{name: value})
    message = str(error.value)
    assert message.startswith(name)
    shown = repr(next(iter(value))) if isinstance(value, dict) else repr(value)
    assert shown in message
    assert "expected" in message or "is not a" in message


def test_every_field_has_bad_values_here() -> None:
    assert set(BAD) == {field.name for field in dataclasses.fields(SamplingParams)}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"min_gen_len": 5, "max_gen_len": 4}, "min_gen_len=5 is more than max_gen_len=4"),
        ({"num_beams": 2, "n": 2}, "num_beams=2 with n=2"),
    ],
)
def test_contradictions(fields: dict, said: str) -> None:
    with pytest.raises(ParameterError, match=said):
        SamplingParams(**fields)


def test_the_limits_themselves_are_in_range() -> None:
    SamplingParams(
        temperature=0, top_p=1, min_p=1, seed=2**64 - 1, max_gen_len=0, top_k=0, n=1, logit_bias={0: -INF}, stop="x"
    )
    SamplingParams(top_p=1e-9, min_p=0, seed=0, min_gen_len=4, max_gen_len=4, presence_penalty=-2)


def test_an_integer_for_a_number_is_one_that_tensors_take() -> None:
    huge = 10**29
    names = ("temperature", "presence_penalty", "frequency_penalty", "repetition_penalty")
    params = SamplingParams(**dict.fromkeys(names, huge), top_p=1, logit_bias={5: huge})
    values = [*(getattr(params, name) for name in (*names, "top_p")), params.logit_bias[5]]
    assert set(map(type, values)) == {float} and torch.tensor(values)[0] == torch.tensor(1e29)


def test_defaults_are_metas() -> None:
    params = SamplingParams()
    assert (params.temperature, params.top_p, params.max_gen_len, params.logprobs) == (0.6, 0.9, None, False)
    assert params.plain
    assert (params.n, params.num_beams, params.stop, params.seed) == (1, 1, (), None)


@pytest.mark.parametrize("field", dataclasses.fields(SamplingParams), ids=lambda field: field.name)
def test_none_stands_for_the_default_of_every_field(field: dataclasses.Field) -> None:
    assert SamplingParams(**{field.name: None}) == SamplingParams()


def test_numbers_of_numpy_and_torch_are_as_good_as_pythons() -> None:
    """Whatever the field: alone, in a list, as an array, as a key or a value of the table."""
    expected = SamplingParams(
        temperature=0.5,
        top_k=7,
        seed=3,
        logprobs=True,
        stop_token_ids=[4, 5],
        bad_words=[[6, 7], [8]],
        logit_bias={9: 2.0},
    )
    for number, array in ((np.float32, np.array), (torch.tensor, torch.tensor)):
        whole = np.int64 if number is np.float32 else torch.tensor
        truth = np.bool_ if number is np.float32 else torch.tensor
        params = SamplingParams(
            temperature=number(0.5), top_k=whole(7), seed=whole(3), logprobs=truth(True), stop_token_ids=array([4, 5]),
            bad_words=[array([6, 7]), [whole(8)]], logit_bias={whole(9): number(2.0)},
        )  # fmt: skip
        assert params == expected and repr(params) == repr(expected)
    for wrong in ({"top_k": np.float64(7)}, {"n": np.bool_(True)}, {"stop_token_ids": torch.tensor([0.5])}):
        with pytest.raises(ParameterError, match=next(iter(wrong))):
            SamplingParams(**wrong)


def test_a_token_of_the_bias_may_be_spelled_as_json_spells_keys() -> None:
    assert SamplingParams(logit_bias={"5": 1, 7: 2}).logit_bias == {5: 1, 7: 2}
    with pytest.raises(ParameterError, match="logit_bias names token 5 twice"):
        SamplingParams(logit_bias={"5": 1, 5: 2})


def test_frozen_and_one_string_is_one_stop() -> None:
    params = SamplingParams(stop="User:", bad_words=[[1, 2]], stop_token_ids=[3])
    assert (params.stop, params.bad_words, params.stop_token_ids) == (("User:",), ((1, 2),), (3,))
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.top_p = 0.5
    bias = {1: 2.0}
    params = SamplingParams(logit_bias=bias)
    bias[1] = 99.0
    assert params.logit_bias == {1: 2.0}
