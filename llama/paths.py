"""Paths that people name: ~ is the home folder, and what leads to no file is said before anything is opened."""

import errno
import os
import re
import stat
from typing import BinaryIO, NewType

from llama.errors import ParameterError

FilePath = NewType("FilePath", str)  # a flag of this type is `expanded`; it may be a folder's too

KINDS = {
    stat.S_IFREG: "a file", stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
}  # fmt: skip
_OPEN_STREAMS = re.compile(r"/dev/fd|/proc/\d+(/task/\d+)?/fd")  # the folders in which a process finds what it has open


def expanded(path: str | os.PathLike[str], name: str) -> FilePath:
    """A path in which ~ is the home folder. Raises ParameterError, which calls it `name`, where it is empty or none."""
    if not isinstance(path, str | os.PathLike):
        raise ParameterError(f"{name}={path!r:.60} is not a path: in a shell, write ./{path} for a name like a number")
    text = os.fspath(path)
    if not text:
        raise ParameterError(f"{name} is empty: expected the path of a file or folder")
    return FilePath(os.path.expanduser(text))


def kind(path: str | os.PathLike[str]) -> str | None:
    """What lies at a path, after any links ("a link to nothing" where they end so); None where nothing does."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return "a link to nothing" if os.path.islink(path) else None
    return "an open stream" if _is_open_stream(path) else KINDS.get(stat.S_IFMT(mode), "no file")


def _is_open_stream(path: str | os.PathLike[str]) -> bool:
    """Whether a path, or a link on its way, is one by which a process finds what it has open, such as /dev/stdout."""
    while True:
        folder = os.path.realpath(os.path.dirname(path))
        if _OPEN_STREAMS.fullmatch(folder):
            return True
        if not os.path.islink(path):
            return False
        path = os.path.join(folder, os.readlink(path))


def opened(path: str | os.PathLike[str]) -> BinaryIO:
    """A file, open for reading. Raises OSError for a pipe or a device too, which might never begin, or never end."""
    found = kind(path)
    if found in ("a pipe", "a socket", "a device"):
        raise OSError(errno.EINVAL, f"it is {found}, not a file")
    return open(path, "rb")


def read(path: str | os.PathLike[str], most: int) -> bytes:
    """All bytes of a file that has at most so many, read as `opened` opens it. Raises OSError."""
    with opened(path) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise OSError(errno.EFBIG, f"it has more than {most} bytes")
    return data


def check_writable(path: str, do: str = "name a file") -> None:
    """Raise ParameterError, which says to `do` something else, unless a file can be made or overwritten there.

    A link leads to its file, which need not be there yet. Nothing is opened, so no pipe waits for its other end.
    """
    if reason := _why_not(path):
        raise ParameterError(f"{path} cannot be written: {reason}; {do}")


def _why_not(path: str) -> str | None:
    if path == "-":
        return "it stands for a standard stream"
    try:
        found = kind(path)
    except OSError as error:
        return error.strerror
    if found not in (None, "a file", "a link to nothing"):
        return f"it is {found}"
    folder = os.path.dirname(os.path.realpath(path))
    if not os.path.isdir(folder):
        return f"there is no folder {folder}"
    if not os.path.basename(path):
        return "it ends like the name of a folder"
    return None if os.access(path if found == "a file" else folder, os.W_OK) else "Permission denied"
