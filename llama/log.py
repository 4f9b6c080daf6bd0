"""What the package says while it works, to the logger `llama`: from one process of a run, on stderr.

A program that configures logging, its own handlers or this logger's level, decides what becomes of these lines. Where
none does, those of level INFO and above go to stderr.
"""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from llama.gate import one_line, to_stderr

LOGGER = logging.getLogger("llama")


class _ToStderr(logging.Handler):
    """Writes the lines that nobody else takes."""

    def emit(self, record: logging.LogRecord) -> None:
        if not _is_configured():
            to_stderr(f"llama: {record.getMessage()}")


LOGGER.addHandler(_ToStderr())


def _is_configured() -> bool:
    """Whether the program has handlers of its own, which then get the lines."""
    return len(LOGGER.handlers) > 1 or bool(logging.getLogger().handlers)


def is_first() -> bool:
    """Whether this process speaks to the person who runs it: rank 0 of a run, or the only one."""
    distributed: Any = sys.modules.get("torch.distributed")
    if "RANK" not in os.environ and distributed and distributed.is_available() and distributed.is_initialized():
        return bool(distributed.get_rank() == 0)
    return int(os.environ.get("RANK", 0)) == 0


def is_said(level: int = logging.INFO) -> bool:
    """Whether this process says lines of that level: bars and statistics are for those who would read them."""
    if not is_first():
        return False
    if LOGGER.level == logging.NOTSET and not _is_configured():
        return level >= logging.INFO
    return LOGGER.isEnabledFor(level)


def say(line: str, level: int = logging.INFO) -> None:
    """Log one line, in which nothing can act on a terminal."""
    if is_said(level):
        LOGGER.handle(LOGGER.makeRecord(LOGGER.name, level, "", 0, one_line(line), (), None))


@contextmanager
def quiet() -> Iterator[None]:
    """Meanwhile errors alone are said, as --quiet asks."""
    before = LOGGER.level
    LOGGER.setLevel(logging.ERROR)
    try:
        yield
    finally:
        LOGGER.setLevel(before)
