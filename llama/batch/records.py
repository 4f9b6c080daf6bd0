"""Results → lines of the output: always the same bytes for the same result."""

import json
from dataclasses import replace
from typing import Any

from llama.batch import openai
from llama.batch.lines import Line
from llama.errors import LlamaError
from llama.gate import json_line
from llama.tokenizer import BaseTokenizer

_OF_THE_RUN = {  # not of the result
    "generation", "samples", "time", "time_to_first_token", "drafted_tokens", "accepted_tokens", "tokens_per_step",
}  # fmt: skip


def result_line(line: Line, result: Any, tokenizer: BaseTokenizer) -> bytes:
    """The line of the output for a prediction, or for the LlamaError that came instead: always the same bytes."""
    if isinstance(result, LlamaError):
        return error_line(replace(line, error=str(result)))
    if line.call:
        return _encode(openai.response(line.number, line.call, result, tokenizer))
    return _encode({"line": line.number, "id": line.id, **_fields(result)})


def error_line(line: Line) -> bytes:
    if line.call:
        return _encode(openai.failure(line.number, line.call, line.error or ""))
    return _encode({"line": line.number, "id": line.id, "error": line.error})


def line_number(record: bytes) -> int | None:
    """Which line of the input a whole line of the output belongs to; None where it is torn."""
    try:
        value = json.loads(record)
    except (ValueError, RecursionError):
        return None
    if not record.endswith(b"\n") or not isinstance(value, dict):
        return None
    number = value.get("line", openai.line_number(value))
    return number if type(number) is int and number > 0 else None


def is_failure(record: bytes) -> bool:
    """Whether a line of the output says that its request failed."""
    value = json.loads(record)
    return value.get("error") is not None or openai.is_failure(value)


def _fields(result: dict[str, Any]) -> dict[str, Any]:
    """What of a prediction is the same in every run: not its times, nor how they were saved."""
    generation = result["generation"]
    text = generation if isinstance(generation, str) else generation["content"]
    kept = {key: value for key, value in result.items() if key not in _OF_THE_RUN}
    if "samples" in result:
        kept["samples"] = [_fields(sample) for sample in result["samples"]]
    return {"text": text, **kept}


def _encode(record: dict[str, Any]) -> bytes:
    try:
        return json_line(record).encode() + b"\n"
    except UnicodeEncodeError:  # an id with half a surrogate pair
        return json.dumps(record).encode() + b"\n"
