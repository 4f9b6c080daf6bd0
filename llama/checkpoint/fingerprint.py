"""Which checkpoint a model was loaded from: a sum over samples of its files, found in a fraction of a second.

A checkpoint that was trained further differs in nearly all bytes of the matrices that were trained, so samples that lie
closer than the matrices are large tell it from what it was made from.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from hashlib import blake2b
from pathlib import Path

from llama.errors import PromptCacheError

_SAMPLE, _SAMPLES = 1 << 12, 1 << 10  # bytes of one, and how many of a file; a file that has no more is read whole
_END = 1 << 18  # bytes: a .pth file ends with sums of all its tensors


def fingerprint_of(files: Sequence[Path]) -> Callable[[], str]:
    """A function that says which files these are, in 32 hexadecimal digits, and needs to read them only once.

    It raises PromptCacheError where a file was replaced or removed since `fingerprint_of` was called.
    """
    before = [_stamp(path) for path in files]

    @cache
    def fingerprint() -> str:
        total = blake2b(digest_size=16)
        for path, stamp in zip(files, before, strict=True):
            try:
                same = _stamp(path) == stamp
                for part in _samples(path) if same else ():
                    total.update(part)
            except OSError:
                same = False
            if not same:
                raise PromptCacheError(f"{path} was changed or removed since it was loaded: build the model again")
        return total.hexdigest()

    return fingerprint


def _stamp(path: Path) -> tuple[int, int, int]:
    """What differs when a file is replaced or written to."""
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def _samples(path: Path) -> Iterator[bytes]:
    size = path.stat().st_size
    yield size.to_bytes(8, "little")
    with open(path, "rb", buffering=0) as file:
        for at in range(0, size, max(_SAMPLE, size // _SAMPLES)):
            file.seek(at)
            yield file.read(_SAMPLE)
        file.seek(max(0, size - _END))
        yield file.read(_END)
