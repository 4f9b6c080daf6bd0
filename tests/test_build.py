"""`Llama.build`, and what callers can do wrong with it and with what it gives: one clear line each."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import random_weights, save
from conftest import DEMO
from near_ties import assert_agree, logits_of, refuse_near_ties

from llama import Llama, LlamaError, SamplingParams
from llama.errors import DeviceError, NumericalError, ParameterError, PromptError

Builder = Callable[..., Llama]


# ------------------------------------------------------------------------------------------------------ parameters


@pytest.mark.parametrize("name", ["max_seq_len", "max_batch_size", "max_step_tokens"])
@pytest.mark.parametrize("value", [0, -1, "4", 4.0, True])
def test_sizes_are_whole_numbers_from_1(build: Builder, name: str, value: Any) -> None:
    with pytest.raises(ParameterError, match=re.escape(f"{name}={value!r} is out of range: expected an integer, 1")):
        build(**{name: value})


@pytest.mark.parametrize("seed", [-1, 2**64, 1.5, "1"])
def test_a_seed_is_a_whole_number_of_64_bits(build: Builder, seed: Any) -> None:
    with pytest.raises(
        ParameterError, match=re.escape(f"seed={seed!r} is out of range: expected an integer from 0 to")
    ):
        build(seed=seed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16", "torch.bfloat16"])
def test_a_dtype_is_itself_or_its_name(build: Builder, dtype: Any) -> None:
    assert build(dtype=dtype).model.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", ["int8", "half", torch.float64, "", 16])
def test_an_unknown_dtype_is_refused_with_those_there_are(build: Builder, dtype: Any) -> None:
    with pytest.raises(ParameterError, match=r"dtype='.*' is not supported: use bfloat16, float16, float32"):
        build(dtype=dtype)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("dtype", "half"),
        ("device", "gpu"),
        ("quantize", "int3"),
        ("kv_dtype", "int8"),
        ("seed", -1),
        ("speculate", "guess"),
    ],
)
def test_an_option_that_is_none_is_said_before_any_file_is_looked_for(
    build: Builder, tmp_path: Path, option: str, value: Any
) -> None:
    with pytest.raises(ParameterError, match=f"^{option}={value!r} is "):
        build(tmp_path / "nowhere", **{option: value})


@pytest.mark.parametrize("device", ["gpu", "", "cpu:x", 1.5])
def test_a_device_that_is_none_is_refused(build: Builder, device: Any) -> None:
    with pytest.raises(ParameterError, match=re.escape(f"device={device!r} is not a device: use cuda, mps or cpu")):
        build(device=device)


@pytest.mark.parametrize("device", ["meta", "xpu"])
def test_a_device_that_is_not_supported_is_refused(build: Builder, device: str) -> None:
    with pytest.raises(ParameterError, match=f"device='{device}' is not supported: use cuda, mps or cpu"):
        build(device=device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
@pytest.mark.parametrize("device", ["cuda", "cuda:1", torch.device("cuda")])
def test_cuda_asked_for_and_absent(build: Builder, device: Any) -> None:
    with pytest.raises(DeviceError, match=r"device='cuda' was asked for, but .*: use device='cpu', or install a CUDA"):
        build(device=device)


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="this machine has MPS")
def test_mps_asked_for_and_absent(build: Builder) -> None:
    with pytest.raises(DeviceError, match="device='mps' was asked for, but this machine has no MPS device"):
        build(device="mps")


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_drafts_are_for_a_cpu(build: Builder, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llama.loading.choose_device", lambda asked: torch.device(asked))
    monkeypatch.setattr("llama.loading.check_kv_dtype", lambda kv_dtype, device: None)
    said = f"speculate='lookup' drafts tokens for a model on a CPU only, not on {device}: leave it out"
    with pytest.raises(DeviceError, match=re.escape(said)):
        build(device=device, speculate="lookup")


@pytest.mark.parametrize("size", [0, 2, -1, "2", 1.5])
def test_model_parallel_size_must_divide_the_processes(build: Builder, size: Any) -> None:
    with pytest.raises(ParameterError, match=re.escape(f"model_parallel_size={size}")):
        build(model_parallel_size=size)


def test_model_parallel_size_says_how_to_start_so_many(build: Builder) -> None:
    with pytest.raises(ParameterError, match="but 1 process is running: start torchrun with --nproc_per_node 2"):
        build(model_parallel_size=2)
    assert build(model_parallel_size=1).model


def test_every_error_of_a_caller_is_a_LlamaError_and_a_ValueError() -> None:
    for error in (DeviceError, NumericalError, ParameterError, PromptError):
        assert issubclass(error, LlamaError) and issubclass(error, ValueError)


# ------------------------------------------------------------------------------------------- what build says and does


def test_what_was_chosen_is_said_in_one_line(build: Builder, ckpt_dir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """On stderr, and nothing on stdout: folder, dtype, device, processes, sizes, seed, time."""
    build(max_seq_len=50, max_batch_size=3, dtype="bfloat16", seed=9)
    out, err = capfd.readouterr()
    line = (
        rf"llama: {ckpt_dir}, bfloat16 on cpu, 1 process, max_seq_len=50, max_batch_size=3, seed=9, loaded in [\d.]+ s"
    )
    assert out == "" and re.fullmatch(line + "\n", err)


def test_seed_none_takes_another_each_time_and_says_which(build: Builder, capfd: pytest.CaptureFixture[str]) -> None:
    seeds = [build(seed=None).seed for _ in range(2)]
    assert seeds[0] != seeds[1]
    assert re.findall(r"seed=(\d+)", capfd.readouterr().err) == [str(seed) for seed in seeds]


def test_a_seed_that_was_said_gives_the_same_text_again(build: Builder) -> None:
    first = build(seed=None)
    again = build(seed=first.seed)
    assert (
        again.text_completion(["a", "b"], 1.0, 1.0, 8)[1]["generation"]
        == first.text_completion(["a", "b"], 1.0, 1.0, 8)[1]["generation"]
    )


def test_ignored_parameters_are_said(
    build: Builder, small: dict, weights: dict, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    build(save(tmp_path, {**small, "model_name": "x", "use_scaled_rope": False}, weights))
    assert "llama: ignored in params.json: model_name, use_scaled_rope\n" in capfd.readouterr().err


def test_the_sizes_are_kept(build: Builder) -> None:
    """max_seq_len ends a row, prompt included; max_batch_size is how many slots there are."""
    llama = build(max_seq_len=12, max_batch_size=3)
    assert llama.engine.cache.slots == 3 and llama.engine.cache.max_seq_len == 12
    rows, _ = llama.generate([[1, 5, 9], [1, 7]], params=SamplingParams(min_gen_len=100))
    assert [len(row) for row in rows] == [12 - 3, 12 - 2]
    assert llama.model.params.max_seq_len == 12 and llama.model.params.max_batch_size == 3


def test_two_models_live_in_one_process(build: Builder, small: dict, tmp_path: Path) -> None:
    """Also of different checkpoints and sizes, used in turn: each as if it were alone."""
    other_params = {**small, "dim": 32, "n_heads": 4, "n_kv_heads": 2, "n_layers": 1}
    folder = save(tmp_path, other_params, random_weights(other_params, seed=5), 2)
    alone = [build().generate([[1, 5]], 6, 0)[0], build(folder).generate([[1, 5]], 6, 0)[0]]
    first, second = build(), build(folder)
    assert alone[0] != alone[1]
    for _ in range(2):
        assert first.generate([[1, 5]], 6, 0)[0] == alone[0]
        assert second.generate([[1, 5]], 6, 0)[0] == alone[1]


SOCKETS = """
import os, sys

def sockets():
    links = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{fd}"))
        except OSError:
            pass
    return sorted(link for link in links if link.startswith("socket:"))

before = sockets()
from llama import Llama
Llama.build(*sys.argv[1:3], 64, 2, device="cpu").text_completion(["a"], max_gen_len=2)
assert sockets() == before, (before, sockets())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_lone_process_opens_no_socket(ckpt_dir: Path) -> None:
    """A plain python run needs no port, so none is taken and no firewall asks."""
    command = [sys.executable, "-c", SOCKETS, str(ckpt_dir), str(DEMO / "tokenizer.model")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ----------------------------------------------------------------------------------------------------------- prompts


@pytest.fixture(scope="module")
def llama(build: Builder) -> Llama:
    return build(max_seq_len=32)


def test_no_prompts_give_no_results(llama: Llama) -> None:
    assert llama.text_completion([]) == [] and llama.chat_completion([]) == []
    assert llama.generate([], 4) == ([], None)
    assert llama.generate([], 4, logprobs=True)[0] == []


@pytest.mark.parametrize(
    ("prompts", "said"),
    [
        ("Once upon", "prompts is one string: give a list of prompts"),
        (["a", 7], "prompt 1 is int, not a string: 7"),
        ([None], "prompt 0 is NoneType, not a string"),
        (["a", b"b"], "prompt 1 is bytes, not a string"),
        (["a", ["b"]], "prompt 1 is list, not a string"),
    ],
)
def test_what_is_no_list_of_strings_is_refused(llama: Llama, prompts: Any, said: str) -> None:
    with pytest.raises(PromptError, match=f"^{re.escape(said)}"):
        llama.text_completion(prompts)
    assert llama.engine.idle


@pytest.mark.parametrize(
    ("prompts", "said"),
    [
        ([[1, 5], []], "prompt 1 has no tokens: begin it with the tokenizer's bos_id"),
        ([[1, -1]], "prompt 0 has token -1: expected ids from 0 to "),
        ([[1, 10**6]], "prompt 0 has token 1000000: expected ids from 0 to "),
        ([[1, 2.0]], "prompt 0 has token 2.0: expected ids from 0 to "),
        (["text"], "prompt 0 is str, not a list of tokens"),
        ([1, 5, 9], "prompt 0 is int, not a list of tokens"),
        ([[1, 5], None], "prompt 1 is NoneType, not a list of tokens"),
    ],
)
def test_what_are_no_prompts_of_tokens_is_refused(llama: Llama, prompts: Any, said: str) -> None:
    with pytest.raises(PromptError, match=f"^{re.escape(said)}"):
        llama.generate(prompts, 4)
    assert llama.engine.idle


@pytest.mark.parametrize("length", [32, 33, 100])
def test_a_prompt_that_leaves_no_room_is_refused_before_anything_runs(llama: Llama, length: int) -> None:
    """Its index, its length and max_seq_len are named; the prompts before it are not run either."""
    computed = llama.engine.computed_tokens
    said = f"prompt 2 has {length} tokens, which leaves no room to generate within max_seq_len=32: shorten it"
    with pytest.raises(PromptError, match=re.escape(said)):
        llama.generate([[1], [1, 5], [1] * length], 4)
    assert llama.engine.idle and llama.engine.computed_tokens == computed


def test_the_longest_prompt_leaves_room_for_one_token(llama: Llama) -> None:
    params = SamplingParams(temperature=0, logprobs=True, min_gen_len=4)
    tokens, logprobs = llama.generate([[1] + [5] * 30], echo=True, params=params)
    assert len(tokens[0]) == len(logprobs[0]) == 32


def test_a_long_text_is_named_by_its_length_in_tokens(llama: Llama) -> None:
    text = "and then " * 40
    n = len(llama.tokenizer.encode(text, bos=True, eos=False))
    with pytest.raises(PromptError, match=f"prompt 1 has {n} tokens, which leaves no room"):
        llama.text_completion(["a", text])
    with pytest.raises(PromptError, match=r"dialog 1 has \d+ tokens, which leaves no room"):
        llama.chat_completion([[{"role": "user", "content": c}] for c in ("a", text)])


# ------------------------------------------------------------------------------------------------------ broken weights


@pytest.fixture
def poisoned(build: Builder, small: dict, weights: dict, tmp_path: Path) -> Callable[[int], Llama]:
    """Build a model in which one token's embedding is NaN: what has it in its prompt gives NaN, all else is sound."""

    def poisoned(token: int) -> Llama:
        table = weights["tok_embeddings.weight"].clone()
        table[token] = torch.nan
        return build(save(tmp_path, small, {**weights, "tok_embeddings.weight": table}))

    return poisoned


def test_nan_logits_name_the_prompt_and_leave_the_engine_usable(
    build: Builder, poisoned: Callable[[int], Llama]
) -> None:
    llama, clean, sound = poisoned(300), [[1, 5, 9, 12], [1, 7]], build()
    expected, _ = sound.generate(clean, 6, 0)
    said = r"the model gave NaN or infinite logits for prompt 1: the weights are damaged .* or overflow in this dtype"
    with pytest.raises(NumericalError, match=said):
        llama.generate([clean[0], [1, 5, 300, 12], clean[1]], 6, 0)
    assert llama.engine.idle
    assert_agree(llama.generate(clean, 6, 0)[0], expected, clean, logits_of(sound))


def test_a_failed_prompt_leaves_nothing_for_those_that_begin_like_it(
    build: Builder, poisoned: Callable[[int], Llama]
) -> None:
    """NaN reaches the keys of the tokens before it too (0 · NaN under the mask): none of them may be used again."""
    llama, prefix = poisoned(300), [1, 5, 9, 12, 40, 41, 42, 43]
    with pytest.raises(NumericalError, match="prompt 0"):
        llama.generate([[*prefix, 300, 50]], 6, 0)
    sound, clean = build(), [[*prefix, 50]]
    assert_agree(llama.generate(clean, 6, 0)[0], sound.generate(clean, 6, 0)[0], clean, logits_of(sound))


def test_the_others_of_a_failing_call_are_not_disturbed(build: Builder, poisoned: Callable[[int], Llama]) -> None:
    """What they are told while it runs is what they get in a call without the failing prompt."""
    prompts, texts = ["One day", "The bear", "Ben"], ["", "", ""]
    encoded = [build().tokenizer.encode(prompt, bos=True, eos=False) for prompt in prompts]
    token = encoded[1][-1]
    assert token not in encoded[0] + encoded[2]

    def collect(index: int, text: str) -> None:
        texts[index] += text

    # The poisoned token is not to be chosen by the others, nor their end.
    options: Any = {"max_gen_len": 6, "min_gen_len": 6, "logit_bias": {token: float("-inf")}}
    with pytest.raises(NumericalError, match="prompt 1"):
        poisoned(token).text_completion(prompts, 0, on_text=collect, **options)
    sound = build()
    refuse_near_ties(sound)
    alone = sound.text_completion(prompts, 0, **options)
    assert texts == [alone[0]["generation"], "", alone[2]["generation"]]


def test_infinite_logits_are_an_error_too(build: Builder, small: dict, weights: dict, tmp_path: Path) -> None:
    folder = save(tmp_path, small, {**weights, "output.weight": weights["output.weight"] * 1e38})
    llama = build(folder)
    for options in ({"temperature": 0.0}, {"temperature": 1.0}, {"num_beams": 2}):
        with pytest.raises(NumericalError, match="NaN or infinite logits for prompt 0"):
            llama.text_completion(["a"], max_gen_len=4, **options)
        assert llama.engine.idle


def test_threads_can_be_chosen(build: Callable[..., Llama]) -> None:
    """And a number that is none is refused."""
    before = torch.get_num_threads()
    try:
        build(threads=3)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    with pytest.raises(ParameterError, match="threads=0 is out of range: expected an integer, 1 or more"):
        build(threads=0)
