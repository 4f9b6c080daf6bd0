"""The gate to a terminal: text of any origin → what can be shown there and cannot act on it.

Names in files, keys and values, ids, file names, what a model writes and what a library says of a file could all hold
escape sequences that move the cursor, hide text or type for the user. A text that is data stays exact in a pipe.
"""

import contextlib
import json
import sys
from typing import Any

# Line separators and directions of writing, which no terminal draws and some obey.
_TURNS = (0x61C, 0x200E, 0x200F, *range(0x2028, 0x202F), *range(0x2066, 0x206A))
_ACTING = (*range(0x7F, 0xA0), *_TURNS)
_VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
_VISIBLE |= dict.fromkeys(_ACTING, 0xFFFD) | {0x7F: 0x2421}
_ESCAPED = {code: f"\\u{code:04x}" for code in _ACTING}  # json itself escapes those below 0x20


def harmless(text: str) -> str:
    """Text that cannot steer a terminal: control characters but newline and tab are shown as pictures (␛), or as �."""
    return text.translate(_VISIBLE)


def one_line(text: str) -> str:
    """The same for names and messages: what is not printable is escaped as in Python's repr (\\x1b, \\n, \\u202e)."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def json_line(value: Any) -> str:
    """A value as one line of JSON, which may be shown anywhere and split by anybody's idea of a line."""
    return json.dumps(value, ensure_ascii=False).translate(_ESCAPED)


def show(text: str, end: str = "\n") -> None:
    """Print what a person or a program reads: in a terminal it is harmless, elsewhere exact."""
    print(harmless(text) if sys.stdout.isatty() else text, end=end, flush=True)


def to_stderr(line: str) -> None:
    """Print one harmless line on stderr; where nothing can be written there, that is silent."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            print(one_line(line), file=sys.stderr, flush=True)
