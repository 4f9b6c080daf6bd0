"""The prompts of a run of `llama batch`: a file, or a copy of what a pipe gives, so that it can be gone on with."""

import hashlib
import os
import shutil
import sys
from pathlib import Path

from llama.batch.results import COPIED, reported
from llama.errors import ParameterError, PromptError
from llama.paths import check_writable

STANDARD_OUTPUT = 1  # its file descriptor


def check_paths(file: str, output: str) -> None:
    """Raise PromptError or ParameterError where `file` cannot be read or `output` cannot be made: before any work."""
    if file != "-" and not os.access(file, os.R_OK):
        why = "it may not be read" if os.path.exists(file) else "no such file"
        raise PromptError(f"prompts file {file} cannot be read: {why}")
    if os.path.isdir(file):
        raise PromptError(f"prompts file {file} is a folder: name a file, or - for standard input")
    if output != "-":
        check_writable(output, "name a file for --output, or - for standard output")
    written = STANDARD_OUTPUT if output == "-" else output
    if file != "-" and os.path.isfile(file) and os.path.exists(written) and os.path.samefile(file, written):
        raise ParameterError(f"--output {output} is the prompts file itself: name another")


def settle_input(file: str, output: Path) -> str:
    """The path from which lines can be read twice: a regular file as it is; what flows is first copied beside OUT."""
    if file != "-" and os.path.isfile(file):
        return file
    copy = output.with_name(f"{output.name}.input")
    try:
        source = sys.stdin.buffer if file == "-" else open(file, "rb")  # noqa: SIM115
    except OSError as error:
        raise PromptError(f"prompts file {file} cannot be read: {error.strerror}") from None
    with source, reported(copy), open(copy, "wb") as target:
        shutil.copyfileobj(source, target, COPIED)
    return str(copy)


def drop_input_copy(output: Path) -> None:
    output.with_name(f"{output.name}.input").unlink(missing_ok=True)


def measure(path: str) -> tuple[str, int]:
    """(SHA-256 of a file, how many of its lines are not blank), read as a stream."""
    digest, lines = hashlib.sha256(), 0
    try:
        with open(path, "rb") as file:
            for line in file:
                digest.update(line)
                lines += bool(line.strip())
    except OSError as error:
        raise PromptError(f"prompts file {path} cannot be read: {error.strerror}") from None
    return digest.hexdigest(), lines
