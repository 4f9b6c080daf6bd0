"""A model whose layers are on several devices, or stay on the disk, is the same model: to the bit, where it can be.

Two parts of a CPU, cpu:0 and cpu:1, stand for two devices: each stage has a cache, a plan and inputs of its own.
"""

import re
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import random_weights, save
from conftest import DEMO
from engines import is_clean
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llama import Llama, SamplingParams
from llama.checkpoint import loader, writer
from llama.checkpoint.convert import convert
from llama.checkpoint.disk import ReadAhead
from llama.checkpoint.source import open_source
from llama.engine.engine import Engine
from llama.errors import DeviceError
from llama.kernels import library
from llama.model.step import Step
from llama.model.transformer import Transformer
from llama.options import RunOptions
from llama.parallel import initialize
from llama.placement import Placement
from llama.request import Request

CPU = torch.device("cpu")
LAYERS = 4
TWO = {"layers.0-1": "cpu:0", "layers.2-3": "cpu:1"}
DISK = {"embeddings": "disk", "layers.0": "cpu", "layers.1-3": "disk", "output": "disk"}
PROMPTS = [[1, 5, 9], [1, *range(7, 60)], [1], [1, 5, 9, 11, 12, 5, 9, 11]]


@pytest.fixture(scope="module")
def sizes(small: dict) -> dict:
    return {**small, "n_layers": LAYERS}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, sizes: dict) -> Path:
    return save(tmp_path_factory.mktemp("placed") / "model", sizes, random_weights(sizes, seed=3))


def build(folder: Path, device_map: dict[str, str] | None = None, **options: Any) -> Llama:
    """All steps are computed by the same kernels then, layer by layer or in one call."""
    options = {"batch_invariant": library.load()[0] is not None, **options}
    return Llama.build(
        str(folder), str(DEMO / "tokenizer.model"), 96, 3, device="cpu", device_map=device_map, **options
    )


def said(llama: Llama) -> list[Any]:
    return list(llama.generate(PROMPTS, 10, 0, logprobs=True))


@pytest.mark.parametrize(
    "options",
    [{}, {"dtype": "bfloat16"}, {"quantize": "int8"}, {"quantize": "int4"}, {"kv_dtype": "fp8"},
     {"speculate": "lookup"}, {"max_step_tokens": 7}],
    ids=str,
)  # fmt: skip
def test_two_stages_behave_as_one_model(folder: Path, options: dict[str, Any]) -> None:
    placed = build(folder, TWO, **options)
    assert placed.model.stages == [(CPU, range(0, 2)), (CPU, range(2, 4))]
    assert said(placed) == said(build(folder, **options))


@pytest.mark.parametrize("device_map", [TWO, DISK], ids=["stages", "disk"])
def test_a_smaller_model_drafts_for_a_placed_one(folder: Path, device_map: dict[str, str]) -> None:
    """The draft model is on the CPU as a whole. Here it is the same model: what it drafts is right."""
    placed = build(folder, device_map, speculate=str(folder))
    assert said(placed) == said(build(folder))
    drafted, accepted = placed.engine.counts.drafted, placed.engine.counts.accepted
    assert drafted and accepted > drafted / 2


def test_two_stages_on_the_same_device_are_one(folder: Path) -> None:
    """Then steps are fused as ever."""
    model = build(folder, {"layers.0-3": "cpu"}).model
    assert model.placement is None and model.device == CPU


@pytest.mark.parametrize("device_map", [TWO, DISK], ids=["stages", "disk"])
def test_requests_get_the_same_in_any_company(folder: Path, device_map: dict[str, str]) -> None:
    """Ragged prompts that come and go, chunks, prefixes that others have left, on a placed model and on one that is
    not."""
    placed, whole = build(folder, device_map).model, build(folder).model
    texts = st.lists(st.integers(3, 400), min_size=1, max_size=40)

    @settings(max_examples=12, suppress_health_check=[HealthCheck.too_slow])
    @given(data=st.data())
    def same(data: st.DataObject) -> None:
        prefix = data.draw(texts)
        begins = st.sampled_from([[], prefix])
        prompts = [[1, *data.draw(begins), *data.draw(texts)][:80] for _ in range(data.draw(st.integers(1, 5)))]
        slots, most = data.draw(st.integers(1, 4)), data.draw(st.sampled_from([5, 17, 512]))
        temperature = data.draw(st.sampled_from([0.0, 1.0]))
        assert answers(placed, prompts, slots, most, temperature) == answers(whole, prompts, slots, most, temperature)

    same()


def answers(model: Transformer, prompts: list[list[int]], slots: int, most: int, temperature: float) -> list[Any]:
    engine, params = (
        Engine(model, slots, 96, most),
        SamplingParams(temperature=temperature, max_gen_len=5, logprobs=True),
    )
    requests = [Request(list(prompt), params, seed, frozenset({2})) for seed, prompt in enumerate(prompts)]
    for request in requests:
        engine.add(request)
    while not engine.idle:
        engine.step()
    assert is_clean(engine)
    return [(request.tokens, request.logprobs) for request in requests]


def test_beam_searches_and_prompt_caches_go_over_stages(folder: Path, tmp_path: Path) -> None:
    placed, whole = build(folder, TWO), build(folder)
    beams = SamplingParams(num_beams=3, max_gen_len=6, temperature=0)
    assert placed.generate(PROMPTS[:2], params=beams) == whole.generate(PROMPTS[:2], params=beams)
    placed.save_prefix(PROMPTS[1], tmp_path / "prefix")
    fresh = build(folder)
    assert fresh.load_prefix(tmp_path / "prefix") == PROMPTS[1]
    prompt = [*PROMPTS[1], 8, 9]
    assert fresh.generate([prompt], 6, 0, logprobs=True) == whole.generate([prompt], 6, 0, logprobs=True)


def test_everything_of_a_stage_is_on_its_device(folder: Path) -> None:
    """The meta device computes nothing, but refuses whatever is on another: a prompt, its chunks, and decoding."""
    initialize(CPU, None)
    source = open_source(folder)
    args = replace(source.args, max_seq_len=32, max_batch_size=2)
    placement = Placement("cpu", ("cpu", "cpu", "meta", "meta"), "meta")
    model = loader.load(source, args, RunOptions(max_seq_len=32, max_batch_size=2), CPU, torch.float32, placement)
    cache = model.new_cache(2, 32)
    assert [keys.device.type for keys in cache.keys] == ["cpu", "cpu", "meta", "meta"]
    steps = [([(0, 0, [1, 5, 6])], [2]), ([(0, 3, [7, 8]), (1, 0, [1])], [1]), ([(0, 5, [9]), (1, 1, [3])], [0, 1])]
    for parts, rows in steps:
        logits = model(Step.pack(parts, rows, model.device), cache)
        assert logits.device.type == "meta" and logits.shape == (len(rows), args.vocab_size)


def test_what_one_device_alone_can_do_is_refused(folder: Path) -> None:
    with pytest.raises(
        DeviceError, match="compile=True compiles a model for one device, but this one is on cpu:0, cpu:1"
    ):
        build(folder, TWO, compile=True, batch_invariant=False)
    with pytest.raises(DeviceError, match="quantize=int8 would quantise what stays on the disk anew in every step"):
        build(folder, DISK, quantize="int8")


# -------------------------------------------------------------------------------------------------------- the disk


def one_shard(folder: Path, out: Path) -> Path:
    return folder


def two_shards(folder: Path, out: Path) -> Path:
    writer.reshard(folder, out, 2)
    return out


def quantised(kind: str) -> Callable[[Path, Path], Path]:
    def make(folder: Path, out: Path) -> Path:
        writer.quantize(folder, out, kind)
        return out

    return make


def converted(to: str, name: str) -> Callable[[Path, Path], Path]:
    def make(folder: Path, out: Path) -> Path:
        (folder / "tokenizer.model").write_bytes((DEMO / "tokenizer.model").read_bytes())
        convert(folder, out / name, to)
        return out / name

    return make


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize(
    "make",
    [one_shard, two_shards, quantised("int8"), quantised("int4"), converted("hf", "folder"),
     converted("gguf", "model.gguf")],
    ids=["one shard", "two shards", "int8", "int4", "hf", "gguf"],
)  # fmt: skip
def test_what_stays_on_the_disk_is_the_same_model(
    folder: Path, tmp_path: Path, make: Callable[[Path, Path], Path], dtype: str | None
) -> None:
    """Where matrices are used as they lie in the files, and where they are made of those in each step."""
    path = make(folder, tmp_path)
    placed = build(path, DISK, dtype=dtype)
    expected = said(build(path, dtype=dtype))
    assert said(placed) == expected
    assert said(placed) == expected  # the reader has gone round


def test_a_step_that_was_not_ended_leaves_nothing_behind(folder: Path) -> None:
    placed = build(folder, DISK)
    expected = said(placed)
    with pytest.MonkeyPatch.context() as patch:

        def interrupted(*given: Any) -> None:
            raise KeyboardInterrupt

        patch.setattr(placed.model.layers[2].feed_forward, "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            said(placed)
    placed.engine.clear_prefix_cache()
    assert said(placed) == expected


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not say what of a file is in memory")
def test_of_a_model_on_the_disk_two_layers_are_in_memory(tmp_path: Path, small: dict) -> None:
    sizes = {**small, "dim": 256, "n_layers": 10}
    weights = random_weights(sizes)
    folder = save(tmp_path / "model", sizes, weights)
    layer = sum(tensor.nbytes for name, tensor in weights.items() if name.startswith("layers.0."))
    placed = build(folder, {"embeddings": "disk", "layers.0-9": "disk", "output": "disk"})
    said(placed)
    until = time.monotonic() + 20
    while resident(folder) > 2.5 * layer and time.monotonic() < until:
        time.sleep(0.05)  # the last of it goes in the background
    assert 0 < resident(folder) <= 2.5 * layer
    whole = build(folder)
    said(whole)
    assert resident(folder) > 9 * layer


def resident(folder: Path) -> int:
    """Bytes of a folder's files that are in this process's memory."""
    found = 0
    own = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            own = str(folder) in line
        elif own and line.startswith("Rss:"):
            found += int(line.split()[1]) * 1024
    return found


class Recorded:
    """A part that notes what is in memory."""

    def __init__(self, number: int, here: list[int], most: list[int]) -> None:
        self.number, self.here, self.most = number, here, most
        self.module = torch.nn.Identity()

    def read(self) -> None:
        assert self.number not in self.here
        self.here.append(self.number)
        self.most.append(len(self.here))

    def drop(self) -> None:
        self.here.remove(self.number)


@settings(max_examples=50)
@given(parts=st.integers(1, 6), data=st.data())
def test_two_parts_are_in_memory_at_most_whatever_is_asked_for(parts: int, data: st.DataObject) -> None:
    """In the order of a step, or after steps that were not ended."""
    here: list[int] = []
    most: list[int] = []
    recorded: Any = [Recorded(number, here, most) for number in range(parts)]
    reader = ReadAhead(recorded)
    for number in data.draw(st.lists(st.integers(0, parts - 1), max_size=20)):
        recorded[number].module(torch.empty(0))  # as a step does
        assert number in here
    reader.bring(0)
    assert max(most) <= 2
