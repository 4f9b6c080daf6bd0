"""One run of a command from a shell: its streams, its words, its help, its errors and its exit code."""

import contextlib
import io
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import fire

from llama import __version__, log
from llama.cli.arguments import HELP, Command, arguments, meant
from llama.cli.help import overview, page
from llama.errors import LlamaError, ParameterError
from llama.gate import to_stderr


def wait_briefly() -> None:
    """Let threads that wait for others give up their core after about 0.1 ms, unless the environment says otherwise.

    Waiting longer gains at most 5 % where the cores are free, and takes them from others, and from itself, where they
    are not (benchmarks/RESULTS.md). It counts for GNU's OpenMP, when that is loaded.
    """
    if not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}:
        os.environ["GOMP_SPINCOUNT"] = "3000"


def check_cores() -> None:
    """Raise ParameterError for a list of cores in which GNU's OpenMP, loaded with torch, would search for ever."""
    cores = os.environ.get("GOMP_CPU_AFFINITY", "")
    if not re.fullmatch(r"[0-9\s,:+-]*", cores, re.ASCII):
        raise ParameterError(f"GOMP_CPU_AFFINITY={cores!r} is not a list of cores such as 0-3,8: mend it, or unset it")


def run(commands: Command | dict[str, Command]) -> None:
    """Run one command, or that of a table which the first word names, with the words of the shell.

    An error of the user's is one line and exit code 2.
    """
    wait_briefly()
    _open_closed_streams()
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="strict" if stream is sys.stdin else "backslashreplace")
    name = Path(sys.argv[0]).name if callable(commands) else "llama"
    warnings.showwarning = lambda message, *_: log.say(str(message), logging.WARNING)  # a library's
    try:
        _check_output()
        _call(commands, sys.argv[1:], name)
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


def _open_closed_streams() -> None:
    """Open /dev/null in the place of standard input and stderr where they are closed: no input, and silence.

    Else files that are opened later would get their numbers, and what libraries write to stderr would go into one.
    """
    for name, mode in (("stdin", "r"), ("stderr", "w")):
        if getattr(sys, name) is None:
            stream = open(os.devnull, mode)  # noqa: SIM115
            os.set_inheritable(stream.fileno(), True)  # by compilers, say, which this process may start
            setattr(sys, name, stream)


@contextlib.contextmanager
def without_stderr() -> Iterator[None]:
    """Nothing reaches stderr meanwhile, not even what a native library writes there by itself."""
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


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


def _call(commands: Command | dict[str, Command], given: list[str], name: str) -> None:
    if given[:2] == ["--", "--completion"]:
        fire.Fire(commands, command=given, name=name)
    elif callable(commands):
        _call_one(commands, given, name)
    elif given in ([], ["help"], *([word] for word in HELP)):
        print(overview(commands))
    elif given == ["--version"]:
        print(f"llama {__version__}")
    elif given[0] in commands:
        _call_one(commands[given[0]], given[1:], f"{name} {given[0]}")
    else:
        raise ParameterError(f"there is no command {given[0]!r:.60}: {meant(given[0], commands, name)}")


def _call_one(command: Command, given: list[str], name: str) -> None:
    read = arguments(command, given, name)
    if read is None:
        print(page(command, name))
    else:
        check_cores()
        places, named = read
        command(*places, **named)


def _is_first_to_fail() -> bool:
    parallel = sys.modules.get("llama.parallel")
    return parallel.is_first_to_fail() if parallel else log.is_first()


def _leave_group() -> None:
    if parallel := sys.modules.get("llama.parallel"):
        parallel.leave()
