"""Talks in a pseudo-terminal."""

import os
import sys
import termios
from pathlib import Path

import pexpect
from conftest import DEMO

READS, HAS_READ = "\x1b[?2004h", "\x1b[?2004l"  # what the line editor sends first and last
UP, LEFT, CTRL_A, CTRL_C, CTRL_D, ESCAPE = "\x1b[A", "\x1b[D", "\x01", "\x03", "\x04", "\x1b"
DOG, WOOF = "What sound does a dog make?", "A dog says woof.\n"
ENDLESS = "/set min_gen_len 100000"  # longer than any context here
EMPTY = "llama: there is nothing to take back yet: the dialog is empty\n"  # what /undo says then
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def command(max_seq_len: int = 512, *flags: str) -> list[str]:
    """The words that start a talk with the demo checkpoint, greedily, after those that start Python."""
    build = ["--ckpt_dir", str(DEMO), "--device", "cpu", "--dtype", "float32", "--max_seq_len", str(max_seq_len)]
    return ["-m", "llama", "chat", "--temperature", "0", *build, *flags]


def environment(home: Path) -> dict[str, str]:
    """A terminal that does not answer questions about its cursor, as pexpect's does not; few threads; a new home."""
    settings = {"TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", "OMP_NUM_THREADS": "1", "HOME": str(home)}
    return {**os.environ, **settings}


def start(home: Path, *words: str) -> pexpect.spawn:
    """Start Python with these words in a terminal, and wait until it reads; `child.before` is what it said."""
    child = pexpect.spawn(
        sys.executable, list(words), env=environment(home), cwd=str(home), encoding="utf-8", timeout=180,
        dimensions=(50, 200),
    )  # fmt: skip
    child.expect_exact(READS)
    return child


def end(child: pexpect.spawn) -> int:
    """The exit code, once the terminal has nothing more to say."""
    child.expect(pexpect.EOF)
    child.close()
    return child.exitstatus


def assert_as_it_was(child: pexpect.spawn) -> None:
    modes = termios.tcgetattr(child.child_fd)[3]
    assert modes & termios.ISIG and modes & termios.ICANON and modes & termios.ECHO
