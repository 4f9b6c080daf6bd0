"""The Triton kernels: interpreted on a CPU, and compiled for GPUs that are not there; on CUDA as they are."""

import importlib
import os
import re
import subprocess
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace

import pytest
import reference
import torch
from checkpoints import random_weights
from conftest import ROOT
from emulation import flash_kernel, gpu, gpu_path
from near_ties import FLOAT32, QUANTIZED, assert_agree, logits_of
from reference import naive

from llama import Llama, SamplingParams, parallel
from llama.checkpoint.layout import format_of, sources
from llama.engine import sampling
from llama.engine.decode_loop import DecodeLoop, as_it_is
from llama.kernels import dispatch, ops
from llama.model.attention import attention, on_device, plan
from llama.model.kv_cache import FLOAT8, KVCache
from llama.model.step import Step
from llama.model.transformer import ModelArgs, Transformer, rope_table
from llama.quantization.quantize import DEQUANTIZE, QUANTIZE

__all__ = ["flash_kernel", "gpu", "gpu_path"]
DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
HALF = [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.cuda)]
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
FILTERS = [  # top_p, min_p, top_k
    (1.0, 0.0, 0), (0.9, 0.0, 0), (0.3, 0.0, 0), (0.0, 0.0, 0), (0.999, 0.0, 0), (1.0, 0.05, 0), (0.95, 1.0, 0),
    (1.0, 0.0, 1), (1.0, 0.0, 40), (0.5, 0.0, 7), (0.8, 0.02, 300), (0.99, 0.0, 90000),
]  # fmt: skip


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.cpu().double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_products_agree_with_plain_arithmetic(gpu: ModuleType, name: str, dtype: torch.dtype) -> None:
    """Odd numbers of rows and outputs, one group of inputs and many, whole tiles and parts of them."""
    torch.manual_seed(0)  # of other numbers a single sum may nearly cancel, and its error is relative to what is left
    for outputs, inputs, n in ((1, 32, 1), (16, 256, 2), (40, 96, 17), (33, 288, 64), (20, 544, 5)):
        q, scales = QUANTIZE[name](torch.randn(outputs, inputs))
        x = torch.randn(n, inputs).to(dtype)
        y = gpu.product(x.to(DEVICE), q.to(DEVICE), scales.to(DEVICE), outputs)
        assert y.shape == (n, outputs) and y.dtype == dtype
        assert error(y, x.double() @ DEQUANTIZE[name](q, scales).double().T) < TOLERANCE[dtype], (outputs, inputs, n)


@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_dequantised_weights_are_those_of_plain_arithmetic(gpu: ModuleType, name: str, dtype: torch.dtype) -> None:
    for outputs, inputs in ((1, 32), (16, 256), (35, 544)):
        q, scales = QUANTIZE[name](torch.randn(outputs, inputs))
        found = gpu.dequantize(q.to(DEVICE), scales.to(DEVICE), dtype).cpu()
        expected = DEQUANTIZE[name](q, scales)
        assert found.shape == expected.shape and found.dtype == dtype
        torch.testing.assert_close(found.float(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] / 4)


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_what_is_not_finite_stays_in_its_row(gpu: ModuleType, name: str) -> None:
    q, scales = (t.to(DEVICE) for t in QUANTIZE[name](torch.randn(20, 64)))
    x = torch.randn(3, 64).half().to(DEVICE)
    x[1, 40] = torch.nan
    y = gpu.product(x, q, scales, 20)
    assert y[1].isnan().all() and y[[0, 2]].isfinite().all()


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(("kv_heads", "group", "head_dim"), [(2, 1, 24), (1, 8, 64), (2, 3, 128)])
@pytest.mark.parametrize("float8", [False, True])
def test_attention_agrees_with_plain_arithmetic(
    gpu: ModuleType, dtype: torch.dtype, kv_heads: int, group: int, head_dim: int, float8: bool
) -> None:
    """Lengths of one position, of a whole split, of several and a part; slots in any order, and empty ones between."""
    if float8 and DEVICE.type == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no float8")
    cache = KVCache(1, kv_heads, 4, 600, head_dim, dtype, torch.device("cpu"), float8)
    for tensor in (cache.keys[0], cache.values[0]):
        tensor.copy_(torch.randn(tensor.shape))
    slots, positions = torch.tensor([3, 0, 2]), torch.tensor([0, 255, 580])
    q = torch.randn(3, kv_heads * group, head_dim).to(dtype)
    found = gpu.attend(*(t.to(DEVICE) for t in (q, cache.keys[0], cache.values[0], slots, positions)))
    for i, (slot, position) in enumerate(zip(slots.tolist(), positions.tolist(), strict=True)):
        keys, values = (t.float().transpose(0, 1) for t in cache.view(0, slot, position + 1))
        assert error(found[i : i + 1], naive(q[i : i + 1].float(), keys, values, position)) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_norm_and_gate_agree(gpu: ModuleType, dtype: torch.dtype) -> None:
    for n, dim in ((1, 8), (3, 17), (5, 448)):
        x, more, weight = (torch.randn(size).to(dtype) for size in ((n, dim), (n, dim), (dim,)))
        for added in (None, more):
            on_gpu = gpu.add_norm(x.to(DEVICE), None if added is None else added.to(DEVICE), weight.to(DEVICE), 1e-5)
            plain = ops.add_norm(x.float(), None if added is None else added.float(), weight.float(), 1e-5)
            assert all(error(a, b) < TOLERANCE[dtype] for a, b in zip(on_gpu, plain, strict=True))
        both = torch.randn(n, 2 * dim).to(dtype) * 4
        assert error(gpu.gate(both.to(DEVICE)), ops.gate(both.float())) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("float8", [False, True])
def test_turned_heads_and_stored_ones_agree(gpu: ModuleType, dtype: torch.dtype, float8: bool) -> None:
    """Queries come back turned; keys are turned into their places, values copied; nothing else of the cache changes.

    Of float8 the numbers are exact and the keys not turned, but for one that is cut to its range: Triton's interpreter
    rounds 1.97 to 1 in it.
    """
    if float8 and DEVICE.type == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no float8")
    for n, n_heads, kv_heads, head_dim in ((1, 2, 1, 8), (5, 6, 2, 24)):
        heads = (torch.randn(n, n_heads + 2 * kv_heads, head_dim) * 3).to(FLOAT8).to(dtype)
        heads[0, -1] = 2000
        positions = torch.randint(0, 1 if float8 else 90, (n,))
        turns = rope_table(head_dim, 90, 10000.0, torch.device("cpu"))[positions][:, None]
        rows = torch.randperm(3 * 20)[:n]
        caches = [KVCache(1, kv_heads, 3, 20, head_dim, dtype, torch.device("cpu"), float8) for _ in range(2)]
        for cache in caches:
            cache.keys[0].fill_(7)
            cache.values[0].fill_(7)
        plain = ops.turn_and_store(heads, turns, caches[0].keys[0], caches[0].values[0], rows, n_heads)
        own = [tensor.to(DEVICE) for tensor in (heads, turns, caches[1].keys[0], caches[1].values[0], rows)]
        q = gpu.turn_and_store(*own, n_heads)
        assert error(q, plain) < TOLERANCE[dtype]
        for found, expected in zip(own[2:4], (caches[0].keys[0], caches[0].values[0]), strict=True):
            tolerance = 0 if float8 else TOLERANCE[dtype]
            torch.testing.assert_close(found.cpu().float(), expected.float(), rtol=tolerance, atol=tolerance)


def stored_by_pytorch(*args: object) -> torch.Tensor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "gpu_kernels", lambda x: None)
        return ops.turn_and_store(*args)


@pytest.mark.parametrize("options", [{}, {"quantize": "int8"}, {"quantize": "int4"}, {"kv_dtype": "fp8"}], ids=str)
def test_a_model_computes_the_same_through_them(
    build: Callable[..., Llama], gpu: ModuleType, gpu_path: None, monkeypatch: pytest.MonkeyPatch, options: dict
) -> None:
    """In float32, prompts, single tokens, and decode steps ahead of the host, against PyTorch's operators."""
    prompts = [[1, *range(5, 75)], [1, 7]]
    params = SamplingParams(temperature=0, max_gen_len=5, logprobs=True)
    if "kv_dtype" in options:  # see above
        monkeypatch.setattr(gpu, "turn_and_store", stored_by_pytorch)
    found = build(**options).generate(prompts, params=params)
    looped = build(**options)
    assert on_device(looped.engine.cache)
    looped.engine.loop = DecodeLoop(looped.model, looped.engine.cache, capture=as_it_is)
    ahead = looped.generate(prompts, params=SamplingParams(temperature=0, max_gen_len=5))[0]
    monkeypatch.undo()
    monkeypatch.setattr(dispatch, "load", lambda: (None, ""))  # so that activations are not rounded to int8
    plain = build(**options)
    expected = plain.generate(prompts, params=params)
    tolerance = QUANTIZED if "kv_dtype" in options else FLOAT32
    agreed = assert_agree(found[0], expected[0], prompts, logits_of(plain), tolerance=tolerance)
    for n, own, other in zip(agreed, found[1], expected[1], strict=True):
        assert own[:n] == pytest.approx(other[:n], abs=tolerance)
    assert_agree(ahead, expected[0], prompts, logits_of(plain), tolerance=tolerance)


@pytest.mark.parametrize(("quantize", "shared"), [(None, 1), (None, 2), ("int8", 1), ("int4", 1)])
def test_steps_of_one_token_agree_with_the_reference(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, quantize: str | None, shared: int
) -> None:
    """Rows of weights in several parts, the last one not full. What is taken off each group costs some digits."""
    if DEVICE.type == "cpu":
        request.getfixturevalue("gpu_path")
    step = importlib.import_module("llama.kernels.gpu_step")
    monkeypatch.setattr(step, "SHAPES", {16: (4, 64, 4), 8: (8, 64, 4), 4: (8, 64, 4)})
    dtype, most = (torch.float32, 1e-3) if DEVICE.type == "cpu" else (torch.bfloat16, 0.05)
    params = {"dim": 96, "n_layers": 1, "n_heads": 4, "n_kv_heads": 4 // shared, "multiple_of": 32, "norm_eps": 1e-5}
    weights, tokens = random_weights({**params, "vocab_size": 45}), [1, 7, 40]
    model = model_of({**params, "vocab_size": 45}, weights, quantize, dtype)
    cache = model.new_cache(3, 20)
    for at, token in enumerate(tokens):
        one = Step.pack([(1, at, [token])], [0], DEVICE)
        assert dispatch.gpu_step(1, model, cache) is step
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
        module, weight = model.get_submodule(owner), torch.cat([weights[part] for part in sources(name)])
        if form := format_of(sources(name)[0], quantize):
            weight, scales = QUANTIZE[form](weight)
            module.scales = scales.to(DEVICE)
        else:
            weight = weight.to(dtype)
        setattr(module, leaf, torch.nn.Parameter(weight.to(DEVICE), requires_grad=False))
    return model.eval()


@pytest.mark.parametrize("float8", [False, True])
def test_single_tokens_among_prompts_go_through_them(gpu_path: None, float8: bool) -> None:
    """Where the flash kernel cannot read the cache: prompts are left to PyTorch, single tokens go in one call."""
    cache = KVCache(1, 2, 6, 40, 16, torch.float16, torch.device("cpu"), float8)
    for tensor in (cache.keys[0], cache.values[0]):
        tensor.copy_(torch.randn(tensor.shape))
    spans = [(4, 9, 1), (0, 0, 5), (2, 30, 1), (5, 3, 4), (1, 0, 1)]
    step = Step.pack([(slot, start, [5] * n) for slot, start, n in spans], [], torch.device("cpu"))
    how = plan(step, cache)
    assert [item.span.slot for item in how.spans] == [0, 5]
    assert how.singles.rows.tolist() == [0, 6, 11] and how.singles.slots.tolist() == [4, 2, 1]
    q = torch.randn(len(step.tokens), 4, 16).half()
    found = attention(q, cache, 0, how)
    for span in step.spans:
        keys, values = (t.float().transpose(0, 1) for t in cache.view(0, span.slot, span.length))
        assert error(found[span.rows], naive(q[span.rows].float(), keys, values, span.start)) < 2e-3


@pytest.mark.parametrize("vocab", [1, 30, 700])
@pytest.mark.parametrize("shape", ["peaked", "flat", "with ties", "all alike", "half banned", "not finite"])
def test_tokens_are_drawn_as_from_a_sorted_row(
    gpu: ModuleType, vocab: int, shape: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exactly, whatever the filters; and always a token of the vocabulary."""
    kernel = importlib.import_module("llama.kernels.gpu_sampling")
    monkeypatch.setattr(kernel, "BLOCK", 256)
    logits = torch.randn(len(FILTERS), vocab) * {"peaked": 6, "all alike": 0}.get(shape, 1)
    if shape == "with ties":
        logits = logits.round()
    if shape == "half banned":
        logits[:, 1::2] = -torch.inf
    if shape == "not finite":
        logits[:, vocab // 2] = torch.nan
    probs = torch.softmax(logits, -1).to(DEVICE)
    for noise in (0.37, 1 - 2**-24):
        *columns, top_k = (torch.tensor(column) for column in zip(*FILTERS, strict=True))
        numbers = torch.stack([torch.ones(len(FILTERS)), *columns, torch.full((len(FILTERS),), noise)]).to(DEVICE)
        tokens = kernel.draw(probs, numbers, top_k.to(DEVICE))
        assert ((tokens >= 0) & (tokens < vocab)).all()
        if shape != "not finite":
            assert tokens.equal(sampling._draw_sorted(probs, numbers, top_k.to(DEVICE)))


def test_top_p_is_of_what_top_k_keeps(gpu: ModuleType) -> None:
    kernel = importlib.import_module("llama.kernels.gpu_sampling")
    probs = torch.tensor([[0.3, 0.5, 0.2]] * 2).to(DEVICE)
    numbers = torch.tensor([[1.0, 1.0], [0.65, 0.6], [0.0, 0.0], [0.1, 0.1]]).to(DEVICE)
    assert kernel.draw(probs, numbers, torch.tensor([2, 2]).to(DEVICE)).tolist() == [0, 1]


@pytest.mark.cuda
def test_tokens_are_drawn_as_on_a_cpu() -> None:
    """All of sampling, from logits on: but for draws that fall where two tokens meet."""
    logits, numbers = torch.randn(512, 32000) * 3, torch.rand(4, 512)
    numbers[0] = torch.tensor([0.0, 0.6, 1.0, 1.5] * 128)
    numbers[2] *= 0.1
    top_k = torch.tensor([0, 0, 40, 5000] * 128)
    found = sampling.sample_all(logits.cuda(), numbers.cuda(), top_k.cuda()).cpu()
    assert (found != sampling.sample_all(logits, numbers, top_k)).sum() <= 2


class PTX:
    """Runs a list of the few instructions that weights are unpacked with; registers are integers."""

    def run(self, code: str, registers: dict[str, int]) -> dict[str, int]:
        self.registers = dict(registers)
        for instruction in re.sub(r"^{ .reg[^;]*;|}$", "", code.strip()).split(";"):
            if words := instruction.replace(",", " ").split():
                name, to, *operands = words
                self.registers[to] = getattr(self, name.replace(".", "_"))(*map(self.value, operands))
        return self.registers

    def value(self, operand: str) -> int:
        return self.registers[operand] if operand in self.registers else int(operand, 0)

    def mov_b32(self, a: int) -> int:
        return a

    def shl_b32(self, a: int, by: int) -> int:
        return a << by & 0xFFFFFFFF

    def xor_b32(self, a: int, b: int) -> int:
        return a ^ b

    def shr_b32(self, a: int, n: int) -> int:
        return a >> n

    def lop3_b32(self, a: int, b: int, c: int, table: int) -> int:
        """Bit by bit what the table says of bits of a, b, c: its bit 4 a + 2 b + c."""
        bits = (table >> (4 * (a >> i & 1) + 2 * (b >> i & 1) + (c >> i & 1)) & 1 for i in range(32))
        return sum(bit << i for i, bit in enumerate(bits))

    def prmt_b32(self, a: int, b: int, chosen: int) -> int:
        """Byte i is that byte of b and a together which nibble i of `chosen` names."""
        both = a.to_bytes(4, "little") + b.to_bytes(4, "little")
        assert all(nibble < 8 for nibble in (chosen >> 4 * i & 15 for i in range(4)))
        return int.from_bytes(bytes(both[chosen >> 4 * i & 15] for i in range(4)), "little")

    def fma_rn_f32(self, a: int, b: int, c: int) -> int:
        x, y, z = (bits_to(torch.float32, n).double() for n in (a, b, c))
        return to_bits((x * y + z).float())

    def cvt_rn_bf16x2_f32(self, high: int, low: int) -> int:
        return to_bits(bits_to(torch.float32, low).bfloat16()) | to_bits(bits_to(torch.float32, high).bfloat16()) << 16

    def fma_rn_bf16x2(self, *operands: int) -> int:
        return self.halves(torch.bfloat16, *operands)

    def fma_rn_f16x2(self, *operands: int) -> int:
        return self.halves(torch.float16, *operands)

    def mul_f16x2(self, a: int, b: int) -> int:
        return self.halves(torch.float16, a, b, 0x80008000)

    def halves(self, dtype: torch.dtype, *operands: int) -> int:
        found = 0
        for shift in (0, 16):
            x, y, z = (bits_to(dtype, n >> shift & 0xFFFF).double() for n in operands)
            found |= to_bits((x * y + z).to(dtype)) << shift
        return found


def bits_to(dtype: torch.dtype, bits: int) -> torch.Tensor:
    whole = torch.int32 if dtype.itemsize == 4 else torch.int16
    size = 1 << 8 * dtype.itemsize
    return torch.tensor(bits - size if bits >= size // 2 else bits, dtype=whole).view(dtype)


def to_bits(number: torch.Tensor) -> int:
    whole = torch.int32 if number.dtype.itemsize == 4 else torch.int16
    return number.view(whole).item() % (1 << 8 * number.dtype.itemsize)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["int8", "int4"])
def test_what_unpacks_weights_gives_every_integer_times_its_scale(
    gpu: ModuleType, name: str, dtype: torch.dtype
) -> None:
    """The PTX that the interpreter cannot run, for every byte: what rounding once gives, but for 2⁻⁸ of a scale."""
    code = {
        ("int8", torch.bfloat16): gpu.INT8_TO_BFLOAT16, ("int8", torch.float16): gpu.INT8_TO_FLOAT16,
        ("int4", torch.bfloat16): gpu.INT4_TO_BFLOAT16, ("int4", torch.float16): gpu.INT4_TO_FLOAT16,
    }[name, dtype].value  # fmt: skip
    in_float32 = name == "int8" and dtype == torch.bfloat16
    for first in range(0, 256, 4):
        data = [first + i * 67 & 255 for i in range(4)] if first % 8 else [first, first + 1, first + 2, first + 3]
        scale = (torch.rand(()) * 0.1 - 0.05).half()
        kept = scale.float() if in_float32 else scale.to(dtype)
        registers = {"$4" if name == "int4" else "$2": int.from_bytes(bytes(data), "little")}
        pair = to_bits(kept) if in_float32 else to_bits(kept) * 0x10001
        for i, place in enumerate(range(3, 7) if in_float32 else (5, 6) if name == "int4" else (3, 4)):
            registers[f"${place}"] = pair
            if in_float32:
                registers[f"${7 + i}"] = to_bits(kept * -32896.0)
        registers = PTX().run(code, registers)
        found = [
            bits_to(dtype, registers[f"${i // 2}"] >> 16 * (i % 2) & 0xFFFF) for i in range(8 if name == "int4" else 4)
        ]
        if name == "int8":
            integers = [byte - 256 if byte > 127 else byte for byte in data]
        else:
            integers = [(byte & 15) - 8 for byte in data] + [(byte >> 4) - 8 for byte in data]
        for number, integer in zip(found, integers, strict=True):
            exact = integer * kept.double()
            if in_float32:
                assert abs(number.double() - exact) <= abs(exact) * 2**-8 + abs(kept) * 2**-8
            else:
                assert number.equal(exact.to(dtype)), (integer, kept)


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


COMPILE = """
import sys, torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

class NoGPU:
    def get_current_target(self): return GPUTarget("cuda", int(sys.argv[1]), 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device=None): return 0

launch = JITFunction.run
def compile_only(self, *args, warmup, **options):
    kernel = launch(self, *args, warmup=True, **options)
    assert kernel.asm["cubin"]
    print(self.fn.__name__, kernel.metadata.shared)
JITFunction.run = compile_only
driver.set_active(NoGPU())

from llama.kernels import gpu
from llama.quantization.quantize import QUANTIZE
zeros = torch.zeros(2, dtype=torch.int64)
for dtype in (torch.bfloat16, torch.float16):
    for form in ("int8", "int4"):
        q, scales = QUANTIZE[form](torch.randn(64, 256))
        for n in (3, 16, 32, 64):
            gpu.product(torch.randn(n, 256).to(dtype), q, scales, 64)
        gpu.dequantize(q, scales, dtype)
    for kept in (dtype, torch.float8_e4m3fn) if int(sys.argv[1]) >= 89 else (dtype,):
        for head_dim, kv_heads in ((128, 8), (128, 1), (24, 2)):
            cache = torch.zeros(kv_heads, 3, 4096, head_dim, dtype=kept)
            gpu.attend(torch.randn(2, 8, head_dim).to(dtype), cache, cache, zeros, zeros)
            heads = torch.randn(2, 8 + 2 * kv_heads, head_dim).to(dtype)
            gpu.turn_and_store(heads, torch.randn(2, 1, head_dim // 2, 2), cache, cache, zeros, 8)
    x = torch.randn(3, 4096).to(dtype)
    gpu.add_norm(x, None, x[0], 1e-5)
    gpu.add_norm(x, x, x[0], 1e-5)
    gpu.gate(x)
from types import SimpleNamespace
from llama.kernels import gpu_step
gpu_step._early = lambda device: int(sys.argv[1]) >= 90

def matrix(outputs, inputs, form):
    weight, scales = QUANTIZE[form](torch.randn(64, 256)) if form else (torch.zeros(64, 256, dtype=dtype), None)
    return SimpleNamespace(weight=weight, scales=scales, in_features=inputs, out_features=outputs)

for dtype, forms in ((torch.bfloat16, (None, "int8", "int4")), (torch.float16, (None,))):
    for form in forms if sys.argv[1] != "89" else ():
        norm = SimpleNamespace(weight=torch.ones(4096, dtype=dtype))
        layer = SimpleNamespace(
            attention_norm=norm, ffn_norm=norm,
            attention=SimpleNamespace(n_heads=32, n_kv_heads=32, head_dim=128, wqkv=matrix(12288, 4096, form),
                                      wo=matrix(4096, 4096, form)),
            feed_forward=SimpleNamespace(w13=matrix(22016, 4096, form), w2=matrix(4096, 11008, form)),
        )
        model = SimpleNamespace(
            tok_embeddings=lambda tokens: torch.zeros(1, 4096, dtype=dtype), params=SimpleNamespace(norm_eps=1e-5),
            layers=[layer], norm=norm, output=matrix(32000, 4096, form), rope=torch.zeros(9, 64, 2), device="",
        )
        cache = SimpleNamespace(keys=[torch.zeros(32, 3, 4096, 128, dtype=dtype)], max_seq_len=4096)
        cache.values = cache.keys
        gpu_step.run(model, SimpleNamespace(tokens=zeros[:1], slots=zeros[:1], positions=zeros[:1]), cache)
from llama.kernels.gpu_sampling import draw
for vocab in (32000, 32016, 517):
    draw(torch.rand(3, vocab), torch.rand(4, 8)[:, :3], torch.zeros(3, dtype=torch.int64))
"""


@pytest.mark.parametrize("capability", [80, 89, 90])
def test_every_kernel_compiles(capability: int) -> None:
    """To machine code of Ampere, Ada and Hopper, as it would be launched; with memory that their cores have.

    Steps of one token have nothing of Ada's own.
    """
    if missing := dispatch.no_triton():
        pytest.skip(missing)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    words = [sys.executable, "-W", "ignore", "-c", COMPILE, str(capability)]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    seen = [line.split() for line in done.stdout.splitlines()]
    of_one_token = {"_heads_kernel", "_gated_kernel", "_sum_kernel"} if capability != 89 else set()
    assert {name for name, _ in seen} == of_one_token | {
        "_product_kernel", "_add_kernel", "_dequantize_kernel", "_attend_kernel", "_join_kernel", "_norm_kernel",
        "_gate_kernel", "_turn_kernel", "_draw_kernel",
    }  # fmt: skip
    assert max(int(shared) for _, shared in seen) <= 99 * 1024


def test_where_they_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA, in 16 bits, where Triton can compile and launch them; what is missing is said in one line."""

    class OnCUDA:
        device, dtype = torch.device("cuda", 0), torch.bfloat16

    kernels = object()
    with monkeypatch.context() as patch:
        patch.setattr(dispatch, "load_gpu", lambda device: kernels)
        assert dispatch.gpu_kernels(OnCUDA()) is kernels
        assert dispatch.gpu_kernels(torch.empty(0, dtype=torch.bfloat16)) is None
        patch.setattr(OnCUDA, "dtype", torch.float32)
        assert dispatch.gpu_kernels(OnCUDA()) is None

    def why(missing: str) -> str:
        return f"no compiled kernels ({missing}): PyTorch's operators are used, which are slower"

    launched = []
    monkeypatch.setattr(dispatch, "no_triton", dispatch.no_triton.__wrapped__)
    monkeypatch.setattr(dispatch, "no_gpu", dispatch.no_gpu.__wrapped__)
    monkeypatch.setattr(dispatch, "_gpu", lambda: SimpleNamespace(gate=launched.append))
    monkeypatch.setattr(torch, "zeros", lambda *size, device, dtype: device)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__="3.10.0+git1"))
    assert dispatch.why_not(OnCUDA.device) is None and launched == [OnCUDA.device]

    def cannot_launch(x: object) -> None:
        raise RuntimeError("Failed to find C compiler.\nmore about it")

    monkeypatch.setattr(dispatch, "_gpu", lambda: SimpleNamespace(gate=cannot_launch))
    assert dispatch.load_gpu(OnCUDA.device) is None
    assert dispatch.why_not(OnCUDA.device) == why("RuntimeError: Failed to find C compiler.")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert dispatch.why_not(OnCUDA.device) == why("compute capability 7.5 is less than 8.0")
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__="3.2.0"))
    assert dispatch.why_not(OnCUDA.device) == why("Triton 3.2.0 is older than 3.5")
    monkeypatch.setitem(sys.modules, "triton", None)
    assert dispatch.why_not(OnCUDA.device) == why("Triton is not installed")
    monkeypatch.setenv("LLAMA_KERNELS", "none")
    assert dispatch.why_not(OnCUDA.device) == why("LLAMA_KERNELS=none") and dispatch.load_gpu(OnCUDA.device) is None
    assert dispatch.why_not(torch.device("mps")) is None
