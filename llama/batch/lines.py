"""Files of prompts: their lines → requests. One file may mix texts, dialogs, gaps and OpenAI's form."""

import json
import sys
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from hashlib import blake2b
from typing import Any, Literal

from llama.batch import openai
from llama.chat import Dialog
from llama.errors import LlamaError, ParameterError, PromptError
from llama.infilling import Infilling
from llama.openai import in_their_words, parse
from llama.request import SamplingParams, derive_seed
from llama.wording import nearest, utf8

Format = Literal["text", "jsonl"]
SAMPLING_FIELDS = frozenset(field.name for field in fields(SamplingParams))
_EXPECTED = (
    'expected {"prompt": …}, {"messages": […]}, {"prefix": …, "suffix": …}, a list of messages, or OpenAI\'s batch form'
)
_KINDS = {"prompt": str, "messages": list, "prefix": str}  # of JSON objects


@dataclass(frozen=True, slots=True)
class Line:
    """One line that asks for something: a request, or the reason why it is none."""

    number: int  # in the file, from 1
    id: str | int | None = None
    prompt: str | Dialog | Infilling = ""
    params: SamplingParams | None = None
    error: str | None = None
    call: openai.Call | None = None  # where the line is of OpenAI's form


def choose_format(path: str, given: str | None) -> Format:
    """How a file of prompts is read: as said, else by its name. Raises ParameterError for another format."""
    if given is None:
        return "jsonl" if path.endswith((".jsonl", ".ndjson")) else "text"
    if given not in ("text", "jsonl"):
        raise ParameterError(f"format={given!r} is not a format: use text (a prompt a line) or jsonl")
    return given  # type: ignore[return-value]


def numbered_lines(path: str) -> Iterator[tuple[int, bytes]]:
    """(Line number, bytes) of every line that is not blank, without its line end. "-" is standard input."""
    try:
        with sys.stdin.buffer if path == "-" else open(path, "rb") as file:
            for number, data in enumerate(file, 1):
                line = data.removeprefix(b"\xef\xbb\xbf") if number == 1 else data
                if line.strip():
                    yield number, line.removesuffix(b"\n").removesuffix(b"\r")
    except OSError as error:
        raise PromptError(f"prompts file {path} cannot be read: {error.strerror}") from None


def whole_file(path: str) -> bytes:
    """All of a file, or of the standard input ("-")."""
    try:
        with sys.stdin.buffer if path == "-" else open(path, "rb") as file:
            return file.read().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise PromptError(f"prompts file {path} cannot be read: {error.strerror}") from None


def read_line(number: int, data: bytes, file_format: Format, defaults: SamplingParams, seed: int) -> Line:
    """What one line asks for, with the sampling fields it sets; its noise comes from `seed` and its number.

    A line that is none says why in its `error`.
    """
    try:
        text = utf8(data)
    except PromptError as error:
        return Line(number, error=str(error))
    line = Line(number, prompt=text) if file_format == "text" else _read_json(number, text, defaults)
    if line.error is None:
        params = line.params or defaults
        line = replace(
            line, params=replace(params, seed=derive_seed(seed, number) if params.seed is None else params.seed)
        )
    return line


def _read_json(number: int, text: str, defaults: SamplingParams) -> Line:
    try:
        value = parse(text)
    except ValueError as error:
        return Line(number, error=f"not JSON ({error}): {_EXPECTED}")
    if isinstance(value, list):
        return Line(number, prompt=value)
    if not isinstance(value, dict):
        return Line(number, error=f"a JSON {type(value).__name__}: {_EXPECTED}")
    if "custom_id" in value or "body" in value:
        return _read_openai(number, value, defaults)
    return _read_object(number, value, defaults)


def _read_object(number: int, value: dict[str, Any], defaults: SamplingParams) -> Line:
    name = value.pop("id", None)
    if not isinstance(name, str | int | None) or isinstance(name, bool):
        return Line(number, error=f"id is a JSON {type(name).__name__}: expected a string or an integer")
    value = {key: field for key, field in value.items() if field is not None or key not in _KINDS}
    try:
        kinds = [key for key in _KINDS if key in value]
        if len(kinds) != 1:
            raise PromptError(
                f"{'both ' + ' and '.join(kinds) if kinds else 'neither prompt nor messages'}: {_EXPECTED}"
            )
        prompt = value.pop(kinds[0])
        if not isinstance(prompt, _KINDS[kinds[0]]):
            raise PromptError(f"a {kinds[0]} that is {type(prompt).__name__}: {_EXPECTED}")
        if kinds == ["prefix"]:
            prompt = _infilling(prompt, value)
        return Line(number, name, prompt, replace(defaults, **sampling_fields(value)))
    except LlamaError as error:
        return Line(number, name, error=str(error))


def _infilling(prefix: str, value: dict[str, Any]) -> Infilling:
    """The gap behind a prefix, with what else of the object belongs to it."""
    suffix, first = value.pop("suffix", None), value.pop("suffix_first", False)
    if not isinstance(suffix, str):
        raise PromptError(f"a prefix whose suffix is {type(suffix).__name__}: {_EXPECTED}")
    if not isinstance(first, bool):
        raise PromptError(f"a suffix_first that is {first!r:.60}: expected true or false")
    return Infilling(prefix, suffix, first)


def _read_openai(number: int, value: dict[str, Any], defaults: SamplingParams) -> Line:
    call = openai.Call.of(value)
    try:
        prompt, given, theirs = openai.read_body(value)
        with in_their_words(theirs):
            return Line(number, prompt=prompt, params=replace(defaults, **given), call=call)
    except LlamaError as error:
        return Line(number, error=str(error), call=call)


def sampling_fields(value: dict[str, Any]) -> dict[str, Any]:
    """A JSON object's sampling fields, without those that are null; raises ParameterError for any that is none."""
    check_names(value)
    return {name: field for name, field in value.items() if field is not None}


def check_names(names: Iterable[str]) -> None:
    """Raise ParameterError, with what may be meant, for a name that is no sampling field's."""
    for name in names:
        if name not in SAMPLING_FIELDS:
            near = nearest(name, SAMPLING_FIELDS)
            raise ParameterError(f"unknown field {name!r}" + (f": did you mean {near!r}?" if near else ""))


def repeated_id(path: str) -> str | None:
    """Which custom_id of OpenAI's lines stands on two lines of a file, and on which; 16 bytes of memory a line."""
    import numpy  # here: a file of plain prompts needs none

    digests, numbers = array("Q"), array("Q")
    for number, data in numbered_lines(path):
        if b'"custom_id"' in data and (name := _custom_id(data)) is not None:
            digest = blake2b(name.encode(errors="surrogatepass"), digest_size=8).digest()
            digests.append(int.from_bytes(digest, "little"))
            numbers.append(number)
    keys = numpy.frombuffer(digests, numpy.uint64) if digests else numpy.empty(0, numpy.uint64)
    order = numpy.argsort(keys, kind="stable")
    again = numpy.flatnonzero(keys[order][1:] == keys[order][:-1])
    if not len(again):
        return None
    place = min(again, key=lambda at: order[at + 1])
    first, second = numbers[order[place]], numbers[order[place + 1]]
    name = next(_custom_id(data) for number, data in numbered_lines(path) if number == first)
    more = f", {len(again) - 1} more lines repeat one" if len(again) > 1 else ""
    return f"custom_id {name!r:.60} stands on line {first} and on line {second}{more}: every line is answered"


def _custom_id(data: bytes) -> str | None:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return None
    name = value.get("custom_id") if isinstance(value, dict) else None
    return name if isinstance(name, str) else None


def read_prompts(path: str) -> list[str]:
    """The lines of a text file, one prompt each; blank lines are left out. Raises PromptError where it is no text."""
    return [utf8(data, f"{path} line {number} is ") for number, data in numbered_lines(path)]


def read_dialogs(path: str) -> list[list[Any]]:
    """The dialogs of a JSON-lines file: lists of messages, or objects with "messages". Raises PromptError by line."""
    return [_dialog(path, number, utf8(data, f"{path} line {number} is ")) for number, data in numbered_lines(path)]


def _dialog(path: str, number: int, line: str) -> list[Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise PromptError(f"{path} line {number} is not JSON ({error}): expected a list of messages") from None
    dialog = value.get("messages") if isinstance(value, dict) else value
    if not isinstance(dialog, list):
        raise PromptError(f'{path} line {number} is not a list of messages, nor {{"messages": […]}}')
    return dialog
