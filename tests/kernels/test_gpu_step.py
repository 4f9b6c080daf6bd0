"""Decode steps of one token on CUDA: our Triton kernels, interpreted on a CPU, against the reference."""

import importlib
from types import ModuleType

import pytest
import reference
import torch
from checkpoints import random_weights
from emulation import DEVICE, error, gpu, gpu_path
from ptx import PTX, bits_to

from llama import parallel
from llama.checkpoint.layout import format_of, stored_names
from llama.kernels import dispatch
from llama.model.step import Step
from llama.model.transformer import ModelArgs, Transformer
from llama.quantization.quantize import DEQUANTIZE, QUANTIZE

__all__ = ["gpu", "gpu_path"]


@pytest.mark.parametrize(("quantize", "shared"), [(None, 1), (None, 2), ("int8", 1), ("int4", 1)])
def test_steps_of_one_token_agree_with_the_reference(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, quantize: str | None, shared: int
) -> None:
    """Rows of weights in several parts, the last one not full. What is taken off each group costs some digits."""
    if DEVICE.type == "cpu":
        request.getfixturevalue("gpu_path")
    step = importlib.import_module("llama.kernels.gpu_step")
    monkeypatch.setattr(step, "SHAPES", dict.fromkeys((16, 8, 4), (8, 64, 4)))
    dtype, most = (torch.float32, 1e-3) if DEVICE.type == "cpu" else (torch.bfloat16, 0.05)
    params = {"dim": 96, "n_layers": 1, "n_heads": 4, "n_kv_heads": 4 // shared, "multiple_of": 32, "norm_eps": 1e-5}
    params |= {"ffn_dim_multiplier": 0.6}
    weights, tokens = random_weights({**params, "vocab_size": 45}), [1, 7, 40]
    model = model_of({**params, "vocab_size": 45}, weights, quantize, dtype)
    cache = model.new_cache(3, 20)
    for at, token in enumerate(tokens):
        one = Step.pack([(1, at, [token])], [0], DEVICE)
        assert dispatch.gpu_step(1, model, cache) is step.run
        found = model(one, cache)
    forms = {name: format_of(name, quantize) for name in weights}
    held = {n: DEQUANTIZE[forms[n]](*QUANTIZE[forms[n]](weights[n])) if forms[n] else weights[n] for n in weights}
    assert found.shape == (1, 45) and found.dtype == torch.float32
    assert error(found, reference.forward(held, params, tokens)[-1:]) < most


def model_of(params: dict, weights: dict[str, torch.Tensor], quantize: str | None, dtype: torch.dtype) -> Transformer:
    """A model with these weights on the device, as they are stored for CUDA."""
    parallel.initialize(DEVICE, 1)
    model = Transformer(ModelArgs(**params), weight_format=quantize)
    for name in [name for name, _ in model.named_parameters()]:
        owner, _, leaf = name.rpartition(".")
        module, weight = model.get_submodule(owner), torch.cat([weights[part] for part in stored_names(name)])
        if form := format_of(stored_names(name)[0], quantize):
            weight, scales = QUANTIZE[form](weight)
            module.scales = scales.to(DEVICE)
        else:
            weight = weight.to(dtype)
        setattr(module, leaf, torch.nn.Parameter(weight.to(DEVICE), requires_grad=False))
    return model.eval()


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_what_unpacks_weights_to_float32_is_exact(gpu: ModuleType, name: str) -> None:
    """The PTX of steps of one token, for every byte: the integer, and what is taken off its group."""
    step = importlib.import_module("llama.kernels.gpu_step")
    code = {"int8": step.INT8_TO_FLOAT32, "int4": step.INT4_TO_FLOAT32}[name].value
    for first in range(256):
        data = [first + 67 * i & 255 for i in range(4)]
        operand = {"int8": "$4", "int4": "$8"}[name]
        registers = PTX().run(code, {operand: int.from_bytes(bytes(data), "little")})
        found = [bits_to(torch.float32, registers[f"${i}"]).item() for i in range(int(operand[1]))]
        if name == "int8":
            expected = [(byte ^ 128) - 256 + 128 + step.BYTE.value for byte in data]
        else:
            low, high = [(byte & 15) - 8 for byte in data], [(byte >> 4) - 8 for byte in data]
            expected = [*(q + step.LOW.value for q in low), *(q + step.HIGH.value for q in high)]
        assert found == expected
