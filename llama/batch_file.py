"""Files of prompts: text with a prompt a line, or JSON lines with a dialog a line."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llama.errors import PromptError


def read_prompts(path: str) -> list[str]:
    """The lines of a text file, one prompt each; empty lines are left out. Raises PromptError where it is no text."""
    return [line for _, line in _lines(path)]


def read_dialogs(path: str) -> list[list[Any]]:
    """The dialogs of a JSON-lines file: lists of messages, or objects with "messages". Raises PromptError by line."""
    dialogs = []
    for number, line in _lines(path):
        try:
            value = json.loads(line)
        except ValueError as error:
            raise PromptError(f"{path} line {number} is not JSON ({error}): expected a list of messages") from None
        dialog = value.get("messages") if isinstance(value, dict) else value
        if not isinstance(dialog, list):
            raise PromptError(f'{path} line {number} is not a list of messages, nor {{"messages": […]}}')
        dialogs.append(dialog)
    return dialogs


def _lines(path: str) -> Iterator[tuple[int, str]]:
    """(Line number, line) of every line that is not blank, without its line end."""
    offset = 0
    try:
        with open(Path(str(path)), "rb") as file:
            for number, data in enumerate(file, 1):
                line = data.decode("utf-8-sig" if number == 1 else "utf-8")
                offset += len(data)
                if line.strip():
                    yield number, line.removesuffix("\n").removesuffix("\r")
    except OSError as error:
        raise PromptError(f"prompts file {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        place = f"{error.reason} at byte {offset + error.start}"
        raise PromptError(f"prompts file {path} is not UTF-8 text ({place})") from None
