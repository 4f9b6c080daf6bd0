"""The shell's words → the arguments of a command: text stays as typed, and what no command takes is said first.

fire calls the command and completes its flags in a shell. Left to itself it would turn the prompt "123" into a number,
take "-" for a separator, give a switch the next prompt as its value, and run before it misses a flag.
"""

import inspect
import json
import os
import re
import typing
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from inspect import Parameter
from typing import Any

from fire.decorators import SetParseFn, SetParseFns
from fire.parser import DefaultParseValue

from llama.errors import ParameterError
from llama.paths import FilePath, expanded
from llama.wording import nearest

Command = Callable[..., None]
Flags = Mapping[str, Parameter]  # what may be given as --name=value
HELP = ("--help", "-h")
_AS_TEXT = "="  # stands before a positional text, so that fire sees neither a flag nor a separator in it
_LIKE_A_FLAG = re.compile(r"-(?!\Z|\.?\d)")  # but not "-", "-5" or "-.5"


@dataclass(frozen=True, slots=True)
class Flag:
    """A flag that several commands have."""

    type: Any
    default: Any
    help: str


def with_flags(**groups: dict[str, Flag]) -> Callable[[Command], Command]:
    """Give a command the flags of `groups`: each group reaches it as one keyword argument, name → value.

    The command's docstring ends with its "Args:", under which the flags' own lines are put. `groups` of the result
    has their names.
    """

    def decorate(command: Command) -> Command:
        own = [p for p in inspect.signature(command).parameters.values() if p.name not in groups]
        shared = {name: flag for group in groups.values() for name, flag in group.items()}

        def call(*positional: Any, **named: Any) -> None:
            given = {
                group: {name: named.pop(name, flag.default) for name, flag in flags.items()}
                for group, flags in groups.items()
            }
            command(*positional, **named, **given)

        parameters = own + [
            Parameter(name, Parameter.KEYWORD_ONLY, default=flag.default, annotation=flag.type)
            for name, flag in shared.items()
        ]
        lines = [f"    {name}: {flag.help}" for name, flag in shared.items()]
        call.__name__ = command.__name__
        call.__doc__ = "\n".join([inspect.cleandoc(command.__doc__ or ""), *lines])
        call.groups = {group: tuple(flags) for group, flags in groups.items()}  # type: ignore[attr-defined]
        call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return call

    return decorate


def _flags_of(command: Command) -> Flags:
    """Every parameter of a command but *texts: a positional one may be given as a flag too."""
    parameters = inspect.signature(command).parameters
    return {name: p for name, p in parameters.items() if p.kind is not Parameter.VAR_POSITIONAL}


def _takes_texts(command: Command) -> bool:
    """Whether a command has a parameter like *texts."""
    return any(p.kind is Parameter.VAR_POSITIONAL for p in inspect.signature(command).parameters.values())


def parsed_as_typed(command: Command) -> Command:
    """Tell fire how to read the words that `words` makes: texts as they are, all else as Python literals."""
    readers: dict[str, Callable[[str], Any]] = {}
    for name, flag in _flags_of(command).items():
        if is_path(flag) or flag.annotation in (str, str | None):
            readers[name] = str
        elif is_repeatable(flag):
            readers[name] = json.loads

    def read(word: str) -> Any:
        return word.removeprefix(_AS_TEXT) if word.startswith(_AS_TEXT) else DefaultParseValue(word)

    readable: Command = SetParseFn(read)(SetParseFns(**readers)(command))
    return readable


def words(command: Command, given: Sequence[str], name: str) -> list[str] | None:
    """The words that fire is to read for `given`, those of the shell; None where they ask for help.

    Every flag becomes --flag=value; after "--" nothing is a flag. A hyphen in a flag is as good as an underscore.
    Raises ParameterError for what the command, which errors call `name`, does not take.
    """
    flags = _flags_of(command)
    values: dict[str, list[str]] = {}
    texts: list[str] = []
    queue = deque(map(as_utf8, given))
    while queue:
        word = queue.popleft()
        if word in HELP:
            return None
        if word == "--":
            texts += queue
            break
        if word == "-" or not word.startswith("-"):
            texts.append(word)
        else:
            flag, value = _flag_and_value(word, queue, flags, name)
            values.setdefault(flag.name, []).append(value)
    rest = _place(texts, flags, values)
    if rest and not _takes_texts(command):
        raise ParameterError(f"nothing takes {rest[0]!r:.60} here: {name} --help says what there is to give")
    for flag in flags.values():
        if flag.default is Parameter.empty and flag.name not in values:
            raise ParameterError(f"{_shown_name(flag)} is missing: {name} --help says what it is")
    return [_joined(flags[key], found) for key, found in values.items()] + [_AS_TEXT + text for text in rest]


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


def _place(texts: list[str], flags: Flags, values: dict[str, list[str]]) -> list[str]:
    """Give texts to the positional flags that have no value yet, in order; return those that are left over."""
    free = [p.name for p in flags.values() if p.kind is Parameter.POSITIONAL_OR_KEYWORD and p.name not in values]
    values.update({name: [text] for name, text in zip(free, texts, strict=False)})
    return texts[len(free) :]


def _joined(flag: Parameter, found: list[str]) -> str:
    """--flag=value, as fire reads it; several texts of one flag become a list."""
    if is_repeatable(flag):
        return f"--{flag.name}={json.dumps(found)}"
    if len(found) > 1:
        raise ParameterError(f"--{flag.name} was given {len(found)} times: give it once")
    value = expanded(found[0], _shown_name(flag)) if is_path(flag) else found[0]
    return f"--{flag.name}={value}"
