"""The Triton kernels: interpreted on a CPU, and compiled for GPUs that are not there; on CUDA as they are."""

import os
import subprocess
import sys
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from conftest import ROOT
from emulation import DEVICE, HALF, TOLERANCE, error, gpu, gpu_path
from near_ties import FLOAT32, QUANTIZED, assert_agree, logits_of
from ptx import PTX, bits_to, to_bits

from llama import Llama, SamplingParams
from llama.engine.decode_loop import DecodeLoop, as_it_is
from llama.kernels import dispatch, ops
from llama.model.attention import gpu_kernels_for
from llama.model.kv_cache import FLOAT8, KVCache
from llama.model.rope import precompute_freqs_cis
from llama.quantization.quantize import DEQUANTIZE, QUANTIZE

__all__ = ["gpu", "gpu_path"]


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
def test_norm_and_silu_and_mul_agree(gpu: ModuleType, dtype: torch.dtype) -> None:
    for n, dim in ((1, 8), (3, 17), (5, 448)):
        x, residual, weight = (torch.randn(size).to(dtype) for size in ((n, dim), (n, dim), (dim,)))
        for added in (None, residual):
            on_gpu = gpu.add_norm(x.to(DEVICE), None if added is None else added.to(DEVICE), weight.to(DEVICE), 1e-5)
            plain = ops.add_norm(x.float(), None if added is None else added.float(), weight.float(), 1e-5)
            assert all(error(a, b) < TOLERANCE[dtype] for a, b in zip(on_gpu, plain, strict=True))
        both = torch.randn(n, 2 * dim).to(dtype) * 4
        assert error(gpu.silu_and_mul(both.to(DEVICE)), ops.silu_and_mul(both.float())) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("float8", [False, True])
def test_heads_after_rope_and_stored_ones_agree(gpu: ModuleType, dtype: torch.dtype, float8: bool) -> None:
    """Queries come back after RoPE, keys and values go to their places; nothing else of the cache changes.

    Of float8 the numbers are exact and the keys not rotated, but for one that is cut to its range: Triton's interpreter
    rounds 1.97 to 1 in it.
    """
    if float8 and DEVICE.type == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no float8")
    for n, n_heads, kv_heads, head_dim in ((1, 2, 1, 8), (5, 6, 2, 24)):
        heads = (torch.randn(n, n_heads + 2 * kv_heads, head_dim) * 3).to(FLOAT8).to(dtype)
        heads[0, -1] = 2000
        positions = torch.randint(0, 1 if float8 else 90, (n,))
        freqs_cis = precompute_freqs_cis(head_dim, 90, 10000.0, torch.device("cpu"))[positions][:, None]
        rows = torch.randperm(3 * 20)[:n]
        caches = [KVCache(1, kv_heads, 3, 20, head_dim, dtype, torch.device("cpu"), float8) for _ in range(2)]
        for cache in caches:
            cache.keys[0].fill_(7)
            cache.values[0].fill_(7)
        plain = ops.rope_and_store(heads, freqs_cis, caches[0].keys[0], caches[0].values[0], rows, n_heads)
        own = [tensor.to(DEVICE) for tensor in (heads, freqs_cis, caches[1].keys[0], caches[1].values[0], rows)]
        q = gpu.rope_and_store(*own, n_heads)
        assert error(q, plain) < TOLERANCE[dtype]
        for found, expected in zip(own[2:4], (caches[0].keys[0], caches[0].values[0]), strict=True):
            tolerance = 0 if float8 else TOLERANCE[dtype]
            torch.testing.assert_close(found.cpu().float(), expected.float(), rtol=tolerance, atol=tolerance)


def stored_by_pytorch(*args: object) -> torch.Tensor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "gpu_kernels", lambda x: None)
        return ops.rope_and_store(*args)


@pytest.mark.parametrize("options", [{}, {"quantize": "int8"}, {"quantize": "int4"}, {"kv_dtype": "fp8"}], ids=str)
def test_a_model_computes_the_same_through_them(
    build: Callable[..., Llama], gpu: ModuleType, gpu_path: None, monkeypatch: pytest.MonkeyPatch, options: dict
) -> None:
    """In float32, prompts, single tokens, and decode steps ahead of the host, against PyTorch's operators."""
    prompts = [[1, *range(5, 75)], [1, 7]]
    params = SamplingParams(temperature=0, max_gen_len=4, logprobs=True)
    if "kv_dtype" in options:  # see above
        monkeypatch.setattr(gpu, "rope_and_store", stored_by_pytorch)
    llama = build(**options)
    assert gpu_kernels_for(llama.engine.cache)
    found = llama.generate(prompts, params=params)
    llama.engine.loop = DecodeLoop(llama.model, llama.engine.cache, capture=as_it_is)
    ahead = llama.generate(prompts, params=SamplingParams(temperature=0, max_gen_len=4))[0]
    monkeypatch.undo()
    monkeypatch.setattr(dispatch, "load", lambda: (None, ""))  # so that activations are not rounded to int8
    plain = build(**options)
    expected = plain.generate(prompts, params=params)
    tolerance = QUANTIZED if "kv_dtype" in options else FLOAT32
    agreed = assert_agree(found[0], expected[0], prompts, logits_of(plain), tolerance=tolerance)
    for n, own, other in zip(agreed, found[1], expected[1], strict=True):
        assert own[:n] == pytest.approx(other[:n], abs=tolerance)
    assert_agree(ahead, expected[0], prompts, logits_of(plain), tolerance=tolerance)


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
            gpu.rope_and_store(heads, torch.randn(2, 1, head_dim // 2, 2), cache, cache, zeros, 8)
    x = torch.randn(3, 4096).to(dtype)
    gpu.add_norm(x, None, x[0], 1e-5)
    gpu.add_norm(x, x, x[0], 1e-5)
    gpu.silu_and_mul(x)
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
            layers=[layer], norm=norm, output=matrix(32000, 4096, form), device="",
        )
        cache = SimpleNamespace(keys=[torch.zeros(32, 3, 4096, 128, dtype=dtype)], max_seq_len=4096)
        cache.values = cache.keys
        step = SimpleNamespace(tokens=zeros[:1], slots=zeros[:1], positions=zeros[:1])
        gpu_step.run(model, torch.zeros(9, 64, 2), step, cache)
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
    of_one_token = {"_heads_kernel", "_swiglu_kernel", "_sum_kernel"} if capability != 89 else set()
    assert {name for name, _ in seen} == of_one_token | {
        "_product_kernel", "_add_kernel", "_dequantize_kernel", "_attend_kernel", "_join_kernel", "_norm_kernel",
        "_silu_and_mul_kernel", "_rope_kernel", "_draw_kernel",
    }  # fmt: skip
    assert max(int(shared) for _, shared in seen) <= 99 * 1024
