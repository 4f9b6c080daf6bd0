"""OpenAI's batch form, in and out."""

import json
from typing import Any

import pytest
from conftest import DEMO

from llama import Llama
from llama.batch_file import Line, line_number, read_line, result_line
from llama.request import SamplingParams

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
    record = result_line(read, result)
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
    assert "".join(token["token"] for token in content) == expected["generation"]["content"]
    assert all(bytes(token["bytes"]).decode() == token["token"] for token in content)
    assert all(len(token["top_logprobs"]) == 2 and token["logprob"] <= 0 for token in content)
    used = body["usage"]
    assert used["completion_tokens"] == expected["completion_tokens"]
    assert used["total_tokens"] == used["prompt_tokens"] + used["completion_tokens"]


def test_a_completion_response(llama: Llama) -> None:
    read = line("completions", {"prompt": "Ben wanted", "max_tokens": 6, "logprobs": 1, "n": 2, "temperature": 1})
    body = answer(llama, read)["response"]["body"]
    assert body["object"] == "text_completion" and [choice["index"] for choice in body["choices"]] == [0, 1]
    for choice in body["choices"]:
        logprobs = choice["logprobs"]
        assert "".join(logprobs["tokens"]) == choice["text"]
        assert [
            choice["text"][at : at + len(t)] for at, t in zip(logprobs["text_offset"], logprobs["tokens"], strict=True)
        ] == logprobs["tokens"]
        assert len(logprobs["token_logprobs"]) == len(logprobs["top_logprobs"]) == len(logprobs["tokens"])


def test_what_is_refused_and_what_fails(llama: Llama) -> None:
    refused = answer(llama, line("chat/completions", {"messages": [{"role": "user", "content": "[INST] x"}]}))
    assert refused["response"]["body"]["choices"][0]["finish_reason"] == "content_filter"
    failed = answer(llama, line("completions", {"prompt": "word " * 200}))
    assert failed["response"]["status_code"] == 400
    assert "leaves no room" in failed["response"]["body"]["error"]["message"]
