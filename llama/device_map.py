"""What `max_memory` and `device_map` may say: sizes, names of devices, ranges of layers."""

import re
from collections.abc import Mapping
from decimal import Decimal
from numbers import Integral
from typing import Any

from llama.errors import ParameterError

DISK = "disk"  # where layers stay in the mapped files, and are computed on the CPU
AUTO, BALANCED = "auto", "balanced"
EMBEDDINGS, OUTPUT = "embeddings", "output"

_SIZE = re.compile(r"\s*(\d{1,18}(?:\.\d{1,9})?)\s*(?:(?:([kmgt])(i?))?b)?\s*", re.ASCII | re.IGNORECASE)
_DEVICE = re.compile(r"(?:cuda|cpu):(?:0|[1-9]\d{0,2})|cuda|cpu|mps", re.ASCII)
_LAYERS = re.compile(r"layers\.(\d{1,6})(?:-(\d{1,6}))?", re.ASCII)


def parse_size(given: Any) -> int | None:
    """Bytes, of a whole number or a text such as "5GiB", "7 GB", "500MB"; None for what is neither."""
    if isinstance(given, Integral) and not isinstance(given, bool):
        return int(given) if int(given) >= 0 else None
    found = _SIZE.fullmatch(given) if isinstance(given, str) else None
    if found is None:
        return None
    number, prefix, binary = found.groups()
    power = "kmgt".index(prefix.lower()) + 1 if prefix else 0
    return int(Decimal(number) * (1024 if binary else 1000) ** power)


def parse_device(given: Any) -> str | None:
    """The device that a name stands for ("cuda" is "cuda:0"); None where it stands for none."""
    if not isinstance(given, str) or not _DEVICE.fullmatch(given):
        return None
    return "cuda:0" if given == "cuda" else given


def on_host(device: str) -> bool:
    """Whether it is the CPU that computes there."""
    return device == DISK or device.partition(":")[0] == "cpu"


def parse_max_memory(given: Any) -> dict[str, int]:
    """Device → the most bytes of it. Raises ParameterError for what is no such table."""
    if not isinstance(given, Mapping) or not given:
        raise ParameterError(
            f"max_memory={given!r:.60} is no table: expected a size for each device, such as"
            ' {"cuda:0": "5GiB", "cpu": "20GiB"}'
        )
    limits: dict[str, int] = {}
    for name, size in given.items():
        device, limit = parse_device(name), parse_size(size)
        if device is None:
            more = ", which has no limit" if name == DISK else ""
            raise ParameterError(f"max_memory names {name!r:.60}{more}: expected cuda:N, mps or cpu")
        if limit is None:
            raise ParameterError(
                f"max_memory gives {device} {size!r:.60}: expected bytes, or a size such as 5GiB, 7GB or 500MB"
            )
        if device in limits:
            raise ParameterError(f"max_memory names {device} twice: give it one size")
        limits[device] = limit
    return limits


def parse_device_map(given: Any) -> str | dict[str, str]:
    """ "auto", "balanced", or part → device, as far as that can be checked without the model.

    Raises ParameterError for anything else.
    """
    if given in (AUTO, BALANCED):
        return str(given)
    if not isinstance(given, Mapping) or not given:
        raise ParameterError(
            f"device_map={given!r:.60} is no map: use auto, balanced, or a table such as"
            ' {"layers.0-15": "cuda:0", "layers.16-31": "cpu"}'
        )
    devices: dict[str, str] = {}
    for part, name in given.items():
        if part not in (EMBEDDINGS, OUTPUT):
            layers_of(part)
        device = name if name == DISK else parse_device(name)
        if device is None:
            raise ParameterError(f"device_map has {part} on {name!r:.60}: expected cuda:N, mps, cpu or disk")
        devices[part] = device
    return devices


def layers_of(part: Any) -> range:
    """The layers of a part of a model: layers.4-7 → range(4, 8). Raises ParameterError where it names none."""
    found = _LAYERS.fullmatch(part) if isinstance(part, str) else None
    if found is None:
        raise ParameterError(
            f"device_map has {part!r:.60}: expected layers.FIRST-LAST, layers.NUMBER, embeddings or output"
        )
    first, last = int(found[1]), int(found[2] or found[1])
    if last < first:
        raise ParameterError(f"device_map has {part!r}, which ends before it begins: write layers.{last}-{first}")
    return range(first, last + 1)


def layers_in_words(layers: range) -> str:
    """range(4, 8) → "layers 4-7", range(4, 5) → "layer 4"."""
    return f"layers {layers.start}-{layers.stop - 1}" if len(layers) > 1 else f"layer {layers.start}"
