"""What decides the bytes of a run of `llama batch`: kept beside its output, so that another is not mixed into it."""

import json
import os
from pathlib import Path
from typing import Any

from llama.batch.results import flush, reported
from llama.errors import ParameterError


def identity_path(output: Path) -> Path:
    return output.with_name(f"{output.name}.run")


def read_identity(output: Path) -> dict[str, Any] | None:
    """What the run that began this output was; None where none did."""
    path = identity_path(output)
    try:
        identity: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return identity
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        raise ParameterError(f"{path} cannot be read, so {output} cannot be finished: name another --output") from None


def write_identity(output: Path, identity: dict[str, Any]) -> None:
    path = identity_path(output)
    target = path.with_name(f"{path.name}.new")
    with reported(path):
        with open(target, "w", encoding="utf-8") as file:
            json.dump(identity, file, indent=1, ensure_ascii=False)
            flush(file)
        os.replace(target, path)


def check_same(output: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise ParameterError that names what differs, unless a run that was begun may be finished by this one."""
    for key in before.keys() | now.keys():
        if before.get(key) == now.get(key):
            continue
        was, is_ = before.get(key), now.get(key)
        if isinstance(was, dict) and isinstance(is_, dict):
            names = [name for name in sorted(was.keys() | is_.keys()) if was.get(name) != is_.get(name)]
            changed = ", ".join(f"{name} was {_short(was.get(name))} and is {_short(is_.get(name))}" for name in names)
        else:
            changed = f"it was {_short(was)} and is {_short(is_)}"
        raise ParameterError(
            f"{output} was begun with a different {key}: {changed}; start the same command as then, or name another"
            " --output"
        )


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:37]}…"
