"""How a command is run and ends: its help, one line for what went wrong, and an exit code."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from types import SimpleNamespace
from typing import BinaryIO

import pytest
from conftest import ROOT

from llama.cli import shell
from llama.errors import LlamaError
from llama.script import wait_briefly

Ended = tuple[int | None, str, str]


def wave(name: str = "you", *, times: int = 1) -> None:
    """Wave to somebody."""
    if times < 1:
        raise LlamaError(f"{times} times is not often: wave once or more")
    if times > 9:
        sys.exit(3)
    print(f"{name}, " * times)


def give(error: str) -> None:
    """Fail."""
    raise {"ctrl-c": KeyboardInterrupt, "bug": RuntimeError}[error]


TABLE = {"wave": wave, "give": give}


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """ends(table, *words): (exit code or None, stdout, stderr)."""

    def ends(commands: dict[str, shell.Command], *words: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["/somewhere/it.py", *words])
        code = None
        try:
            shell.run(commands)
        except SystemExit as ended:
            code = ended.code
        return code, *capfd.readouterr()

    return ends


@pytest.mark.parametrize(
    ("words", "code", "out", "err"),
    [
        (["wave"], None, "you, \n", ""),
        (["wave", "123", "--times=2"], None, "123, 123, \n", ""),
        (["wave", "--times", "0"], 2, "", "llama: 0 times is not often: wave once or more\n"),
        (["wave", "--times", "10"], 3, "", ""),
        (["wav"], 2, "", "llama: there is no command 'wav': did you mean wave?\n"),
        (["--bogus"], 2, "", "llama: there is no command '--bogus': llama --help lists what there is\n"),
        (["--"], 2, "", "llama: there is no command '--': llama --help lists what there is\n"),
        (["wave", "--x"], 2, "", "llama: there is no flag '--x': llama wave --help lists what there is "),
        (["give", "ctrl-c"], 130, "", ""),
        (["--version"], None, f"llama {version('llama-runner')}\n", ""),
    ],
)
def test_a_word_names_the_command(ends: Callable[..., Ended], words: list[str], code: int, out: str, err: str) -> None:
    found = ends(TABLE, *words)
    assert found[:2] == (code, out) and found[2].startswith(err) and found[2].count("\n") == (1 if err else 0)


def test_our_own_mistakes_are_not_hidden(ends: Callable[..., Ended]) -> None:
    with pytest.raises(RuntimeError):
        ends(TABLE, "give", "bug")


@pytest.mark.parametrize("words", [[], ["help"], ["--help"], ["-h"]])
def test_the_first_page_lists_the_commands(ends: Callable[..., Ended], words: list[str]) -> None:
    code, out, err = ends(TABLE, *words)
    assert (code, err) == (None, "") and "  wave  Wave to somebody.\n" in out


@pytest.mark.parametrize("words", [["wave", "--help"], ["wave", "-h"], ["wave", "--times", "0", "--help"]])
def test_a_command_explains_itself(ends: Callable[..., Ended], words: list[str]) -> None:
    code, out, err = ends(TABLE, *words)
    assert (code, err) == (None, "") and out.startswith("Usage: llama wave [NAME] [FLAGS]\n")


def test_a_shell_can_complete_words(ends: Callable[..., Ended]) -> None:
    """bash reads the script, which knows commands and flags; fish has one too."""
    code, out, err = ends(TABLE, "--", "--completion", "bash")
    assert (code, err) == (None, "") and "--times" in out and "wave" in out
    assert subprocess.run(["bash", "-n"], input=out, text=True, capture_output=True).stderr == ""
    assert "__fish_using_command" in ends(TABLE, "--", "--completion", "fish")[1]


@pytest.mark.parametrize("cores", ["abc", "0,abc", "1x", "1;2", "\u0663"])
def test_a_list_of_cores_that_hangs_a_library_is_refused(
    ends: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch, cores: str
) -> None:
    """libgomp never comes back from it; help needs no libgomp."""
    monkeypatch.setenv("GOMP_CPU_AFFINITY", cores)
    code, out, err = ends(TABLE, "wave")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("llama: GOMP_CPU_AFFINITY=") and err.endswith("such as 0-3,8: mend it, or unset it\n")
    assert ends(TABLE, "wave", "--help")[0] is None


@pytest.mark.parametrize("cores", ["", "0", "0-3", "0-10:2 11", "0, 1\t2"])
def test_other_lists_of_cores_are_not_ours_to_judge(
    ends: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch, cores: str
) -> None:
    monkeypatch.setenv("GOMP_CPU_AFFINITY", cores)
    assert ends(TABLE, "wave") == (None, "you, \n", "")


def test_a_command_that_exits_takes_leave_of_the_other_processes(
    ends: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it returns or exits with a code of its own; where it failed, nobody waits."""
    left = []
    monkeypatch.setitem(
        sys.modules, "llama.parallel", SimpleNamespace(leave=lambda: left.append(1), is_first_to_fail=lambda: True)
    )
    for times, count in ((1, 1), (10, 2), (0, 2)):
        ends(TABLE, "wave", f"--times={times}")
        assert len(left) == count


# ------------------------------------------------------------------------------------------------- in a real process


def llama(*words: str, stdout: int | BinaryIO = subprocess.PIPE, **environment: str) -> subprocess.CompletedProcess:
    """A run whose output is written when its buffer is full or it ends, as it is where nobody has asked otherwise."""
    known = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-m", "llama", *words]
    return subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, env=known | environment)


def test_a_reader_that_has_had_enough_is_no_error() -> None:
    """As `llama --help | true` may have it: quiet, with the code that a shell gives to SIGPIPE."""
    read, write = os.pipe()
    os.close(read)
    done = llama("--help", stdout=write)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full on this system")
def test_a_full_disk_is_one_line() -> None:
    with open("/dev/full", "wb") as full:
        done = llama("--help", stdout=full)
    assert (done.returncode, done.stderr) == (2, "llama: [Errno 28] No space left on device\n")


@pytest.mark.skipif(not str(ROOT).isascii(), reason="in a locale of ASCII Python finds nothing in such a folder")
def test_a_file_name_that_the_locale_cannot_write_is_one_line() -> None:
    done = llama("score", "é.txt", LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"llama: 'ascii' codec can't encode character .*\n", done.stderr), done.stderr


def test_a_name_that_is_not_utf8_can_be_said() -> None:
    done = llama("verify", LLAMA_CKPT_DIR=os.fsdecode(b"/nowhere\xff"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(r"llama: /nowhere\udcff/checklist.chk is missing")


@pytest.mark.parametrize(
    ("given", "expected"), [({}, "3000"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None), ({"GOMP_SPINCOUNT": "7"}, "7")]
)
def test_waiting_threads_give_up_their_core(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], expected: str | None
) -> None:
    """Unless the environment says how they shall wait."""
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    wait_briefly()
    assert os.environ.get("GOMP_SPINCOUNT") == expected
