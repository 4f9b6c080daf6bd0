"""What the package says while it works: on stderr, or wherever a program that configures logging wants it."""

import logging
import subprocess
import sys
from collections.abc import Iterator

import pytest

from llama import log

BUILD = """
import logging
{}
from llama import Llama
from llama.checkpoint.find import DEMO
Llama.build(str(DEMO), str(DEMO / "tokenizer.model"), 32, 1, device="cpu")
"""


class Kept(logging.Handler):
    """A program's handler."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.name} {record.levelname} {record.getMessage()}")


@pytest.fixture
def kept() -> Iterator[Kept]:
    """The handler of the root logger, whose level is WARNING."""
    handler = Kept()
    logging.getLogger().addHandler(handler)
    yield handler
    logging.getLogger().removeHandler(handler)


def test_lines_go_to_stderr_where_nobody_takes_them(capsys: pytest.CaptureFixture[str]) -> None:
    log.say("loaded")
    log.say("slow", logging.WARNING)
    log.say("details", logging.DEBUG)
    assert capsys.readouterr().err == "llama: loaded\nllama: slow\n"


def test_no_line_can_act_on_a_terminal(capsys: pytest.CaptureFixture[str], kept: Kept) -> None:
    log.say("a\x1b[2J\nb", logging.WARNING)
    assert kept.lines == [r"llama WARNING a\x1b[2J\nb"] and not capsys.readouterr().err


@pytest.mark.parametrize(
    ("root", "own", "said"),
    [
        (logging.WARNING, logging.NOTSET, ["slow"]),
        (logging.INFO, logging.NOTSET, ["loaded", "slow"]),
        (logging.WARNING, logging.INFO, ["loaded", "slow"]),
        (logging.DEBUG, logging.ERROR, []),
    ],
)
def test_a_program_that_configures_logging_decides(
    root: int, own: int, said: list[str], kept: Kept, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    """By its levels, and by its handlers: nothing goes to stderr beside them."""
    before = logging.getLogger().level
    logging.getLogger().setLevel(root)
    log.LOGGER.setLevel(own)
    try:
        log.say("loaded")
        log.say("slow", logging.WARNING)
    finally:
        logging.getLogger().setLevel(before)
        log.LOGGER.setLevel(logging.NOTSET)
    assert [line.split()[-1] for line in kept.lines] == said and not capsys.readouterr().err


def test_a_handler_of_the_logger_itself_takes_the_lines(capsys: pytest.CaptureFixture[str]) -> None:
    handler = Kept()
    log.LOGGER.addHandler(handler)
    try:
        log.LOGGER.setLevel(logging.INFO)
        log.say("loaded")
    finally:
        log.LOGGER.removeHandler(handler)
        log.LOGGER.setLevel(logging.NOTSET)
    assert handler.lines == ["llama INFO loaded"] and not capsys.readouterr().err


def test_quiet_says_errors_alone_and_only_meanwhile(capsys: pytest.CaptureFixture[str]) -> None:
    with log.quiet():
        log.say("slow", logging.WARNING)
        log.say("lost", logging.ERROR)
        assert not log.is_said(logging.WARNING)
    log.say("loaded")
    assert capsys.readouterr().err == "llama: lost\nllama: loaded\n"


def test_one_process_of_several_speaks(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The first, as torchrun numbers them before they have met."""
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        log.say(f"rank {rank}")
    assert capsys.readouterr().err == "llama: rank 0\n"


@pytest.mark.parametrize(
    ("configured", "said"),
    [
        ("", "llama: "),
        ("logging.basicConfig(level=logging.INFO, format='%(name)s|%(message)s')", "llama|"),
        ("logging.basicConfig()", ""),
        ("logging.getLogger('llama').setLevel(logging.WARNING)", ""),
    ],
)
def test_a_script_gets_what_it_asks_for(configured: str, said: str) -> None:
    done = subprocess.run([sys.executable, "-c", BUILD.format(configured)], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stdout
    assert done.stderr.startswith(said) and done.stderr.count("\n") == bool(said)
