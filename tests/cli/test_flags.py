"""The shared flags are those of `Llama.build` and of `SamplingParams`: same names, same types, same defaults."""

import inspect
from dataclasses import MISSING, fields
from typing import get_args

import pytest

from llama import Llama, SamplingParams
from llama.cli.flags import MODEL, SAMPLING, sampling_params
from llama.errors import ParameterError
from llama.paths import FilePath

OWN = {"max_batch_size": (int | None, None)}  # a command decides by what it is given
PATHS = {"ckpt_dir", "tokenizer_path"}  # may be left out: there are the environment and the demo
DEFAULTS = {name: flag.default for name, flag in SAMPLING.items()}


def test_every_parameter_of_build_is_a_flag() -> None:
    parameters = inspect.signature(Llama.build).parameters
    assert list(MODEL) == list(parameters)
    for name, flag in MODEL.items():
        if name in PATHS:
            assert (flag.type, flag.default) == (FilePath | None, None)
        elif name in OWN:
            assert (flag.type, flag.default) == OWN[name]
        elif name in ("device", "dtype"):
            assert flag.type == str | None and set(get_args(flag.type)) <= set(get_args(parameters[name].annotation))
            assert flag.default is parameters[name].default is None
        else:
            assert (flag.type, flag.default) == (parameters[name].annotation, parameters[name].default)


def test_every_sampling_field_is_a_flag() -> None:
    """But the seed: that of a command is build's, from which each request's is derived."""
    found = {field.name: field for field in fields(SamplingParams) if field.name != "seed"}
    assert list(SAMPLING) == list(found) and "seed" in MODEL
    for name, flag in SAMPLING.items():
        field = found[name]
        assert flag.type == (FilePath | None if name in ("json_schema", "grammar") else field.type)
        assert flag.default == (field.default_factory() if field.default is MISSING else field.default)


def test_every_flag_is_explained_in_a_line() -> None:
    for flag in (MODEL | SAMPLING).values():
        assert flag.help.endswith(".") and "\n" not in flag.help and 20 < len(flag.help) < 100


def test_the_flags_make_sampling_params() -> None:
    assert sampling_params(DEFAULTS) == SamplingParams()
    given = {"n": 2, "stop": ["a", "b"], "bad_words": [[1, 2]], "logit_bias": {5: -1.0}, "top_logprobs": 3}
    assert sampling_params({**DEFAULTS, **given}) == SamplingParams(**given)
    with pytest.raises(ParameterError, match="n='x' is out of range"):
        sampling_params({**DEFAULTS, "n": "x"})


@pytest.mark.parametrize("given", [5, (5,), [5]])
def test_a_lone_stop_token_stands_for_a_list(given: object) -> None:
    """--stop_token_ids=5 is read as a number."""
    assert sampling_params({**DEFAULTS, "stop_token_ids": given}).stop_token_ids == (5,)
