"""The output of a prompt file: lines that are written whole or not at all, and what a killed run needs to go on.

Beside OUT.jsonl lies OUT.jsonl.run, which says what the run is (input, model, parameters); a second replica writes
OUT.jsonl.part1, a third OUT.jsonl.part2, … until they are joined. Which requests are done is read from the results
themselves, so there is no second record of it that could disagree.
"""

import contextlib
import os
from array import array
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llama.batch.records import is_failure, line_number
from llama.errors import ParameterError

COPIED = 1 << 20  # bytes at once


class LineSet:
    """A set of line numbers, one bit each."""

    def __init__(self) -> None:
        self._bits = bytearray()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __contains__(self, number: int) -> bool:
        place, bit = divmod(number, 8)
        return place < len(self._bits) and bool(self._bits[place] >> bit & 1)

    def add(self, number: int) -> None:
        if number in self:
            return
        place, bit = divmod(number, 8)
        self._bits.extend(bytes(max(0, place + 1 - len(self._bits))))
        self._bits[place] |= 1 << bit
        self._count += 1


class ResultFile:
    """A file of result lines that only one process has open, and adds to: a torn end of an earlier run goes first."""

    def __init__(self, path: Path) -> None:
        """Raises ParameterError where the file cannot be opened, or another process has it."""
        self.path = path
        with reported(path):
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        _lock(self._descriptor, path)
        self._size = os.fstat(self._descriptor).st_size

    def scan(self, done: LineSet) -> int:
        """Note the lines that are there in `done`; return how many failed. More is written behind the last whole one.

        Raises ParameterError, and changes nothing, where a line is damaged that is not the torn last one.
        """
        failed, good = 0, 0
        for record in _records(self.path):
            done.add(line_number(record) or 0)
            failed += is_failure(record)
            good += len(record)
        self._size = good
        return failed

    def cut_torn_end(self) -> None:
        """Cut off what `scan` found behind the last whole line."""
        with reported(self.path):
            self._cut(self._size)

    def append(self, record: bytes) -> None:
        """Write one line, whole or not at all. Raises ParameterError where the disk is full, say."""
        with reported(self.path):
            try:
                _write_all(self._descriptor, record, self._size)
            except OSError:
                self._cut(self._size)
                raise
        self._size += len(record)

    def sync(self) -> None:
        with reported(self.path):
            os.fsync(self._descriptor)

    def __enter__(self) -> "ResultFile":
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._descriptor)

    def _cut(self, size: int) -> None:
        os.ftruncate(self._descriptor, size)
        self._size = size


@contextlib.contextmanager
def reported(path: Path) -> Iterator[None]:
    """An error of writing becomes one line, which says that what is finished is kept."""
    try:
        yield
    except OSError as error:
        raise ParameterError(
            f"{path} cannot be written: {error.strerror}; what is finished is kept: mend that and start the same"
            " command again"
        ) from None


def _write_all(descriptor: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


def _lock(descriptor: int, path: Path) -> None:
    """Keep other runs from the file while this process lives, where the system has such locks."""
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ParameterError(f"{path} is being written by another run: wait for it, or name another --output") from None
    except OSError:
        return  # a file system without locks


def _records(path: Path) -> Iterator[bytes]:
    """The lines of a result file, without a torn last one, which has no newline.

    Raises ParameterError that names the first other line which is no result: to cut the file there would lose what
    follows.
    """
    with reported(path), open(path, "rb") as file:
        for number, record in enumerate(file, 1):
            if not record.endswith(b"\n"):
                return
            if line_number(record) is None:
                raise ParameterError(
                    f"{path} line {number} is damaged, not a result of this command; nothing was changed: mend that"
                    " line or take it out, and what it held is computed again, or name another --output"
                )
            yield record


def part(output: Path, replica: int) -> Path:
    """Where a replica writes: the first straight into the output."""
    return output if replica == 0 else output.with_name(f"{output.name}.part{replica}")


def join_parts(results: ResultFile, done: LineSet) -> int:
    """Move what other replicas wrote to the end of the output, each line once; return how many of it failed."""
    failed = 0
    for path in _parts(results.path):
        for record in _records(path):
            number = line_number(record) or 0
            if number not in done:
                results.append(record)
                done.add(number)
                failed += is_failure(record)
        results.sync()
        path.unlink()
    return failed


def check_parts(output: Path) -> None:
    """Raise ParameterError where what other replicas wrote is damaged, as `ResultFile.scan` does."""
    for path in _parts(output):
        deque(_records(path), maxlen=0)


def has_parts(output: Path) -> bool:
    return bool(_parts(output))


def _parts(output: Path) -> list[Path]:
    prefix = f"{output.name}.part"
    files = output.absolute().parent.iterdir()
    return sorted(path for path in files if path.name.startswith(prefix) and path.name[len(prefix) :].isdecimal())


def sort_by_line(path: Path) -> None:
    """Put the lines of an output into the order of the input; eight bytes of memory a line, twice the disk for a while.

    The sorted file takes the place of the other in one move.
    """
    path = path.resolve()  # what a link leads to: the link stays
    places, at, last, ordered = array("Q"), 0, 0, True
    for record in _records(path):
        number = line_number(record) or 0
        places.extend([0] * (number + 1 - len(places)))
        places[number] = at + 1  # 0: no such line
        ordered, last, at = ordered and number > last, number, at + len(record)
    if ordered:
        return
    target = path.with_name(f"{path.name}.sorting")
    with reported(path):
        try:
            with open(path, "rb") as source, open(target, "wb") as file:
                for place in places:
                    if place:
                        source.seek(place - 1)
                        file.write(source.readline())
                flush(file)
            os.replace(target, path)
        except BaseException:
            target.unlink(missing_ok=True)
            raise


def flush(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
