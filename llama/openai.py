"""OpenAI's interface: the body of a request → a prompt with sampling fields, a prediction → the body of a response.

Source: the reference of /v1/completions and /v1/chat/completions, https://platform.openai.com/docs/api-reference.
Lines of batch files and requests to the service have the same bodies.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

from llama.errors import ParameterError, PromptError
from llama.infilling import Infilling
from llama.predictions import completion_tokens, samples_of
from llama.response_format import form_of
from llama.tokenizer import BaseTokenizer

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
_SAME = ("temperature", "top_p", "presence_penalty", "frequency_penalty", "logit_bias", "seed", "stop", "n")
_OURS = ("top_k", "min_p", "repetition_penalty", "min_gen_len", "stop_token_ids", "bad_words", "num_beams",
         "length_penalty")  # fmt: skip
# Fields that do not change what is generated here, and fields that may stand there at the value that changes nothing.
_HARMLESS = {"model", "user", "metadata", "store", "service_tier", "stream_options", "safety_identifier",
             "prompt_cache_key"}  # fmt: skip
_ONLY_AT = {"stream": (False,), "echo": (False,), "best_of": (1,), "tools": ([],),
            "tool_choice": ("none", "auto"), "parallel_tool_calls": (True, False),
            "modalities": (["text"],)}  # fmt: skip
_MESSAGE = ("role", "content")
_LIMITS = ("max_completion_tokens", "max_tokens")
_DEEPEST = 200  # lists and objects within each other: whoever looks into a value may do so by recursion


def parse(text: str) -> Any:
    """A JSON text in which no key stands twice: one of the two values would be lost. Raises ValueError."""
    try:
        value = json.loads(text, object_pairs_hook=_object)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(_DEEPEST):
        parts = (part.values() if isinstance(part, dict) else part for part in level)
        level = [one for own in parts for one in own if isinstance(one, dict | list)]
        if not level:
            return value
    raise ValueError(f"it is nested too deeply: more than {_DEEPEST} levels")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise ValueError(f"the key {next(key for key, count in counts.items() if count > 1)!r:.60} stands twice")
    return value


def read_body(given: Mapping[str, Any], chat: bool) -> tuple[Any, dict[str, Any], dict[str, str]]:
    """(Prompt or dialog, sampling fields, our names of fields → the body's where they differ) of a body.

    Raises PromptError or ParameterError for what cannot be done.
    """
    body = {key: field for key, field in given.items() if field is not None and key not in _HARMLESS}
    prompt = _messages(body) if chat else _text(body)
    return prompt, *_sampling(body, chat)


def refuse_unknown(value: dict[str, Any], known: tuple[str, ...], where: str) -> None:
    """Raise PromptError for a key that would have to be ignored; one that is null says nothing."""
    for key, field in value.items():
        if key not in known and field is not None:
            raise PromptError(f"{where} has the unknown field {key!r:.60}: expected {', '.join(known)}")


def _text(body: dict[str, Any]) -> str | Infilling:
    """The prompt; with a suffix that is not empty, what stands before a gap."""
    prompt, suffix = _prompt(body), body.pop("suffix", "")
    if not isinstance(suffix, str):
        raise PromptError(f"body.suffix is {suffix!r:.60}: expected a string")
    return Infilling(prompt, suffix) if suffix else prompt


def _prompt(body: dict[str, Any]) -> str:
    prompt = body.pop("prompt", None)
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    if not isinstance(prompt, str):
        raise PromptError(
            "body.prompt is not one text: expected a string, or a list of one; ask for each prompt by itself"
        )
    return prompt


def _messages(body: dict[str, Any]) -> list[Any]:
    messages = body.pop("messages", None)
    if not isinstance(messages, list):
        raise PromptError("body.messages is not a list of messages")
    return [_message(message, f"body.messages[{place}]") for place, message in enumerate(messages)]


def _message(message: Any, where: str) -> Any:
    """A message whose content may be OpenAI's list of text parts; one that is no object is the dialog's to refuse."""
    if not isinstance(message, dict):
        return message
    refuse_unknown(message, _MESSAGE, where)
    message = {key: message[key] for key in _MESSAGE if key in message}
    content = message.get("content")
    if not isinstance(content, list):
        return message
    if not content:
        raise PromptError(f"{where}.content is an empty list: expected a text, or parts of type text")
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise PromptError(f"{where}.content has a part that is no text: {part!r:.60}")
        refuse_unknown(part, ("type", "text"), f"a part of {where}.content")
    return {**message, "content": "".join(part["text"] for part in content)}


def _sampling(body: dict[str, Any], chat: bool) -> tuple[dict[str, Any], dict[str, str]]:
    """The sampling fields of what is left of a body, and our names of those → theirs where they differ."""
    fields, theirs = {name: body.pop(name) for name in (*_SAME, *_OURS) if name in body} | form_of(body), {}
    limits = {name: body.pop(name) for name in _LIMITS if name in body}
    if len(limits) > 1:
        raise ParameterError(f"body has both {' and '.join(limits)}: give one of them")
    for name, limit in limits.items():
        fields["max_gen_len"], theirs["max_gen_len"] = limit, name
    if chat:
        fields |= {name: body.pop(name) for name in ("logprobs", "top_logprobs") if name in body}
        if fields.get("top_logprobs") is not None and fields.get("logprobs") is not True:
            raise ParameterError("body.top_logprobs needs body.logprobs, which is not true: set it, or leave both out")
    elif "logprobs" in body:
        fields |= {"logprobs": True, "top_logprobs": body.pop("logprobs")}
        theirs["top_logprobs"] = "logprobs"
    for name, value in body.items():
        if name not in _ONLY_AT:
            raise ParameterError(f"body has the unknown field {name!r:.60}")
        if value not in _ONLY_AT[name]:
            raise ParameterError(f"body.{name}={value!r:.60} is not supported: leave it out")
    return fields, theirs


@contextmanager
def in_their_words(theirs: dict[str, str]) -> Iterator[None]:
    """What is wrong with a parameter is said by the name that it has in the body."""
    try:
        yield
    except ParameterError as error:
        said = re.sub(r"\w+", lambda word: theirs.get(word[0], word[0]), str(error)) if theirs else str(error)
        raise ParameterError(said) from None


def response(
    name: str, created: int, model: str | None, chat: bool, result: Mapping[str, Any], tokenizer: BaseTokenizer
) -> dict[str, Any]:
    """The body of the response to a prediction; `seed`, which is ours, gives the same result again."""
    return {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{name}",
        "object": "chat.completion" if chat else "text_completion",
        "created": created,
        "model": model,
        "choices": [_choice(index, sample, chat, tokenizer) for index, sample in enumerate(samples_of(result))],
        "usage": usage(result["prompt_tokens"], completion_tokens(result)),
        "seed": result["seed"],
    }


def usage(read: int, completed: int) -> dict[str, int]:
    return {"prompt_tokens": read, "completion_tokens": completed, "total_tokens": read + completed}


def finish_reason(reason: str | None) -> str | None:
    """Why a text ended, in OpenAI's words."""
    return "content_filter" if reason == "refused" else reason


def _choice(index: int, sample: dict[str, Any], chat: bool, tokenizer: BaseTokenizer) -> dict[str, Any]:
    if chat:
        said: dict[str, Any] = {"message": {**sample["generation"], "refusal": None}}
    else:
        said = {"text": sample["generation"]}
    logprobs = token_logprobs(sample, chat, tokenizer) if "logprobs" in sample else None
    return {"index": index, **said, "logprobs": logprobs, "finish_reason": finish_reason(sample["finish_reason"])}


def token_logprobs(
    sample: Mapping[str, Any], chat: bool, tokenizer: BaseTokenizer, first: tuple[int, ...] = (), offset: int = 0
) -> dict[str, Any]:
    """The log-probabilities of a sample, or of a part of it: then `first` is the token with which its text begins,
    and `offset` how many characters stand before the part."""
    if chat:
        return _chat_logprobs(sample, tokenizer, first)
    return _completion_logprobs(sample, tokenizer, offset)


# A token is spelled as `Tokenizer.piece` spells it, wherever it stands: whoever compares the one that was chosen with
# the most probable ones finds it. Where a text drops its first space or ends at a stop string, offsets and bytes say.


def _completion_logprobs(sample: Mapping[str, Any], tokenizer: BaseTokenizer, offset: int) -> dict[str, Any]:
    tokens = list(map(tokenizer.piece, sample["token_ids"]))
    tops = sample.get("top_logprobs") or [[] for _ in tokens]
    lengths = map(len, sample["tokens"])
    return {
        "tokens": tokens,
        "token_logprobs": sample["logprobs"],
        "top_logprobs": [
            # Of two tokens that are spelled alike the chosen one stays, else the more probable one.
            {**{each["piece"]: each["logprob"] for each in reversed(top)}, token: logprob}
            for token, logprob, top in zip(tokens, sample["logprobs"], tops, strict=True)
        ],
        "text_offset": list(accumulate(lengths, initial=offset))[: len(tokens)],
    }


def _chat_logprobs(sample: Mapping[str, Any], tokenizer: BaseTokenizer, first: tuple[int, ...]) -> dict[str, Any]:
    ids, tops = sample["token_ids"], sample.get("top_logprobs") or [[] for _ in sample["token_ids"]]
    added = _within(tokenizer.token_bytes([*first, *ids])[len(first) :], "".join(sample["tokens"]))
    before = [*first, *ids][:1]  # the token with which the text begins, unless the place is that one
    content = [
        {
            **_token(tokenizer.piece(chosen), logprob, own),
            "top_logprobs": [
                _token(each["piece"], each["logprob"], tokenizer.token_bytes([*befores, each["token"]])[-1])
                for each in top
            ],
        }
        for place, (chosen, logprob, own, top) in enumerate(zip(ids, sample["logprobs"], added, tops, strict=True))
        for befores in [before if place or first else []]
    ]
    return {"content": content, "refusal": None}


def _within(added: list[bytes], text: str) -> list[bytes]:
    """What tokens add to a text, without what is behind its end, where a stop string begins."""
    whole, end = b"".join(added), 0
    for character in text:
        encoded = character.encode()
        end += len(encoded) if whole.startswith(encoded, end) else 1  # U+FFFD for a byte that is not UTF-8
    ends = list(accumulate(map(len, added), initial=0))
    return [one[: max(0, end - begin)] for one, begin in zip(added, ends, strict=False)]


def _token(piece: str, logprob: float, added: bytes) -> dict[str, Any]:
    return {"token": piece, "logprob": logprob, "bytes": list(added)}
