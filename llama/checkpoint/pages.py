"""The pages of memory-mapped tensors, given back when they have been read."""

import ctypes
import mmap
import sys

from torch import Tensor


def release_pages(piece: Tensor) -> None:
    """Let go of the whole pages between a piece's first and last number, so that they do not count as our memory.

    They are read from the file again, should anybody look. A piece that is not mapped must not come here: what it
    holds would be lost.
    """
    if sys.platform != "linux" or not piece.numel():
        return
    span = 1 + sum((length - 1) * stride for length, stride in zip(piece.shape, piece.stride(), strict=True))
    first, page = piece.data_ptr(), mmap.PAGESIZE
    begin, end = -(-first // page) * page, (first + span * piece.element_size()) // page * page
    if end > begin:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_DONTNEED)
