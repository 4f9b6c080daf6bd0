"""The terminal of a talk: what is typed, asked and shown there."""

import contextlib
import os
import select
import signal
import sys
from collections.abc import Iterator
from types import FrameType

from prompt_toolkit import PromptSession
from prompt_toolkit.enums import DEFAULT_BUFFER
from prompt_toolkit.filters import has_focus
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

from llama.errors import ParameterError
from llama.gate import harmless, one_line

CTRL_C = b"\x03"
SECONDS_TO_END = 2  # after SIGTERM


def check_terminal() -> None:
    """Raise ParameterError unless a person can type and read here."""
    if sys.platform == "win32":
        raise ParameterError("llama chat needs a terminal of Linux or macOS: put dialogs into a file for llama batch")
    for name, stream in (("input", sys.stdin), ("output", sys.stdout)):
        if not stream.isatty():
            raise ParameterError(
                f"standard {name} is not a terminal, and a talk needs one: run llama chat in a terminal, or put dialogs"
                " into a file for llama batch"
            )


def lines() -> Iterator[str]:
    """What the user types, a message or command at a time, until Ctrl-D; blank ones are left out."""
    editor = _editor()
    while True:
        try:
            line = editor.prompt("> ", prompt_continuation="  ").strip()
        except KeyboardInterrupt:
            if not editor.default_buffer.text:
                notice("Ctrl-D or /exit leaves")
            continue
        except EOFError:
            return
        if line:
            yield line


def _editor() -> "PromptSession[str]":
    """A line editor whose messages may have several lines; its history is in memory only."""
    keys = KeyBindings()
    typing = has_focus(DEFAULT_BUFFER)  # and not searching the history, say

    @keys.add("enter", filter=typing)
    def send(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.text.endswith("\\") and buffer.document.is_cursor_at_the_end:
            buffer.delete_before_cursor()
            buffer.newline(copy_margin=False)
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter", filter=typing)
    def begin_line(event: KeyPressEvent) -> None:
        event.current_buffer.newline(copy_margin=False)

    return PromptSession(multiline=True, key_bindings=keys)


def ask(question: str) -> bool:
    """Whether the user answers yes; to leave the question is to say no."""
    session: PromptSession[str] = PromptSession()
    while True:
        try:
            answer = session.prompt(f"{one_line(question)} [y/n] ").strip().lower()
        except (KeyboardInterrupt, EOFError):
            return False
        if answer in ("y", "yes", "n", "no"):
            return answer.startswith("y")


def write(text: str) -> None:
    """Put text on the screen that may come from anywhere; half surrogate pairs (bytes that were no UTF-8) become ?."""
    sys.stdout.write(harmless(text).encode(errors="replace").decode())
    sys.stdout.flush()


def notice(text: str) -> None:
    """A line of the program's own, where there is one to say."""
    if text:
        write(f"llama: {text}\n")


@contextlib.contextmanager
def prepared(*, keys_as_bytes: bool) -> Iterator[None]:
    """The terminal as a talk needs it; at the end it is as it was, also where SIGTERM ends the process.

    `keys_as_bytes`: Ctrl-C is a byte to be read. The signal would reach torchrun, which would end every process: those
    that it starts are not in the terminal's session.
    """
    import termios  # here: Windows has none

    before = termios.tcgetattr(sys.stdin)
    handlers = {number: signal.signal(number, _end) for number in (signal.SIGTERM, signal.SIGALRM)}
    try:
        if keys_as_bytes:
            modes = termios.tcgetattr(sys.stdin)
            modes[3] &= ~(termios.ISIG | termios.ICANON | termios.ECHO)
            termios.tcsetattr(sys.stdin, termios.TCSANOW, modes)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        with contextlib.suppress(termios.error):  # the terminal may be gone
            termios.tcsetattr(sys.stdin, termios.TCSANOW, before)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _end(number: int, frame: FrameType | None) -> None:
    """End the talk. Python drops what is raised in a finalizer, so this is done again until the talk has ended."""
    signal.setitimer(signal.ITIMER_REAL, SECONDS_TO_END)
    sys.exit(128 + signal.SIGTERM)


def ctrl_c_typed() -> bool:
    """Whether Ctrl-C is among what was typed since the last look; what else was typed meanwhile is dropped."""
    typed, descriptor = b"", sys.stdin.fileno()
    while select.select([descriptor], [], [], 0)[0]:
        read = os.read(descriptor, 1024)
        if not read:
            return True  # the terminal is gone
        typed += read
    return CTRL_C in typed
