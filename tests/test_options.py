"""`RunOptions` is `Llama.build`'s parameters as an object: checked where it is made, and not changed after."""

import inspect
from dataclasses import MISSING, FrozenInstanceError, fields
from typing import Any

import numpy as np
import pytest
import torch

from llama import Llama
from llama.errors import ParameterError
from llama.options import RunOptions

SIZES = {"max_seq_len": 64, "max_batch_size": 2}


def test_its_fields_are_the_parameters_of_build() -> None:
    """Those beside the two paths: names, order, types and defaults."""
    parameters = dict(inspect.signature(Llama.build).parameters)
    for path in ("ckpt_dir", "tokenizer_path"):
        del parameters[path]
    assert [field.name for field in fields(RunOptions)] == list(parameters)
    for field in fields(RunOptions):
        parameter = parameters[field.name]
        default = inspect.Parameter.empty if field.default is MISSING else field.default
        declared = eval(field.type, {"torch": torch}) if isinstance(field.type, str) else field.type
        assert (declared, default) == (parameter.annotation, parameter.default), field.name


def test_build_passes_on_what_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each value in its own field."""
    given: dict[str, Any] = {
        "max_seq_len": 7, "max_batch_size": 3, "model_parallel_size": 1, "seed": 9, "device": "cpu",
        "dtype": torch.float16, "quantize": "int4", "kv_dtype": "fp8", "threads": 11, "compile": True, "verify": True,
        "batch_invariant": True, "max_step_tokens": 13, "chat_template": "none", "speculate": "lookup",
        "draft_tokens": 3, "max_memory": {"cpu": 17}, "device_map": "balanced",
    }  # fmt: skip
    seen: list[RunOptions] = []

    class Stop(Exception):
        pass

    def load(folder: object, tokenizer_path: object, options: RunOptions) -> None:
        seen.append(options)
        raise Stop

    monkeypatch.setattr("llama.generation.load", load)
    with pytest.raises(Stop):
        Llama.build("folder", "tokenizer.model", **given)
    assert {name: getattr(seen[0], name) for name in given} == given and len(given) == len(fields(RunOptions))


def test_numbers_may_be_those_of_arrays() -> None:
    options = RunOptions(max_seq_len=np.int64(64), max_batch_size=torch.tensor(2), seed=np.uint8(5), threads=np.int8(1))
    assert options == RunOptions(**SIZES, seed=5, threads=1) and type(options.max_seq_len) is int


def test_sizes_and_devices_have_one_form() -> None:
    options = RunOptions(max_memory={"cuda": "2kB", "cpu": np.int64(5)}, device_map={"layers.0": "cuda"})
    assert options.max_memory == {"cuda:0": 2000, "cpu": 5} and options.device_map == {"layers.0": "cuda:0"}
    assert options.places and RunOptions(device_map="auto").places and not RunOptions().places


def test_it_is_not_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        RunOptions(**SIZES).seed = 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"max_seq_len": 0}, "max_seq_len=0 is out of range: expected an integer, 1 or more"),
        ({"max_batch_size": True}, "max_batch_size=True is out of range: expected an integer, 1 or more"),
        ({"max_step_tokens": -1}, "max_step_tokens=-1 is out of range: expected an integer, 1 or more"),
        ({"threads": 1.5}, "threads=1.5 is out of range: expected an integer, 1 or more"),
        ({"seed": -1}, "seed=-1 is out of range: expected an integer from 0 to 2**64 - 1, or None"),
        ({"quantize": "int3"}, "quantize='int3' is not a format: use int8 or int4, or leave it out"),
        (
            {"speculate": 3},
            "speculate=3 is no way to draft tokens: use lookup or the folder of a smaller model, or leave it out",
        ),
        ({"draft_tokens": 0}, "draft_tokens=0 is out of range: expected an integer, 1 or more"),
        ({"draft_tokens": 16}, "draft_tokens=16 is out of range: expected an integer from 1 to 15"),
        (
            {"max_memory": {"cpu": "lots"}},
            "max_memory gives cpu 'lots': expected bytes, or a size such as 5GiB, 7GB or 500MB",
        ),
        ({"device_map": {"layers.0": "tpu"}}, "device_map has layers.0 on 'tpu': expected cuda:N, mps, cpu or disk"),
        (
            {"device_map": "auto", "model_parallel_size": 2},
            "model_parallel_size=2 splits a model over processes, device_map and max_memory lay it over the devices of"
            " one: leave one of them out",
        ),
        ({"kv_dtype": "int8"}, "kv_dtype='int8' is not a format of the KV cache: use fp8, or leave it out"),
    ],
)
def test_what_is_out_of_range_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ParameterError) as error:
        RunOptions(**{**SIZES, **change})
    assert str(error.value) == said
