"""What `llama complete` is to complete: texts as they were typed, standard input, or a text with a gap."""

import sys
from collections.abc import Sequence
from pathlib import Path

from llama import log
from llama.errors import ParameterError, PromptError
from llama.infilling import Infilling, at_mark
from llama.log import is_first
from llama.wording import utf8


def texts(prompts: Sequence[str], more: Sequence[str]) -> list[str]:
    """The texts to complete; in the place of "-" what the first process reads from standard input."""
    if not prompts and not more:
        raise PromptError("no prompt: give llama complete a text, or - for standard input, or --prompt=TEXT")
    if prompts.count("-") > 1:
        raise PromptError(f"- was given {prompts.count('-')} times, but standard input is read once: give it once")
    return [_standard_input() if text == "-" and is_first() else text for text in prompts] + list(more)


def text_with_gap(
    prefix: str | None, suffix: str | None, infill: str | None, suffix_first: bool
) -> Infilling | None:  # fmt: skip
    """That of the flags, if they name one; of several processes the first reads the file."""
    if infill is not None and (prefix is not None or suffix is not None):
        raise ParameterError("--infill names a text with a gap, and so do --prefix and --suffix: give one of them")
    if infill is None and prefix is None and suffix is None:
        if suffix_first:
            raise ParameterError("--suffix_first is for a text with a gap: give --prefix and --suffix, or --infill")
        return None
    found = Infilling(prefix or "", suffix or "") if infill is None else _marked(infill)
    return Infilling(found.prefix, found.suffix, suffix_first)


def _marked(file: str) -> Infilling:
    if not is_first():
        return Infilling("", "")
    if file == "-":
        return at_mark(_standard_input(), "standard input")
    try:
        data = Path(file).read_bytes()
    except OSError as error:
        raise ParameterError(f"infill={file!r} cannot be read: {error.strerror}") from None
    return at_mark(utf8(data, f"{file} is "), file)


def _standard_input() -> str:
    """All of standard input as one text, without the newline that ends it."""
    if sys.stdin.isatty():
        log.say("reading the prompt from the terminal; Ctrl-D ends it")
    return utf8(sys.stdin.buffer.read(), "standard input is ").removesuffix("\n")
