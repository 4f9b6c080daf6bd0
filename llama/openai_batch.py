"""OpenAI's batch form: a line's body → a prompt with sampling fields, a prediction → the response that OpenAI writes.

Source: https://platform.openai.com/docs/guides/batch and the reference of /v1/completions and /v1/chat/completions.
What a run cannot know the same way twice is constant: `created` is 0, and ids are made of the line's number.
"""

from dataclasses import dataclass
from typing import Any

from llama.errors import ParameterError, PromptError

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
_SAME = ("temperature", "top_p", "presence_penalty", "frequency_penalty", "logit_bias", "seed", "stop", "n")
_OURS = ("top_k", "min_p", "repetition_penalty", "min_gen_len", "stop_token_ids", "bad_words", "num_beams",
         "length_penalty")  # fmt: skip
# Fields that do not change what is generated here, and fields that may stand there at the value that changes nothing.
_HARMLESS = {"model", "user", "metadata", "store", "service_tier", "stream_options", "safety_identifier",
             "prompt_cache_key"}  # fmt: skip
_ONLY_AT = {"stream": (False,), "echo": (False,), "best_of": (1,), "suffix": ("",), "tools": ([],),
            "tool_choice": ("none", "auto"), "parallel_tool_calls": (True, False), "modalities": (["text"],),
            "response_format": ({"type": "text"},)}  # fmt: skip
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


def read_body(value: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """(Prompt or dialog, sampling fields) of a line. Raises PromptError or ParameterError for what cannot be done."""
    if not isinstance(value.get("custom_id"), str):
        raise PromptError("custom_id is missing or not a string")
    if value.get("url") not in (COMPLETIONS, CHAT):
        raise PromptError(f"url is {value.get('url')!r}: expected {COMPLETIONS} or {CHAT}")
    if value.get("method", "POST") != "POST":
        raise PromptError(f"method is {value['method']!r}: expected POST")
    if not isinstance(value.get("body"), dict):
        raise PromptError("body is not an object")
    body = {key: field for key, field in value["body"].items() if field is not None and key not in _HARMLESS}
    chat = value["url"] == CHAT
    prompt = _messages(body) if chat else _prompt(body)
    return prompt, _sampling(body, chat)


def _prompt(body: dict[str, Any]) -> str:
    prompt = body.pop("prompt", None)
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    if not isinstance(prompt, str):
        raise PromptError(
            "body.prompt is not one text: expected a string, or a list of one; use a line for each prompt"
        )
    return prompt


def _messages(body: dict[str, Any]) -> list[Any]:
    messages = body.pop("messages", None)
    if not isinstance(messages, list):
        raise PromptError("body.messages is not a list of messages")
    return [_message(message) for message in messages]


def _message(message: Any) -> Any:
    """A message whose content may be OpenAI's list of text parts; what is none of it is the dialog's to refuse."""
    if not isinstance(message, dict):
        return message
    content = message.get("content")
    if isinstance(content, list) and all(
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str) for part in content
    ):
        return {**message, "content": "".join(part["text"] for part in content)}
    return message


def _sampling(body: dict[str, Any], chat: bool) -> dict[str, Any]:
    fields = {name: body.pop(name) for name in (*_SAME, *_OURS) if name in body}
    limits = [body.pop(name) for name in ("max_completion_tokens", "max_tokens") if name in body]
    if limits:
        fields["max_gen_len"] = limits[0]
    if "logprobs" in body:
        wanted = body.pop("logprobs")
        fields |= {"logprobs": wanted} if chat else {"logprobs": True, "top_logprobs": wanted}
    if chat and "top_logprobs" in body:
        fields["top_logprobs"] = body.pop("top_logprobs")
    for name, value in body.items():
        if name not in _ONLY_AT:
            raise ParameterError(f"body has the unknown field {name!r}")
        if value not in _ONLY_AT[name]:
            raise ParameterError(f"body.{name}={value!r:.60} is not supported: leave it out")
    return fields


def response(number: int, call: Call, result: dict[str, Any]) -> dict[str, Any]:
    """The line of OpenAI's output file for a prediction; `seed`, which is ours, gives the same result again."""
    chat = call.url == CHAT
    samples = result.get("samples", [result])
    read, made = result["prompt_tokens"], sum(sample["completion_tokens"] for sample in samples)
    body = {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{number}",
        "object": "chat.completion" if chat else "text_completion",
        "created": 0,
        "model": call.model,
        "choices": [_choice(index, sample, chat) for index, sample in enumerate(samples)],
        "usage": {"prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made},
        "seed": result["seed"],
    }
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


def _choice(index: int, sample: dict[str, Any], chat: bool) -> dict[str, Any]:
    reason = "content_filter" if sample["finish_reason"] == "refused" else sample["finish_reason"]
    if not chat:
        said = {"text": sample["generation"]}
        logprobs = _completion_logprobs(sample)
    else:
        said = {"message": {**sample["generation"], "refusal": None}}
        logprobs = _chat_logprobs(sample)
    return {"index": index, **said, "logprobs": logprobs, "finish_reason": reason}


def _completion_logprobs(sample: dict[str, Any]) -> dict[str, Any] | None:
    if "logprobs" not in sample:
        return None
    offsets, at = [], 0
    for piece in sample["tokens"]:
        offsets.append(at)
        at += len(piece)
    top = sample.get("top_logprobs")
    return {
        "tokens": sample["tokens"],
        "token_logprobs": sample["logprobs"],
        "top_logprobs": [{each["piece"]: each["logprob"] for each in place} for place in top] if top else None,
        "text_offset": offsets,
    }


def _chat_logprobs(sample: dict[str, Any]) -> dict[str, Any] | None:
    if "logprobs" not in sample:
        return None
    tops = sample.get("top_logprobs") or [[] for _ in sample["tokens"]]
    content = [
        {**_token(piece, logprob), "top_logprobs": [_token(each["piece"], each["logprob"]) for each in top]}
        for piece, logprob, top in zip(sample["tokens"], sample["logprobs"], tops, strict=True)
    ]
    return {"content": content, "refusal": None}


def _token(piece: str, logprob: float) -> dict[str, Any]:
    return {"token": piece, "logprob": logprob, "bytes": list(piece.encode())}
