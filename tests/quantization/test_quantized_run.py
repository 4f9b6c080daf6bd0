"""Models with int8 and int4 weights: quantised while they are read or stored so, split, near their original."""

import gc
import json
import math
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from batch_files import environment
from checkpoints import random_weights, save
from conftest import DEMO, ROOT
from near_ties import QUANTIZED, assert_agree, logits_of

from llama import Llama, SamplingParams
from llama.checkpoint import parameters
from llama.checkpoint.info import describe
from llama.checkpoint.writer import quantize, reshard
from llama.errors import CheckpointError, ParameterError
from llama.quantization.formats import FORMATS

PROMPTS = ["Once upon a time there was a small fox named Tom.", "Ben wanted a red kite.", "One morning Mia went"]
TOKENIZER = str(DEMO / "tokenizer.model")


def demo(folder: Path = DEMO, **options: object) -> Llama:
    return Llama.build(str(folder), TOKENIZER, 256, 4, device="cpu", **options)


@pytest.fixture(scope="module")
def stories() -> list[str]:
    """Texts of the demo's world."""
    return [r["generation"] for r in demo().text_completion(PROMPTS * 4, temperature=0.8, echo=True)]


def perplexity(llama: Llama, texts: list[str]) -> float:
    logprobs = [p for score in llama.score(texts) for p in score["logprobs"] if p is not None]
    return math.exp(-sum(logprobs) / len(logprobs))


@pytest.mark.parametrize(("name", "bound"), [("int8", 0.005), ("int4", 0.05)])
def test_quality_stays(stories: list[str], name: str, bound: float) -> None:
    """Perplexity within 0.5 % of bfloat16's in int8, within 5 % in int4."""
    plain, quantized = perplexity(demo(), stories), perplexity(demo(quantize=name), stories)
    assert abs(quantized / plain - 1) < bound


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_a_stored_checkpoint_is_what_loading_makes_of_the_first(tmp_path: Path, name: str) -> None:
    """Bit for bit, and not quantised again; its checklist holds, and params.json says what it is."""
    written = quantize(DEMO, tmp_path / "out", name)
    assert json.loads((tmp_path / "out" / "params.json").read_text())["quantize"] == name
    assert written[0].stat().st_size < (DEMO / "consolidated.00.pth").stat().st_size * (
        0.62 if name == "int8" else 0.42
    )
    loaded, stored = demo(quantize=name), demo(tmp_path / "out", verify=True)
    assert stored.model.weight_format == stored.model.params.quantize == name
    for (path, module), (_, other) in zip(loaded.model.named_modules(), stored.model.named_modules(), strict=True):
        if getattr(module, "scales", None) is not None:
            form = "int8" if path == "output" else name
            assert module.weight.dtype == getattr(torch, FORMATS[form].dtype), path
            assert torch.equal(module.weight, other.weight) and torch.equal(module.scales, other.scales), path
    assert (
        loaded.text_completion(PROMPTS, temperature=0)[0]["generation"]
        == (stored.text_completion(PROMPTS, temperature=0)[0]["generation"])
    )
    info = describe(tmp_path / "out", 256, 4)
    assert info["quantize"] == name and info["weights_bytes"] < describe(DEMO, 256, 4)["weights_bytes"]


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_shards_and_processes_are_as_free_as_ever(tmp_path: Path, name: str) -> None:
    """Two shards quantised are the quantised one resharded; two processes say what one does.

    One takes the same steps: some kernels round activations only where a step has few rows.
    """
    sizes = {"dim": 256, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 1024, "multiple_of": 128,
             "norm_eps": 1e-5}  # fmt: skip
    weights = random_weights(sizes)
    one, two = save(tmp_path / "one", sizes, weights), save(tmp_path / "two", sizes, weights, 2)
    for folder in (one, two):
        quantize(folder, folder.with_name(f"{folder.name} quantised"), name)
    reshard(tmp_path / "one quantised", tmp_path / "resharded", 2)
    for number in range(2):
        shards = [
            torch.load(tmp_path / folder / f"consolidated.{number:02d}.pth", weights_only=True)
            for folder in ("two quantised", "resharded")
        ]
        assert shards[0].keys() == shards[1].keys()
        assert all(torch.equal(shards[0][key], shards[1][key]) for key in shards[0])
    words = ["-m", "llama", "complete", *PROMPTS, "--json", "--quiet", "--temperature=0", "--max_gen_len=8"]
    words += ["--dtype=float32", "--device=cpu", f"--tokenizer_path={TOKENIZER}", "--max_seq_len=64"]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [sys.executable, *launcher, *words, f"--ckpt_dir={tmp_path / 'two quantised'}", "--top_logprobs=1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment(), cwd=ROOT)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in done.stdout.splitlines()]
    alone = demo(tmp_path / "two quantised", dtype="float32")
    tokens = [[best["token"] for (best,) in record["top_logprobs"]] for record in records]
    prompts = [alone.tokenizer.encode(prompt, bos=True, eos=False) for prompt in PROMPTS]
    params = SamplingParams(temperature=0, max_gen_len=8, logprobs=True)
    expected, logprobs = alone.generate(prompts, params=params)
    agreed = assert_agree(tokens, expected, prompts, logits_of(alone), tolerance=QUANTIZED)
    for n, record, own in zip(agreed, records, logprobs, strict=True):
        assert record["logprobs"][:n] == pytest.approx(own[:n], abs=QUANTIZED)


def test_what_cannot_be_had_is_refused(tmp_path: Path, build: Callable[..., Llama]) -> None:
    quantize(DEMO, tmp_path / "int4", "int4")
    with pytest.raises(CheckpointError, match="int4 is quantised as int4, so quantize=int8 cannot be had of it"):
        demo(tmp_path / "int4", quantize="int8")
    with pytest.raises(CheckpointError, match="is quantised already, as int4"):
        quantize(tmp_path / "int4", tmp_path / "again", "int4")
    with pytest.raises(ParameterError, match="quantize='int3' is not a format"):
        demo(quantize="int3")
    with pytest.raises(ParameterError, match="quantize='int3' is not a format"):
        quantize(DEMO, tmp_path / "out", "int3")
    shutil.copytree(DEMO, tmp_path / "lie")
    params = json.loads((DEMO / "params.json").read_text())
    (tmp_path / "lie" / "params.json").write_text(json.dumps({**params, "quantize": "int8"}))
    with pytest.raises(CheckpointError, match=r"does not fit params\.json: output\.scales is missing; layers\.0\.att"):
        demo(tmp_path / "lie")
    (tmp_path / "lie" / "params.json").write_text(json.dumps({**params, "quantize": "fp8"}))
    with pytest.raises(CheckpointError, match=r"params\.json sets quantize='fp8': expected int8 or int4"):
        demo(tmp_path / "lie")


def test_matrices_are_quantised_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """When the next one is read, the one before is gone: the peak is the quantised model and one matrix."""
    seen: list[weakref.ref[torch.Tensor]] = []
    quantizer = parameters.quantize

    def watched(weight: torch.Tensor, form: str) -> tuple[torch.Tensor, torch.Tensor]:
        gc.collect()
        assert not any(reference() is not None for reference in seen)
        seen.append(weakref.ref(weight))
        return quantizer(weight, form)

    monkeypatch.setattr(parameters, "quantize", watched)
    demo(quantize="int8")
    assert len(seen) == 17
