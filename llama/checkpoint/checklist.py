"""`checklist.chk`: the MD5 sums that Meta ships with a checkpoint, one "sum  file name" a line (md5sum's format)."""

import hashlib
import os
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from llama.errors import CheckpointError
from llama.paths import read
from llama.progress import Move, bar_of_bytes

CHUNK = 1 << 22  # bytes hashed between two moves of the progress bar
PAGE, PAGES = 4096, 1024  # a fingerprint reads at most so many pages of a file
_MOST_BYTES = 1 << 20  # of the file; Meta's has a few hundred
_SUM = re.compile("[0-9a-fA-F]{32}")


def read_checklist(folder: Path) -> dict[str, str]:
    """File name → MD5 sum, as `folder`/checklist.chk lists them. Raises CheckpointError where it cannot be read."""
    path = folder / "checklist.chk"
    if not path.is_file():
        raise CheckpointError(f"{path} is missing, so nothing can be verified: download it, or build without verify")
    try:
        text = read(path, _MOST_BYTES).decode("utf-8-sig", errors="replace")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    sums = {}
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split()
        if not words:
            continue
        name = words[-1].removeprefix("*")
        if len(words) != 2 or not _SUM.fullmatch(words[0]) or Path(name).name != name:
            raise CheckpointError(f"{path} line {number} is not 'md5  file name': download the file again")
        sums[name] = words[0].lower()
    if not sums:
        raise CheckpointError(f"{path} lists no file: download it again")
    return sums


def format_checklist(sums: dict[str, str]) -> str:
    """The text of a checklist.chk for file name → MD5 sum."""
    return "".join(f"{md5}  {name}\n" for name, md5 in sums.items())


def verify(folder: Path) -> int:
    """Compare every file that the checklist names with its sum; return how many files there were.

    Raises CheckpointError that names every file that is missing or differs.
    """
    sums = read_checklist(folder)
    present = [name for name in sums if os.path.isfile(folder / name)]  # of a damaged name Path.is_file may raise
    faults = [f"{name} is missing" for name in sums if name not in present]
    total = sum((folder / name).stat().st_size for name in present)
    with bar_of_bytes("verifying", total) as move:
        for name in present:
            if sum_of(folder / name, move, md5()) != sums[name]:
                faults.append(f"{name} differs")
    if faults:
        raise CheckpointError(f"{folder} does not match its checklist.chk: {', '.join(faults)}; download again")
    return len(sums)


md5 = partial(hashlib.md5, usedforsecurity=False)  # a guard against torn downloads, as Meta ships it


def sum_of(path: Path, move: Move, digest: "hashlib._Hash") -> str:
    """The sum of a file, which a fresh `digest` computes."""
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            move(len(chunk), path.name)
    return digest.hexdigest()


def fingerprint(files: Sequence[Path]) -> str:
    """A sum that tells checkpoints apart in a moment: of each file its name, its size, and pages all over it.

    Fine-tuned weights differ nearly everywhere, so some of the pages differ; a single changed byte may be missed.
    """
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with open(path, "rb") as file:
            for place in range(0, size, max(PAGE, size // PAGES)):
                file.seek(place)
                digest.update(file.read(PAGE))
    return digest.hexdigest()
