"""Sampling: each filter is its definition, draws follow the distribution, and noise is a pure function."""

import math
from collections import Counter
from collections.abc import Iterator

import numpy
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from reference import kept

import llama.engine.sampling as sampling
from llama.engine.sampling import Behind, adjust, forbid, noise_key, sample, top_logprobs, uniform
from llama.kernels import library
from llama.kernels import sample as kernel
from llama.request import SamplingParams, derive_seed

VARIANTS = range(library.variant() + 1) if library.load()[0] else []


@pytest.fixture(
    scope="module", params=["sorted", *VARIANTS], ids=["sorted", *library.VARIANTS[: len(VARIANTS)]], autouse=True
)
def way(request: pytest.FixtureRequest) -> Iterator[str | int]:
    """Every test with PyTorch's operators, as on a GPU, and with the kernel in each variant of this processor."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "sorted":
            patch.setattr(sampling, "cpu_library", lambda logits: None)
        else:
            patch.setattr(kernel, "variant", lambda: request.param)
        yield request.param


def draw(logits: torch.Tensor, noise: list[float], temperature=1.0, top_p=1.0, top_k=0, min_p=0.0) -> list[int]:
    """One draw a number of noise, all rows with the same logits (V,) or their own (R, V)."""
    rows = len(noise)
    logits = logits.expand(rows, -1)
    numbers = torch.tensor([[temperature] * rows, [top_p] * rows, [min_p] * rows, noise])
    return sample(logits, numbers, torch.full((rows,), top_k)).tolist()


def clear(logits: torch.Tensor, temperature=1.0, top_p=1.0, top_k=0, min_p=0.0) -> bool:
    """Whether what the filters keep does not hang on a rounding error."""
    near = [(top_p + d if top_p < 1 else 1.0, min_p * (1 + e)) for d in (-1e-6, 1e-6) for e in (-1e-6, 1e-6)]
    if min_p == 1:
        near = [(p, 1.0) for p, _ in near]
    return len({tuple(kept(logits, temperature, p, top_k, m)) for p, m in near}) == 1


def critical(freedom: int) -> float:
    """The chi-squared value that is exceeded by chance once in 10,000 (Wilson and Hilferty's approximation)."""
    return freedom * (1 - 2 / (9 * freedom) + 3.719 * math.sqrt(2 / (9 * freedom))) ** 3


FILTERS = [
    {}, {"temperature": 0.6}, {"temperature": 1.7}, {"top_k": 7}, {"top_p": 0.8}, {"min_p": 0.15},
    {"temperature": 0.9, "top_k": 12, "top_p": 0.85, "min_p": 0.05},
]  # fmt: skip


@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize("source", ["seeds", "positions"])
def test_draws_follow_the_distribution(filters: dict, source: str) -> None:
    """Chi-squared over 20,000 draws, with the noise of many requests or of many positions of one."""
    logits = torch.randn(24, generator=torch.Generator().manual_seed(1)) * 1.5
    n = 20_000
    if source == "seeds":
        noise = [uniform(noise_key(seed, [1, 5, 9]), 3) for seed in range(n)]
    else:
        key = noise_key(7, [1, 5, 9])
        noise = [uniform(key, position) for position in range(n)]
    counts = Counter(draw(logits, noise, **filters))
    expected = kept(logits, **filters)
    assert set(counts) <= set(expected)
    big = {token: p for token, p in expected.items() if p * n >= 5}
    chi = sum((counts[token] - p * n) ** 2 / (p * n) for token, p in big.items())
    assert chi < critical(len(big) - 1)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10**6), vocab=st.sampled_from([1, 2, 30, 257, 700]), spread=st.sampled_from([0.1, 2.0, 8.0]),
    ties=st.booleans(), top_p=st.sampled_from([0.05, 0.5, 0.9, 0.999, 1.0]), top_k=st.sampled_from([0, 1, 5, 256, 300]),
    min_p=st.sampled_from([0.0, 0.01, 0.5, 1.0]), noise=st.floats(0, 1, exclude_max=True, width=32),
)  # fmt: skip
def test_the_draw_is_the_definitions(
    seed: int, vocab: int, spread: float, ties: bool, top_p: float, top_k: int, min_p: float, noise: float
) -> None:
    """The token in which noise · kept mass falls, in the order of ids."""
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(seed)) * spread
    if ties:
        logits = logits.round()
    assume(clear(logits, 1.0, top_p, top_k, min_p))
    expected = kept(logits, 1.0, top_p, top_k, min_p)
    token = draw(logits, [noise], top_p=top_p, top_k=top_k, min_p=min_p)[0]
    before = sum(p for other, p in expected.items() if other < token)
    assert before - 1e-5 <= noise <= before + expected[token] + 1e-5


@settings(deadline=None, max_examples=80)
@given(
    seed=st.integers(0, 10**6), vocab=st.sampled_from([2, 30, 300, 600]), levels=st.integers(1, 12),
    temperature=st.sampled_from([0.5, 1.0, 2.0]), top_p=st.sampled_from([0.05, 0.43, 0.86, 1.0]),
    top_k=st.sampled_from([0, 1, 7, 255, 256, 257]), min_p=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
)  # fmt: skip
def test_exactly_the_kept_tokens_are_drawn(
    seed: int, vocab: int, levels: int, temperature: float, top_p: float, top_k: int, min_p: float
) -> None:
    """Noise in the middle of each kept token's share draws that token; of like tokens the lower ones are kept."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randint(levels, (vocab,), generator=g) * (4 * temperature / levels)  # shares that float32 can tell
    filters = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p}
    assume(clear(logits, **filters))
    expected = kept(logits, **filters)
    shares = torch.tensor([0.0, *expected.values()], dtype=torch.float64).cumsum(0)
    assert draw(logits, ((shares[:-1] + shares[1:]) / 2).tolist(), **filters) == list(expected)


def test_top_p_is_of_what_top_k_keeps() -> None:
    """Of 0.5, 0.3 and 0.2 two are kept, then those before which come at most 0.65 · 0.8."""
    logits = torch.tensor([0.3, 0.5, 0.2]).log()
    assert draw(logits, [0.1, 0.5, 0.9], top_k=2, top_p=0.65) == [0, 1, 1]
    assert draw(logits, [0.1, 0.5, 0.9], top_k=2, top_p=0.6) == [1, 1, 1]


def test_like_tokens_go_to_the_lower_and_top_p_itself_is_kept() -> None:
    """A token is kept where the probability before it is ≤ top_p, equal included."""
    logits = torch.zeros(600)
    noise = [(i + 0.5) / 3 for i in range(3)]
    assert draw(logits, noise, top_k=3) == [0, 1, 2]
    assert draw(logits, noise, top_p=2.5 / 600) == [0, 1, 2]
    assert draw(torch.zeros(4), noise, top_p=0.5) == [0, 1, 2]


@pytest.mark.parametrize("filters", [{}, {"top_p": 0.9}, {"top_k": 2}])
@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-38, 1e-44, 1e-60])
def test_the_colder_the_more_certain(temperature: float, filters: dict) -> None:
    """However small a temperature is, a token of the vocabulary is drawn: the best one, at last."""
    assert draw(torch.tensor([1.0, 3.0, 2.0]), [0.0, 0.5, 0.999], temperature, **filters) == [1, 1, 1]


def test_the_kernel_draws_what_a_full_sort_draws(way: str | int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of flat rows and steep ones, ties included, whatever the filters."""
    if way == "sorted":
        pytest.skip("it would be compared with itself")
    g = torch.Generator().manual_seed(0)
    noise = torch.rand(40, generator=g).tolist()
    logits = torch.randn(40, 2000, generator=g) * torch.linspace(0.1, 6, 40)[:, None]
    for rows in (logits, logits.round(), torch.zeros(40, 2000), torch.randn(40, 1), torch.randn(40, 64)):
        for filters in (
            {},
            {"top_p": 0.9},
            {"top_k": 50},
            {"min_p": 0.1},
            {"top_p": 0.7, "top_k": 80, "min_p": 0.01},
            {"top_p": 0.5, "top_k": 1999, "min_p": 0.4},
            {"top_p": 0.0},
            {"top_p": 0.999, "top_k": 3000},
        ):
            found = draw(rows, noise, **filters)
            with monkeypatch.context() as patch:
                patch.setattr(sampling, "cpu_library", lambda logits: None)
                assert draw(rows, noise, **filters) == found


def test_rows_do_not_depend_on_each_other() -> None:
    """A batch of mixed parameters draws what each row draws alone; temperature 0 takes the largest logit."""
    g = torch.Generator().manual_seed(2)
    logits = torch.randn(12, 500, generator=g) * 3
    numbers = torch.rand(4, 12, generator=g)
    numbers[0] = torch.tensor([0, 1.0, 0.5] * 4)
    top_k = torch.tensor([0, 3, 0, 40] * 3)
    together = sample(logits, numbers, top_k)
    for i in range(12):
        assert sample(logits[i : i + 1], numbers[:, i : i + 1], top_k[i : i + 1])[0] == together[i]
    greedy = numbers[0] == 0
    assert torch.equal(together[greedy], logits.argmax(-1)[greedy])


@pytest.mark.parametrize("noise", [0.0, 1 - 2**-24])
@pytest.mark.parametrize("filters", FILTERS)
def test_extreme_noise_draws_a_kept_token(noise: float, filters: dict) -> None:
    logits = torch.tensor([-math.inf, 2.0, 1.0, -math.inf, 0.5, 0.1, -7.0, -math.inf])
    tokens = draw(logits, [noise], **filters)
    shares = {token: p for token, p in kept(logits, **filters).items() if p > 0}
    below = torch.tensor(list(shares.values()), dtype=torch.float64).cumsum(0)
    assert tokens == [list(shares)[torch.searchsorted(below, noise, right=True)]]


def test_no_order_of_addition_changes_a_draw(way: str | int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does any draw a token of probability 0, wherever the noise falls."""
    if way != "sorted":
        pytest.skip("the kernel adds in an order of its own")
    g = torch.Generator().manual_seed(0)
    logits = (torch.randn(1500, generator=g) * 2).masked_fill(torch.rand(1500, generator=g) < 0.5, -math.inf)
    edges = (logits.softmax(-1).double().cumsum(-1) * 2**24).long()  # where a rounding error may matter
    noise = (torch.cat((edges - 1, edges)).clamp(0, 2**24 - 1).unique() / 2**24).tolist()
    expected = [draw(logits, noise, top_p=top_p) for top_p in (1.0, 0.9)]
    assert all(logits[token] > -math.inf for tokens in expected for token in tokens)
    plain = torch.Tensor.cumsum

    def backwards(x: torch.Tensor, dim: int) -> torch.Tensor:
        return x.sum(dim, keepdim=True) - plain(x.flip(dim), dim).flip(dim) + x

    def in_parts(x: torch.Tensor, dim: int) -> torch.Tensor:
        parts = torch.nn.functional.pad(x, (0, -x.shape[1] % 7)).unflatten(1, (-1, 7))
        sums = plain(parts, -1)
        before = torch.nn.functional.pad(plain(sums[..., -1], -1)[:, :-1], (1, 0))
        return (sums + before[..., None]).flatten(1)[:, : x.shape[1]].contiguous()

    for added in (backwards, in_parts):
        monkeypatch.setattr(torch.Tensor, "cumsum", added)
        assert [draw(logits, noise, top_p=top_p) for top_p in (1.0, 0.9)] == expected


def test_what_is_not_finite_draws_a_token_of_the_vocabulary() -> None:
    """Which one does not matter: the request is refused. But a GPU that looks up another one is lost."""
    logits = torch.randn(6, 50)
    logits[0, 3], logits[1, 7], logits[2] = math.nan, math.inf, math.nan
    for filters in ({}, {"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}):
        for noise in (0.0, 0.5, 1 - 2**-24):
            tokens = draw(logits, [noise] * 6, **filters)
            assert all(0 <= token < 50 for token in tokens)


def test_noise_is_a_function_of_seed_prompt_and_position() -> None:
    """Numbers in [0, 1), exact in float32, and other ones for another seed, prompt or position."""
    keys = [noise_key(seed, prompt) for seed in (0, 1, 2**64 - 1) for prompt in ([1], [1, 2], [2, 1], [1, 1])]
    numbers = [uniform(key, position) for key in keys for position in range(50)]
    assert len(set(numbers)) == len(numbers)
    assert all(0 <= number < 1 and float(torch.tensor(number)) == number for number in numbers)
    assert numbers == [uniform(key, position) for key in keys for position in range(50)]
    assert 0.45 < sum(numbers) / len(numbers) < 0.55
    seeds = {derive_seed(seed, counter) for seed in (1, 2) for counter in range(100)}
    assert len(seeds) == 200
    assert all(0 <= seed < 2**63 for seed in seeds)


def changed(
    logits: list[float], prompt: list[int], made: list[int], stops: tuple = (), **params: object
) -> list[float]:
    rows = torch.tensor([logits])
    adjust(rows, [Behind(SamplingParams(**params), prompt, made, frozenset(stops))])
    return rows[0].tolist()


INF = -math.inf


@pytest.mark.parametrize(
    ("params", "made", "stops", "expected"),
    [
        ({"logit_bias": {1: 0.5, 3: INF}}, [], (), [2.0, -0.5, 0.5, INF]),
        ({"repetition_penalty": 2.0}, [2], (), [1.0, -2.0, 0.25, -2.0]),
        ({"presence_penalty": 0.5}, [2, 2], (), [2.0, -1.0, 0.0, -2.0]),
        ({"frequency_penalty": 0.5}, [2, 2, 3], (), [2.0, -1.0, -0.5, -2.5]),
        ({"bad_words": [[3]]}, [], (), [2.0, -1.0, 0.5, INF]),
        ({"bad_words": [[2, 3], [3, 0]]}, [2], (), [2.0, -1.0, 0.5, INF]),
        ({"bad_words": [[0, 1, 2]]}, [], (), [2.0, -1.0, INF, -2.0]),
        ({"bad_words": [[0, 1, 2]]}, [3], (), [2.0, -1.0, 0.5, -2.0]),
        ({"bad_words": [[1, 2, 3]]}, [2], (), [2.0, -1.0, 0.5, INF]),
        ({"min_gen_len": 2}, [3], (0, 2), [INF, -1.0, INF, -2.0]),
        ({"min_gen_len": 2}, [3, 3], (0, 2), [2.0, -1.0, 0.5, -2.0]),
        ({"logit_bias": {0: 2.0}, "repetition_penalty": 2.0, "presence_penalty": 1.0}, [0], (), [1.0, -2.0, 0.5, -2.0]),
    ],
)
def test_adjust(params: dict, made: list[int], stops: tuple, expected: list[float]) -> None:
    """Numbers by hand, for logits 2, −1, 0.5, −2 after the prompt 0 1; the order is bias, repetition, the others."""
    logits = [2.0, -1.0, 0.5, -2.0]
    assert changed(logits, [0, 1], made, stops, **params) == pytest.approx(expected)


def test_rows_are_changed_together_as_each_alone() -> None:
    """To the last bit, plain rows among them."""
    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    every = [
        {"frequency_penalty": 0.1, "presence_penalty": 0.3}, {}, {"repetition_penalty": 1.3, "logit_bias": {3: 1}},
        {"frequency_penalty": 0.7, "logit_bias": {3: -0.1, 39: -math.inf}, "bad_words": [[4], [7, 5]]},
        {"min_gen_len": 9},
    ]  # fmt: skip
    rows = [Behind(SamplingParams(**one), [1, n, 5], [7, n, 7, 7], frozenset({2})) for n, one in enumerate(every)]
    together, alone = logits.clone(), logits.clone()
    adjust(together, rows)
    for number, row in enumerate(rows):
        adjust(alone[number : number + 1], [row])
    assert torch.equal(together, alone) and together[1].equal(logits[1]) and not together[0].equal(logits[0])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_what_a_mask_has_no_bit_of_is_forbidden(device: str) -> None:
    """In the rows that have one, whatever the words hold beyond the vocabulary."""
    allowed = [[0, 31, 32, 69], [], list(range(70))]
    masks = [numpy.packbits([token in row for token in range(96)], bitorder="little").view("uint32") for row in allowed]
    masks[0][2] |= 1 << 20
    logits = torch.zeros(4, 70, device=device)
    forbid(logits, [3, 0, 1], masks)
    assert [row.nonzero()[:, 0].tolist() for row in logits.cpu() == 0] == [[], allowed[2], list(range(70)), allowed[0]]


def test_the_bits_of_words_are_the_same_on_every_device() -> None:
    words = numpy.array([[1, 0x80000000], [0xFFFFFFFE, 6]], dtype=numpy.uint32)
    bits = numpy.unpackbits(words.view(numpy.uint8), axis=1, bitorder="little")
    assert sampling._bits(torch.from_numpy(words.view(numpy.int32))).int().tolist() == bits.tolist()


def test_plain_params_change_nothing() -> None:
    assert SamplingParams().plain
    for field in ({"logit_bias": {1: 1.0}}, {"min_gen_len": 1}, {"repetition_penalty": 1.1}, {"bad_words": [[1]]},
                  {"presence_penalty": 0.1}, {"frequency_penalty": -0.1}):  # fmt: skip
        assert not SamplingParams(**field).plain


def test_top_logprobs_are_the_best_in_order() -> None:
    rows = torch.tensor([[-3.0, -1.0, -2.0], [-0.5, -4.0, -1.0]])
    assert top_logprobs(rows, 2) == [{1: -1.0, 2: -2.0}, {0: -0.5, 2: -1.0}]
    assert [list(top) for top in top_logprobs(rows, 9)] == [[1, 2, 0], [0, 2, 1]]
