"""Any checkpoint that can be read → Meta's layout, a Hugging Face folder, or one GGUF file; tensor by tensor."""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from llama import log
from llama.checkpoint import huggingface_writer
from llama.checkpoint.gguf_writer import GGUFWriter
from llama.checkpoint.new_folder import all_or_nothing, check_room, check_target, said_in_one_line
from llama.checkpoint.source import open_checked
from llama.checkpoint.writer import reshard, text_files
from llama.errors import CheckpointError, ParameterError
from llama.paths import kind
from llama.progress import Move, bar_of_bytes
from llama.text.gguf_metadata import tokenizer_metadata

FORMATS = ("meta", "hf", "gguf")


class Streamed(Protocol):
    """A file that is too large to be made in memory."""

    size: int

    def write(self, path: Path, move: Move) -> None: ...


def convert(path: Path, out: Path, to: str) -> list[Path]:
    """Write the checkpoint at `path` anew as `out`: a folder that is new or empty, or a GGUF file that is not there.

    Numbers stay as they are, to the bit; the tokenizer comes along. Returns the files. Raises CheckpointError where
    the format cannot hold the checkpoint, or a file cannot be read or written, and leaves nothing then.
    """
    if to not in FORMATS:
        raise ParameterError(f"to={to!r:.40} is no format: expected {', '.join(FORMATS)}")
    source, args = open_checked(path)
    for note in source.notes:
        log.say(note)
    if to == "meta":
        reshard(path, out, source.shards)
        return sorted(out.iterdir())
    source.check_dtypes()
    if to == "gguf":
        return _write_file(out, GGUFWriter(source, args, tokenizer_metadata(source.folder, args.vocab_size)))
    return _write_folder(out, {**huggingface_writer.files(source, args), **text_files(source)})


def _write_file(out: Path, content: Streamed) -> list[Path]:
    if out.suffix != ".gguf":
        raise CheckpointError(f"{out} does not end with .gguf, by which such files are known: name one that does")
    if (present := kind(out)) is not None:
        raise CheckpointError(f"{out} is there already, {present}: name another file")
    return _write(out.parent, {out.name: content})


def _write_folder(out: Path, files: Mapping[str, "bytes | Streamed"]) -> list[Path]:
    with said_in_one_line(out):
        check_target(out, _size(files))
    return _write(out, files)


def _size(files: Mapping[str, "bytes | Streamed"]) -> int:
    return sum(len(content) if isinstance(content, bytes) else content.size for content in files.values())


def _write(folder: Path, files: Mapping[str, "bytes | Streamed"]) -> list[Path]:
    size = _size(files)
    with said_in_one_line(folder):
        check_room(folder, size)
        with all_or_nothing(folder, list(files)) as places, bar_of_bytes("writing", size) as move:
            for name, content in files.items():
                if isinstance(content, bytes):
                    places[name].write_bytes(content)
                    move(len(content), name)
                else:
                    content.write(places[name], move)
    return [folder / name for name in files]
