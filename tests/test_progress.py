"""The progress of a run: lines where stderr is no terminal, a bar where it is one."""

import pytest

from llama import progress
from llama.progress import Progress


def test_lines_come_now_and_then(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """With what is done, tokens per second in and out, and the time that is left at this rate."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    shown = Progress(110, 10, quiet=False)
    for done, seconds in ((11, 1), (20, 9), (21, 10), (60, 25)):
        now[0] = 100.0 + seconds
        shown.show(done, read=1000 * seconds, made=50 * seconds)
    shown.close()
    assert capsys.readouterr().err.splitlines() == [
        "llama: 20 of 110 requests, 1000 tokens/s in, 50 out, 0:01:21 left",
        "llama: 60 of 110 requests, 1000 tokens/s in, 50 out, 0:00:25 left",
    ]


def test_a_total_that_nobody_knows_is_not_said(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress.time, "monotonic", iter((0.0, 10.0)).__next__)
    Progress(None, 0, quiet=False).show(20, read=1000, made=50)
    assert capsys.readouterr().err == "llama: 20 requests, 100 tokens/s in, 5 out\n"


def test_quiet_says_nothing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "PAUSE", 0)
    shown = Progress(10, 0, quiet=True)
    shown.show(5, 100, 100)
    shown.close()
    assert not capsys.readouterr().err


def test_a_terminal_gets_one_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(progress.time, "monotonic", iter(range(0, 100, 2)).__next__)
    shown = Progress(8, 2, quiet=False)
    shown.show(8, 600, 60)
    shown.close()
    last = capsys.readouterr().err.split("\r")[-1]
    assert "requests: 100%" in last and "8/8" in last and "300 tokens/s in, 30 out" in last
