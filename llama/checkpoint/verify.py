"""Whether the files of a checkpoint are whole: by the sums that came with them, and by what they say of each other.

Hugging Face folders may have SHA-256 sums: in a file of sha256sum's format, or in what its hub's downloads leave in
.cache/huggingface/download/NAME.metadata (commit, sum, time, a line each).
"""

import hashlib
import re
from pathlib import Path

from llama.checkpoint import checklist
from llama.checkpoint.checklist import sum_of
from llama.errors import CheckpointError
from llama.gguf import is_gguf
from llama.paths import read
from llama.progress import bar_of_bytes

SUM_FILES = ("SHA256SUMS", "sha256sums.txt")
_SUM = re.compile("[0-9a-f]{64}")
_MOST_BYTES = 1 << 20  # of a file of sums


def verify(folder: Path) -> str:
    """What was compared, in a line. Raises CheckpointError that names every file that is missing or differs."""
    if (folder / "checklist.chk").exists() or not ((folder / "config.json").is_file() or is_gguf(folder)):
        return f"{checklist.verify(folder)} files match checklist.chk"
    from llama.checkpoint.source import open_checked  # it imports torch

    source, _ = open_checked(folder)
    sums, files = _sums(folder), [*source.described_by, *source.files]
    summed = [path for path in files if path.name in sums]
    with bar_of_bytes("verifying", sum(path.stat().st_size for path in summed)) as move:
        differ = [path.name for path in summed if sum_of(path, move, hashlib.sha256()) != sums[path.name]]
    if differ:
        raise CheckpointError(f"{folder} does not match its SHA-256 sums: {', '.join(differ)} differ; download again")
    said = f"{len(summed)} of them match their SHA-256 sums" if summed else "there are no sums to compare"
    return f"{len(files)} files fit together by their names, shapes and sizes; {said}"


def _sums(folder: Path) -> dict[str, str]:
    """File name → SHA-256 sum, of those that the folder has sums of."""
    sums = {}
    for path in (folder / ".cache" / "huggingface" / "download").glob("*.metadata"):
        lines = _text(path).splitlines()
        if len(lines) > 1 and _SUM.fullmatch(lines[1].strip('"')):  # the sum of a small file is another kind
            sums[path.name.removesuffix(".metadata")] = lines[1].strip('"')
    for name in SUM_FILES:
        for line in _text(folder / name).splitlines() if (folder / name).is_file() else ():
            words = line.split()
            if len(words) == 2 and _SUM.fullmatch(words[0].lower()):
                sums[words[1].removeprefix("*")] = words[0].lower()
    return sums


def _text(path: Path) -> str:
    try:
        return read(path, _MOST_BYTES).decode(errors="replace")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
