"""Decode steps that run ahead of the host: on a CPU with a capture that only repeats, and on CUDA with graphs."""

import gc
import random
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from emulation import flash_kernel
from engines import is_clean, prompts_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from near_ties import assert_agree, logits_of

from llama import Llama, SamplingParams, parallel
from llama.engine.decode_loop import (
    WORTH_CAPTURE,
    Choice,
    DecodeLoop,
    Row,
    Tokens,
    Work,
    _sizes,
    as_it_is,
    can_loop,
    graph_capture,
)
from llama.engine.engine import Engine
from llama.errors import NumericalError
from llama.model.forward import Prepared
from llama.model.kv_cache import KVCache
from llama.model.step import Step
from llama.request import Request

__all__ = ["flash_kernel"]


class Watched(DecodeLoop):
    """Notes what is launched and read, in order; the capture repeats its work, as a graph would."""

    def __init__(self, *args: object) -> None:
        self.captured: list[Work] = []
        self.noted: list[str] = []
        super().__init__(*args, capture=self._record)

    def _record(self, work: Work) -> Work:
        self.captured.append(work)
        return work

    def load(self, rows: Sequence[Row]) -> None:
        self.noted.append(f"load {len(rows)}")
        super().load(rows)

    def launch(self, noise: Sequence[float]) -> Tokens:
        read = super().launch(noise)
        number = self._launches
        self.noted.append(f"launch {number}")

        def tokens() -> list[int]:
            self.noted.append(f"read {number}")
            return read()

        return tokens


@pytest.fixture
def looped(build: Callable[..., Llama], flash_kernel: None) -> Callable[..., Llama]:
    """Build a `Llama` whose decode steps go through a watched loop, as they do on CUDA."""

    def build_looped(**options: object) -> Llama:
        llama = build(**options)
        llama.engine.loop = Watched(llama.model, llama.engine.cache)
        return llama

    return build_looped


def test_a_cpu_has_no_loop(build: Callable[..., Llama]) -> None:
    engine = build().engine
    assert engine.loop is None and not can_loop(engine.model, engine.cache)


def test_sizes_are_powers_of_two_up_to_the_slots() -> None:
    assert [_sizes(n) for n in (1, 2, 3, 8, 9, 20)] == [
        [1],
        [1, 2],
        [1, 2, 3],
        [1, 2, 4, 8],
        [1, 2, 4, 8, 9],
        [1, 2, 4, 8, 16, 20],
    ]


PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0, 0, 0.8, 1.5]),
    top_p=st.sampled_from([0.5, 0.9, 1.0]),
    top_k=st.sampled_from([0, 5]),
    max_gen_len=st.integers(3, 12),
    min_gen_len=st.sampled_from([0, 0, 0, 3]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.0, 3.0]),
    logprobs=st.sampled_from([False, False, False, True]),
    seed=st.integers(0, 99),
    n=st.sampled_from([1, 1, 2]),
)


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(1, 60), PARAMS), min_size=1, max_size=9), st.integers(0, 9))
def test_answers_are_those_of_the_plain_engine(
    build: Callable[..., Llama], looped: Callable[..., Llama], small: dict, requests: list, seed: int
) -> None:
    """Of any mixture: greedy and sampled, with and without what is left to the host, more than there are slots."""
    prompts = prompts_of([length for length, _ in requests], small["vocab_size"], seed)
    params = [own for _, own in requests]
    options = {"max_batch_size": 3, "max_step_tokens": 16, "max_seq_len": 64}
    plain = build(**options)
    expected = plain.generate(prompts, params=params)
    llama = looped(**options)
    tokens, logprobs = llama.generate(prompts, params=params)
    samples = [(prompt, own) for prompt, own in zip(prompts, params, strict=True) for _ in range(own.n)]
    # Each difference must be a near-tie; that there are few of them cannot be asked of a single token.
    agreed = assert_agree(
        tokens, expected[0], [p for p, _ in samples], logits_of(plain), [p for _, p in samples], at_least=0
    )
    assert is_clean(llama.engine)
    if logprobs:
        for n, own, other in zip(agreed, logprobs, expected[1], strict=True):
            assert own[:n] == pytest.approx(other[:n], abs=1e-4)


def test_the_host_is_one_step_behind(looped: Callable[..., Llama], small: dict) -> None:
    """Each step is launched before the one before it is read; the batch is loaded once; the last is not outrun."""
    llama = looped(max_batch_size=2)
    llama.generate(
        prompts_of([3, 3], small["vocab_size"]), params=SamplingParams(temperature=0, max_gen_len=6, stop_token_ids=())
    )
    launched = [word for word in llama.engine.loop.noted if word != "load 2"]
    assert llama.engine.loop.noted[0] == "load 2" and len(launched) == len(llama.engine.loop.noted) - 1
    # The first token comes with the prompt, five from the loop.
    assert launched == [
        "launch 1", "launch 2", "read 1", "launch 3", "read 2", "launch 4", "read 3", "launch 5", "read 4", "read 5",
    ]  # fmt: skip


def test_what_was_computed_past_an_end_is_dropped(looped: Callable[..., Llama], small: dict) -> None:
    """A sequence that meets its stop token had a step too many on its way; the others go on, and its slot is free."""
    prompts = prompts_of([5, 9, 7], small["vocab_size"])
    plain = looped(max_batch_size=3)
    rows = plain.generate(prompts, params=SamplingParams(temperature=0, max_gen_len=12))[0]
    stop = next(token for i, token in enumerate(rows[0]) if i >= 3 and token not in rows[0][:i])
    llama = looped(max_batch_size=3)
    params = [
        SamplingParams(temperature=0, max_gen_len=12, stop_token_ids=(stop,)),
        *[SamplingParams(temperature=0, max_gen_len=12)] * 2,
    ]
    found = llama.generate(prompts, params=params)[0]
    expected = [rows[0][: rows[0].index(stop)], rows[1], rows[2]]
    assert_agree(found, expected, prompts, logits_of(plain), params)
    assert llama.engine.computed_tokens == sum(map(len, prompts)) + sum(map(len, found)) - 2  # two lack their last
    assert is_clean(llama.engine)


def test_a_kind_of_step_is_captured_once_when_it_has_paid(looped: Callable[..., Llama], small: dict) -> None:
    llama = looped(max_batch_size=4)
    loop = llama.engine.loop
    prompt = prompts_of([3], small["vocab_size"])
    params = SamplingParams(temperature=0, max_gen_len=WORTH_CAPTURE + 1)
    llama.generate(prompt, params=params)
    assert not loop.captured
    llama.generate(prompt, params=params)
    assert set(loop._steps) == {(1, Choice.GREEDY)} and len(loop.captured) == 1
    llama.generate(prompt * 3, params=SamplingParams(temperature=1, max_gen_len=2 * WORTH_CAPTURE))
    assert (4, Choice.SAMPLED) in loop._steps and len(loop.captured) == len(loop._steps)


@pytest.mark.parametrize("more", [{"logprobs": True}, {"repetition_penalty": 1.5}], ids=str)
def test_steps_whose_tokens_the_host_chooses_are_captured_too(
    build: Callable[..., Llama], looped: Callable[..., Llama], small: dict, more: dict
) -> None:
    """One such request among others, and a number of rows that is padded: the same tokens and log-probabilities."""
    prompts = prompts_of([4, 8, 2], small["vocab_size"])
    params = [
        SamplingParams(temperature=t, max_gen_len=30, seed=5, **own) for t, own in ((0, more), (0.8, {}), (0, {}))
    ]
    llama = looped(max_batch_size=5)
    found = llama.generate(prompts, params=params)
    assert set(llama.engine.loop._steps) == {(4, Choice.ON_HOST)} and len(llama.engine.loop.captured) == 1
    plain = build(max_batch_size=5)
    expected = plain.generate(prompts, params=params)
    agreed = assert_agree(found[0], expected[0], prompts, logits_of(plain), params)
    if found[1]:
        assert found[1][0][: agreed[0]] == pytest.approx(expected[1][0][: agreed[0]], abs=1e-4)


def test_captured_work_reads_and_writes_only_its_buffers(looped: Callable[..., Llama], small: dict) -> None:
    """All tensors of a step that outlive it are where they were: a graph that was recorded once would find them."""
    llama = looped(max_batch_size=4)
    loop, cache = llama.engine.loop, llama.engine.cache
    held = [loop._ints, loop._floats, loop._chosen, loop._row_numbers, *cache.keys, *cache.values]
    before = [tensor.data_ptr() for tensor in held]
    llama.generate(prompts_of([4, 8, 2], small["vocab_size"]), params=SamplingParams(temperature=0.7, max_gen_len=30))
    after = [loop._ints, loop._floats, loop._chosen, loop._row_numbers, *cache.keys, *cache.values]
    assert [tensor.data_ptr() for tensor in after] == before


def test_padding_changes_no_row(looped: Callable[..., Llama], small: dict) -> None:
    """Three sequences in a step of four: each is what it is alone, and no other slot is written."""
    llama = looped(max_batch_size=5)
    for tensor in (*llama.engine.cache.keys, *llama.engine.cache.values):
        tensor.fill_(7)
    prompts = prompts_of([4, 8, 2], small["vocab_size"])
    params = SamplingParams(temperature=0, max_gen_len=20)
    together = llama.generate(prompts, params=params)[0]
    assert (4, Choice.GREEDY) in llama.engine.loop._steps
    for slot in (3, 4):
        assert all((tensor[:, slot] == 7).all() for tensor in (*llama.engine.cache.keys, *llama.engine.cache.values))
    alone = [looped().generate([prompt], params=params)[0][0] for prompt in prompts]
    assert_agree(together, alone, prompts, logits_of(llama))


def test_padding_keeps_the_tokens_of_what_it_repeats() -> None:
    """Even where a row of a product is rounded otherwise than the same row elsewhere, and another token is best."""

    class Rounding:
        device = torch.device("cpu")
        prepared = Prepared()

        def __call__(self, step: Step, cache: KVCache) -> torch.Tensor:
            best = step.tokens * 3 + torch.arange(len(step.tokens))
            return torch.nn.functional.one_hot(best % 97, 97).float()

    cache = KVCache(1, 1, 4, 16, 8, torch.float32, Rounding.device)
    loop = DecodeLoop(Rounding(), cache, capture=as_it_is)
    loop.load([Row(5 + slot, slot, 2, 0.0, 1.0, 0, 0.0) for slot in range(3)])
    for step in range(3):
        loop.launch([])()
        tokens, _, positions = loop._ints[:3].tolist()
        assert tokens[3] == tokens[0] and tokens[1] != tokens[0]
        assert positions == [3 + step] * 4


@pytest.mark.parametrize("seed", range(6))
def test_ctrl_c_while_a_step_is_ahead_loses_nothing(
    build: Callable[..., Llama], looped: Callable[..., Llama], small: dict, seed: int
) -> None:
    """Interrupted anywhere, the engine goes on with the same tokens."""
    prompts = prompts_of([5, 9, 7], small["vocab_size"])
    params = SamplingParams(temperature=0.9, max_gen_len=15)
    alone = SamplingParams(temperature=0.9, max_gen_len=15, seed=3)
    expected = [build().generate([prompt], params=alone)[0][0] for prompt in prompts]
    rng = random.Random(seed)

    def sometimes_interrupt(*_: object) -> None:
        if rng.random() < 0.1:
            raise KeyboardInterrupt

    engine: Engine = looped().engine
    launch = engine.loop.launch

    def interrupted_launch(noise: Sequence[float]) -> Tokens:
        sometimes_interrupt()
        tokens = launch(noise)
        sometimes_interrupt()
        return lambda: (sometimes_interrupt(), tokens())[1]

    engine.loop.launch = interrupted_launch
    requests = [Request(prompt, params, 3, frozenset({2})) for prompt in prompts]
    for request in requests:
        engine.add(request, sometimes_interrupt)
    interrupted = 0
    while not engine.idle:
        try:
            engine.step()
        except KeyboardInterrupt:
            interrupted += 1
    assert interrupted > 2
    assert_agree([request.tokens for request in requests], expected, prompts, logits_of(build()), params)


def test_requests_that_are_cancelled_or_come_while_a_step_is_ahead(
    build: Callable[..., Llama], looped: Callable[..., Llama], small: dict
) -> None:
    """The one who leaves gets nothing more, the one who comes gets the slot, and what others get does not change."""
    prompts = prompts_of([5, 9, 7, 11], small["vocab_size"])
    greedy = SamplingParams(temperature=0, max_gen_len=14)
    plain = build()
    expected = plain.generate(prompts, params=greedy)[0]
    engine: Engine = looped(max_batch_size=2).engine
    requests = [Request(prompt, greedy, 3, frozenset({2})) for prompt in prompts]
    engine.add(requests[0])
    engine.add(requests[1])
    for _ in range(4):
        engine.step()
    assert engine._ahead
    seen = len(requests[0].tokens)
    engine.finish(requests[0], "cancelled")
    engine.add(requests[2])
    engine.add(requests[3])
    while not engine.idle:
        engine.step()
    found = [request.tokens for request in requests]
    assert_agree(found, [expected[0][:seen], *expected[1:]], prompts, logits_of(plain))
    engine.clear_prefix_cache()
    assert engine._ahead is None and is_clean(engine)


def test_logits_that_are_not_finite_end_their_own_request(looped: Callable[..., Llama], small: dict) -> None:
    llama = looped(max_batch_size=2)
    good, bad = prompts_of([5, 9], small["vocab_size"])
    expected = llama.generate([good], params=SamplingParams(temperature=0, max_gen_len=12))[0][0]
    engine = looped(max_batch_size=2).engine
    requests = [
        Request(prompt, SamplingParams(temperature=0, max_gen_len=12), 3, frozenset({2})) for prompt in (good, bad)
    ]
    for request in requests:
        engine.add(request)
    for _ in range(3):
        engine.step()
    engine.cache.values[0][:, requests[1] and engine._sequences[requests[1]].slot] = torch.nan
    while not engine.idle:
        engine.step()
    assert_agree([requests[0].tokens], [expected], [good], logits_of(llama))
    assert requests[0].finish_reason == "length"
    assert isinstance(requests[1].error, NumericalError) and len(requests[1].tokens) < 12


def test_where_graphs_fail_steps_go_on_without(
    looped: Callable[..., Llama], small: dict, capsys: pytest.CaptureFixture
) -> None:
    """And it is said, once."""

    def fail(work: Work) -> Work:
        raise RuntimeError("operation not permitted when stream is capturing\nmore about it")

    prompt, params = prompts_of([3], small["vocab_size"]), SamplingParams(temperature=0, max_gen_len=40)
    expected = looped().generate(prompt * 2, params=params)
    llama = looped()
    llama.engine.loop._capture = fail
    capsys.readouterr()
    assert llama.generate(prompt * 2, params=params) == expected
    llama.generate(prompt, params=params)
    assert capsys.readouterr().err == (
        "llama: no CUDA graphs (operation not permitted when stream is capturing): decode steps are slower without\n"
    )


def test_graphs_of_a_loop_share_memory_and_a_stream_and_with_other_loops_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Graph:
        def pool(self) -> object:
            return self.own_pool

    recorded = []

    @contextmanager
    def record(graph: Graph, pool: object, stream: object) -> Iterator[None]:
        assert current == [stream]
        graph.own_pool = pool or object()
        recorded.append((graph.own_pool, stream))
        yield

    @contextmanager
    def entered(stream: object) -> Iterator[None]:
        current.append(stream)
        try:
            yield
        finally:
            current.pop()

    current: list[object] = []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", record)
    monkeypatch.setattr(torch.cuda, "Stream", object)
    monkeypatch.setattr(torch.cuda, "stream", entered)
    monkeypatch.setattr(Graph, "replay", lambda self: None, raising=False)

    def fail() -> None:
        raise RuntimeError

    one, other = graph_capture(), graph_capture()
    with pytest.raises(RuntimeError):  # its memory is nobody's
        one(fail)
    assert current == []
    for capture in (one, one, other, one, other):
        capture(lambda: None)
    failed, *held = recorded
    assert [held.index(memory) for memory in held] == [0, 0, 2, 0, 2]
    assert held[0][0] != held[2][0] != failed[0] != held[0][0] and held[0][1] != held[2][1]


def test_graphs_are_dropped_before_processes_part(
    looped: Callable[..., Llama], small: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NCCL would wait for their end for ever. What runs after that runs without."""
    llama = looped()
    prompt, params = prompts_of([3], small["vocab_size"]), SamplingParams(temperature=0, max_gen_len=20)
    expected = llama.generate(prompt, params=params)
    recorded = [weakref.ref(step) for step in llama.engine.loop._steps.values()]
    llama.engine.loop.captured.clear()
    del looped().engine.loop  # one that is gone is not asked
    parted = []
    monkeypatch.setattr(parallel.dist, "get_backend", lambda: "nccl")
    monkeypatch.setattr(parallel.fairscale_groups, "destroy_model_parallel", lambda: None)
    monkeypatch.setattr(
        parallel.dist, "destroy_process_group", lambda: parted.append([graph() is None for graph in recorded])
    )
    parallel.leave()
    assert parted == [[True] * len(recorded)] and recorded
    assert llama.generate(prompt, params=params) == expected


@pytest.mark.cuda
def test_graphs_outlive_other_loops(build: Callable[..., Llama], small: dict, capsys: pytest.CaptureFixture) -> None:
    """Those that were recorded before and after another loop's, which are gone when they are replayed."""
    prompts, params = prompts_of([4], small["vocab_size"]), SamplingParams(temperature=0, max_gen_len=40)

    def answer(llama: Llama) -> list[list[int]]:
        llama.engine.clear_prefix_cache()
        return llama.generate(prompts, params=params)[0]

    first, other = build(device="cuda", dtype="bfloat16"), build(device="cuda", dtype="bfloat16")
    expected = answer(first)
    assert answer(other) == expected
    del other
    gc.collect()
    third = build(device="cuda", dtype="bfloat16")
    assert [answer(llama) for llama in (first, third, first)] == [expected] * 3
    assert "no CUDA graphs" not in capsys.readouterr().err


@pytest.mark.cuda
@pytest.mark.parametrize("temperature", [0, 0.8])
def test_graphs_compute_what_the_same_steps_do_without(
    ckpt_dir: object, build: Callable[..., Llama], small: dict, temperature: float
) -> None:
    """Bit for bit: the tokens of many steps, and the keys and values that they leave."""
    found = []
    for capture in (True, False):
        llama = build(device="cuda", dtype="bfloat16")
        if not capture:
            llama.engine.loop._capture = as_it_is
        params = SamplingParams(temperature=temperature, max_gen_len=60, seed=1)
        tokens = llama.generate(prompts_of([4, 8, 2], small["vocab_size"]), params=params)[0]
        assert capture == any(not isinstance(step, type(lambda: 0)) for step in llama.engine.loop._steps.values())
        found.append((tokens, [tensor[:, :3, :30].clone() for tensor in llama.engine.cache.keys]))
    assert found[0][0] == found[1][0]
    assert all(a.equal(b) for a, b in zip(found[0][1], found[1][1], strict=True))


@pytest.mark.cuda
def test_nothing_waits_inside_the_loop(build: Callable[..., Llama], small: dict) -> None:
    """No step synchronises the device, but for reading the tokens of the one before it."""
    llama = build(device="cuda", dtype="bfloat16")
    params = SamplingParams(temperature=0.8, max_gen_len=40)
    prompts = prompts_of([4, 8, 2], small["vocab_size"])
    llama.generate(prompts, params=params)
    loop = llama.engine.loop
    loop.load([Row(5, slot, 10, 0.8, 0.9, 0, 0.0) for slot in range(3)])
    torch.cuda.set_sync_debug_mode("error")
    try:
        launched = [loop.launch([0.5] * 3) for _ in range(2)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(0 <= token < small["vocab_size"] for read in launched for token in read())


def test_texts_of_a_form_are_chosen_on_the_host(looped: Callable[..., Llama], build: Callable[..., Llama]) -> None:
    """Beside free ones too, which the device goes on with when they are alone."""
    pytest.importorskip("llguidance")
    free, formed = (
        SamplingParams(temperature=0, max_gen_len=n, regex=regex) for n, regex in ((12, None), (6, "[ab]+c"))
    )
    llama, params = looped(), [free, formed]
    results = llama.text_completion(["once", "twice"], params=params)
    expected = build().text_completion(["once", "twice"], params=params)
    assert [r["generation"] for r in results] == [r["generation"] for r in expected]
    assert set(results[1]["generation"]) <= set("abc")
    assert "load 2" in llama.engine.loop.noted and any(note.startswith("launch") for note in llama.engine.loop.noted)
