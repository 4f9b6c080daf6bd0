"""The pages of memory-mapped tensors: fetched before they are used, given back when they have been read."""

import ctypes
import mmap
import sys

from torch import Tensor

_PAGE_OUT = 21  # MADV_PAGEOUT, of Linux 5.4
_POPULATE_READ = 22  # MADV_POPULATE_READ, of Linux 5.14


def fetch_pages(piece: Tensor) -> None:
    """Have all of a contiguous piece in memory, so that whoever uses it first does not wait for the file.

    Where the system cannot do that, each page comes when it is first read.
    """
    begin = piece.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    _advise(begin, piece.data_ptr() + piece.nbytes, _POPULATE_READ)


def release_pages(piece: Tensor, *, for_good: bool = False) -> None:
    """Let go of the whole pages between a piece's first and last number, so that they do not count as our memory.

    They are read from the file again, should anybody look. A piece that is not mapped must not come here: what it
    holds would be lost. `for_good`: they leave the page cache too, where this user may write the file; else they would
    drive out what is of more use there.
    """
    if sys.platform != "linux" or not piece.numel():
        return
    span = 1 + sum((length - 1) * stride for length, stride in zip(piece.shape, piece.stride(), strict=True))
    first, page = piece.data_ptr(), mmap.PAGESIZE
    begin, end = -(-first // page) * page, (first + span * piece.element_size()) // page * page
    if for_good:
        _advise(begin, end, _PAGE_OUT)
    _advise(begin, end, mmap.MADV_DONTNEED)


def _advise(begin: int, end: int, advice: int) -> None:
    if sys.platform == "linux" and end > begin:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), advice)
