"""Words that messages share: alternatives, lists, sizes, near misses, texts that are none."""

from collections.abc import Iterable
from difflib import get_close_matches

from llama.errors import PromptError

UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
LISTED = 5  # how many names a message lists


def either(numbers: list[int]) -> str:
    """[1] → "1", [1, 2, 4] → "1, 2 or 4"."""
    return " or ".join(filter(None, (", ".join(map(str, numbers[:-1])), str(numbers[-1]))))


def listed(names: list[str], separator: str = ", ") -> str:
    """The first names, and how many more there are."""
    more = f"{separator}and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return separator.join(names[:LISTED]) + more


def in_units(size: int) -> str:
    """Bytes as people read them, in the largest unit of which there is one: 13.48 GB, 512 bytes."""
    scale, unit = next(((scale, unit) for scale, unit in UNITS if round(size / scale, 2) >= 1), (1, ""))
    return f"{size / scale:.2f} {unit}" if unit else f"{size} byte{'s' if size != 1 else ''}"


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that was probably meant."""
    near = get_close_matches(name, list(known), 1)
    return near[0] if near else None


def utf8(data: bytes, what: str = "") -> str:
    """The text of bytes. Raises PromptError, which begins with `what` ("standard input is "), where they are none."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        place = f"{error.reason} at byte {error.start}"
        raise PromptError(f"{what}not UTF-8 text ({place}): convert it first") from None
