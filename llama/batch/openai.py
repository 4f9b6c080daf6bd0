"""OpenAI's batch form: a line → the body in it, a prediction → the line that OpenAI writes.

Source: https://platform.openai.com/docs/guides/batch. What a run cannot know the same way twice is constant: `created`
is 0, and ids are made of the line's number.
"""

from dataclasses import dataclass
from typing import Any

from llama import openai
from llama.errors import PromptError
from llama.openai import CHAT, COMPLETIONS
from llama.tokenizer import BaseTokenizer

_LINE = ("custom_id", "method", "url", "body")
_ID = "batch_req_"


@dataclass(frozen=True, slots=True)
class Call:
    """What the response to a line repeats of it."""

    custom_id: Any
    url: str | None
    model: str | None

    @staticmethod
    def of(value: dict[str, Any]) -> "Call":
        url, body = value.get("url"), value.get("body")
        model = body.get("model") if isinstance(body, dict) else None
        name = value.get("custom_id")
        return Call(
            name if isinstance(name, str) else None,
            url if url in (COMPLETIONS, CHAT) else None,
            model if isinstance(model, str) else None,
        )


def read_body(value: dict[str, Any]) -> tuple[Any, dict[str, Any], dict[str, str]]:
    """What `llama.openai.read_body` reads in the body of a line. Raises PromptError or ParameterError."""
    if not isinstance(value.get("custom_id"), str):
        raise PromptError("custom_id is missing or not a string")
    if value.get("url") not in (COMPLETIONS, CHAT):
        raise PromptError(f"url is {value.get('url')!r}: expected {COMPLETIONS} or {CHAT}")
    if value.get("method") not in (None, "POST"):
        raise PromptError(f"method is {value['method']!r}: expected POST")
    if not isinstance(value.get("body"), dict):
        raise PromptError("body is not an object")
    openai.refuse_unknown(value, _LINE, "the line")
    return openai.read_body(value["body"], value["url"] == CHAT)


def response(number: int, call: Call, result: dict[str, Any], tokenizer: BaseTokenizer) -> dict[str, Any]:
    """The line of OpenAI's output file for a prediction."""
    body = openai.response(str(number), 0, call.model, call.url == CHAT, result, tokenizer)
    return _line(number, call, 200, body)


def failure(number: int, call: Call, reason: str) -> dict[str, Any]:
    error = {"message": reason, "type": "invalid_request_error", "param": None, "code": None}
    return _line(number, call, 400, {"error": error})


def _line(number: int, call: Call, status: int, body: dict[str, Any]) -> dict[str, Any]:
    answer = {"status_code": status, "request_id": f"req_{number}", "body": body}
    return {"id": f"{_ID}{number}", "custom_id": call.custom_id, "response": answer, "error": None}


def line_number(record: dict[str, Any]) -> int | None:
    """Which line of the input a line of the output belongs to."""
    name = record.get("id")
    digits = name.removeprefix(_ID) if isinstance(name, str) and name.startswith(_ID) else ""
    return int(digits) if digits.isdecimal() and digits.isascii() else None


def is_failure(record: dict[str, Any]) -> bool:
    answer = record.get("response")
    return isinstance(answer, dict) and answer.get("status_code") != 200
