"""Drafts of a smaller model: they change no result, to the bit; a model that drafts for itself is always right."""

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import random_weights, save
from conftest import DEMO
from engines import is_clean, prompts_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_speculation import params, requests_of, results

from llama import Llama, SamplingParams
from llama.engine.draft_model import DraftModel
from llama.engine.drafts import Pace, Speculation
from llama.engine.engine import Engine
from llama.errors import CheckpointError, ParameterError
from llama.kernels import library
from llama.kernels.decode_step import rows_alike
from llama.request import Request

needs_library = pytest.mark.skipif(library.load()[0] is None, reason=f"no compiled kernels: {library.load()[1]}")
SLOTS, LENGTH = 3, 64
FORMATS = [{"dtype": "float32"}, {"dtype": "bfloat16"}, {"quantize": "int8", "dtype": "bfloat16"},
           {"quantize": "int4", "dtype": "float32"}]  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, small: dict) -> dict[str, Path]:
    """A model; the same with noise on its weights; and another one with one layer."""
    place, weights = tmp_path_factory.mktemp("drafts"), random_weights(small, seed=3)
    generator = torch.Generator().manual_seed(0)
    near = {name: w + 0.05 * w.std() * torch.randn(w.shape, generator=generator) for name, w in weights.items()}
    other = {**small, "n_layers": 1}
    return {
        "same": save(place / "same", small, weights),
        "near": save(place / "near", small, near),
        "other": save(place / "other", other, random_weights(other, seed=4)),
    }


def built(folder: Path, **options: Any) -> Llama:
    return Llama.build(str(folder), str(DEMO / "tokenizer.model"), LENGTH, SLOTS, device="cpu", **options)


@pytest.fixture(scope="module", params=FORMATS if library.load()[0] else [], ids=str)
def models(request: pytest.FixtureRequest, folders: dict[str, Path]) -> dict[str, Llama]:
    return {name: built(folder, batch_invariant=True, **request.param) for name, folder in folders.items()}


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pace, "wanted", lambda self, price: 99)


def engine_of(models: dict[str, Llama], drafts: str | None, most: int = 5, step_tokens: int = 16) -> Engine:
    model, speculation = models["same"].model, None
    if drafts:
        drafter = DraftModel(models[drafts].model, SLOTS, LENGTH, step_tokens, 0.1)
        speculation = Speculation(drafts, drafter, most, min(step_tokens, rows_alike(model)))
    return Engine(model, SLOTS, LENGTH, step_tokens, speculation)


def run(engine: Engine, requests: list[Request]) -> list[Request]:
    for one in requests:
        engine.add(one)
    while not engine.idle:
        engine.step()
    assert is_clean(engine)
    if engine.speculation:
        drafter = engine.speculation._drafter
        assert isinstance(drafter, DraftModel) and sorted(drafter._free) == list(range(SLOTS)) and not drafter._known
    return requests


@needs_library
@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.data())
def test_any_batch_gets_what_it_gets_without(
    models: dict[str, Llama], data: st.DataObject, monkeypatch: pytest.MonkeyPatch
) -> None:
    lists = st.lists(st.lists(st.integers(1, 400), min_size=1, max_size=30), min_size=1, max_size=6)
    prompts = data.draw(lists, "prompts")
    every = [data.draw(params(), f"params {i}") for i in range(len(prompts))]
    expected = run(engine_of(models, None), requests_of(prompts, every))
    drafts, most = data.draw(st.sampled_from(["same", "near", "other"])), data.draw(st.sampled_from([1, 4, 15]))
    engine = engine_of(models, drafts, most, data.draw(st.sampled_from([4, 16, 64]), "step"))
    with monkeypatch.context() as patch:
        if data.draw(st.booleans(), "as many as can be"):
            patch.setattr(Pace, "wanted", lambda self, price: 99)
        assert results(run(engine, requests_of(prompts, every))) == results(expected)


@needs_library
@pytest.mark.usefixtures("eager")
def test_a_model_that_drafts_for_itself_is_always_right(models: dict[str, Llama]) -> None:
    """Greedy and sampled, with whatever changes logits: the noise of each position is the same for both."""
    every = [
        SamplingParams(temperature=0, max_gen_len=24, min_gen_len=24),
        SamplingParams(temperature=1.0, max_gen_len=24, min_gen_len=24, repetition_penalty=1.3, logit_bias={5: 4.0}),
        SamplingParams(temperature=1.5, top_p=0.9, top_k=40, max_gen_len=24, min_gen_len=24, bad_words=[[7], [8, 9]]),
    ]
    made = run(engine_of(models, "same"), requests_of(prompts_of([5, 20, 33], 512), every))
    assert all(one.counts.accepted == one.counts.drafted > 12 for one in made)


@needs_library
@pytest.mark.usefixtures("eager")
def test_a_near_model_is_often_right(models: dict[str, Llama]) -> None:
    every = [SamplingParams(temperature=t, max_gen_len=24, min_gen_len=24) for t in (0.0, 0.0, 0.7)]
    rates = {}
    for name in ("near", "other"):
        made = run(engine_of(models, name), requests_of(prompts_of([5, 20, 33], 512), every))
        rates[name] = sum(one.counts.accepted for one in made) / sum(one.counts.drafted for one in made)
    assert rates["near"] > 0.2 > rates["other"]


@needs_library
@pytest.mark.usefixtures("eager")
def test_drafts_that_are_no_numbers_are_none(models: dict[str, Llama], monkeypatch: pytest.MonkeyPatch) -> None:
    every, prompts = [SamplingParams(temperature=0.5, max_gen_len=9)] * 2, prompts_of([5, 9], 512)
    expected = run(engine_of(models, None), requests_of(prompts, every))
    engine = engine_of(models, "near")
    drafting, forward = models["near"].model, type(models["near"].model).forward

    def damaged(self: Any, step: Any, cache: Any) -> torch.Tensor:
        logits = forward(self, step, cache)
        return logits * torch.nan if self is drafting else logits

    monkeypatch.setattr(type(drafting), "forward", damaged)
    found = run(engine, requests_of(prompts, every))
    assert results(found) == results(expected) and not engine.counts.drafted


@needs_library
@pytest.mark.usefixtures("eager")
def test_a_draft_that_is_interrupted_is_made_again(models: dict[str, Llama], monkeypatch: pytest.MonkeyPatch) -> None:
    every, prompts = [SamplingParams(temperature=0, max_gen_len=20, min_gen_len=20)] * 2, prompts_of([6, 30], 512)
    expected = run(engine_of(models, None), requests_of(prompts, every))
    engine, calls, drafting = engine_of(models, "near"), [0], models["near"].model
    forward = type(drafting).forward

    def flaky(self: Any, step: Any, cache: Any) -> torch.Tensor:
        calls[0] += self is drafting
        if self is drafting and calls[0] in (1, 4, 17):
            raise KeyboardInterrupt
        return forward(self, step, cache)

    monkeypatch.setattr(type(drafting), "forward", flaky)
    found = requests_of(prompts, every)
    for one in found:
        engine.add(one)
    while not engine.idle:
        try:
            engine.step()
        except KeyboardInterrupt:
            continue
    assert results(found) == results(expected) and is_clean(engine)


@needs_library
def test_build_takes_a_folder(folders: dict[str, Path]) -> None:
    plain = built(folders["same"])
    drafting = built(folders["same"], speculate=str(folders["near"]))
    every: dict[str, Any] = {"temperature": 0.8, "max_gen_len": 30, "n": 2}
    assert [p["generation"] for p in drafting.text_completion(["a story", "b"], **every)] == [
        p["generation"] for p in plain.text_completion(["a story", "b"], **every)
    ]
    assert drafting.engine.counts.drafted > 0
    quantised = built(folders["same"], quantize="int8", speculate=str(folders["other"]))
    assert quantised.text_completion(["c"], temperature=0, max_gen_len=5)


def test_what_cannot_draft_is_refused(folders: dict[str, Path], small: dict, tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match=r"^speculate='nowhere' is no way to draft tokens: use lookup or the"):
        built(folders["same"], speculate="nowhere")
    larger = {**small, "vocab_size": 600}
    folder = save(tmp_path / "larger", larger, random_weights(larger))
    with pytest.raises(
        CheckpointError, match=r"cannot draft tokens for this model: it has 600 tokens, not 1024; use a"
    ):
        built(folders["same"], speculate=str(folder))
