"""The words of a shell → the command that they name, called, or its help."""

import contextlib
import os
import re
import sys
from collections.abc import Iterator

import fire

from llama import __version__
from llama.cli.arguments import HELP, Command, arguments, meant
from llama.cli.help import overview, page
from llama.errors import ParameterError
from llama.script import in_a_shell


def check_cores() -> None:
    """Raise ParameterError for a list of cores in which GNU's OpenMP, loaded with torch, would search for ever."""
    cores = os.environ.get("GOMP_CPU_AFFINITY", "")
    if not re.fullmatch(r"[0-9\s,:+-]*", cores, re.ASCII):
        raise ParameterError(f"GOMP_CPU_AFFINITY={cores!r} is not a list of cores such as 0-3,8: mend it, or unset it")


def run(commands: dict[str, Command]) -> None:
    """Run the command of a table that the first of the shell's words names, with the others."""
    with in_a_shell("llama"):
        _call(commands, sys.argv[1:])


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


def _call(commands: dict[str, Command], given: list[str]) -> None:
    if given[:2] == ["--", "--completion"]:
        fire.Fire(commands, command=given, name="llama")
    elif given in ([], ["help"], *([word] for word in HELP)):
        print(overview(commands))
    elif given == ["--version"]:
        print(f"llama {__version__}")
    elif given[0] in commands:
        _call_one(commands[given[0]], given[1:], f"llama {given[0]}")
    else:
        raise ParameterError(f"there is no command {given[0]!r:.60}: {meant(given[0], commands, 'llama')}")


def _call_one(command: Command, given: list[str], name: str) -> None:
    read = arguments(command, given, name)
    if read is None:
        print(page(command, name))
    else:
        check_cores()
        places, named = read
        command(*places, **named)
