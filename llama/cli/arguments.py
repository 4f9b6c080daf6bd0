"""The shell's words → the arguments of a command: text stays as typed, and what no command takes is said first.

fire alone would turn the prompt "123" into a number, take "-" for a separator, give a switch the next prompt as its
value, and run a command before it misses a flag. Its reading of numbers, lists and tables is what flags use.
"""

import inspect
import os
import re
import typing
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from inspect import Parameter
from typing import Any

from fire.parser import DefaultParseValue

from llama import log
from llama.errors import ParameterError
from llama.paths import FilePath, expanded
from llama.wording import nearest

Command = Callable[..., None]
Flags = Mapping[str, Parameter]  # what may be given as --name=value
HELP = ("--help", "-h")
_LIKE_A_FLAG = re.compile(r"-(?!\Z|\.?\d)")  # but not "-", "-5" or "-.5"


@dataclass(frozen=True, slots=True)
class Flag:
    """A flag that several commands have."""

    type: Any
    default: Any
    help: str


QUIET = {"quiet": Flag(bool, False, "nothing on stderr but errors.")}  # of every command


def with_flags(**groups: dict[str, Flag]) -> Callable[[Command], Command]:
    """Give a command the flags of `groups`: each group reaches it as one keyword argument, name → value.

    Beside them it has --quiet, which it knows nothing of. The flags' help texts are put under the "Args:" with which
    its docstring may end. `groups` of the result has the names of the flags.
    """

    def decorate(command: Command) -> Command:
        own = [p for p in inspect.signature(command).parameters.values() if p.name not in groups]
        added = QUIET | {name: flag for group in groups.values() for name, flag in group.items()}

        def call(*positional: Any, quiet: bool = False, **named: Any) -> None:
            given = {
                group: {name: named.pop(name, flag.default) for name, flag in flags.items()}
                for group, flags in groups.items()
            }
            with log.quiet() if quiet else nullcontext():
                command(*positional, **named, **given)

        parameters = own + [
            Parameter(name, Parameter.KEYWORD_ONLY, default=flag.default, annotation=flag.type)
            for name, flag in added.items()
        ]
        doc = inspect.cleandoc(command.__doc__ or "")
        lines = [f"    {name}: {flag.help}" for name, flag in added.items()]
        call.__name__ = command.__name__
        call.__doc__ = "\n".join([doc if "\nArgs:\n" in doc else f"{doc}\n\nArgs:", *lines])
        call.groups = {group: tuple(flags) for group, flags in groups.items()}  # type: ignore[attr-defined]
        call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return call

    return decorate


def arguments(command: Command, given: Sequence[str], name: str) -> tuple[list[Any], dict[str, Any]] | None:
    """What a command is called with for `given`, the words of a shell: by place, and by name. None: it asks for help.

    After "--" nothing is a flag. A hyphen in a flag is as good as an underscore. Raises ParameterError for what the
    command, which errors call `name`, does not take.
    """
    parameters = inspect.signature(command).parameters
    flags = {key: p for key, p in parameters.items() if p.kind is not Parameter.VAR_POSITIONAL}
    sorted_out = _sorted_out(flags, deque(map(as_utf8, given)), name)
    if sorted_out is None:
        return None
    texts, values = sorted_out
    places = [key for key, p in flags.items() if p.kind is Parameter.POSITIONAL_OR_KEYWORD]
    free = [key for key in places if key not in values]
    values |= {key: [text] for key, text in zip(free, texts, strict=False)}
    rest = texts[len(free) :]
    if rest and len(flags) == len(parameters):  # no *texts
        raise ParameterError(f"nothing takes {rest[0]!r:.60} here: {name} --help says what there is to give")
    for flag in flags.values():
        if flag.default is Parameter.empty and flag.name not in values:
            raise ParameterError(f"{_shown_name(flag)} is missing: {name} --help says what it is")
    read = {key: _value(flags[key], found) for key, found in values.items()}
    before = [read.pop(key) for key in places] if rest else []  # all of them were given
    return before + rest, read


def _sorted_out(flags: Flags, queue: "deque[str]", name: str) -> tuple[list[str], dict[str, list[str]]] | None:
    """The texts among the words, and what each flag was given; None where the words ask for help."""
    texts: list[str] = []
    values: dict[str, list[str]] = {}
    while queue:
        word = queue.popleft()
        if word in HELP:
            return None
        if word == "--":
            return texts + list(queue), values
        if word == "-" or not word.startswith("-"):
            texts.append(word)
        else:
            flag, value = _flag_and_value(word, queue, flags, name)
            values.setdefault(flag.name, []).append(value)
    return texts, values


def as_utf8(word: str) -> str:
    """An argument as UTF-8, whatever the locale made of its bytes."""
    try:
        return os.fsencode(word).decode()
    except UnicodeError:
        raise ParameterError(f"the argument {word!r:.60} is not UTF-8 text: type it in UTF-8") from None


def meant(typed: str, names: Iterable[str], name: str, prefix: str = "") -> str:
    """What to try instead of a name that is none."""
    begun = (known for known in names if typed and known.startswith(typed))
    near = next(begun, None) or nearest(typed, names)
    return f"did you mean {prefix}{near}?" if near else f"{name} --help lists what there is"


def _shown_name(flag: Parameter) -> str:
    """How help and errors name what is given: FILE by its place, --flag by its name."""
    by_place = flag.default is Parameter.empty and flag.kind is Parameter.POSITIONAL_OR_KEYWORD
    return flag.name.upper() if by_place else f"--{flag.name}"


def is_repeatable(flag: Parameter) -> bool:
    """Whether a flag takes texts, one each time it is given."""
    return typing.get_origin(flag.annotation) is Sequence and typing.get_args(flag.annotation) == (str,)


def is_path(flag: Parameter) -> bool:
    """Whether a flag takes the path of a file or folder."""
    return flag.annotation in (FilePath, FilePath | None)


def _flag_and_value(word: str, queue: "deque[str]", flags: Flags, name: str) -> tuple[Parameter, str]:
    """The flag that a word names, and its value, which may be the next word of the queue."""
    typed, equals, value = word.partition("=")
    flag, negated = _find(typed, flags, name)
    if flag.annotation is bool:
        if not equals:
            return flag, str(not negated)
        if negated or value.lower() not in ("true", "false"):
            raise ParameterError(f"{typed} is a switch: give it without a value, not {value!r:.60}")
        return flag, value.capitalize()
    if equals:
        return flag, value
    if not queue or _LIKE_A_FLAG.match(queue[0]):
        raise ParameterError(f"{typed} needs a value: write {typed}=VALUE")
    return flag, queue.popleft()


def _find(typed: str, flags: Flags, name: str) -> tuple[Parameter, bool]:
    """(Flag, whether it is switched off) for --flag, -flag, --noflag or --no-flag."""
    key = typed.removeprefix("-").removeprefix("-").replace("-", "_")
    if key in flags:
        return flags[key], False
    switch = flags.get(key.removeprefix("no").removeprefix("_"))
    if key.startswith("no") and switch and switch.annotation is bool:
        return switch, True
    hint = meant(key, flags, name, "--")
    raise ParameterError(f"there is no flag {typed!r:.60}: {hint} (text that begins with - goes after --)")


def _value(flag: Parameter, found: list[str]) -> Any:
    """What a flag's texts are read as: text and paths as they are, all else as a Python literal where it is one."""
    if is_repeatable(flag):
        return found
    if len(found) > 1:
        raise ParameterError(f"--{flag.name} was given {len(found)} times: give it once")
    if is_path(flag):
        return expanded(found[0], _shown_name(flag))
    return found[0] if flag.annotation in (str, str | None) else DefaultParseValue(found[0])
