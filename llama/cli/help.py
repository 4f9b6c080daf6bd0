"""Help pages, made of signatures and docstrings: what commands there are, and what one command takes."""

import inspect
import shutil
import textwrap
from collections.abc import Iterable, Mapping
from inspect import Parameter
from typing import Any

from fire import docstrings

from llama.cli.arguments import Command, is_path, is_repeatable

START = """\
llama runs Llama-2 checkpoints in the layout in which Meta ships them.

Start with the small one that is bundled:
  llama demo
  llama complete "Once upon a time"
  llama chat

Go on with your own, in a folder with consolidated.00.pth and params.json:
  llama chat --ckpt_dir FOLDER"""
MORE = (
    ("llama COMMAND --help", "what a command takes."),
    ("llama --version", "which llama this is."),
    ("llama -- --completion bash", "a script for completion with the Tab key; there is one for fish too."),
)
MOST_COLUMNS = 110
_VALUES: dict[Any, str] = {
    str: "TEXT", str | None: "TEXT", int: "N", int | None: "N", float: "X", float | None: "X",
    dict[str, int | str] | None: "TABLE", str | dict[str, str] | None: "MAP",
}  # fmt: skip


def overview(commands: Mapping[str, Command]) -> str:
    """The first page: how to start, a line for each command, and what there is besides."""
    rows = [(name, str(docstrings.parse(command.__doc__).summary)) for name, command in commands.items()]
    return "\n\n".join([START, f"Commands:\n{_table(rows)}", f"More:\n{_table(MORE)}"])


def page(command: Command, name: str) -> str:
    """What one command, which the shell calls `name`, does and takes."""
    doc = docstrings.parse(command.__doc__)
    said = {argument.name: argument.description for argument in doc.args or ()}
    parameters = inspect.signature(command).parameters
    labels = _labels(parameters.values())
    groups: dict[str, tuple[str, ...]] = getattr(command, "groups", {})
    shared = {flag for flags in groups.values() for flag in flags}
    paragraphs = [str(doc.summary), *(doc.description or "").split("\n\n")]
    parts = [_usage(name, parameters.values(), labels), *map(_wrapped, filter(None, paragraphs))]
    for title, names in {"arguments": [n for n in parameters if n not in shared], **groups}.items():
        rows = [(labels[n], f"{said.get(n) or ''} {_default(parameters[n])}".strip()) for n in names]
        parts += [f"{title.capitalize()}:\n{_table(rows)}"] if rows else []
    return "\n\n".join(parts)


def _usage(name: str, parameters: Iterable[Parameter], labels: Mapping[str, str]) -> str:
    """One line: what must be given, what may be given by its place, and that there are flags."""
    words = [name]
    for parameter in parameters:
        label = labels[parameter.name]
        if parameter.kind is Parameter.VAR_POSITIONAL:
            words.append(f"[{label}]...")
        elif parameter.default is Parameter.empty:
            words.append(label)
        elif parameter.kind is Parameter.POSITIONAL_OR_KEYWORD:
            words.append(f"[{label}]")
    return f"Usage: {' '.join(words)} [FLAGS]"


def _labels(parameters: Iterable[Parameter]) -> dict[str, str]:
    """Name → FILE for what is given by its place, --flag or --flag=VALUE for the rest."""
    by_place = (Parameter.VAR_POSITIONAL, Parameter.POSITIONAL_OR_KEYWORD)
    return {p.name: p.name.upper() if p.kind in by_place else f"--{p.name}{_value(p)}" for p in parameters}


def _value(flag: Parameter) -> str:
    if flag.annotation is bool:
        return ""
    if is_path(flag):
        return "=PATH"
    return f"={_VALUES.get(flag.annotation, 'TEXT' if is_repeatable(flag) else 'LIST')}"


def _default(parameter: Parameter) -> str:
    """What holds where nothing is given, unless that is nothing."""
    default = parameter.default
    if default in (Parameter.empty, None) or default is False or default in ((), {}):
        return ""
    return f"Default: {default}."


def _table(rows: Iterable[tuple[str, str]]) -> str:
    """Two columns, the second wrapped to the terminal."""
    rows = list(rows)
    indent = 4 + max(len(label) for label, _ in rows)
    return "\n".join(_wrapped(f"  {label:<{indent - 2}}{text}", indent) for label, text in rows)


def _wrapped(text: str, indent: int = 0) -> str:
    columns = min(shutil.get_terminal_size().columns, MOST_COLUMNS)
    return textwrap.fill(text, max(columns, indent + 20), subsequent_indent=" " * indent, break_on_hyphens=False)
