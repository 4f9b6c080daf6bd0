"""Lines of prompt files: what they ask for, and that a bad one is an error record, never an exception."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import DEMO
from hypothesis import given
from hypothesis import strategies as st

from llama.batch.lines import SAMPLING_FIELDS, Line, choose_format, numbered_lines, read_line
from llama.batch.records import error_line, is_failure, line_number, result_line
from llama.errors import LlamaError, ParameterError
from llama.request import SamplingParams
from llama.tokenizer import Tokenizer

TOKENIZER = Tokenizer(str(DEMO / "tokenizer.model"))
DEFAULTS = SamplingParams(temperature=0.5)
DIALOG = [{"role": "user", "content": "Hi"}]
PREDICTION: dict[str, Any] = {
    "generation": "a\u2028b", "finish_reason": "stop", "seed": 5, "prompt_tokens": 3, "completion_tokens": 2,
    "time": 1.0, "time_to_first_token": 0.5,
}  # fmt: skip


def read(value: Any, number: int = 3) -> Line:
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    return read_line(number, data, "jsonl", DEFAULTS, 1)


def test_a_text_line_is_its_prompt() -> None:
    """Whatever it looks like."""
    for text in ('{"prompt": 1}', "[1,2]", " two  spaces ", "123", "-"):
        line = read_line(2, text.encode(), "text", DEFAULTS, 1)
        assert (line.number, line.prompt, line.error) == (2, text, None)


def test_json_lines_ask_for_texts_and_dialogs() -> None:
    line = read({"prompt": "Hi", "id": "a", "top_k": 5, "logit_bias": {"7": -1}, "stop": "x", "bad_words": [[1, 2]]})
    assert (line.id, line.prompt) == ("a", "Hi")
    assert line.params == SamplingParams(
        temperature=0.5, top_k=5, logit_bias={7: -1}, stop=("x",), bad_words=((1, 2),), seed=line.params.seed
    )
    assert read({"messages": DIALOG, "id": 4}).prompt == DIALOG == read(DIALOG).prompt


def test_seeds_come_from_the_run_and_the_line() -> None:
    seeds = [
        read_line(number, b'{"prompt": ""}', "jsonl", DEFAULTS, seed).params.seed
        for number in (1, 2)
        for seed in (1, 2)
    ]
    assert len(set(seeds)) == 4
    assert read({"prompt": "", "seed": 9}).params.seed == 9


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (b"{", "not JSON"),
        (b"\xff", "not UTF-8 text"),
        (b"[" * 100_000, "not JSON"),
        (3, "a JSON int"),
        ({}, "neither prompt nor messages"),
        ({"prompt": "a", "messages": []}, "both prompt and messages"),
        ({"prompt": 3}, "a prompt that is int"),
        ({"messages": "x"}, "a messages that is str"),
        ({"prompt": "a", "id": [1]}, "id is a JSON list"),
        ({"prompt": "a", "temprature": 1}, "unknown field 'temprature': did you mean 'temperature'?"),
        ({"prompt": "a", "temperature": -1}, "temperature=-1 is out of range"),
        ({"prompt": "a", "temperature": "hot"}, "temperature='hot' is out of range"),
        ({"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias has 'x': 1; expected token id"),
        ({"prompt": "a", "max_gen_len": 1e400}, "max_gen_len=inf is out of range"),
        ({"custom_id": "a"}, "url is None"),
        ({"custom_id": 1, "url": "/v1/completions", "body": {}}, "custom_id is missing or not a string"),
        ({"custom_id": "a", "url": "/v1/completions", "body": []}, "body is not an object"),
        ({"custom_id": "a", "url": "/v1/completions", "method": "GET", "body": {}}, "method is 'GET'"),
        ({"custom_id": "a", "url": "/v1/completions", "body": {"prompt": ["a", "b"]}}, "body.prompt is not one text"),
        ({"custom_id": "a", "url": "/v1/chat/completions", "body": {"messages": 1}}, "body.messages is not a list"),
        ({"custom_id": "a", "url": "/v1/completions", "body": {"prompt": "a", "colour": 1}}, "unknown field 'colour'"),
        ({"custom_id": "a", "url": "/v1/completions", "body": {"prompt": "a", "stream": True}}, "not supported"),
    ],
)  # fmt: skip
def test_a_bad_line_says_why(value: Any, said: str) -> None:
    line = read(value)
    assert line.error and said in line.error
    record = error_line(line)
    assert record.endswith(b"\n") and record.count(b"\n") == 1
    assert line_number(record) == 3 and is_failure(record)


@given(st.binary(max_size=60))
def test_any_bytes_are_a_request_or_an_error(data: bytes) -> None:
    for form in ("text", "jsonl"):
        line = read_line(1, data, form, DEFAULTS, 1)
        assert (line.error is None) == (line.params is not None and line.params.seed is not None)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
KEYS = ["id", "prompt", "messages", "custom_id", "url", "body", "method", *SamplingParams.__dataclass_fields__]
BODY = ["model", "prompt", "messages", "max_tokens", "logprobs", "top_logprobs", "n", "stop", "tools", "stream"]
OBJECTS = st.dictionaries(st.sampled_from(KEYS), JSON | st.just("/v1/completions") | st.just(DIALOG), max_size=4)
BODIES = st.builds(
    lambda url, body: {"custom_id": "a", "url": url, "body": body},
    st.sampled_from(["/v1/completions", "/v1/chat/completions"]),
    st.dictionaries(st.sampled_from(BODY), JSON | st.just(DIALOG) | st.just("Hi"), max_size=5),
)


@given(OBJECTS | BODIES)
def test_malformed_objects_are_error_records(value: dict[str, Any]) -> None:
    """Whatever stands where: one whole line comes out, and it belongs to the line that went in."""
    line = read(json.dumps(value).encode(), 12)
    if line.error is not None:
        record = error_line(line)
        assert line_number(record) == 12 and is_failure(record)
    else:
        assert line.params.seed is not None and isinstance(line.prompt, str | list)


def test_results_are_whole_lines_without_times() -> None:
    record = result_line(Line(4, "x", "Hi", DEFAULTS), PREDICTION, TOKENIZER)
    assert json.loads(record) == {
        "line": 4, "id": "x", "text": "a\u2028b", "finish_reason": "stop", "seed": 5, "prompt_tokens": 3,
        "completion_tokens": 2,
    }  # fmt: skip
    assert line_number(record) == 4 and not is_failure(record)
    failed = result_line(Line(4, "\ud800", "Hi", DEFAULTS), LlamaError("too long"), TOKENIZER)
    assert json.loads(failed) == {"line": 4, "id": "\ud800", "error": "too long"} and is_failure(failed)


@pytest.mark.parametrize("torn", [b"", b"{", b'{"line": 3}', b'{"line": "3"}\n', b'{"line": 0}\n', b"\0\0\n", b"[3]\n"])
def test_what_is_no_whole_record_has_no_line_number(torn: bytes) -> None:
    assert line_number(torn) is None


def test_the_format_is_said_or_is_in_the_name() -> None:
    assert [choose_format(name, None) for name in ("a.jsonl", "a.ndjson", "a.txt", "-", "a")] == [
        "jsonl", "jsonl", "text", "text", "text",
    ]  # fmt: skip
    assert choose_format("a.txt", "jsonl") == "jsonl"
    with pytest.raises(ParameterError, match="format='csv' is not a format"):
        choose_format("a", "csv")


def test_lines_are_numbered_as_they_stand_in_the_file(tmp_path: Path) -> None:
    (tmp_path / "p").write_bytes(b"\xef\xbb\xbfone\r\n\n  \ntwo\n three")
    assert list(numbered_lines(str(tmp_path / "p"))) == [(1, b"one"), (4, b"two"), (5, b" three")]


FORMS = {
    "prompt": {"prompt": "Hi"}, "messages": {"messages": DIALOG},
    "OpenAI's": {"custom_id": "a", "url": "/v1/completions", "body": {"prompt": "Hi"}},
}  # fmt: skip


@pytest.mark.parametrize("name", [*sorted(SAMPLING_FIELDS), "id", "prompt", "messages"])
@pytest.mark.parametrize("form", FORMS.values(), ids=list(FORMS))
def test_null_means_left_out_in_every_form(form: dict[str, Any], name: str) -> None:
    """The flags of the command then say it, as where the field is not there."""
    if name in {**form, **form.get("body", {})}:
        return
    flags = SamplingParams(temperature=0.5, top_k=9, max_gen_len=8, min_gen_len=2, stop="x", n=2, top_logprobs=1)
    body = form.get("body")
    null = {**form, "body": {**body, name: None}} if body else {**form, name: None}
    with_null, without = (read_line(1, json.dumps(value).encode(), "jsonl", flags, 5) for value in (null, form))
    assert with_null == without and without.error is None
