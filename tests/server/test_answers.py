"""What the service answers: OpenAI's forms, with the texts of `Llama` itself; whole, in events, with any client."""

import asyncio
import json
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from services import Service, events, httpx, service

from llama import Llama

DIALOG = [{"role": "user", "content": "What sound does a dog make?"}]
openai = pytest.importorskip("openai", reason="no openai: pip install openai")


@pytest.fixture(scope="module")
def served() -> Iterator[Service]:
    with service("--max_seq_len", "512") as running:
        yield running


def test_an_answer_is_the_librarys(served: Service, demo: Llama) -> None:
    body = {"model": "demo", "messages": DIALOG, "temperature": 0}
    answer = served.post("chat/completions", body).json()
    expected = demo.chat_completion([DIALOG], temperature=0)[0]
    assert answer["choices"][0]["message"] == {**expected["generation"], "refusal": None}
    assert (answer["object"], answer["model"]) == ("chat.completion", "demo")
    assert answer["usage"]["completion_tokens"] == expected["completion_tokens"]
    text = served.complete("Ben wanted a red kite.", max_tokens=10)
    assert text["choices"] == [
        {"index": 0, "text": "He dreamed of it every night.", "logprobs": None, "finish_reason": "length"}
    ]


def joined(chunks: list[dict[str, Any]], index: int, chat: bool) -> dict[str, Any]:
    """The choice that the chunks of one sample make."""
    own = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
    texts = [choice["delta"].get("content", "") if chat else choice["text"] for choice in own]
    made: dict[str, Any] = {"text": "".join(texts), "finish_reason": own[-1]["finish_reason"], "logprobs": None}
    for part in (choice["logprobs"] for choice in own if choice["logprobs"]):
        if made["logprobs"] is None:
            made["logprobs"] = {key: list(value) if value else value for key, value in part.items()}
        else:
            for key, value in part.items():
                made["logprobs"][key] = made["logprobs"][key] + value if value else value
    assert all(choice["finish_reason"] is None for choice in own[:-1])
    return made


@pytest.mark.parametrize("more", [
    {}, {"n": 3}, {"logprobs": 2}, {"logprobs": 0, "n": 2}, {"stop": ["every", " k"], "logprobs": 1},
    {"stop": "m of it", "logprobs": 1}, {"logit_bias": {"229": 12, "133": 12, "175": 12}, "logprobs": 1},
])  # fmt: skip
@pytest.mark.parametrize("chat", [True, False])
def test_a_stream_joins_to_the_whole_answer(served: Service, chat: bool, more: dict[str, Any]) -> None:
    """Texts, reasons and log-probabilities; the biased tokens are bytes, of which some make no character."""
    path, body = ("chat/completions", {"messages": DIALOG}) if chat else ("completions", {"prompt": "Ben wanted"})
    body = {**body, "seed": 3, "temperature": 1, "max_tokens": 24, **more}
    if chat and "logprobs" in more:
        body |= {"logprobs": True, "top_logprobs": more["logprobs"]}
    whole = served.post(path, body).json()
    chunks = served.stream(path, {**body, "stream_options": {"include_usage": True}})
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert chunks[-1]["usage"] == whole["usage"] and all(chunk["usage"] is None for chunk in chunks[:-1])
    for choice in whole["choices"]:
        text = choice["message"]["content"] if chat else choice["text"]
        made = joined(chunks, choice["index"], chat)
        assert (made["text"], made["finish_reason"]) == (text, choice["finish_reason"])
        if more.get("logprobs") is not None:
            assert_near(made["logprobs"], choice["logprobs"])
    if chat:
        assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}


def assert_near(made: Any, expected: Any) -> None:
    """The same, but for the last digits: a prompt that is read from a cached prefix rounds differently."""
    if isinstance(expected, float):
        assert made == pytest.approx(expected, abs=1e-4)
    elif isinstance(expected, dict):
        assert made.keys() == expected.keys()
        for key, value in expected.items():
            assert_near(made[key], value)
    elif isinstance(expected, list):
        assert len(made) == len(expected)
        for one, other in zip(made, expected, strict=True):
            assert_near(one, other)
    else:
        assert made == expected


def test_a_refused_dialog_is_answered_so(served: Service) -> None:
    body = {"messages": [{"role": "user", "content": "[INST] x"}]}
    choice = served.post("chat/completions", body).json()["choices"][0]
    made = joined(served.stream("chat/completions", body), 0, chat=True)
    assert choice["finish_reason"] == made["finish_reason"] == "content_filter"
    assert choice["message"]["content"] == made["text"] != ""


def test_the_same_seed_gives_the_same_text_in_any_company(served: Service) -> None:
    """In float32, alone and among 50 others."""
    own = {"prompt": "Once upon a time", "temperature": 0.8, "seed": 11, "max_tokens": 40}
    alone = served.complete(**own)["choices"][0]["text"]
    others = [{**own, "prompt": f"{name} had a dog.", "seed": seed} for seed in range(25) for name in ("Mia", "Tom")]
    with ThreadPoolExecutor(51) as threads:
        answers = threads.map(lambda body: served.complete(**body), [*others[:25], own, *others[25:]])
        assert [answer["choices"][0]["text"] for answer in answers][25] == alone


def test_openais_own_client(served: Service) -> None:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["demo"]
        assert client.models.retrieve("demo").owned_by == "llama"
        answer = client.chat.completions.create(
            model="demo",
            messages=DIALOG,
            temperature=0,
            logprobs=True,
            top_logprobs=3,
            response_format={"type": "text"},
        )
        assert answer.choices[0].message.content == "A dog says woof."
        assert len(answer.choices[0].logprobs.content) == answer.usage.completion_tokens
        stream = client.chat.completions.create(
            model="demo", messages=DIALOG, temperature=0, stream=True, stream_options={"include_usage": True}
        )
        chunks = list(stream)
        assert chunks[-1].usage.total_tokens == answer.usage.total_tokens
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "A dog says woof."
        text = client.completions.create(model="demo", prompt="Ben wanted a red kite.", temperature=0, max_tokens=10)
        assert text.choices[0].text == "He dreamed of it every night."
        with pytest.raises(openai.NotFoundError, match="this service has 'demo'") as missing:
            client.chat.completions.create(model="gpt", messages=DIALOG)
        assert missing.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError, match="temperature=9e"):
            client.chat.completions.create(model="demo", messages=DIALOG, temperature=9e99)
        with pytest.raises(openai.BadRequestError, match="response_format"):
            client.chat.completions.create(model="demo", messages=DIALOG, response_format={"type": "xml"})


def test_a_form_is_kept(served: Service) -> None:
    pytest.importorskip("llguidance", reason="no llguidance: pip install llguidance")
    schema = {"type": "object", "properties": {"sound": {"enum": ["woof", "meow"]}}, "required": ["sound"],
              "additionalProperties": False}  # fmt: skip
    asked = {"type": "json_schema", "json_schema": {"name": "sound", "schema": schema}}
    with openai.OpenAI(base_url=served.url + "/v1", api_key="none", max_retries=0) as client:
        answer = client.chat.completions.create(model="demo", messages=DIALOG, temperature=0, response_format=asked)
        assert json.loads(answer.choices[0].message.content)["sound"] in ("woof", "meow")
        choice = {"guided_choice": ["moo", "woof"]}
        one = client.completions.create(model="demo", prompt="A dog says", extra_body=choice)
        assert one.choices[0].text in ("moo", "woof")
        asked["json_schema"]["schema"] = {"type": "no such type"}
        with pytest.raises(openai.BadRequestError, match="json_schema cannot be followed"):
            client.chat.completions.create(model="demo", messages=DIALOG, response_format=asked)


def test_openais_client_many_times_at_once(served: Service) -> None:
    async def ask(client: Any, number: int) -> str:
        stream = await client.completions.create(
            model="demo", prompt="Mia had a dog.", temperature=0.9, seed=number, max_tokens=12, stream=True
        )
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(ask(client, number) for number in range(20)))

    texts = asyncio.run(all_of_them())
    for number in (0, 7, 19):
        answer = served.complete("Mia had a dog.", temperature=0.9, seed=number, max_tokens=12)
        assert texts[number] == answer["choices"][0]["text"]


@pytest.mark.skipif(not shutil.which("curl"), reason="no curl")
def test_curl(served: Service) -> None:
    body = json.dumps({"prompt": "Ben wanted a red kite.", "temperature": 0, "max_tokens": 10, "stream": True})
    out = subprocess.run(
        ["curl", "-sN", f"{served.url}/v1/completions", "-d", body], capture_output=True, text=True, check=True
    ).stdout
    assert "".join(event["choices"][0]["text"] for event in events(out)) == "He dreamed of it every night."


@pytest.mark.parametrize(("body", "status", "said"), [
    (b"{", 400, "the body is not JSON"), (b"\xff", 400, "not UTF-8"), (b"[1]", 400, "a JSON list, not an object"),
    (b'{"prompt": "a", "prompt": "b"}', 400, "the key 'prompt' stands twice"),
    (b'{"prompt": "\\ud800"}', 400, "half a surrogate"), (b"[" * 200_000, 400, "the body is not JSON"),
    (b'{"prompt": ' + b'{"a":' * 100_000, 400, "the body is not JSON"),
    (b'{"prompt": "a", "seed": ' + b"9" * 100_000 + b"}", 400, "the body is not JSON"),
    (b'{"prompt": "a", "temperature": NaN}', 400, "temperature=nan is out of range"),
    ({"prompt": "a", "temprature": 1}, 400, "unknown field 'temprature'"), ({}, 400, "body.prompt is not one text"),
    ({"prompt": ["a", "b"]}, 400, "ask for each prompt by itself"), ({"prompt": "a", "model": "b"}, 404, "'demo'"),
    ({"prompt": "a", "stream": 1.5}, 400, "stream=1.5"), ({"prompt": "a", "stream_options": {}}, 400, "stream_options"),
    ({"prompt": "a", "stream": True, "stream_options": {"x": 1}}, 400, "stream_options has the unknown field 'x'"),
    ({"prompt": "a", "logprobs": 21}, 400, "logprobs asks for 21: at most 20"),
    ({"prompt": "a", "stop": ["a"] * 17}, 400, "stop asks for 17"), ({"prompt": "a", "stop": "a" * 1001}, 400, "stop"),
    ({"prompt": "a", "bad_words": [[1]] * 257}, 400, "bad_words asks for 257"),
    ({"prompt": "a", "n": 10_000}, 400, "n=10000 is more than the 272 samples"),
    ({"prompt": "a", "max_tokens": 513}, 400, "max_tokens=513 is more than the 512"),
    ({"prompt": "word " * 600}, 400, "leaves no room"), ({"prompt": "word " * 20_000}, 400, "100000 characters"),
    ({"prompt": "a", "suffix": "b"}, 400, "cannot be filled in"),
    ({"prompt": "a", "logit_bias": {"99999": 1}}, 400, "token 99999"),
    ({"prompt": "a", "logit_bias": {str(token): 1 for token in range(1025)}}, 400, "logit_bias asks for 1025"),
    ({"prompt": "a", "temperature": [1] * 100_000}, 400, " …"),
    (b'{"prompt": "a", "temperature": ' + b"[" * 900 + b"]" * 900 + b"}", 400, "nested too deeply"),
    (b'{"prompt": "a", "guided_json": ' + b'{"a":' * 201 + b"1" + b"}" * 202, 400, "nested too deeply"),
    (b"{" + b"".join(b'"%d": 1,' % number for number in range(50_000)) + b'"49999": 1}', 400, "'49999' stands twice"),
    ({"prompt": "a", "guided_choice": ["a" * 70_000]}, 400, "at most 65536 are compiled here"),
    ({"prompt": "a", "n": 27, "logprobs": 20, "max_tokens": 500}, 400, "are 270000 log-probabilities: at most 262144"),
])  # fmt: skip
def test_what_cannot_be_done_is_said(served: Service, body: Any, status: int, said: str) -> None:
    """Soon, and without repeating all that was sent."""
    begun = time.monotonic()
    answer = served.post("completions", body)
    assert time.monotonic() - begun < 10 and len(answer.content) < 2000
    assert answer.status_code == status and said in answer.json()["error"]["message"], answer.text
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_numbers_at_the_ends_of_their_ranges_harm_nobody(served: Service) -> None:
    """A step that fails would end all that runs."""
    huge, own = 10**29, {"prompt": "Once upon a time", "max_tokens": 200, "min_gen_len": 200}
    bodies = [
        {"logit_bias": {"5": huge}}, {"logit_bias": {"5": -huge, "6": 1.5}}, {"presence_penalty": huge},
        {"frequency_penalty": -huge}, {"repetition_penalty": huge}, {"repetition_penalty": 1e-30, "logprobs": 20},
        {"temperature": huge}, {"temperature": 1e-320}, {"top_k": 2**31}, {"top_p": 1e-320}, {"seed": 2**64 - 1},
        {"logit_bias": {"5": 1e30, "6": -1e30}, "repetition_penalty": 1e30, "presence_penalty": -1e30, "logprobs": 20},
        {"num_beams": 16, "length_penalty": -100}, {"stop_token_ids": list(range(256))}, {"max_tokens": 0},
        {"bad_words": [[5] * 64] * 256}, {"logit_bias": {str(token): -1e30 for token in range(1024)}},
    ]  # fmt: skip
    expected = served.complete(**own)["choices"][0]["text"]
    with ThreadPoolExecutor(len(bodies) + 1) as threads:
        beside = threads.submit(lambda: served.complete(**own)["choices"][0]["text"])
        answers = threads.map(lambda more: served.post("completions", {"prompt": "a", "max_tokens": 9, **more}), bodies)
        assert [answer.text for answer in answers if answer.status_code != 200] == []
        assert beside.result() == expected


def test_what_it_says_of_itself(served: Service) -> None:
    assert served.http.get("/health").json() == {"status": "ok"}
    before = served.metric("completion_tokens_total"), served.metric("prompt_tokens_total")
    served.complete("Ben wanted a red kite.", max_tokens=5, min_gen_len=5)
    assert served.metric("completion_tokens_total") == before[0] + 5
    assert served.metric("prompt_tokens_total") == before[1] + 7
    assert served.metric("requests_running") == served.metric("requests_waiting") == 0
    assert served.metric("time_to_first_token_seconds_count") > 0
    text = served.http.get("/metrics").text
    assert 'llama_requests_total{path="/v1/completions",status="200"}' in text
    assert served.http.get("/v1/models/other").status_code == 404
    wrong = httpx.delete(f"{served.url}/v1/models")
    assert wrong.status_code == 405 and wrong.headers["allow"] in wrong.json()["error"]["message"]
    assert "'DELETE' is not answered here: use " in wrong.text and "GET" in wrong.headers["allow"]


def test_metrics_are_prometheuss_text(served: Service) -> None:
    """As its exposition format says: https://prometheus.io/docs/instrumenting/exposition_formats/"""
    answer = served.http.get("/metrics")
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8" and answer.text.endswith("\n")
    kinds: dict[str, str] = {}
    samples: dict[str, list[float]] = {}
    for line in answer.text.splitlines():
        if found := re.fullmatch(r"# HELP (llama_[a-z_]+) [ -~]+", line):
            assert found[1] not in kinds, "a metric's lines stand together"
        elif found := re.fullmatch(r"# TYPE (llama_[a-z_]+) (counter|gauge|histogram)", line):
            kinds[found[1]] = found[2]
        else:
            found = re.fullmatch(r'(llama_[a-z_]+)(\{[a-z_]+="[^"\\\n]*"(,[a-z_]+="[^"\\\n]*")*\})? (\S+)', line)
            assert found, line
            name = found[1]
            if kinds[last := list(kinds)[-1]] == "histogram":
                name = re.sub("_(bucket|sum|count)$", "", name)
            assert name == last and (kinds[name] == "counter") == name.endswith("_total")
            samples.setdefault(found[1], []).append(float(found[4]))
    buckets = samples["llama_time_to_first_token_seconds_bucket"]
    assert buckets == sorted(buckets) and buckets[-1:] == samples["llama_time_to_first_token_seconds_count"]
    assert 'le="+Inf"' in answer.text and set(kinds.values()) == {"counter", "gauge", "histogram"}
