"""One run of a command from a shell: its streams, its words, its help, its errors and its exit code."""

import io
import os
import sys
import warnings
from pathlib import Path

import fire

from llama import __version__
from llama.command_line import HELP, Command, meant, parsed_as_typed, words
from llama.errors import LlamaError, ParameterError
from llama.gate import say
from llama.help_page import overview, page


def is_main() -> bool:
    """Whether this process talks to the person: rank 0 of those that torchrun started, or the only one."""
    return int(os.environ.get("RANK", 0)) == 0


def wait_briefly() -> None:
    """Let threads that wait for others give up their core after about 0.1 ms, unless the environment says otherwise.

    Waiting longer gains at most 5 % where the cores are free, and takes them from others, and from itself, where they
    are not (benchmarks/RESULTS.md). It counts for GNU's OpenMP, when that is loaded.
    """
    if not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}:
        os.environ["GOMP_SPINCOUNT"] = "3000"


def run(commands: Command | dict[str, Command]) -> None:
    """Run one command, or that of a table which the first word names, with the words of the shell.

    An error of the user's is one line and exit code 2.
    """
    wait_briefly()
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="strict" if stream is sys.stdin else "backslashreplace")
    name = Path(sys.argv[0]).name if callable(commands) else "llama"
    warnings.showwarning = lambda message, *_: say(f"{name}: {message}")  # a library's, which may quote a file
    try:
        _call(commands, sys.argv[1:], name)
        print(end="", flush=True)  # a pipe that is closed or a disk that is full is still ours to report
    except LlamaError as error:
        if _is_first_to_fail():
            say(f"{name}: {error}")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)  # as a shell reports a command that Ctrl-C ended
    except (OSError, UnicodeEncodeError) as error:  # the latter: a file name that the locale cannot write
        sys.exit(_system_error(error, name))
    except SystemExit:
        _leave_group()
        raise
    _leave_group()


def _system_error(error: OSError | UnicodeEncodeError, name: str) -> int:
    """Say what the system refused, and return the exit code; nothing where a reader such as head(1) has had enough."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would fail to write the rest at exit
    if isinstance(error, BrokenPipeError):
        return 141
    say(f"{name}: {error}")
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
    read = words(command, given, name)
    if read is None:
        print(page(command, name))
    else:
        fire.Fire(parsed_as_typed(command), command=read, name=name)


def _is_first_to_fail() -> bool:
    parallel = sys.modules.get("llama.parallel")
    return parallel.is_first_to_fail() if parallel else is_main()


def _leave_group() -> None:
    if parallel := sys.modules.get("llama.parallel"):
        parallel.leave()
