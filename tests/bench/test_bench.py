"""`llama bench`: the rounds by a fake clock, limits by hand, the table, records beside earlier ones, the command."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import DEMO, Ended

from llama import Llama
from llama.bench import limits, measure, report, rounds
from llama.bench.figures import LONGEST, Figure, batches, steps_within, too_long, wanted
from llama.errors import ParameterError

RUN = {"checkpoint": "a", "dtype": "float32"}


def record(**medians: float) -> report.Report:
    figures = [report.measured(name, "tokens/s", [median, median], 2 * median) for name, median in medians.items()]
    return report.Report(
        kind=report.KIND, run=RUN, read_rates=[2e9, 2e9], matmul_rate=3e9, figures=figures, missing={"x": "why"},
        noise=None,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------- which figures, and when


def test_the_figures() -> None:
    """The most wanted first, each once; the longest fit into the length that holds where nobody says."""
    assert batches(1) == [1] and batches(12) == [1, 2, 4, 8, 12] and batches(16) == [1, 2, 4, 8, 16]
    figures = wanted(12)
    assert figures[:3] == [Figure(512), Figure(0, 1), Figure(0, 8)] and len(set(figures)) == len(figures) == 13
    assert not too_long(figures, LONGEST) and max(one.needed for one in figures) <= LONGEST
    assert Figure(2048) in too_long(figures, 2048) and Figure(512) not in too_long(figures, 513)
    assert set(too_long(wanted(1), 40)) == {*map(Figure, (128, 512, 2048)), Figure(2048, 1)}


class Machine:
    """A clock that runs move: a token of a prompt takes `token` seconds, a step `step`."""

    def __init__(self, token: float, step: float) -> None:
        self.now, self.token, self.step, self.order = 0.0, token, step, []

    def run(self, figure: Figure, estimate: float) -> float:
        took = self.step if figure.batch else self.token * figure.tokens
        self.now += took * (steps_within(estimate) + 4 if figure.batch else 1)
        self.order.append(figure)
        return took


def rounds_of(machine: Machine, seconds: float) -> rounds.Samples:
    return rounds.measure(machine.run, wanted(8), seconds, lambda: seconds - machine.now, lambda *_: None)


def test_a_fast_machine_runs_all_so_often() -> None:
    """In turns, the most wanted first."""
    machine = Machine(1e-5, 1e-4)
    samples = rounds_of(machine, 120)
    assert not samples.missed and {len(runs) for runs in samples.runs.values()} == {rounds.ROUNDS}
    assert machine.order[-len(wanted(8)) :] == wanted(8) and machine.now < 120


@pytest.mark.parametrize(("token", "step"), [(0.01, 0.1), (0.01, 0.2), (0.1, 2.0)])
def test_a_slow_machine_ends_in_time(token: float, step: float) -> None:
    """What is wanted most is measured, what cannot end is not begun, and that is said."""
    machine = Machine(token, step)
    samples = rounds_of(machine, 120)
    assert machine.now < 120 and Figure(512) in samples.runs
    assert set(samples.runs) | set(samples.missed) == set(wanted(8))
    assert all("would take about" in why and "were left" in why for why in samples.missed.values())
    assert (Figure(2048) in samples.missed) == (token == 0.1)
    assert not set(samples.runs) & set(samples.missed)


def test_without_time_all_is_missing() -> None:
    machine = Machine(1, 1)
    assert set(rounds_of(machine, 0).missed) == set(wanted(8)) and machine.now == 0


# ----------------------------------------------------------------------------------------------- runs and their limits


def test_a_run_goes_through_the_engine(build: Callable[..., Llama]) -> None:
    """With room for more, end tokens ignored, and a context that is computed once for all sequences."""
    llama = measure.with_room(build(max_seq_len=128), 4)
    assert llama.engine.scheduler.slots == 4
    assert measure.run(llama, Figure(90), 1.0) > 0
    before = llama.engine.computed_tokens
    assert measure.run(llama, Figure(90, 4), 1.0) > 0
    assert llama.engine.computed_tokens - before == 4 * (3 + 5)  # no token of the context; three times 1, then 4 + 1


def test_limits_by_hand(build: Callable[..., Llama]) -> None:
    model = build().model
    every = sum(tensor.nbytes for tensor in model.parameters())
    assert limits.weights_read(model) == every - model.tok_embeddings.weight.nbytes
    args, rates = model.params, limits.Rates(read=1.0, matmul=float("inf"))
    cached = 2 * args.n_layers * args.kv_heads * args.head_dim * 4
    assert limits.decode_seconds(model, rates, 3, 10) == limits.weights_read(model) + 30 * cached
    matrices = sum(tensor.numel() for tensor in model.parameters() if tensor.dim() == 2) - args.vocab_size * args.dim
    by_products = limits.Rates(read=float("inf"), matmul=1.0)
    assert limits.decode_seconds(model, by_products, 3, 0) == 6 * matrices
    assert limits.prefill_seconds(model, by_products, 1) == 2 * matrices + 2 * args.n_layers * args.dim


def test_quantised_weights_count_with_their_scales(build: Callable[..., Llama]) -> None:
    whole, small = (limits.weights_read(build(dtype="float32", quantize=kind).model) for kind in (None, "int8"))
    assert small > whole / 4 and small < whole / 2


def test_rates_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "READ", 1 << 22)
    monkeypatch.setattr(limits, "SQUARE", 64)
    cpu = torch.device("cpu")
    assert limits.read_rate(cpu) > 1e6 and limits.matmul_rate(cpu, torch.bfloat16) > 1e6


# ------------------------------------------------------------------------------------------------------ what is shown


def test_spread_and_noise() -> None:
    steady, shaky = report.measured("steady", "s", [1.0, 1.05, 1.02]), report.measured("shaky", "s", [1.0, 2.0, 1.5])
    assert shaky["median"] == 1.5 and shaky["spread"] == pytest.approx(2 / 3)
    assert report.measured("one", "s", [1.0])["spread"] is None
    assert report.noise([1e9, 1.05e9], [steady]) is None
    assert report.noise([1e9, 2e9], [steady]) == "noisy: the read rate was 1.0 GB/s and then 2.0 GB/s"
    assert "1 of 2 figures varied by more than 10%, most of all shaky (67%)" in str(
        report.noise([1e9], [steady, shaky])
    )


def test_the_table_beside_an_earlier_run() -> None:
    """Its JSON comes back as it was; ratios are this run's over the earlier one's."""
    before = json.loads(json.dumps(record(a=10.0, b=4.0)))
    now = record(a=15.0, c=1.0)
    table = report.rows(now, before)
    assert table[0] == [*report.HEAD, "× earlier"]
    assert table[1] == ["a", "15.0 tokens/s", "0.0%", "2", "30.0 tokens/s", "0.50", "1.50"]
    assert table[2][-1] == "-"
    assert report.differences(now, before) is None
    before["run"]["dtype"] = "bfloat16"
    assert report.differences(now, before) == "the earlier run had dtype bfloat16 (now float32)"
    shown = report.text(now, before, markdown=True)
    assert "| figure | median |" in shown and "| --- |" in shown and "missing: x: why" in shown


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (None, "cannot be read: No such file"),
        (b"x", "is not JSON"),
        (b"\xff", "is not JSON"),
        (b"[" * 9999, "is not JSON"),
        (b"[]", "is no record"),
        (b'{"kind": "llama bench"}', "is no record"),
        (b'{"kind": "llama bench", "run": {}, "figures": [{"name": "a", "median": "1"}]}', "is no record"),
        (b'{"kind": "llama bench", "run": {}, "figures": [{"name": "a", "median": NaN}]}', "is no record"),
    ],
)
def test_a_file_that_is_not_ours_is_one_line(data: bytes | None, said: str, tmp_path: Path) -> None:
    if data is not None:
        (tmp_path / "old.json").write_bytes(data)
    with pytest.raises(ParameterError, match=said) as error:
        report.earlier(str(tmp_path / "old.json"))
    assert str(error.value).endswith("name a file that llama bench --json wrote")


# -------------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def bench(here: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ended]:
    """bench(*words): (exit code, stdout, stderr), with quick measurements of the machine."""
    monkeypatch.setattr(limits, "READ", 1 << 22)
    monkeypatch.setattr(limits, "SQUARE", 64)
    return lambda *words: here("bench", "--device=cpu", *words)


def test_the_demo_is_measured_and_compared(bench: Callable[..., Ended], tmp_path: Path) -> None:
    sizes = ["--max_batch_size=2", "--max_seq_len=200", "--seconds=3"]
    code, out, err = bench(*sizes, "--json", "--quiet")
    found = json.loads(out)
    assert (code, err) == (0, "")
    assert [one["name"] for one in found["figures"]] == [
        "load", "prefill 128", "decode, batch 1, context 0", "decode, batch 2, context 0", "peak memory",
    ]  # fmt: skip
    assert all(one["median"] > 0 and len(one["runs"]) >= 1 for one in found["figures"])
    assert found["missing"]["prefill 2048"] == "needs --max_seq_len 2049"
    (tmp_path / "old.json").write_text(out, encoding="utf-8")
    code, out, err = bench(*sizes, "--compare", str(tmp_path / "old.json"), "--ckpt_dir", str(DEMO), "--quiet")
    assert code == 0 and "× earlier" in out and "the earlier run had checkpoint the demo (now " in out


def test_a_second_ends_soon_and_says_what_is_missing(bench: Callable[..., Ended]) -> None:
    code, out, err = bench("--seconds=0.001", "--max_batch_size=1", "--markdown")
    assert code == 0 and "missing: decode, batch 1, context 2048: no time was left" in out
    assert "| load |" in out and "| decode" not in out and "running the bundled demo checkpoint" in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--seconds=0"], "seconds=0 is out of range"),
        (["--seconds=x"], "seconds='x' is out of range"),
        (["--json", "--markdown"], "--json prints this run's record alone"),
        (["--speculate=lookup"], "there is no flag '--speculate'"),
        (["--compare=/nowhere/x"], "/nowhere/x cannot be read"),
    ],
)
def test_what_cannot_run(words: list[str], said: str, bench: Callable[..., Ended]) -> None:
    code, out, err = bench(*words)
    assert (code, out) == (2, "") and err.startswith(f"llama: {said}") and err.count("\n") == 1
