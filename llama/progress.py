"""How far something is, on stderr: a bar in a terminal; elsewhere, of a run, a line now and then."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

from llama import log
from llama.gate import one_line

PAUSE = 5.0  # seconds between two lines
PATIENCE = 1.0  # seconds before a bar of bytes appears
Move = Callable[[int, str], object]  # move(how many bytes more, what to say beside them)


@contextmanager
def bar_of_bytes(doing: str, total: int) -> Iterator[Move]:
    """A bar of `total` bytes that are read or written, in a terminal, for what takes longer than a second.

    It moves as often as it is told to, and is gone at the end.
    """
    if not (log.is_said() and _in_terminal()):
        yield lambda count, said: None
        return
    with tqdm(
        total=total, desc=doing, unit="B", unit_scale=True, delay=PATIENCE, miniters=1, leave=False, dynamic_ncols=True
    ) as bar:

        def move(count: int, said: str) -> None:
            bar.set_postfix_str(one_line(said), refresh=False)
            bar.update(count)

        yield move


@contextmanager
def bar_of_seconds(doing: str, total: float) -> Iterator[Callable[[float, str], object]]:
    """How much of `total` seconds is spent, told by move(seconds since the start, what was done): a bar in a terminal,
    gone at the end; elsewhere a line now and then."""
    said = time.monotonic()
    if log.is_said() and _in_terminal():
        with tqdm(total=round(total), desc=doing, unit="s", leave=False, dynamic_ncols=True) as bar:

            def move(spent: float, what: str) -> None:
                bar.set_postfix_str(one_line(what), refresh=False)
                bar.update(max(0, min(round(spent), round(total)) - bar.n))

            yield move
        return

    def say(spent: float, what: str) -> None:
        nonlocal said
        if time.monotonic() - said >= PAUSE:
            said = time.monotonic()
            log.say(f"{doing}: {what}, {spent:.0f} of at most {total:.0f} s")

    yield say


def _in_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()


class Progress:
    """Shows requests done, tokens per second in and out, and the time that is left.

    `total` is None where nobody knows yet how many requests there are. `hidden`: nothing is shown, since results
    appear in the same terminal.
    """

    def __init__(self, total: int | None, done: int, *, hidden: bool = False) -> None:
        self._total, self._before = total, done
        self._started = self._said = time.monotonic()
        self._hidden = hidden
        self._bar = None
        if not hidden and log.is_said() and _in_terminal():
            self._bar = tqdm(total=total, initial=done, desc="requests", unit="", dynamic_ncols=True)

    def show(self, done: int, prompt_tokens: int, completion_tokens: int) -> None:
        """`done` requests in all; the tokens are those since the start."""
        now = time.monotonic()
        seconds = max(now - self._started, 1e-3)
        rates = f"{prompt_tokens / seconds:.0f} tokens/s in, {completion_tokens / seconds:.0f} out"
        if self._bar is not None:
            self._bar.set_postfix_str(rates, refresh=False)
            self._bar.update(done - self._bar.n)
        elif not self._hidden and now - self._said >= PAUSE:
            self._said = now
            log.say(f"{done}{self._of()} requests, {rates}{self._left(done, seconds)}")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def _of(self) -> str:
        return "" if self._total is None else f" of {self._total}"

    def _left(self, done: int, seconds: float) -> str:
        if self._total is None or done <= self._before:
            return ""
        left = round((self._total - done) * seconds / (done - self._before))
        return f", {left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"
