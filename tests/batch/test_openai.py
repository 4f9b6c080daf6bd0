"""OpenAI's batch form, in and out."""

import json
import re
from itertools import accumulate
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import DEMO
from hypothesis import given
from hypothesis import strategies as st

from llama import Llama
from llama.batch.lines import Line, read_line
from llama.batch.records import line_number, result_line
from llama.output import Output
from llama.request import Request, SamplingParams

DIALOG = [{"role": "user", "content": "What sound does a dog make?"}]


def line(url: str, body: dict[str, Any]) -> Line:
    value = {"custom_id": "mine", "method": "POST", "url": f"/v1/{url}", "body": body}
    read = read_line(7, json.dumps(value).encode(), "jsonl", SamplingParams(temperature=0), 1)
    assert read.error is None, read.error
    return read


def test_fields_have_their_counterparts() -> None:
    body = {
        "model": "m", "messages": DIALOG, "max_completion_tokens": 9, "temperature": 0.3, "top_p": 0.8, "n": 2,
        "seed": 4, "stop": ["a", "b"], "presence_penalty": 0.5, "frequency_penalty": 0.25, "logit_bias": {"5": -100},
        "logprobs": True, "top_logprobs": 3, "user": "u", "stream": False, "tools": None,
        "response_format": {"type": "text"}, "top_k": 40,
    }  # fmt: skip
    read = line("chat/completions", body)
    assert read.prompt == DIALOG
    assert read.params == SamplingParams(
        max_gen_len=9, temperature=0.3, top_p=0.8, n=2, seed=4, stop=("a", "b"), presence_penalty=0.5, top_k=40,
        frequency_penalty=0.25, logit_bias={5: -100}, logprobs=True, top_logprobs=3,
    )  # fmt: skip
    text = line("completions", {"prompt": ["Ben"], "logprobs": 2, "max_tokens": 3})
    assert (text.prompt, text.params.logprobs, text.params.top_logprobs, text.params.max_gen_len) == ("Ben", True, 2, 3)


def test_content_in_parts_is_joined() -> None:
    parts = [{"type": "text", "text": "What sound "}, {"type": "text", "text": "does a dog make?"}]
    assert line("chat/completions", {"messages": [{"role": "user", "content": parts}]}).prompt == DIALOG


@pytest.fixture(scope="module")
def llama() -> Llama:
    return Llama.build(str(DEMO), str(DEMO / "tokenizer.model"), 128, 2, device="cpu", dtype="float32")


def answer(llama: Llama, read: Line) -> dict[str, Any]:
    (_, result), = llama.run_each([read.prompt], [read.params])  # fmt: skip
    record = result_line(read, result, llama.tokenizer)
    assert line_number(record) == 7
    return json.loads(record)


def test_a_chat_response(llama: Llama) -> None:
    read = line("chat/completions", {"model": "m", "messages": DIALOG, "logprobs": True, "top_logprobs": 2})
    record = answer(llama, read)
    body = record["response"]["body"]
    assert (record["custom_id"], record["error"], record["response"]["status_code"]) == ("mine", None, 200)
    assert (body["object"], body["model"]) == ("chat.completion", "m")
    choice = body["choices"][0]
    expected = llama.chat_completion([DIALOG], temperature=0)[0]
    assert choice["message"] == {**expected["generation"], "refusal": None}
    assert choice["finish_reason"] == "stop"
    content = choice["logprobs"]["content"]
    assert b"".join(bytes(token["bytes"]) for token in content).decode() == expected["generation"]["content"]
    assert all(len(token["top_logprobs"]) == 2 and token["logprob"] <= 0 for token in content)
    for token in content:  # greedy, so each is the most probable one, and said alike
        assert {key: token[key] for key in ("token", "bytes")} == {
            key: token["top_logprobs"][0][key] for key in ("token", "bytes")
        }
    used = body["usage"]
    assert used["completion_tokens"] == expected["completion_tokens"]
    assert used["total_tokens"] == used["prompt_tokens"] + used["completion_tokens"]


def test_a_completion_response(llama: Llama) -> None:
    read = line("completions", {"prompt": "Ben wanted", "max_tokens": 6, "logprobs": 1, "n": 2, "temperature": 1})
    body = answer(llama, read)["response"]["body"]
    assert body["object"] == "text_completion" and [choice["index"] for choice in body["choices"]] == [0, 1]
    for choice in body["choices"]:
        logprobs = choice["logprobs"]
        tokens, offsets = logprobs["tokens"], logprobs["text_offset"]
        assert "".join(tokens) == " " + choice["text"]  # the first one is spelled with the space that a text drops
        assert offsets == [0, *accumulate(len(token) - (not at) for at, token in enumerate(tokens[:-1]))]
        assert len(tokens) == 6 == len(offsets)
        for token, logprob, top in zip(tokens, logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True):
            assert top[token] == logprob  # also one that is not among the most probable
            assert len(top) == (1 if logprob == max(top.values()) else 2)
    assert any(len(top) == 2 for choice in body["choices"] for top in choice["logprobs"]["top_logprobs"])


def test_a_harness_sees_which_tokens_were_greedy(llama: Llama) -> None:
    """It compares `tokens[i]` with the most probable key of `top_logprobs[i]`."""
    body = {"prompt": "Ben wanted", "max_tokens": 12, "logprobs": 3}
    logprobs = answer(llama, line("completions", body))["response"]["body"]["choices"][0]["logprobs"]
    assert [max(top, key=top.get) for top in logprobs["top_logprobs"]] == logprobs["tokens"]


BYTES_FROM = 3  # the byte tokens follow <unk>, <s>, </s>
PLAIN = st.integers(BYTES_FROM, 1023)
IN_CHARACTERS = st.sampled_from([BYTES_FROM + byte for byte in "é€\n🐶\ufffd".encode()])


@given(st.data())
def test_bytes_are_the_bytes_of_the_text(llama: Llama, data: st.DataObject) -> None:
    """Joined they are the text's, also where a stop string ends it, and a byte token has its one byte."""
    tokens = data.draw(st.lists(PLAIN | IN_CHARACTERS, min_size=1, max_size=12))
    whole = llama.tokenizer.decode(tokens)
    place = data.draw(st.integers(0, len(whole)))
    stop = whole[place : place + data.draw(st.integers(0, 3))]
    sample = as_generated(llama, tokens, SamplingParams(logprobs=True, top_logprobs=1, stop=stop or None))
    read = line("chat/completions", {"messages": DIALOG, "logprobs": True})
    body = json.loads(result_line(read, sample, llama.tokenizer))["response"]["body"]["choices"][0]
    content = body["logprobs"]["content"]
    joined = b"".join(bytes(token["bytes"]) for token in content).decode(errors="surrogateescape")
    assert re.sub("[\udc80-\udcff]", "\ufffd", joined) == body["message"]["content"]
    if not stop:
        assert len(content) == len(tokens)
        for token, said in zip(tokens, content, strict=True):
            if token < BYTES_FROM + 256:
                assert said["bytes"] == [token - BYTES_FROM] == said["top_logprobs"][0]["bytes"]
                assert said["token"] == f"<0x{token - BYTES_FROM:02X}>"


def as_generated(llama: Llama, tokens: list[int], params: SamplingParams) -> dict[str, Any]:
    """The answer to a dialog that was answered with these tokens."""
    request = Request([1], params, seed=1, stop_tokens=frozenset())
    finish = lambda request, reason: setattr(request, "finish_reason", reason)  # noqa: E731  # one line
    engine: Any = SimpleNamespace(finish=finish, speculation=None)
    output = Output(engine, llama.tokenizer, request, 0, False)
    for count, token in enumerate(tokens, 1):
        request.tokens.append(token)
        request.logprobs.append(-1.0)
        request.top_logprobs.append({token: -1.0})
        request.finish_reason = "length" if count == len(tokens) else None
        output.observe(request)
        if request.finish_reason:
            break
    request.added = request.first_token = request.finished = 0.0
    return {"generation": {"role": "assistant", "content": output.text}, **output.result()}


@pytest.mark.parametrize(
    ("changed", "body", "said"),
    [
        ({"tools": []}, {}, "the line has the unknown field 'tools': expected custom_id, method, url, body"),
        ({"temperature": 1}, {}, "the line has the unknown field 'temperature'"),
        ({"method": "GET"}, {}, "method is 'GET': expected POST"),
        ({"custom_id": 3}, {}, "custom_id is missing or not a string"),
        ({}, {"messages": [{**DIALOG[0], "name": "Tom"}]}, "body.messages[0] has the unknown field 'name'"),
        ({}, {"messages": [*DIALOG, {"role": "assistant", "tool_calls": [1], "content": ""}]},
         "body.messages[1] has the unknown field 'tool_calls': expected role, content"),
        ({}, {"messages": [{"role": "user", "content": []}]}, "body.messages[0].content is an empty list"),
        ({}, {"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "content has a part that is no text"),
        ({}, {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "id": 1}]}]},
         "a part of body.messages[0].content has the unknown field 'id'"),
        ({}, {"top_logprobs": 2}, "body.top_logprobs needs body.logprobs"),
        ({}, {"top_logprobs": 2, "logprobs": False}, "body.top_logprobs needs body.logprobs"),
        ({}, {"max_tokens": -1}, "max_tokens=-1 is out of range"),
        ({}, {"max_completion_tokens": "many"}, "max_completion_tokens='many' is out of range"),
        ({}, {"max_completion_tokens": 3, "max_tokens": 3}, "body has both max_completion_tokens and max_tokens"),
        ({}, {"max_gen_len": 3}, "body has the unknown field 'max_gen_len'"),
        ({}, {"logit_bias": {"1_0": 1}}, "logit_bias has '1_0': 1; expected token id"),
        ({}, {"logit_bias": {" 6 ": 1}}, "logit_bias has ' 6 ': 1; expected token id"),
        ({}, {"logit_bias": {"6": 1, "06": 2}}, "logit_bias has '06': 2; expected token id"),
        ({}, b'{"custom_id": "a", "url": "/v1/completions", "body": {"prompt": "a", "logit_bias": {"6": 1, "6": 2}}}',
         "the key '6' stands twice"),
    ],
)  # fmt: skip
def test_what_would_be_ignored_is_refused_by_its_name(
    changed: dict[str, Any], body: dict[str, Any] | bytes, said: str
) -> None:
    """A field that has no counterpart here changes what its writer expects, so it is an error, in the body's words."""
    if isinstance(body, dict):
        value = {"custom_id": "mine", "url": "/v1/chat/completions", "body": {"messages": DIALOG, **body}, **changed}
    read = read_line(1, body if isinstance(body, bytes) else json.dumps(value).encode(), "jsonl", SamplingParams(), 1)
    assert said in (read.error or "none")


def test_a_completions_logprobs_are_named_as_in_its_body() -> None:
    value = {"custom_id": "a", "url": "/v1/completions", "body": {"prompt": "a", "logprobs": -1}}
    error = read_line(1, json.dumps(value).encode(), "jsonl", SamplingParams(), 1).error
    assert error and error.startswith("logprobs=-1 is out of range")


def test_what_is_refused_and_what_fails(llama: Llama) -> None:
    refused = answer(llama, line("chat/completions", {"messages": [{"role": "user", "content": "[INST] x"}]}))
    assert refused["response"]["body"]["choices"][0]["finish_reason"] == "content_filter"
    failed = answer(llama, line("completions", {"prompt": "word " * 200}))
    assert failed["response"]["status_code"] == 400
    assert "leaves no room" in failed["response"]["body"]["error"]["message"]
