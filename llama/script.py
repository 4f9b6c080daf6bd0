"""A program that a shell starts: its streams, one line for what went wrong, its exit code, which process prints."""

import contextlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

from llama import gate, log
from llama.errors import LlamaError
from llama.gate import to_stderr


@contextlib.contextmanager
def in_a_shell(name: str | None = None) -> Iterator[None]:
    """Run what follows as a command: an error of the user's is one line, after `name:`, and exit code 2.

    `name` is the script's if left out. Streams are UTF-8, and closed ones do no harm. Ctrl-C is exit code 130; a reader
    that has had enough, such as head(1), is 141. Of several processes the first to fail says why.
    """
    name = name or Path(sys.argv[0]).name
    wait_briefly()
    _open_closed_streams()
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="strict" if stream is sys.stdin else "backslashreplace")
    warnings.showwarning = lambda message, *_: log.say(str(message), logging.WARNING)
    try:
        _check_output()
        yield
        print(end="", flush=True)  # a pipe that is closed or a disk that is full is still ours to report
    except LlamaError as error:
        if _is_first_to_fail():
            to_stderr(f"{name}: {error}")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)  # as a shell reports a command that Ctrl-C ended
    except (OSError, UnicodeEncodeError) as error:  # the latter: a file name that the locale cannot write
        sys.exit(_system_error(error, name))
    except SystemExit:
        _leave_group()
        raise
    _leave_group()


def show(text: str, end: str = "\n") -> None:
    """Print a text, from the first process alone; in a terminal nothing in it can act."""
    if log.is_first():
        gate.show(text, end)


def wait_briefly() -> None:
    """Let threads that wait for others give up their core after about 0.1 ms, unless the environment says otherwise.

    Waiting longer gains at most 5 % where the cores are free, and takes them from others, and from itself, where they
    are not (benchmarks/RESULTS.md). It counts for GNU's OpenMP, when that is loaded.
    """
    if not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}:
        os.environ["GOMP_SPINCOUNT"] = "3000"


def _open_closed_streams() -> None:
    """Open /dev/null in the place of standard input and stderr where they are closed: no input, and silence.

    Else files that are opened later would get their numbers, and what libraries write to stderr would go into one.
    """
    for name, mode in (("stdin", "r"), ("stderr", "w")):
        if getattr(sys, name) is None:
            stream = open(os.devnull, mode)  # noqa: SIM115
            os.set_inheritable(stream.fileno(), True)  # by compilers, say, which this process may start
            setattr(sys, name, stream)


def _check_output() -> None:
    """Raise LlamaError where standard output is closed: whatever a command did, its result would be lost."""
    if sys.stdout is None:
        raise LlamaError("standard output is closed: send it to a file, a pipe or /dev/null")


def _system_error(error: OSError | UnicodeEncodeError, name: str) -> int:
    """Say what the system refused, and return the exit code; nothing where a reader such as head(1) has had enough."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would fail to write the rest at exit
    if isinstance(error, BrokenPipeError):
        return 141
    to_stderr(f"{name}: {error}")
    return 2


def _is_first_to_fail() -> bool:
    parallel = sys.modules.get("llama.parallel")
    return parallel.is_first_to_fail() if parallel else log.is_first()


def _leave_group() -> None:
    if parallel := sys.modules.get("llama.parallel"):
        parallel.leave()
