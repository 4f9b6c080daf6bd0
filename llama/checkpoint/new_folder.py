"""A folder to be written: new or empty, with room on its disk, and with all of its files or none."""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from llama.errors import CheckpointError
from llama.paths import kind
from llama.wording import in_units

NEW = "choose a folder that is new or empty"


def check_target(out: Path, size: int) -> None:
    """Raise CheckpointError unless a folder of that size can be written there."""
    present = kind(out)
    if present not in (None, "a folder"):
        raise CheckpointError(f"{out} is {present}: {NEW}")
    names = sorted(path.name for path in out.iterdir()) if present else []
    if names:
        raise CheckpointError(f"{out} is not empty, it holds {names[0]}: {NEW}")
    check_room(out, size)


def check_room(out: Path, size: int) -> None:
    """Raise CheckpointError unless the disk of a folder, which need not be there yet, has room for so many bytes."""
    free = shutil.disk_usage(next(path for path in (out, *out.absolute().parents) if path.exists())).free
    if size > free:
        raise CheckpointError(
            f"{out} needs {in_units(size)}, but {in_units(free)} is free on its disk: make room, or choose another"
        )


@contextmanager
def said_in_one_line(out: Path) -> Iterator[None]:
    """What the system says against writing, such as that the disk is full, becomes a CheckpointError."""
    try:
        yield
    except OSError as error:
        reason = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
        raise CheckpointError(
            f"{out} could not be written ({reason}), nothing is left of it: mend that, or choose another folder"
        ) from None


@contextmanager
def all_or_nothing(out: Path, names: Sequence[str]) -> Iterator[dict[str, Path]]:
    """Name → where the block is to write that file; afterwards each gets its name within `out`, in this order.

    Whatever fails, or interrupts it: the files are removed, and the folders that were made for them.
    """
    made = [path for path in (out, *out.parents) if not path.exists()]
    places = {name: out / f"{name}.partial" for name in names}
    try:
        out.mkdir(parents=True, exist_ok=True)
        yield places
        for name, place in places.items():
            place.rename(out / name)
    except BaseException:
        with suppress(OSError):
            for name, place in places.items():
                place.unlink(missing_ok=True)
                (out / name).unlink(missing_ok=True)
            for path in made:
                path.rmdir()
        raise
