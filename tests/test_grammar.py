"""Output that must have a form: what is finished has it, whatever the tokenizer, the batch, the drafts, the noise."""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import json_tokenizers
import numpy
import pytest
from checkpoints import SMALL, random_weights, save
from conftest import ROOT
from hypothesis import given, seed, settings
from hypothesis import strategies as st

pytest.importorskip("llguidance")
jsonschema = pytest.importorskip("jsonschema")

from llama import Llama, SamplingParams  # noqa: E402
from llama.batch.lines import read_line  # noqa: E402
from llama.cli.flags import SAMPLING, sampling_params  # noqa: E402
from llama.cli.output import cut  # noqa: E402
from llama.errors import LlamaError, ParameterError  # noqa: E402
from llama.grammar import Form, Forms  # noqa: E402
from llama.response_format import form_of  # noqa: E402
from llama.tokenizer import BaseTokenizer, Tokenizer  # noqa: E402

PERSON = {
    "type": "object", "additionalProperties": False, "required": ["name", "age"],
    "properties": {"name": {"enum": ["Tom", "Zoë", "李"]}, "age": {"type": "integer", "minimum": 0, "maximum": 120}},
}  # fmt: skip
PROMPT, DIALOG = "Once upon a time", [{"role": "user", "content": "Who is it?"}]
IDENT = r"[a-c]{1,3}-[0-9]{2}é?"


def is_person(text: str) -> bool:
    jsonschema.validate(json.loads(text), PERSON)
    return True


FORMS: list[tuple[dict[str, Any], Callable[[str], object]]] = [
    ({"json_schema": PERSON}, is_person),
    ({"regex": IDENT}, lambda text: re.fullmatch(IDENT, text)),
    ({"regex": " two  spaces"}, lambda text: text == " two  spaces"),
    ({"choices": ["yes", "no", "Łódź \U0001f600", 'a "quote"\n']},
     lambda text: text in ("yes", "no", "Łódź \U0001f600", 'a "quote"\n')),
    ({"grammar": 'start: sum\nsum: NUMBER "+" NUMBER\nNUMBER: /[1-9]/'},
     lambda text: re.fullmatch(r"[1-9]\+[1-9]", text)),
    ({"grammar": 'root ::= "(" ("a" | "b") ")"'}, lambda text: text in ("(a)", "(b)")),
]  # fmt: skip
NAMES = ["schema", "regex", "spaces", "choices", "lark", "with ::="]


@pytest.fixture(scope="module", params=["SentencePiece", "byte_level", "spelled_spaces"])
def any_llama(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, build: Any) -> Llama:
    """A random model with each kind of tokenizer."""
    if request.param == "SentencePiece":
        return build(max_seq_len=512)
    return of_json(request.param, tmp_path_factory.mktemp("folder"), 512)


def of_json(kind: str, folder: Path, max_seq_len: int) -> Llama:
    made = getattr(json_tokenizers, kind)()
    folder = json_tokenizers.save(made, folder / kind)
    sizes = {**SMALL, "vocab_size": made.get_vocab_size()}
    save(folder, sizes, random_weights(sizes))
    return Llama.build(str(folder), str(folder / "tokenizer.json"), max_seq_len, 4, device="cpu")


@pytest.mark.parametrize(("form", "holds"), FORMS, ids=NAMES)
def test_what_is_finished_has_the_form(any_llama: Llama, form: dict, holds: Callable[[str], object]) -> None:
    """Sampled and greedy; n samples; the pieces join to the text."""
    for temperature in (0, 1):
        params = SamplingParams(temperature=temperature, top_p=1, n=2, seed=5, logprobs=True, max_gen_len=400, **form)
        result = any_llama.text_completion([PROMPT], params=params)[0]
        for sample in result["samples"]:
            assert sample["finish_reason"] == "stop" and holds(sample["generation"]), sample["generation"]
            assert "".join(sample["tokens"]) == sample["generation"]


def test_chat_answers_have_the_form(build: Any) -> None:
    answer = build().chat_completion([DIALOG], temperature=1, seed=1, **FORMS[0][0])[0]
    assert is_person(answer["generation"]["content"]) and answer["finish_reason"] == "stop"


def allowed(form: Form, tokens: Sequence[int], drafts: Sequence[int] = ()) -> set[int]:
    """The tokens that may follow."""
    bits = numpy.unpackbits(form.mask(tokens, drafts).view(numpy.uint8), bitorder="little")
    return set(numpy.flatnonzero(bits).tolist())


def forms_of(tokenizer: BaseTokenizer) -> Callable[..., Any]:
    forms = Forms(tokenizer, tokenizer.n_words + 3)
    return lambda **given: forms.form(*next(iter(given.items())), frozenset({tokenizer.eos_id}))


def test_the_first_token_loses_its_space_and_the_others_keep_it(tokenizer: Tokenizer) -> None:
    form = forms_of(tokenizer)(regex="a b")
    first = allowed(form, [])
    assert {tokenizer.id_of("a"), tokenizer.id_of("▁a")} & first and tokenizer.id_of("▁") not in first
    spaced = tokenizer.id_of("▁a")
    assert tokenizer.id_of("▁b") in allowed(form, [spaced])
    inside = Forms(tokenizer, tokenizer.n_words).form("regex", "a b", frozenset({tokenizer.eos_id}), inside=True)
    assert spaced not in allowed(inside, [])


def test_tokens_without_text_and_beyond_the_tokenizer_are_never_allowed(tokenizer: Tokenizer) -> None:
    followers = allowed(forms_of(tokenizer)(regex="(?s:.)*"), [])
    assert tokenizer.eos_id in followers and tokenizer.bos_id not in followers and max(followers) < tokenizer.n_words


def test_drafts_are_cut_where_the_form_ends_them_and_leave_no_trace(tokenizer: Tokenizer) -> None:
    form, tokens = forms_of(tokenizer)(regex="[ab]+c"), tokenizer.encode("abac", bos=False, eos=False)
    before = allowed(form, [])
    assert form.allowed([], [*tokens, tokenizer.eos_id]) == len(tokens)
    assert form.allowed([], [tokenizer.eos_id]) == 0 and form.allowed([], [tokenizer.n_words + 1]) == 0
    assert form.allowed([], [tokens[0], tokenizer.id_of("▁b")]) == 1
    assert allowed(form, [], tokens) == {tokenizer.eos_id} and allowed(form, []) == before
    assert form.ended(tokens) and not forms_of(tokenizer)(regex="[ab]+c").ended(tokens[:-1])


@pytest.mark.parametrize("seed", range(4))
def test_whitespace_does_not_go_on_for_ever(tokenizer: Tokenizer, seed: int) -> None:
    """A model that takes whitespace wherever it may ends nevertheless."""
    form, tokens, blank = forms_of(tokenizer)(json_schema=PERSON), [], re.compile(r"\s*|<0x(09|0A|0D|20)>")
    choose = numpy.random.default_rng(seed)
    while not form.ended(tokens) and len(tokens) < 500:
        followers = sorted(allowed(form, tokens))
        blanks = [token for token in followers if blank.fullmatch(tokenizer.piece(token))]
        tokens.append(int(choose.choice(blanks or followers)))
    assert form.ended(tokens) and is_person(tokenizer.decode(tokens))


@pytest.mark.parametrize("temperature", [0, 1])
def test_drafts_change_nothing(build: Any, ckpt_dir: Path, temperature: float) -> None:
    """From the text, and from a model, whose drafts have the form too: the same model's are nearly all right."""
    params = [SamplingParams(temperature=temperature, seed=3, max_gen_len=60, **form) for form, _ in FORMS]
    alone = build().text_completion([PROMPT] * len(params), params=params)
    for speculate in ("lookup", str(ckpt_dir)):
        drafted = build(speculate=speculate).text_completion([PROMPT] * len(params), params=params)
        assert [r["generation"] for r in drafted] == [r["generation"] for r in alone]
        assert [r["finish_reason"] for r in drafted] == [r["finish_reason"] for r in alone]
    assert sum(r["accepted_tokens"] for r in drafted) > 0.9 * sum(r["drafted_tokens"] for r in drafted) > 0


def test_free_requests_beside_it_get_what_they_get_alone(build: Any) -> None:
    llama = build()
    free = SamplingParams(temperature=1, seed=9, max_gen_len=30)
    alone = llama.text_completion([PROMPT], params=free)[0]["generation"]
    formed = SamplingParams(temperature=1, seed=9, max_gen_len=60, json_schema=PERSON)
    results = llama.text_completion([PROMPT] * 3, params=[formed, free, formed])
    assert results[1]["generation"] == alone
    assert is_person(results[0]["generation"]) and results[0]["generation"] == results[2]["generation"]


def test_stop_strings_and_lengths_cut_it_and_say_so(build: Any) -> None:
    llama = build()
    cut = llama.text_completion([PROMPT], temperature=0, json_schema=PERSON, stop=["age"])[0]
    assert cut["finish_reason"] == "stop" and '"name"' in cut["generation"] and "age" not in cut["generation"]
    short = llama.text_completion([PROMPT], temperature=0, regex="[ab]{200}", max_gen_len=5)[0]
    assert short["finish_reason"] == "length" and re.fullmatch("[ab]+", short["generation"])
    whole = llama.text_completion([PROMPT], temperature=0, regex="é", max_gen_len=2, min_gen_len=2)[0]
    assert (whole["generation"], whole["finish_reason"]) == ("é", "stop")


def test_a_text_that_may_go_on_ends_with_an_end_token(build: Any) -> None:
    llama = build()
    eos = llama.tokenizer.eos_id
    result = llama.text_completion([PROMPT], temperature=0, regex="a+", logit_bias={eos: 100}, min_gen_len=3)[0]
    assert result["finish_reason"] == "stop" and result["completion_tokens"] == 3


def test_log_probabilities_are_those_of_the_model_itself(build: Any) -> None:
    llama = build()
    result = llama.text_completion([PROMPT], temperature=0, logprobs=True, top_logprobs=2, choices=["yes", "no"])[0]
    prompt = llama.prompt_tokens(PROMPT)
    _, scores = llama.generate([prompt + result["token_ids"]], max_gen_len=0, logprobs=True, echo=True)
    assert result["logprobs"] == pytest.approx(scores[0][len(prompt) :], abs=1e-4)
    assert result["top_logprobs"][0][0]["logprob"] >= result["logprobs"][0]


DEEP: dict = reduce(lambda part, _: {"items": part}, range(600), {})


@pytest.mark.parametrize(
    ("form", "said"),
    [
        ({"json_schema": {"properties": {"a~/b": {"items": {"type": "strin"}}}}}, "/properties/a~0~1b/items: .*strin"),
        ({"json_schema": {"$ref": "#/$defs/none"}}, "json_schema cannot be followed: .*none"),
        ({"json_schema": {"$ref": "http://localhost/schema"}}, "does not fetch"),
        ({"json_schema": {"type": "array", "items": {"not": {}}}}, "/items: .*not"),
        ({"regex": "b(a"}, r"regex cannot be followed: 'b\(a', character 2: unclosed group"),
        ({"grammar": "start: foo"}, "grammar cannot be followed: line 1, column 8: .*foo"),
        ({"regex": "a\ud800"}, "regex has half of a surrogate pair"),
        ({"json_schema": {"const": "\ud800"}}, "json_schema has half of a surrogate pair"),
        ({"json_schema": DEEP}, "json_schema .*(nested too deeply|recursion)"),
        ({"grammar": "root ::= foo"}, "grammar cannot be followed: .*foo"),
        ({"regex": "a", "choices": ["b"]}, "regex and choices were both given"),
        ({"regex": "a", "num_beams": 2}, "regex with num_beams=2"),
    ],
)
def test_what_cannot_be_followed_is_said_before_any_step(build: Any, form: dict, said: str) -> None:
    llama = build()
    with pytest.raises(ParameterError, match=said) as error:
        llama.text_completion(["a", "b"], **form)
    assert llama.engine.computed_tokens == 0 and "\n" not in str(error.value)


def test_a_form_that_other_parameters_forbid_is_an_error_of_its_request(build: Any) -> None:
    llama = build()
    texts = [llama.tokenizer.piece(t) for t in range(llama.tokenizer.n_words)]
    bias = {t: -numpy.inf for t, text in enumerate(texts) if text.strip() == "a" or text == "<0x61>"}
    params = [SamplingParams(regex="a", logit_bias=bias), SamplingParams(temperature=0, choices=["b"])]
    results = dict(llama.run_each([PROMPT, PROMPT], params))
    assert isinstance(results[0], LlamaError) and "its regex with its logit_bias" in str(results[0])
    assert results[1]["generation"] == "b"


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, build: Any) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ParameterError, match=r"regex needs the package llguidance.*llama-runner\[grammar\]"):
        build().text_completion([PROMPT], regex="a")


@pytest.mark.parametrize(
    ("body", "fields"),
    [
        ({}, {}),
        ({"response_format": {"type": "text"}}, {}),
        ({"response_format": {"type": "json_object"}}, {"json_schema": {"type": "object"}}),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": PERSON, "strict": True}}},
         {"json_schema": PERSON}),
        ({"guided_json": PERSON}, {"json_schema": PERSON}),
        ({"guided_json": json.dumps(PERSON)}, {"json_schema": PERSON}),
        ({"guided_regex": "a"}, {"regex": "a"}),
        ({"guided_choice": ["a"]}, {"choices": ["a"]}),
        ({"guided_grammar": "start: A"}, {"grammar": "start: A"}),
    ],
)  # fmt: skip
def test_openais_bodies_ask_for_forms(body: dict, fields: dict) -> None:
    body = {**body, "model": "m"}
    assert form_of(body) == fields and body == {"model": "m"}


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"response_format": "json"}, "response_format is 'json'"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "expected"),
        ({"guided_json": "{"}, "guided_json is not JSON"),
        ({"guided_json": "[]"}, "guided_json is a JSON list"),
        ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "both response_format and a guided_"),
    ],
)
def test_bodies_that_ask_for_no_form_are_refused(body: dict, said: str) -> None:
    with pytest.raises(ParameterError, match=said):
        form_of(body)


def test_lines_of_files_have_forms() -> None:
    ours = {"prompt": "a", "json_schema": PERSON}
    theirs = {
        "custom_id": "1", "url": "/v1/chat/completions",
        "body": {"messages": DIALOG, "response_format": {"type": "json_object"}},
    }  # fmt: skip
    lines = [read_line(1, json.dumps(one).encode(), "jsonl", SamplingParams(), 0) for one in (ours, theirs)]
    assert [line.error for line in lines] == [None, None]
    assert [line.params.json_schema for line in lines] == [PERSON, {"type": "object"}]


SCALARS = st.sampled_from(
    [{"type": "string", "maxLength": 5}, {"type": "integer", "minimum": -9, "maximum": 40}, {"type": "boolean"},
     {"type": "null"}, {"enum": ["é", "b c", 3, None]}, {"const": '"\\'}, {"type": "string", "pattern": "^[a-f]{2,4}$"},
     {"type": "number", "minimum": 0, "maximum": 1}]
)  # fmt: skip


def _objects(of: st.SearchStrategy) -> st.SearchStrategy:
    return st.builds(
        lambda properties, some: {
            "type": "object", "properties": properties, "additionalProperties": False,
            "required": [name for number, name in enumerate(properties) if some >> number & 1],
        },
        st.dictionaries(st.sampled_from(["a", "b", "é", "a b", '"']), of, max_size=3), st.integers(0, 7),
    )  # fmt: skip


SCHEMAS = st.recursive(
    SCALARS,
    lambda of: st.one_of(
        _objects(of),
        st.builds(lambda items, most: {"type": "array", "items": items, "maxItems": most}, of, st.integers(0, 3)),
        st.builds(lambda options: {"anyOf": options}, st.lists(of, min_size=1, max_size=2)),
    ),
    max_leaves=5,
)


def test_texts_of_random_schemas_are_valid(shared: list[Llama]) -> None:
    """200 schemas, of which nearly all are followed to the end."""
    ended = []

    @seed(1)
    @settings(max_examples=200, database=None, deadline=None)
    @given(schema=SCHEMAS, noise=st.integers(0, 2**32))
    def check(schema: dict, noise: int) -> None:
        params = SamplingParams(temperature=1, top_p=1, seed=noise, max_gen_len=200, json_schema=schema)
        result = shared[noise % len(shared)].text_completion([PROMPT], params=params)[0]
        ended.append(result["finish_reason"])
        if ended[-1] == "stop":
            jsonschema.validate(json.loads(result["generation"]), schema)
        else:
            assert result["completion_tokens"] == 200

    check()
    assert len(ended) >= 200 and ended.count("stop") > 0.9 * len(ended)


@pytest.fixture(scope="module")
def shared(build: Any, small: dict, tmp_path_factory: pytest.TempPathFactory) -> list[Llama]:
    """Random models of several seeds, with each kind of tokenizer."""
    folders = [save(tmp_path_factory.mktemp("m") / str(n), small, random_weights(small, seed=n)) for n in range(3)]
    return [*(build(folder, max_seq_len=256) for folder in folders),
            of_json("byte_level", tmp_path_factory.mktemp("m"), 256)]  # fmt: skip


def flags(**given: Any) -> SamplingParams:
    return sampling_params({**{name: flag.default for name, flag in SAMPLING.items()}, **given})


def test_the_command_reads_schemas_and_grammars_from_files(tmp_path: Path) -> None:
    """And says what is wrong with them before a model is loaded."""
    schema, grammar = tmp_path / "person.json", tmp_path / "a.lark"
    schema.write_text(json.dumps(PERSON), encoding="utf-8")
    grammar.write_text("start: /a+/\n", encoding="utf-8")
    assert flags(json_schema=str(schema)).json_schema == PERSON
    assert flags(grammar=str(grammar)).form == ("grammar", "start: /a+/\n")
    assert flags(choices=["a", "b"]).choices == ("a", "b")
    for wrong, said in (
        ({"json_schema": str(grammar)}, "json_schema is not JSON"),
        ({"json_schema": str(tmp_path / "none")}, "cannot be read: No such file"),
        ({"grammar": str(schema)}, "grammar cannot be followed"),
        ({"regex": "("}, "regex cannot be followed"),
    ):
        with pytest.raises(ParameterError, match=said):
            flags(**wrong)


def test_the_command_says_what_was_cut() -> None:
    results = [{"samples": [{"finish_reason": "stop"}, {"finish_reason": "length"}]}, {"finish_reason": "length"}]
    assert "2 of 3 texts cut by max_gen_len" in cut(results, SamplingParams(regex="a+"))
    assert not cut(results, SamplingParams()) and not cut([{"finish_reason": "stop"}], SamplingParams(regex="a+"))


def test_nothing_is_imported_unasked() -> None:
    code = (
        "import sys; from llama import Llama; llama = Llama.build(max_seq_len=64);"
        "llama.text_completion(['a'], max_gen_len=2); print('llguidance' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "False\n"
