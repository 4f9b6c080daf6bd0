"""Placements by arithmetic: maps worked out by hand, laws beside all that is possible, and what a map may say."""

from collections.abc import Iterator
from itertools import combinations_with_replacement, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llama.checkpoint.memory import parts
from llama.device_map import DISK, on_host, parse_device_map, parse_max_memory, parse_size
from llama.errors import DeviceError, ParameterError
from llama.model.args import ModelArgs
from llama.placement import Parts, Placement, check, explicit, plan, shares

GB, GIB = 10**9, 2**30
SEVEN = ModelArgs(vocab_size=32000, max_seq_len=2048, max_batch_size=1)
THIRTEEN = ModelArgs(dim=5120, n_layers=40, n_heads=40, vocab_size=32000, max_seq_len=2048, max_batch_size=1)
SEVENTY = ModelArgs(
    dim=8192, n_layers=80, n_heads=64, n_kv_heads=8, multiple_of=4096, ffn_dim_multiplier=1.3, vocab_size=32000,
    max_seq_len=4096, max_batch_size=1,
)  # fmt: skip


def runs(placement: Placement) -> list[tuple[str, int]]:
    return [(device, len(layers)) for device, layers in placement.stages]


# --------------------------------------------------------------------------------------------------------- by hand


def test_parts_of_seven_billion_to_the_byte() -> None:
    """A layer has 4 · 4096² + 3 · 4096 · 11008 + 2 · 4096 numbers."""
    assert parts(SEVEN, torch.bfloat16, 2048) == Parts(
        n_layers=32, embeddings=262_144_000, layer=404_766_720, output=262_152_192, cache=2048 * 2 * 4096 * 2,
        activations=538_968_064, logits=786_432_000,
    )  # fmt: skip
    quantized = parts(SEVEN, torch.bfloat16, 2048, weight_format="int4", kv_dtype="fp8")
    assert quantized.layer == 202_375_168 // 2 + 202_375_168 // 32 * 2 + 2 * 4096 * 2
    assert (quantized.output, quantized.cache) == (32000 * 4096 * 34 // 32 + 8192, 2048 * 2 * 4096)


def test_two_unequal_cards_hold_seven_billion() -> None:
    """A layer and its cache are 438,321,152 bytes. On 8 GB beside embeddings and activations 16.4 of them have room."""
    limits = {"cuda:0": 8 * GB, "cuda:1": 12 * GB, "cpu": 20 * GB}
    placement = plan(parts(SEVEN, torch.bfloat16, 2048), "auto", limits)
    assert placement == Placement("cuda:0", ("cuda:0",) * 16 + ("cuda:1",) * 16, "cuda:1")
    assert placement.stages == (("cuda:0", range(16)), ("cuda:1", range(16, 32)))
    assert placement.words == "cuda:0 (embeddings, layers 0-15) and cuda:1 (layers 16-31, output)"


def test_embeddings_go_where_there_is_room_if_a_layer_is_then_not_on_the_cpu() -> None:
    """On 5 GiB 10 layers have room beside the embeddings, 11 without them; on 7 GiB 15 have, with them too."""
    limits = {"cuda:0": 5 * GIB, "cuda:1": 7 * GIB, "cpu": 20 * GIB}
    placement = plan(parts(SEVEN, torch.bfloat16, 2048), "auto", limits)
    assert (placement.embeddings, placement.output) == ("cuda:1", "cpu")
    assert runs(placement) == [("cuda:0", 11), ("cuda:1", 15), ("cpu", 6)]


def test_what_the_memory_of_a_cpu_does_not_hold_is_on_the_disk() -> None:
    """4 GB less the embeddings, the output and a step of 512 tokens are 3,144,353,792 bytes; less two layers of the
    disk and the cache of all 32, of 512 tokens, they are 2,066,384,896: 5.1 layers."""
    small = ModelArgs(vocab_size=32000, max_seq_len=512, max_batch_size=1)
    sizes = parts(small, torch.bfloat16, 512)
    placement = plan(sizes, "auto", {"cpu": 4 * GB})
    assert placement == Placement("cpu", ("cpu",) * 5 + (DISK,) * 27, "cpu")
    on_cpu, on_disk = shares(sizes, placement, {"cpu": 4 * GB})
    assert on_cpu.memory == 5 * 413_155_328 + 262_144_000 + 262_152_192 + 134_742_016 + 196_608_000
    assert on_disk.memory == 27 * 8_388_608 + 2 * 404_766_720
    assert on_disk.weights == 27 * 404_766_720
    assert (on_cpu.parts, on_disk.parts) == ("embeddings, layers 0-4, output", "layers 5-31")


def test_thirteen_billion_filled_and_balanced() -> None:
    """A layer and its cache are 676,352,000 bytes: 24 GB have room for 34.002 beside the embeddings. Of the whole,
    82.9 % of each card is needed: 27.9 and 12.1 layers."""
    limits = {"cuda:0": 24 * GB, "cuda:1": 12 * GB, "cpu": 64 * GB}
    sizes = parts(THIRTEEN, torch.bfloat16, 2048)
    filled, balanced = (plan(sizes, way, limits) for way in ("auto", "balanced"))
    assert runs(filled) == [("cuda:0", 34), ("cuda:1", 6)]
    assert runs(balanced) == [("cuda:0", 28), ("cuda:1", 12)]
    assert {(p.embeddings, p.output) for p in (filled, balanced)} == {("cuda:0", "cuda:1")}


def test_seventy_billion_over_three_cards() -> None:
    """A layer and its cache are 1,728,086,016 bytes: 45.3 have room on 80 GB, 27.1 on 48 GB."""
    limits = {"cuda:0": 80 * GB, "cuda:1": 48 * GB, "cuda:2": 24 * GB, "cpu": 64 * GB}
    placement = plan(parts(SEVENTY, torch.bfloat16, 2048), "auto", limits)
    assert runs(placement) == [("cuda:0", 45), ("cuda:1", 27), ("cuda:2", 8)]
    assert (placement.embeddings, placement.output) == ("cuda:0", "cuda:2")


def test_seventy_billion_over_two_cards_a_cpu_and_the_disk() -> None:
    """13.2 layers on 24 GB without the embeddings, 12.9 beside them; of the other 54 there are 33.1 on the CPU."""
    limits = {"cuda:0": 24 * GB, "cuda:1": 24 * GB, "cpu": 64 * GB}
    placement = plan(parts(SEVENTY, torch.bfloat16, 2048), "auto", limits)
    assert runs(placement) == [("cuda:0", 13), ("cuda:1", 13), ("cpu", 33), (DISK, 21)]
    assert (placement.embeddings, placement.output) == ("cpu", "cpu")
    assert plan(parts(SEVENTY, torch.bfloat16, 2048), "balanced", limits) == placement  # the cards are full


def test_devices_are_taken_in_the_order_of_their_numbers() -> None:
    sizes = Parts(n_layers=5, embeddings=0, layer=10, output=0, cache=0, activations=0, logits=0)
    limits = {"cpu": 10, "cuda:10": 10, "cpu:1": 10, "cuda:2": 10, "cpu:0": 10}
    assert plan(sizes, "auto", limits).layers == ("cuda:2", "cuda:10", "cpu:0", "cpu:1", "cpu")


# ------------------------------------------------------------------------------------------------------------ laws

small = st.integers(0, 4)
SIZES = st.builds(
    Parts, n_layers=st.integers(1, 4), embeddings=small, layer=st.integers(1, 5), output=st.integers(1, 4), cache=small,
    activations=small, logits=small,
)  # fmt: skip
LIMITS = st.builds(
    lambda devices, cpu: {**devices, "cpu": cpu},
    st.dictionaries(st.sampled_from(["cuda:0", "cuda:1", "cpu:0"]), st.integers(0, 20)),
    st.integers(0, 40),
)


def everything(n_layers: int, order: list[str]) -> Iterator[Placement]:
    """Every placement with the layers on the devices in order."""
    for layers in combinations_with_replacement(order, n_layers):
        for embeddings, output in product(order, order):
            yield Placement(embeddings, layers, output)


def memory(sizes: Parts, placement: Placement) -> dict[str, int]:
    """The bytes that each device needs, reckoned one part after another."""
    needs: dict[str, int] = {}

    def add(device: str, weights: int, beside: int) -> None:
        device, in_memory = ("cpu", 0) if device == DISK else (device, weights)
        needs[device] = needs.get(device, sizes.activations) + in_memory + beside

    add(placement.embeddings, sizes.embeddings, 0)
    for device in placement.layers:
        add(device, sizes.layer, sizes.cache)
    add(placement.output, sizes.output, sizes.logits)
    read = [sizes.embeddings] * (placement.embeddings == DISK) + [sizes.output] * (placement.output == DISK)
    read += [sizes.layer] * (DISK in placement.layers)
    if read:
        needs["cpu"] += 2 * max(read)
    return needs


def slow_bytes(sizes: Parts, placement: Placement) -> tuple[int, int]:
    """What a step reads from the disk, and what on the CPU."""
    on_cpu = [name for name in (*placement.layers, placement.output) if on_host(name) and name != DISK]
    layers = placement.layers.count(DISK) * sizes.layer
    disk = layers + (placement.embeddings == DISK) * sizes.embeddings + (placement.output == DISK) * sizes.output
    output = placement.output in on_cpu and placement.output != DISK
    return disk, (len(on_cpu) - output) * sizes.layer + output * sizes.output


@settings(max_examples=100, deadline=None)
@given(sizes=SIZES, limits=LIMITS, way=st.sampled_from(["auto", "balanced"]))
def test_a_plan_is_the_best_of_all_and_refused_only_where_there_is_none(
    sizes: Parts, limits: dict[str, int], way: str
) -> None:
    order = [*(name for name in ("cuda:0", "cuda:1", "cpu:0", "cpu") if name in limits), DISK]
    fitting = [
        placement for placement in everything(sizes.n_layers, order)
        if all(needed <= limits[device] for device, needed in memory(sizes, placement).items())
    ]  # fmt: skip
    if not fitting:
        with pytest.raises(DeviceError, match=r"^not enough memory on (cuda|cpu)"):
            plan(sizes, way, limits)
        return
    found = plan(sizes, way, limits)
    assert found in fitting  # no layer lost or doubled, in order, within every limit
    best = min(slow_bytes(sizes, placement) for placement in fitting)
    assert slow_bytes(sizes, found) == best


@settings(max_examples=150, deadline=None)
@given(sizes=SIZES, limits=LIMITS, data=st.data())
def test_shares_are_what_the_parts_need(sizes: Parts, limits: dict[str, int], data: st.DataObject) -> None:
    placement = data.draw(st.sampled_from(list(everything(sizes.n_layers, [*limits, DISK]))))
    needs: dict[str, int] = {}
    for share in shares(sizes, placement, limits):
        needs[share.memory_of] = needs.get(share.memory_of, 0) + share.memory
    assert needs == memory(sizes, placement)
    if any(needed > limits[device] for device, needed in needs.items()):
        with pytest.raises(DeviceError):
            check(sizes, placement, limits)
    else:
        check(sizes, placement, limits)


@settings(max_examples=100, deadline=None)
@given(n_layers=st.integers(1, 90), gigabytes=st.lists(st.integers(1, 80), min_size=1, max_size=8))
def test_a_balanced_map_fills_equal_parts(n_layers: int, gigabytes: list[int]) -> None:
    """No accelerator is fuller than another would be with one layer more."""
    sizes = Parts(n_layers, embeddings=0, layer=GB // 10, output=0, cache=0, activations=0, logits=0)
    limits = {**{f"cuda:{i}": size * GB for i, size in enumerate(gigabytes)}, "cpu": 100 * GB}
    found = dict.fromkeys(limits, 0) | dict(runs(plan(sizes, "balanced", limits)))
    if found["cpu"]:
        assert all(found[name] == limits[name] // sizes.layer for name in limits if name != "cpu")
    else:
        fullest = max(found[name] * sizes.layer / limits[name] for name in limits if found[name])
        assert all((found[name] + 1) * sizes.layer / limits[name] >= fullest for name in limits if name != "cpu")


# --------------------------------------------------------------------------------------------------------- refusals


def test_a_refusal_says_what_does_not_fit_and_by_how_much() -> None:
    """16 layers, the embeddings and a step: 6,476,267,520 + 536,870,912 + 262,144,000 + 538,968,064 bytes."""
    sizes = parts(SEVEN, torch.bfloat16, 2048)
    by_hand = {"layers.0-15": "cuda:0", "layers.16-31": "cpu"}
    limits = {"cuda:0": 7 * GB, "cpu": 20 * GB}
    with pytest.raises(DeviceError) as error:
        plan(sizes, by_hand, limits)
    assert str(error.value) == (
        "not enough memory on cuda:0 for embeddings, layers 0-15: weights 6.74 GB + KV cache 536.87 MB + workspace"
        " 538.97 MB are 814.25 MB more than its 7.00 GB: choose a smaller max_seq_len or max_batch_size, or another"
        " max_memory or device_map"
    )
    with pytest.raises(DeviceError, match=r"^not enough memory on cpu for .*layers 0-31.* on the disk: weights 0"):
        plan(sizes, "auto", {"cpu": GB})
    with pytest.raises(DeviceError, match=r"0-15 on cpu:0 and layers 16-31, output on cpu:1: weights 13"):
        plan(sizes, {"layers.0-15": "cpu:0", "layers.16-31": "cpu:1"}, {"cpu": GB})


# ------------------------------------------------------------------------------------------------- what a map may say


def test_a_table_says_where_all_is() -> None:
    table = {"layers.2-3": DISK, "output": "cuda:1", "layers.0": "cuda:0", "layers.1": "cuda:0"}
    assert explicit(table, 4) == Placement("cuda:0", ("cuda:0", "cuda:0", DISK, DISK), "cuda:1")
    assert explicit({"layers.0-3": "cpu", "embeddings": "mps"}, 4) == Placement("mps", ("cpu",) * 4, "cpu")


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"layers.0-2": "cpu"}, "device_map says no device for layer 3: the model has layers 0-3"),
        ({"layers.3": "cpu"}, "device_map says no device for layers 0-2: the model has layers 0-3"),
        ({"output": "cpu"}, "device_map says no device for layers 0-3: the model has layers 0-3"),
        ({"layers.0-4": "cpu"}, "device_map has layers.0-4, but the model has layers 0-3"),
        (
            {"layers.0-3": "cpu", "layers.2": DISK},
            "device_map has layer 2 twice, in layers.0-3 and layers.2: give it one device",
        ),
        (
            {"layers.0": "cpu", "layers.1-2": DISK, "layers.3": "cpu"},
            "device_map has layer 0 and layer 3 on cpu, but others between them elsewhere: give each device layers that"
            " follow one another",
        ),
    ],
)
def test_a_table_has_each_layer_once_and_those_of_a_device_together(table: dict[str, str], said: str) -> None:
    with pytest.raises(ParameterError) as error:
        explicit(table, 4)
    assert str(error.value) == said


@pytest.mark.parametrize(
    ("given", "size"),
    [
        (0, 0), (5, 5), ("4096", 4096), ("5GiB", 5 * 2**30), ("7GB", 7 * 10**9), ("500MB", 5 * 10**8),
        ("1.5 gib", 3 << 29), ("2kB", 2000), ("1TiB", 2**40), ("3B", 3), (" 7 GB ", 7 * 10**9),
        (-1, None), (True, None), (1.5, None), ("", None), ("GB", None), ("5G", None), ("5iB", None), ("-5GB", None),
        ("5 apples", None), ("1e9", None), ("٥GB", None), (None, None), ("9" * 30, None),
    ],
)  # fmt: skip
def test_sizes_are_read(given: object, size: int | None) -> None:
    assert parse_size(given) == size


def test_limits_are_read() -> None:
    assert parse_max_memory({"cuda": "5GiB", "cuda:1": 7, "cpu:0": "1MB", "mps": 1, "cpu": "20GB"}) == {
        "cuda:0": 5 * 2**30, "cuda:1": 7, "cpu:0": 10**6, "mps": 1, "cpu": 20 * 10**9
    }  # fmt: skip


TABLE = 'expected a size for each device, such as {"cuda:0": "5GiB", "cpu": "20GiB"}'


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("5GiB", f"max_memory='5GiB' is no table: {TABLE}"),
        ({}, f"max_memory={{}} is no table: {TABLE}"),
        ({"gpu": "5GiB"}, "max_memory names 'gpu': expected cuda:N, mps or cpu"),
        ({0: "5GiB"}, "max_memory names 0: expected cuda:N, mps or cpu"),
        ({"cuda:01": "5GiB"}, "max_memory names 'cuda:01': expected cuda:N, mps or cpu"),
        ({DISK: "5GiB"}, "max_memory names 'disk', which has no limit: expected cuda:N, mps or cpu"),
        ({"cpu": "lots"}, "max_memory gives cpu 'lots': expected bytes, or a size such as 5GiB, 7GB or 500MB"),
        ({"cuda": 1, "cuda:0": 2}, "max_memory names cuda:0 twice: give it one size"),
    ],
)
def test_limits_that_are_none_are_refused(given: object, said: str) -> None:
    with pytest.raises(ParameterError) as error:
        parse_max_memory(given)
    assert str(error.value) == said


MAP = 'use auto, balanced, or a table such as {"layers.0-15": "cuda:0", "layers.16-31": "cpu"}'
PART = "expected layers.FIRST-LAST, layers.NUMBER, embeddings or output"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("best", f"device_map='best' is no map: {MAP}"),
        ({}, f"device_map={{}} is no map: {MAP}"),
        (["cpu"], f"device_map=['cpu'] is no map: {MAP}"),
        ({"layer.0": "cpu"}, f"device_map has 'layer.0': {PART}"),
        ({"layers.0-": "cpu"}, f"device_map has 'layers.0-': {PART}"),
        ({3: "cpu"}, f"device_map has 3: {PART}"),
        ({"layers.5-3": "cpu"}, "device_map has 'layers.5-3', which ends before it begins: write layers.3-5"),
        ({"layers.0": "tpu"}, "device_map has layers.0 on 'tpu': expected cuda:N, mps, cpu or disk"),
        ({"output": None}, "device_map has output on None: expected cuda:N, mps, cpu or disk"),
    ],
)
def test_maps_that_are_none_are_refused(given: object, said: str) -> None:
    with pytest.raises(ParameterError) as error:
        parse_device_map(given)
    assert str(error.value) == said


def test_maps_are_read() -> None:
    assert parse_device_map("balanced") == "balanced"
    assert parse_device_map({"layers.0-3": "cuda", "output": DISK}) == {"layers.0-3": "cuda:0", "output": DISK}
