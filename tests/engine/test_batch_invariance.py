"""With `batch_invariant` a request gets the same tokens and log-probabilities, to the bit, whatever is beside it.

In any batch, read in any chunks, behind a prefix that another has left, in every dtype and variant of the kernels.
"""

from collections.abc import Iterator
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
from llama.engine.engine import Engine
from llama.errors import DeviceError
from llama.kernels import library
from llama.kernels.invariance import costs_nothing, why_not_invariant
from llama.request import Request

LIBRARY = library.load()[0]
VARIANTS = library.VARIANTS[: LIBRARY.llama_variant() + 1] if LIBRARY else ()
FORMATS = [
    {"dtype": "bfloat16"}, {"dtype": "float32"}, {"dtype": "bfloat16", "quantize": "int8"},
    {"dtype": "float32", "quantize": "int4"}, {"dtype": "bfloat16", "kv_dtype": "fp8"},
]  # fmt: skip
LENGTH = 160
needs_library = pytest.mark.skipif(LIBRARY is None, reason=f"no compiled kernels: {library.load()[1]}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, small: dict) -> Path:
    return save(tmp_path_factory.mktemp("invariant") / "model", small, random_weights(small, seed=5))


def build(folder: Path, **options: Any) -> Llama:
    return Llama.build(str(folder), str(DEMO / "tokenizer.model"), LENGTH, 4, device="cpu", **options)


@pytest.fixture(scope="module", params=[(v, f) for v in VARIANTS for f in FORMATS], ids=lambda p: f"{p[0]} {p[1]}")
def invariant(request: pytest.FixtureRequest, folder: Path) -> Iterator[Llama]:
    name, options = request.param
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "_variant", lambda: library.VARIANTS.index(name))
        yield build(folder, batch_invariant=True, **options)


def run(llama: Llama, slots: int, step_tokens: int, requests: list[Request]) -> list[Any]:
    engine = Engine(llama.model, slots, LENGTH, step_tokens)
    for one in requests:
        engine.add(one)
    while not engine.idle:
        engine.step()
    assert is_clean(engine)
    return [(r.tokens, r.logprobs, r.scores, r.finish_reason) for r in requests]


PROMPTS = st.lists(st.integers(3, 400), min_size=1, max_size=70)


@needs_library
@settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.data())
def test_a_request_gets_the_same_in_any_company(invariant: Llama, data: st.DataObject) -> None:
    prefix = data.draw(PROMPTS, "what prompts begin with")
    begins = st.sampled_from([[], prefix])
    prompts = [[1, *data.draw(begins), *data.draw(PROMPTS)] for _ in range(data.draw(st.integers(1, 6), "requests"))]
    params = SamplingParams(temperature=data.draw(st.sampled_from([0.0, 1.0])), max_gen_len=6, logprobs=True)

    def requests() -> list[Request]:
        return [
            Request(list(prompt), params, seed, frozenset({2}), prompt_logprobs=seed % 2 == 0)
            for seed, prompt in enumerate(prompts)
        ]

    alone = [run(invariant, 1, 512, [one])[0] for one in requests()]
    slots, step_tokens = data.draw(st.integers(1, 5), "slots"), data.draw(st.sampled_from([5, 17, 40, 512]), "step")
    assert run(invariant, slots, step_tokens, requests()) == alone


@needs_library
def test_it_is_said_where_it_cannot_be(folder: Path) -> None:
    cases = [{"dtype": "float16"}, {"compile": True}]
    for options in cases:
        with pytest.raises(DeviceError, match=r"^batch_invariant=True: .*: leave it out$"):
            build(folder, batch_invariant=True, **options)
    assert why_not_invariant(torch.device("cuda:0"), torch.bfloat16) == "on cuda:0 they depend on what shares a step"


@needs_library
def test_it_needs_not_be_asked_for_where_it_costs_nothing(folder: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert build(folder, dtype=dtype).model.batch_invariant == costs_nothing(dtype)
    assert not build(folder, dtype="float16").model.batch_invariant
