"""A JSON object in a small file beside the weights, read with care: bounded, and no key twice."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llama.errors import CheckpointError
from llama.paths import read

MOST_BYTES = 1 << 20  # of the file; Meta's params.json has a hundred


def read_object(path: Path, get: str, most: int = MOST_BYTES) -> dict[str, Any]:
    """The object. Raises CheckpointError, which says to `get` another file, where there is none."""
    try:
        given = json.loads(read(path, most).decode("utf-8-sig"), object_pairs_hook=_without_doubles)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: {get}") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}; {get}") from None
    except UnicodeDecodeError:
        raise CheckpointError(f"{path} is not JSON, which is text in UTF-8: save it so, or {get}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON ({error!s:.100}): {get}") from None
    if not isinstance(given, dict):
        raise CheckpointError(f"{path} holds a JSON {type(given).__name__}, not an object with the model's sizes")
    return given


def shown(value: Any, write: Callable[[Any], str] = repr) -> str:
    """A value as an error quotes it: cut, and what may be nested deeper than can be written is not written."""
    return "{…}" if isinstance(value, dict) else "[…]" if isinstance(value, list) else f"{write(value):.60}"


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Which of two values for one key is meant, nobody knows; readers of JSON differ in which they take."""
    given: dict[str, Any] = {}
    for key, value in pairs:
        if key in given:
            raise ValueError(f"{key!r:.60} stands in it twice")
        given[key] = value
    return given
