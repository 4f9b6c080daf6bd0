"""The model against the slow reference: however a prompt is cut into steps, its logits are the same."""

from pathlib import Path

import psutil
import pytest
import torch
from checkpoints import SMALL, held, random_weights, save
from fairscale.nn.model_parallel.layers import ColumnParallelLinear, ParallelEmbedding, RowParallelLinear
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import forward
from torch import Tensor

from llama import ModelArgs, Transformer
from llama.checkpoint.layout import stored_names
from llama.checkpoint.loader import load
from llama.checkpoint.source import open_source
from llama.model.step import Step
from llama.model.transformer import RMSNorm
from llama.options import RunOptions
from llama.parallel import initialize

CPU = torch.device("cpu")
P = 24  # positions of a slot
VARIANTS = {
    "GQA": SMALL,
    "MHA": {**SMALL, "n_kv_heads": None},
    "one kv head": {**SMALL, "n_kv_heads": 1},
    "rope_theta of Code Llama": {**SMALL, "rope_theta": 1e6},
    "ffn_dim_multiplier": {**SMALL, "ffn_dim_multiplier": 1.3},
}
PROMPTS = [[1, 17, 300, 4, 99, 250, 8, 8, 31, 2, 440], [1, 5], [1, 77, 140, 6, 511, 0, 23]]
REFERENCE = [forward(random_weights(SMALL), SMALL, prompt) for prompt in PROMPTS]
SLOTS = [2, 0, 3]  # of the three prompts, out of order, one slot of the four left out
# A schedule is a list of steps; a step is a list of (prompt, start, stop).
Schedule = list[list[tuple[int, int, int]]]
SCHEDULES: dict[str, Schedule] = {
    "a whole prompt alone": [[(0, 0, 11)]],
    "ragged prompts packed": [[(0, 0, 11), (1, 0, 2), (2, 0, 7)]],
    "chunks": [[(0, 0, 4)], [(0, 4, 5)], [(0, 5, 11)]],
    "token by token": [[(2, i, i + 1)] for i in range(7)],
    "decoding beside prefill": [[(1, 0, 1), (0, 0, 6)], [(1, 1, 2), (2, 0, 7)], [(0, 6, 11)]],
}


def load_model(folder: Path, dtype: torch.dtype = torch.float32) -> Transformer:
    initialize(CPU, None)
    source = open_source(folder)
    return load(source, source.args, RunOptions(max_seq_len=P, max_batch_size=4, max_step_tokens=64), CPU, dtype)


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    """(params, weights, model) of one variant of the architecture."""
    params = VARIANTS[request.param]
    weights = random_weights(params)
    return params, weights, load_model(save(tmp_path_factory.mktemp("variant"), params, weights))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Transformer:
    return load_model(save(tmp_path_factory.mktemp("model"), SMALL, random_weights(SMALL)))


def run(model: Transformer, schedule: Schedule) -> dict[int, Tensor]:
    """All logits (T, vocab) of each prompt, its tokens computed as the schedule says."""
    cache = model.new_cache(4, P)
    for tensor in (*cache.keys, *cache.values):
        tensor.fill_(torch.nan)  # what was never written must not be read
    rows: dict[int, list[Tensor]] = {}
    for step in schedule:
        parts = [(SLOTS[i], start, PROMPTS[i][start:stop]) for i, start, stop in step]
        n = sum(stop - start for _, start, stop in step)
        logits = model(Step.pack(parts, range(n), CPU), cache)
        for (i, _, _), own in zip(step, logits.split([stop - start for _, start, stop in step]), strict=True):
            rows.setdefault(i, []).append(own)
    return {i: torch.cat(parts) for i, parts in rows.items()}


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_gives_the_logits_of_the_reference(variant: tuple, name: str) -> None:
    """Whole, ragged and packed, chunked, token by token: within 1e-4 of the plain forward pass, at every position."""
    params, weights, model = variant
    for i, logits in run(model, SCHEDULES[name]).items():
        assert logits.dtype == torch.float32
        torch.testing.assert_close(logits, forward(weights, params, PROMPTS[i]), atol=1e-4, rtol=0)


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    """Any way to run the three prompts to their ends in steps; the smallest is one step."""
    done, schedule = [0, 0, 0], []
    while any(done[i] < len(PROMPTS[i]) for i in range(3)):
        step = []
        for i in draw(st.permutations(range(3))):
            stop = len(PROMPTS[i]) - draw(st.integers(0, len(PROMPTS[i]) - done[i]))
            if stop > done[i]:
                step.append((i, done[i], stop))
                done[i] = stop
        if step:
            schedule.append(step)
    return schedule


@settings(max_examples=30, deadline=None)
@given(schedule=schedules())
def test_any_schedule_at_all_gives_the_logits_of_the_reference(model: Transformer, schedule: Schedule) -> None:
    """The law behind chunked prefill and continuous batching: how the work was cut leaves no trace."""
    for i, logits in run(model, schedule).items():
        torch.testing.assert_close(logits, REFERENCE[i], atol=1e-4, rtol=0)


def test_only_wanted_rows_reach_the_output_layer(model: Transformer) -> None:
    """Logits are made for `logit_rows` only, in their order; a step that decides nothing makes none."""
    seen: list[int] = []
    hook = model.output.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    try:
        parts = [(slot, 0, prompt) for slot, prompt in zip(SLOTS, PROMPTS, strict=True)]
        every = model(Step.pack(parts, range(20), CPU), model.new_cache(4, P))
        some = model(Step.pack(parts, [10, 12, 19], CPU), model.new_cache(4, P))
        none = model(Step.pack(parts, [], CPU), model.new_cache(4, P))
    finally:
        hook.remove()
    assert seen == [20, 3, 0]
    torch.testing.assert_close(some, every[[10, 12, 19]], atol=1e-5, rtol=0)
    assert none.shape == (0, SMALL["vocab_size"])


def test_modules_have_the_names_of_the_checkpoint(model: Transformer) -> None:
    """Every parameter is a tensor of the file, but for wq|wk|wv and w1|w3, which are joined."""
    names = list(held(model))
    assert sorted(source for name in names for source in stored_names(name)) == sorted(random_weights(SMALL))
    assert {name for name in names if len(stored_names(name)) > 1} == {
        f"layers.{i}.{part}.weight" for i in range(2) for part in ("attention.wqkv", "feed_forward.w13")
    }


def test_parallel_layers_are_those_of_fairscale(model: Transformer) -> None:
    block = model.layers[0]
    assert isinstance(model.tok_embeddings, ParallelEmbedding)
    for layer in (block.attention.wqkv, block.feed_forward.w13, model.output):
        assert isinstance(layer, ColumnParallelLinear)
    for layer in (block.attention.wo, block.feed_forward.w2):
        assert isinstance(layer, RowParallelLinear)


META_SIZES = {
    "7B": ({"dim": 4096, "n_layers": 32, "n_heads": 32}, 6_738_415_616),
    "13B": ({"dim": 5120, "n_layers": 40, "n_heads": 40}, 13_015_864_320),
    "70B": (
        {"dim": 8192, "n_layers": 80, "n_heads": 64, "n_kv_heads": 8, "multiple_of": 4096, "ffn_dim_multiplier": 1.3},
        68_976_648_192,
    ),
}


@pytest.mark.parametrize("name", META_SIZES)
def test_a_model_without_weights_takes_no_memory_and_has_metas_size(name: str) -> None:
    """Building Llama-2-70B costs a few megabytes; its parameters are as many as published."""
    sizes, count = META_SIZES[name]
    initialize(CPU, None)
    before = psutil.Process().memory_info().rss
    model = Transformer(ModelArgs(**sizes, vocab_size=32000))
    assert psutil.Process().memory_info().rss - before < 50e6
    assert all(parameter.is_meta and not parameter.requires_grad for parameter in model.parameters())
    assert sum(parameter.numel() for parameter in model.parameters()) == count


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_half_precision_is_close_to_float32(tmp_path: Path, dtype: torch.dtype, tolerance: float) -> None:
    """On the same rounded weights the logits differ from the float32 reference by a few percent of their spread."""
    weights = random_weights(SMALL, dtype)
    model = load_model(save(tmp_path, SMALL, weights), dtype)
    assert model.dtype == dtype
    for i, logits in run(model, SCHEDULES["decoding beside prefill"]).items():
        expected = forward(weights, SMALL, PROMPTS[i])
        assert logits.dtype == torch.float32
        assert (logits - expected).abs().max() < tolerance * expected.std() * 3
        assert (logits - expected).pow(2).mean().sqrt() < tolerance * expected.std()


def test_rms_norm_is_computed_in_float32() -> None:
    """The square of 300 overflows float16; the norm of a row of 300s is 1."""
    norm = RMSNorm(8, 1e-5)
    norm.weight = torch.nn.Parameter(torch.ones(8, dtype=torch.float16), requires_grad=False)
    out, _ = norm(torch.full((2, 8), 300.0, dtype=torch.float16))
    assert out.dtype == torch.float16
    torch.testing.assert_close(out, torch.ones(2, 8, dtype=torch.float16))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_callers_default_dtype_changes_nothing(model: Transformer, dtype: torch.dtype) -> None:
    def every_logit() -> Tensor:
        model.prepared.freqs_cis = None  # so that the table is made anew
        return torch.cat(list(run(model, SCHEDULES["decoding beside prefill"]).values()))

    expected, before = every_logit(), torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        assert torch.equal(every_logit(), expected)
    finally:
        torch.set_default_dtype(before)
