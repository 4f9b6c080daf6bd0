"""When Ctrl-C may raise KeyboardInterrupt: not in the middle of work that other threads wait for.

Python raises it in the main thread, between any two instructions. So nothing here has an effect in other threads.
"""

import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType, TracebackType
from typing import Any

Handler = Callable[[int, FrameType | None], Any]


@dataclass(slots=True)
class _Main:
    """The main thread's state: whether Ctrl-C waits now, the ones that wait, and who handles them."""

    waits: bool = False
    late: deque[FrameType | None] = field(default_factory=deque)
    handler: Handler = signal.default_int_handler


_main = _Main()


@contextmanager
def put_off() -> Iterator[None]:
    """Let Ctrl-C wait until the end, or for the next `let_through`."""
    if threading.current_thread() is not threading.main_thread():
        yield
    elif (handler := signal.getsignal(signal.SIGINT)) is _note:  # within another, perhaps where that lets through
        waits, _main.waits = _main.waits, True
        try:
            yield
        finally:
            _main.waits = waits
            _handle_late()
    elif not callable(handler):
        yield
    else:
        _main.handler, _main.waits = handler, True
        _main.late.clear()
        try:
            signal.signal(signal.SIGINT, _note)
            yield
        finally:
            if signal.getsignal(signal.SIGINT) is _note:  # else a handler has set another one
                signal.signal(signal.SIGINT, handler)
            while _main.late:
                handler(signal.SIGINT, _main.late.popleft())


class let_through:
    """Within `put_off`, where nothing would be left half done: one that waits is handled now, the next at once."""

    def __enter__(self) -> None:
        self._waits = _main.waits and threading.current_thread() is threading.main_thread()
        if self._waits:
            _main.waits = False
            _handle_late()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._waits:
            _main.waits = True


def _handle_late() -> None:
    while _main.late and not _main.waits:
        _note(signal.SIGINT, _main.late.popleft())


def _note(number: int, frame: FrameType | None) -> None:
    if _main.waits:
        _main.late.append(frame)
        return
    _main.waits = True  # where the handler raises, what is done on the way out is not to be disturbed again
    _main.handler(number, frame)
    _main.waits = False
