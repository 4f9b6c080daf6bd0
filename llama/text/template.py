"""`TemplateChat`: a checkpoint's own chat template, which is a program in Jinja, run where it can do no harm.

The conventions are those of transformers (https://huggingface.co/docs/transformers/chat_templating). Special tokens are
such only where the template wrote them: what a message holds stays text. To tell them apart, a mark that no text
has is put into each special token that a message spells, and taken out of what the template returns.
"""

import datetime
import hashlib
import json
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any, ClassVar

from llama.chat import ChatPrompt, Dialog, check_messages
from llama.errors import PromptError
from llama.gate import one_line
from llama.tokenizer import BaseTokenizer

MOST_CHARACTERS = 1 << 24  # of a prompt: a template that goes on for ever is stopped there
_MARKS = range(0xF0000, 0xF0100)  # for private use: of these the first that no message has


_MISTAKES = (ArithmeticError, LookupError, TypeError, ValueError, AttributeError, RecursionError)  # of a template


class TemplateChat:
    """A template with its tokenizer; `names` are the special tokens that a template may ask for, such as bos_token."""

    end_ids: ClassVar[frozenset[int]] = frozenset()

    def __init__(self, template: str, names: Mapping[str, str], tokenizer: BaseTokenizer) -> None:
        self._template, self._names, self._tokenizer = template, dict(names), tokenizer
        self.identity = hashlib.sha256(json.dumps([template, self._names]).encode()).hexdigest()

    @cached_property
    def _compiled(self) -> Any:
        from jinja2 import TemplateError

        try:
            return _environment().from_string(self._template)
        except (TemplateError, RecursionError) as error:
            raise PromptError(f"the chat template cannot be read ({_first_line(error)}): name another one") from None

    def check(self, dialog: Dialog, name: str) -> None:
        check_messages(dialog, name)
        for place, message in enumerate(dialog):
            if not isinstance(message["role"], str):
                raise PromptError(f"{name}, message {place}: role is {type(message['role']).__name__}, not text")

    def refuses(self, dialog: Dialog) -> bool:
        return False

    def prompt(self, dialog: Dialog) -> ChatPrompt:
        """Raises PromptError with the template's own words, where it does not take the dialog."""
        held = "".join(_texts(list(dialog))) + self._template
        mark = next(mark for mark in map(chr, _MARKS) if mark not in held)
        marked = _marked(list(dialog), {name: name[:1] + mark + name[1:] for name in self._tokenizer.specials})
        text = self._rendered(marked)
        return ChatPrompt(text.replace(mark, ""), self._tokenizer.encode_template(text, mark))

    def _rendered(self, messages: list[Any]) -> str:
        from jinja2 import TemplateError

        written, size = [], 0
        try:
            for piece in self._compiled.generate(messages=messages, add_generation_prompt=True, **self._names):
                written.append(piece)
                size += len(piece)
                if size > MOST_CHARACTERS:
                    raise PromptError(
                        f"the chat template writes more than {MOST_CHARACTERS} characters: name another one"
                    )
        except PromptError:
            raise
        except (
            TemplateError,
            ArithmeticError,
            LookupError,
            TypeError,
            ValueError,
            AttributeError,
            RecursionError,
        ) as error:
            raise PromptError(f"the chat template does not take this dialog: {_first_line(error)}") from None
        return "".join(written)


def _first_line(error: Exception) -> str:
    return one_line((str(error).strip().splitlines() or [type(error).__name__])[0])[:300]


def _texts(value: Any) -> Iterator[str]:
    """All texts in messages."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for one in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(one)


def _marked(value: Any, marked: Mapping[str, str]) -> Any:
    """A message, in which the special tokens that its texts spell have a mark."""
    if isinstance(value, str):
        for name, other in marked.items():
            value = value.replace(name, other)
        return value
    if isinstance(value, Mapping):
        return {key: _marked(one, marked) for key, one in value.items()}
    return [_marked(one, marked) for one in value] if isinstance(value, list | tuple) else value


def _environment() -> Any:
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} marks what an assistant said, which matters to those who train alone."""

        tags = {"generation"}  # noqa: RUF012  # jinja2 declares it so

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": _now}
    return environment


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Without jinja2's escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)
