"""The progress of a run and of long readings and writings: bars in a terminal; elsewhere lines, of a run alone."""

import io
import sys
from collections.abc import Callable
from contextlib import redirect_stderr
from itertools import count
from pathlib import Path

import pytest
from conftest import DEMO

from llama import Llama, log, progress
from llama.checkpoint.checklist import verify
from llama.checkpoint.writer import quantize, reshard
from llama.cli import commands
from llama.progress import Progress, bar_of_bytes


def test_lines_come_now_and_then(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """With what is done, tokens per second in and out, and the time that is left at this rate."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    shown = Progress(110, 10)
    for done, seconds in ((11, 1), (20, 9), (21, 10), (60, 25)):
        now[0] = 100.0 + seconds
        shown.show(done, prompt_tokens=1000 * seconds, completion_tokens=50 * seconds)
    shown.close()
    assert capsys.readouterr().err.splitlines() == [
        "llama: 20 of 110 requests, 1000 tokens/s in, 50 out, 0:01:21 left",
        "llama: 60 of 110 requests, 1000 tokens/s in, 50 out, 0:00:25 left",
    ]


def test_a_total_that_nobody_knows_is_not_said(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress.time, "monotonic", iter((0.0, 10.0)).__next__)
    Progress(None, 0).show(20, prompt_tokens=1000, completion_tokens=50)
    assert capsys.readouterr().err == "llama: 20 requests, 100 tokens/s in, 5 out\n"


def test_quiet_says_nothing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "PAUSE", 0)
    shown = Progress(10, 0, hidden=True)
    shown.show(5, 100, 100)
    with log.quiet():
        Progress(10, 0).show(5, 100, 100)
    shown.close()
    assert not capsys.readouterr().err


def test_a_terminal_gets_one_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(progress.time, "monotonic", iter(range(0, 100, 2)).__next__)
    shown = Progress(8, 2)
    shown.show(8, 600, 60)
    shown.close()
    last = capsys.readouterr().err.split("\r")[-1]
    assert "requests: 100%" in last and "8/8" in last and "300 tokens/s in, 30 out" in last


# ----------------------------------------------------------------------------------------------------- bars of bytes


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def seen(act: Callable[[], object]) -> str:
    """What a terminal gets on stderr while something is done."""
    with redirect_stderr(Terminal()) as terminal:
        act()
    return terminal.getvalue()


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two looks at the clock a bar finds half a second gone."""
    monkeypatch.setattr("tqdm.std.time", count(0.0, 0.5).__next__)


def test_a_bar_comes_after_a_second_and_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    """It shows how much of all was done, the rate, and what it is told to say."""
    now = [0.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    with redirect_stderr(Terminal()) as terminal, bar_of_bytes("loading", 4_000_000_000) as move:
        for done, seconds in enumerate((0.5, 0.9, 2.0), 1):
            assert terminal.getvalue() == ""
            now[0] = seconds
            move(1_000_000_000, f"{done} of 4 tensors")
        shown = terminal.getvalue()
    assert shown.startswith("\rloading:  75%") and "3.00G/4.00G" in shown and "1.50GB/s, 3 of 4 tensors]" in shown
    assert not terminal.getvalue().removeprefix(shown).strip()


def test_what_is_done_within_a_second_has_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tqdm.std.time", lambda: 0.0)
    assert seen(lambda: load(Path())).startswith("llama: ")


@pytest.mark.usefixtures("slow")
def test_a_name_in_a_bar_does_not_act_on_the_terminal() -> None:
    with redirect_stderr(Terminal()) as terminal, bar_of_bytes("verifying", 8) as move:
        for _ in range(8):
            move(1, "a\x1b[2J\n")
    assert r"a\x1b[2J\n" in terminal.getvalue() and not set("\x1b\n") & set(terminal.getvalue())


def load(out: Path, form: str | None = None) -> None:
    Llama.build(str(DEMO), str(DEMO / "tokenizer.model"), 32, 1, device="cpu", quantize=form)


LONG: dict[str, tuple[str, str, Callable[[Path], object]]] = {
    "load": ("loading: ", "39 of 39 tensors", load),
    "quantise": ("loading as int8: ", "39 of 39 tensors", lambda out: load(out, "int8")),
    "verify": ("verifying: ", "tokenizer.model", lambda out: verify(DEMO)),
    "reshard": ("writing: ", "consolidated.01.pth", lambda out: reshard(DEMO, out, 2)),
    "quantize": ("writing: ", "consolidated.00.pth", lambda out: quantize(DEMO, out, "int4")),
}


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("name", LONG)
def test_what_may_take_long_shows_how_far_it_is(name: str, tmp_path: Path) -> None:
    """To the end: the parts that are counted are the whole."""
    doing, said, act = LONG[name]
    bars = [bar for bar in seen(lambda: act(tmp_path)).split("\r") if bar.startswith(doing)]
    assert len(bars) > 1 and bars[-1].startswith(f"{doing}100%") and any(said in bar for bar in bars)


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("name", LONG)
def test_a_pipe_gets_no_bar(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    doing, _, act = LONG[name]
    act(tmp_path)
    assert doing not in "".join(capfd.readouterr())


@pytest.mark.usefixtures("slow")
def test_a_closed_stderr_gets_no_bar(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    for name, (_, _, act) in LONG.items():
        act(tmp_path / name)


QUIET = {
    "complete": ["complete", "x", "--max_gen_len=0"],
    "verify": ["verify"],
    "reshard": ["reshard", str(DEMO), "out", "--model_parallel_size=2"],
    "quantize": ["quantize", str(DEMO), "out", "--quantize=int8"],
}


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("name", QUIET)
def test_quiet_has_no_bar(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["llama", *QUIET[name], "--quiet"])
    assert seen(commands.main) == ""


@pytest.mark.usefixtures("slow")
def test_one_process_of_several_shows_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "is_first", lambda: False)
    assert "loading: " not in seen(lambda: load(tmp_path))
