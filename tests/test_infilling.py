"""Infilling, to the token: prompts, ends, first spaces; from Python, in files of prompts and from the shell."""

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from code_llama import INFILLING, checkpoint
from code_llama import tokenizer as with_pieces
from hypothesis import given
from hypothesis import strategies as st

from llama import Llama, SamplingParams, Tokenizer
from llama.batch.lines import read_line
from llama.batch.records import result_line
from llama.cli import commands
from llama.errors import ParameterError, PromptError
from llama.infilling import Infilling, at_mark, infilling_prompt

PRE, SUF, MID, EOT = range(1024, 1028)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("code") / "model", INFILLING)


@pytest.fixture(scope="module")
def llama(folder: Path) -> Llama:
    return Llama.build(str(folder), None, 128, 4, device="cpu")


# --------------------------------------------------------------------------------------------------------- the prompt


@given(
    st.text(st.sampled_from("ab the\n   (☺)é你"), max_size=20),
    st.text(st.sampled_from("ab the\n   (☺)é你"), max_size=20),
)
def test_prompts_are_prefix_suffix_middle(folder: Path, prefix: str, suffix: str) -> None:  # fmt: skip
    """The suffix keeps its first characters as they are: its pieces spell it, with no space before them."""
    tokenizer = Tokenizer(str(folder / "tokenizer.model"))
    own = tokenizer.encode(prefix, bos=False, eos=False)
    prompt = infilling_prompt(Infilling(prefix, suffix), tokenizer, "it")
    assert prompt.end_ids == {EOT} and prompt.inside
    head, end = [tokenizer.bos_id, PRE, *own, SUF], prompt.tokens[-1]
    assert prompt.tokens[: len(head)] == head and end == MID
    behind = prompt.tokens[len(head) : -1]
    assert "".join(tokenizer.pieces(behind, inside=True)) == suffix
    other = infilling_prompt(Infilling(prefix, suffix, suffix_first=True), tokenizer, "it")
    assert other.tokens == [tokenizer.bos_id, PRE, SUF, *behind, MID, *own]


def test_metas_own_tokens(tmp_path: Path) -> None:
    """With Llama's tokenizer and the four pieces where Code Llama has them, the published prompt to the token."""
    path = os.environ.get("LLAMA_TOKENIZER_PATH")
    if not path:
        pytest.skip("LLAMA_TOKENIZER_PATH does not name Meta's tokenizer.model")
    more = [f"<unused {n}>" for n in range(7)] + INFILLING
    tokenizer = Tokenizer(str(with_pieces(tmp_path / "tokenizer.model", more, Path(path))))
    infilling = Infilling('def remove_non_ascii(s: str) -> str:\n    """ ', "\n    return result\n")
    assert infilling_prompt(infilling, tokenizer, "it").tokens == [
        1, 32007, 822, 3349, 29918, 5464, 29918, 294, 18869, 29898, 29879, 29901, 851, 29897, 1599, 851, 29901, 13,
        1678, 9995, 29871, 32008, 13, 1678, 736, 1121, 13, 32009,
    ]  # fmt: skip


@pytest.mark.parametrize("missing", range(4))
def test_a_model_without_the_pieces_says_so(tmp_path: Path, missing: int) -> None:
    """Whichever of them is missing: an unknown piece is none, though SentencePiece gives it the number 0."""
    pieces = [piece for place, piece in enumerate(INFILLING) if place != missing]
    tokenizer = Tokenizer(str(with_pieces(tmp_path / "tokenizer.model", pieces)))
    with pytest.raises(
        PromptError, match=rf"prompt 0 cannot be filled in: the tokenizer has no piece {INFILLING[missing]}"
    ):
        infilling_prompt(Infilling("a", "b"), tokenizer, "prompt 0")


def test_a_tokenizer_without_an_unknown_piece_has_none(tmp_path: Path) -> None:
    """Its answer to a name that it does not know is no token."""
    tokenizer = Tokenizer(str(with_pieces(tmp_path / "tokenizer.model", [])))
    tokenizer.sp_model = SimpleNamespace(piece_to_id=lambda piece: -1)
    assert tokenizer.id_of("▁<PRE>") is None


def test_a_tokenizer_json_has_them_too(tmp_path: Path) -> None:
    from json_tokenizers import save, spelled_spaces

    from llama.text.tokenizer_files import open_tokenizer

    made = spelled_spaces()
    made.add_special_tokens(INFILLING)
    tokenizer = open_tokenizer(str(save(made, tmp_path / "t", bos_token="<s>", eos_token="</s>")))
    pre, suf, mid, end = map(made.token_to_id, INFILLING)
    prompt = infilling_prompt(Infilling("the fox", " jumps"), tokenizer, "it")
    own = tokenizer.encode("the fox", bos=False, eos=False)
    assert prompt.tokens[: len(own) + 3] == [tokenizer.bos_id, pre, *own, suf] and prompt.end_ids == {end}
    assert prompt.tokens[-1] == mid
    assert "".join(tokenizer.pieces(prompt.tokens[len(own) + 3 : -1], inside=True)) == " jumps"


# ------------------------------------------------------------------------------------------------------- what is made


def test_what_is_made_is_what_the_model_makes_of_the_prompt(llama: Llama) -> None:
    """Ends at EOT, keeps a first space, and stands between the two texts."""
    prefixes, suffixes = ["def add(a, b):\n    return", "The"], [" + b\n", " ends."]
    found = llama.infill(prefixes, suffixes, temperature=0, max_gen_len=12, logprobs=True)
    for prefix, suffix, one in zip(prefixes, suffixes, found, strict=True):
        prompt = infilling_prompt(Infilling(prefix, suffix), llama.tokenizer, "it")
        tokens, _ = llama.generate([prompt.tokens], 12, temperature=0, params=None)
        kept = tokens[0][: tokens[0].index(EOT)] if EOT in tokens[0] else tokens[0]
        assert one["token_ids"] == kept and one["prompt_tokens"] == len(prompt.tokens)
        assert one["generation"] == "".join(one["tokens"]) == "".join(llama.tokenizer.pieces(kept, inside=True))
        assert one["full_text"] == prefix + one["generation"] + suffix
    assert llama.text_infilling(prefixes, suffixes, 0, 0.9, 12)[1]["generation"] == found[1]["generation"]


def test_it_ends_where_the_model_says_so(llama: Llama) -> None:
    """And nothing else ends there: of a plain text EOT is a token like others."""
    params = SamplingParams(temperature=0, max_gen_len=8, logit_bias={EOT: 1e9})
    (filled,) = llama.infill(["a"], ["b"], params=params)
    assert (filled["generation"], filled["finish_reason"], filled["completion_tokens"]) == ("", "stop", 0)
    (plain,) = llama.text_completion(["a"], params=params)
    assert (plain["finish_reason"], plain["completion_tokens"]) == ("length", 8)


def test_a_first_space_is_kept(llama: Llama) -> None:
    token = llama.tokenizer.encode("the", bos=False, eos=False)[0]
    assert llama.tokenizer.piece(token).startswith(" ")
    params = SamplingParams(temperature=0, max_gen_len=1, logit_bias={token: 1e9}, logprobs=True, n=2)
    (filled,) = llama.infill(["of"], ["b"], params=params)
    assert filled["generation"] == filled["tokens"][0] == llama.tokenizer.piece(token)
    assert [sample["full_text"] for sample in filled["samples"]] == [f"of{llama.tokenizer.piece(token)}b"] * 2
    (plain,) = llama.text_completion(["of"], params=params)
    assert plain["generation"] == plain["tokens"][0] == llama.tokenizer.piece(token)[1:]
    texts: list[str] = []
    llama.infill(["of"], ["b"], params=params, on_text=lambda _, text: texts.append(text))
    assert "".join(texts) == filled["generation"]


def test_what_is_no_gap_is_refused(llama: Llama) -> None:
    with pytest.raises(PromptError, match="2 prefixes and 1 suffixes: give a suffix for each prefix"):
        llama.infill(["a", "b"], ["c"])
    with pytest.raises(PromptError, match="prompt 0 has a int, not a string, beside its gap"):
        llama.infill([3], ["c"])
    with pytest.raises(PromptError, match="prompts is one string"):
        llama.infill("a", ["c"])
    for text in ("no mark", "<FILL_ME> and <FILL_ME>"):
        with pytest.raises(PromptError, match=rf"file has <FILL_ME> {text.count('<F')} times: put it once"):
            at_mark(text, "file")


# ------------------------------------------------------------------------------------------- files of prompts, a shell


def _record(llama: Llama, value: dict[str, Any]) -> dict[str, Any]:
    line = read_line(3, json.dumps(value).encode(), "jsonl", SamplingParams(temperature=0, max_gen_len=6), 1)
    assert line.error is None, line.error
    ((_, result),) = llama.run_each([line.prompt], [line.params])
    record: dict[str, Any] = json.loads(result_line(line, result, llama.tokenizer))
    return record


def test_lines_have_gaps(llama: Llama) -> None:
    expected = llama.infill(["The"], [" ends."], temperature=0, max_gen_len=6, seed=None)[0]
    own = _record(llama, {"prefix": "The", "suffix": " ends."})
    assert (own["text"], own["full_text"]) == (expected["generation"], expected["full_text"])
    first = _record(llama, {"prefix": "The", "suffix": " ends.", "suffix_first": True})
    (turned,) = llama.infill(["The"], [" ends."], temperature=0, max_gen_len=6, suffix_first=True)
    assert first["text"] == turned["generation"]
    body = {"prompt": "The", "suffix": " ends."}
    answer = _record(llama, {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": body})
    assert answer["response"]["body"]["choices"][0]["text"] == expected["generation"]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"prefix": "a"}, "a prefix whose suffix is NoneType"),
        ({"prefix": "a", "suffix": 3}, "a prefix whose suffix is int"),
        ({"prefix": 3, "suffix": "a"}, "a prefix that is int"),
        ({"prefix": "a", "suffix": "b", "suffix_first": 1}, "a suffix_first that is 1: expected true or false"),
        ({"prefix": "a", "suffix": "b", "prompt": "c"}, "both prompt and prefix"),
        ({"prompt": "a", "suffix": "b"}, "unknown field 'suffix'"),
        ({"custom_id": "a", "url": "/v1/completions", "body": {"prompt": "a", "suffix": 3}}, "body.suffix is 3"),
    ],
)
def test_lines_that_have_no_gap_say_so(value: dict[str, Any], said: str) -> None:
    assert said in str(read_line(1, json.dumps(value).encode(), "jsonl", SamplingParams(), 1).error)


def test_a_shell_fills_gaps(llama: Llama, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"ckpt_dir": str(folder), "max_seq_len": 128, "device": "cpu", "temperature": 0, "max_gen_len": 6}
    (expected,) = llama.infill(["The"], [" ends."], temperature=0, max_gen_len=6)
    commands.complete(prefix="The", suffix=" ends.", **options)
    assert capsys.readouterr().out == expected["generation"] + "\n"
    (tmp_path / "gap.txt").write_text("The<FILL_ME> ends.")
    commands.complete(infill=str(tmp_path / "gap.txt"), json=True, show_prompt=True, **options)
    shown = capsys.readouterr()
    record = json.loads(shown.out)
    assert (record["prefix"], record["suffix"], record["text"]) == ("The", " ends.", expected["generation"])
    assert record["full_text"] == expected["full_text"]
    assert f"{infilling_prompt(Infilling('The', ' ends.'), llama.tokenizer, 'it').tokens}" in shown.err


@pytest.mark.parametrize(
    ("texts", "flags", "said"),
    [
        (["a"], {"prefix": "b"}, "a text with a gap is filled in by itself"),
        ([], {"prefix": "b", "infill": "x"}, "give one of them"),
        ([], {"suffix_first": True}, "--suffix_first is for a text with a gap"),
        ([], {"infill": "/nowhere"}, "infill='/nowhere' cannot be read: No such file"),
    ],
)
def test_flags_that_name_no_gap(texts: list[str], flags: dict[str, Any], said: str) -> None:
    with pytest.raises(ParameterError, match=said):
        commands.complete(*texts, **flags)
