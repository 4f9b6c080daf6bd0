"""Prompt caches: what is loaded is what was saved, to the bit, and no wrong or damaged file is ever used."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

import pytest
import talks
import torch
from checkpoints import random_weights, save
from conftest import DEMO, ROOT
from damage import RUNS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from llama import Llama, LlamaError, parallel
from llama.checkpoint import fingerprint
from llama.errors import DeviceError, PromptCacheError, PromptError

PROMPT = "Once upon a time there was a small fox named Tom. He had a red kite and a blue ball."
Build = Callable[..., Llama]


def rows(llama: Llama, tokens: list[int]) -> list[torch.Tensor]:
    held = llama.engine.read_prefix(tokens)
    assert held is not None
    return held


def bits(tensors: list[torch.Tensor]) -> list[bytes]:
    return [tensor.contiguous().view(torch.uint8).numpy().tobytes() for tensor in tensors]


@pytest.fixture(scope="module")
def file(build: Build, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cache") / "prefix"
    build().save_prefix(PROMPT, path)
    return path


@pytest.fixture(scope="module")
def other(build: Build) -> Llama:
    """The model of `file`, anew."""
    return build()


@pytest.mark.parametrize(
    "options",
    [{"dtype": "float32"}, {"dtype": "bfloat16"}, {"dtype": "bfloat16", "kv_dtype": "fp8"}, {"quantize": "int8"}],
)
def test_what_is_loaded_is_what_was_saved(build: Build, tmp_path: Path, options: dict[str, str]) -> None:
    first, second = build(**options), build(**options)
    tokens = first.save_prefix(PROMPT, tmp_path / "cache")
    assert tokens == first.prompt_tokens(PROMPT) == second.load_prefix(tmp_path / "cache")
    assert bits(rows(first, tokens)) == bits(rows(second, tokens))
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
    ask = {"temperature": 0, "max_gen_len": 4, "logprobs": True}
    llamas = (first, second, build(**options))
    here, there, alone = (llama.text_completion([PROMPT + " Tom"], **ask)[0] for llama in llamas)
    assert here["token_ids"] == there["token_ids"] and here["logprobs"] == there["logprobs"]
    assert there["logprobs"][0] == pytest.approx(alone["logprobs"][0], abs=0.15 if "dtype" in options else 1e-3)


def test_only_what_follows_the_prefix_is_computed(build: Build, file: Path) -> None:
    llama = build()
    tokens = llama.load_prefix(file)
    llama.generate([[*tokens, 5, 6]], max_gen_len=1, temperature=0)
    assert llama.engine.computed_tokens == 2
    llama.generate([[*tokens[:10], 7]], max_gen_len=1, temperature=0)  # a part of it serves too
    assert llama.engine.computed_tokens == 3


def test_a_prefix_may_be_a_dialog_or_tokens(build: Build, tmp_path: Path) -> None:
    llama, dialog = build(), [{"role": "user", "content": "Hello"}]
    assert llama.save_prefix(dialog, tmp_path / "a") == llama.format_dialog(dialog).tokens
    assert llama.save_prefix([1, 5, 9], tmp_path / "b") == [1, 5, 9] == build().load_prefix(tmp_path / "b")


def test_batch_invariant_results_are_the_same_to_the_bit(build: Build, tmp_path: Path) -> None:
    options = {"batch_invariant": True, "dtype": "float32"}
    first, second, alone = (build(**options) for _ in range(3))
    first.save_prefix(PROMPT, tmp_path / "cache")
    second.load_prefix(tmp_path / "cache")
    ask = {"temperature": 0, "max_gen_len": 4, "logprobs": True}
    loaded, computed = (llama.text_completion([PROMPT + " Tom"], **ask)[0] for llama in (second, alone))
    assert loaded["token_ids"] == computed["token_ids"] and loaded["logprobs"] == computed["logprobs"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dtype": "bfloat16"}, "dtype='float32', this model has 'bfloat16'"),
        ({"kv_dtype": "fp8"}, "kv_dtype='float32', this model has 'float8_e4m3fn'"),
        ({"quantize": "int8"}, "quantize=None, this model has 'int8'"),
        ({"max_seq_len": 16}, "more than max_seq_len=16"),
    ],
)
def test_a_run_of_other_options_is_refused(build: Build, file: Path, options: dict[str, object], said: str) -> None:
    llama = build(**options)
    with pytest.raises(PromptCacheError) as caught:
        llama.load_prefix(file)
    assert said in str(caught.value)
    assert llama.engine.scheduler.prefixes == [[]] * 4


def test_another_checkpoint_of_the_same_shape_is_refused(build: Build, file: Path, small: dict, tmp_path: Path) -> None:
    changed = random_weights(small)
    changed["layers.1.attention.wv.weight"] *= 1.01
    with pytest.raises(PromptCacheError, match="weights of another checkpoint"):
        build(save(tmp_path / "other", small, changed)).load_prefix(file)
    scaled = save(tmp_path / "scaled", {**small, "rope_theta": 5e5}, random_weights(small))
    with pytest.raises(PromptCacheError, match=r"rope_theta=10000\.0, this model has 500000\.0"):
        build(scaled).load_prefix(file)


def test_a_checkpoint_that_was_replaced_since_is_refused(build: Build, small: dict, tmp_path: Path) -> None:
    folder = save(tmp_path / "model", small, random_weights(small))
    llama = build(folder)
    (folder / "consolidated.00.pth").rename(tmp_path / "old")
    save(folder, small, random_weights(small, seed=1))
    with pytest.raises(PromptCacheError, match="changed or removed since it was loaded"):
        llama.save_prefix(PROMPT, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


@given(st.binary(min_size=1, max_size=9000), st.data())
def test_a_file_that_is_sampled_whole_differs_by_any_byte(data: bytes, draw: st.DataObject) -> None:
    at = draw.draw(st.integers(0, len(data) - 1))
    changed = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
    with TemporaryDirectory() as folder:
        first, second = Path(folder, "a"), Path(folder, "b")
        first.write_bytes(data)
        second.write_bytes(changed)
        assert fingerprint.fingerprint_of([first])() != fingerprint.fingerprint_of([second])()


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32))
def test_a_damaged_file_is_refused(file: Path, other: Llama, tmp_path: Path, seed: int) -> None:
    r, sound = Random(seed), file.read_bytes()
    head = 8 + int.from_bytes(sound[:8], "little")
    part, rest = (sound[:head], sound[head:]) if r.random() < 0.5 else (sound, b"")
    damaged = r.choice(RUNS)(r, part) + rest
    bad = tmp_path / "bad"
    bad.write_bytes(damaged)
    before = [list(prefix) for prefix in other.engine.scheduler.prefixes]
    try:
        tokens = other.load_prefix(bad)
    except PromptCacheError:
        assert other.engine.scheduler.prefixes == before
    else:  # what was changed says nothing: a space, say
        assert tokens == other.load_prefix(file)
        with safe_open(bad, "pt") as one, safe_open(file, "pt") as two:
            assert all(torch.equal(one.get_tensor(name), two.get_tensor(name)) for name in two.keys())  # noqa: SIM118


@pytest.mark.parametrize("change", ["shape", "dtype", "missing", "more", "tokens", "metadata"])
def test_a_sound_file_of_other_tensors_is_refused(file: Path, other: Llama, tmp_path: Path, change: str) -> None:
    with safe_open(file, "pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        metadata = opened.metadata()
    name = "layers.1.values"
    if change == "shape":
        tensors[name] = tensors[name][:, 1:].contiguous()
    elif change == "dtype":
        tensors[name] = tensors[name].double()
    elif change == "missing":
        del tensors[name]
    elif change == "more":
        tensors["layers.2.keys"] = tensors[name].clone()
    elif change == "tokens":
        tensors["tokens"] = tensors["tokens"] + 100000
    else:
        metadata = {"made_with": json.dumps([1])}
    save_file(tensors, tmp_path / "bad", metadata)
    with pytest.raises(PromptCacheError):
        other.load_prefix(tmp_path / "bad")


def test_what_is_no_file_is_refused(other: Llama, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "none", tmp_path / "pipe", DEMO / "params.json"):
        with pytest.raises(PromptCacheError):
            other.load_prefix(path)
    with pytest.raises(LlamaError, match="there is no folder"):
        other.save_prefix(PROMPT, tmp_path / "no" / "cache")
    with pytest.raises(PromptError, match="max_seq_len"):
        other.save_prefix("a " * 500, tmp_path / "cache")


def test_a_model_whose_places_are_all_in_use_refuses(build: Build, file: Path) -> None:
    llama = build(max_batch_size=1)
    stream = llama.stream_text("Tom", temperature=0, max_gen_len=50)
    next(stream)
    with pytest.raises(DeviceError, match="in use"):
        llama.load_prefix(file)
    stream.close()
    assert llama.load_prefix(file)


def test_a_model_that_is_split_has_no_prompt_cache(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each process holds a part of the KV cache."""
    llama = build()
    monkeypatch.setattr(parallel, "model_parallel_size", lambda: 2)
    for call in (llama.prefix_made_with, lambda: llama.save_prefix(PROMPT, tmp_path / "cache")):
        with pytest.raises(DeviceError, match="split over 2 processes, each with a part of the KV cache"):
            call()
    assert not any(tmp_path.iterdir())


def test_a_model_not_built_from_files_has_no_prompt_cache(demo: Llama, tmp_path: Path) -> None:
    with pytest.raises(PromptCacheError, match=r"Llama\.build"):
        Llama(demo.model, demo.tokenizer).save_prefix(PROMPT, tmp_path / "cache")


def complete(file: Path, *prompts: str, dtype: str = "float32") -> tuple[int, str, str]:
    words = ["-m", "llama", "complete", *prompts, "--prompt_cache", str(file), "--temperature", "0"]
    words += ["--max_gen_len", "4", "--device", "cpu", "--dtype", dtype]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=120, cwd=ROOT)
    return done.returncode, done.stdout, done.stderr


def test_the_command_makes_uses_and_refuses_a_file(tmp_path: Path) -> None:
    file = tmp_path / "cache"
    code, made, err = complete(file, PROMPT)
    assert code == 0 and f"prompt cache {file}: made, " in err
    code, again, err = complete(file, PROMPT)
    assert code == 0 and again == made and " tokens begin the prompt\n" in err and "made" not in err
    before = file.read_bytes()
    code, out, err = complete(file, PROMPT, dtype="bfloat16")
    assert code == 2 and out == "" and "dtype='float32', this model has 'bfloat16'" in err
    assert file.read_bytes() == before


def test_a_talk_keeps_its_prompt_cache(tmp_path: Path) -> None:
    file = tmp_path / "cache"
    child = talks.start(tmp_path, *talks.command(512, "--prompt_cache", str(file)))
    for line in (talks.DOG, f"/save {tmp_path / 'talk'}"):
        child.send(line + "\r")
        child.expect_exact(talks.HAS_READ)
        child.expect_exact(talks.READS)
    assert "tokens written" in child.before and file.exists()
    child.send(talks.CTRL_D)
    assert talks.end(child) == 0
    child = talks.start(tmp_path, *talks.command(512, "--prompt_cache", str(file)))
    assert "tokens read" in child.before
    child.send("/exit\r")
    assert talks.end(child) == 0
