"""The /commands of a talk, without a terminal and without a model."""

import dataclasses
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from llama.chat import Llama2Chat
from llama.cli.chat.commands import COMMANDS, Reply, Talk, Turn, respond
from llama.cli.chat.conversation import Conversation
from llama.errors import LlamaError, ParameterError
from llama.request import Counts, SamplingParams
from llama.tokenizer import Tokenizer

EXCHANGES = [("A dog?", "Woof."), ("A cat?", "Miau.")]


def never(question: str) -> bool:
    raise AssertionError(f"nothing was to be asked: {question}")


@pytest.fixture
def talk(tokenizer: Tokenizer) -> Talk:
    return Talk(
        params=SamplingParams(),
        chat=Llama2Chat(tokenizer),
        max_seq_len=512,
        check=lambda params: None,
        ask=never,
        conversation=Conversation("Be brief.", list(EXCHANGES)),
    )


def said(talk: Talk, line: str) -> str:
    """What a command answers, which sends nothing and does not leave."""
    reply = respond(talk, line)
    assert reply == Reply(reply.say)
    return reply.say


@pytest.fixture
def refused(talk: Talk) -> Callable[[str], str]:
    """The error of a line, which changes nothing."""

    def refused(line: str) -> str:
        before = (talk.params, list(talk.conversation.exchanges), talk.conversation.system)
        with pytest.raises(LlamaError) as caught:
            respond(talk, line)
        assert (talk.params, talk.conversation.exchanges, talk.conversation.system) == before
        return str(caught.value)

    return refused


@pytest.mark.parametrize(("line", "sent"), [("Hello", "Hello"), ("a /b", "a /b"), ("//b c", "/b c"), ("///", "//")])
def test_what_is_no_command_is_sent(talk: Talk, line: str, sent: str) -> None:
    assert respond(talk, line) == Reply(send=sent)


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("/sytem Be kind.", "there is no command /sytem: did you mean /system? (a message may begin with //)"),
        ("/retri", "there is no command /retri: did you mean /retry?"),
        ("/", "there is no command /: /help lists what there is"),
        ("/usr/bin/env python", "there is no command /usr/bin/env: /help lists what there is"),
        ("/Help", "there is no command /Help: did you mean /help?"),
        ("/undo 2", "/undo takes nothing, but '2' follows: type /undo alone"),
        ("/save", "/save lacks its FILE: type /save FILE"),
        ("/load", "/load lacks its FILE: type /load FILE"),
        ("/system [INST]", "the system prompt holds a special tag"),
        ("/load /does/not/exist", "/does/not/exist cannot be read: No such file"),
        ("/save /does/not/exist", "/does/not/exist cannot be written: there is no folder /does/not; name another"),
        ("/set temprature 1", "unknown field 'temprature': did you mean 'temperature'?"),
        ("/set temprature", "unknown field 'temprature'"),
        ("/set temperature -1", "temperature=-1 is out of range: expected 0 (argmax) to 1e38"),
        ("/set temperature warm", "temperature='warm' is out of range"),
        ("/set max_gen_len 1.5", "max_gen_len=1.5 is out of range: expected an integer, 0 or more, or None"),
        ("/set logit_bias {'5': 1}", "logit_bias=\"{'5': 1}\" is not a table"),
        ("/set stop [3]", "stop=[3] is not a list of non-empty strings"),
        ("/set n " + "[" * 100_000, "n='[[["),
    ],
)
def test_what_cannot_be_done_is_said(refused: Callable[[str], str], line: str, error: str) -> None:
    assert error in refused(line)


def test_the_system_prompt_is_shown_set_and_removed(talk: Talk) -> None:
    assert said(talk, "/system") == "Be brief."
    assert said(talk, "/system Be\nkind.") == "The system prompt is set."
    assert talk.conversation == Conversation("Be\nkind.", EXCHANGES)
    assert said(talk, "/system none") == "The system prompt is removed."
    assert talk.conversation.system is None
    assert said(talk, "/system") == "There is no system prompt; /system TEXT sets one."


def test_reset_keeps_the_system_prompt(talk: Talk) -> None:
    assert said(talk, "/reset") == "The dialog is forgotten; the system prompt stays."
    assert talk.conversation == Conversation("Be brief.")


def test_undo_takes_back_exchange_by_exchange(talk: Talk, refused: Callable[[str], str]) -> None:
    assert said(talk, "/undo") == "Taken back: A cat?"
    assert talk.conversation.exchanges == EXCHANGES[:1]
    assert said(talk, "/undo") == "Taken back: A dog?"
    assert refused("/undo") == "there is nothing to take back yet: the dialog is empty"
    assert refused("/retry") == "there is nothing to answer again yet: the dialog is empty"


def test_retry_sends_the_last_message_again(talk: Talk) -> None:
    assert respond(talk, "/retry") == Reply(send="A cat?")
    assert talk.conversation.exchanges == EXCHANGES[:1]


@pytest.mark.parametrize("same", [{"temperature": 0}, {"seed": 3}, {"num_beams": 2}])
def test_retry_says_where_the_answer_will_be_the_same(talk: Talk, same: dict) -> None:
    talk.params = SamplingParams(**same)
    reply = respond(talk, "/retry")
    assert reply.send == "A cat?" and "will be the same" in reply.say


def test_a_talk_is_saved_and_loaded(talk: Talk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """File names may have spaces, and begin with ~."""
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / "my talk.jsonl"
    assert said(talk, "/save ~/my talk.jsonl") == f"Saved 2 exchanges to {file}"
    talk.conversation = Conversation()
    assert said(talk, f"/load {file}") == (
        f"System prompt: Be brief.\n> A dog?\nWoof.\n> A cat?\nMiau.\nLoaded 2 exchanges from {file}"
    )
    assert talk.conversation == Conversation("Be brief.", EXCHANGES)


@pytest.mark.parametrize("yes", [True, False])
def test_a_file_is_overwritten_only_after_a_yes(talk: Talk, tmp_path: Path, yes: bool) -> None:
    file, questions = tmp_path / "talk.jsonl", []
    file.write_text("mine")
    talk.ask = lambda question: questions.append(question) or yes
    reply = said(talk, f"/save {file}")
    assert questions == [f"{file} exists. Overwrite it?"]
    assert reply == (f"Saved 2 exchanges to {file}" if yes else "Not saved.")
    assert ("Woof" in file.read_text()) is yes


def test_what_is_no_file_is_refused_without_a_question(
    talk: Talk, refused: Callable[[str], str], tmp_path: Path
) -> None:
    """A pipe would wait for a reader for ever."""
    os.mkfifo(tmp_path / "pipe")
    for path, what in ((tmp_path / "pipe", "a pipe"), (tmp_path, "a folder")):
        assert refused(f"/save {path}") == f"{path} cannot be written: it is {what}; name another"


def test_an_empty_dialog_is_not_saved(talk: Talk, refused: Callable[[str], str], tmp_path: Path) -> None:
    talk.conversation = Conversation()
    assert refused(f"/save {tmp_path / 'talk'}") == "there is nothing to save yet: the dialog is empty"


VALUES = {
    "temperature": ("0.2", 0.2), "top_p": ("1", 1), "top_k": ("40", 40), "min_p": ("0.1", 0.1),
    "repetition_penalty": ("1.1", 1.1), "presence_penalty": ("-1", -1), "frequency_penalty": ("0.5", 0.5),
    "min_gen_len": ("2", 2), "max_gen_len": ("9", 9), "stop": ('["\\n", "User:"]', ("\n", "User:")),
    "stop_token_ids": ("[5, 13]", (5, 13)), "bad_words": ("[[5, 13], [7]]", ((5, 13), (7,))),
    "logit_bias": ('{"5": -2.5}', {5: -2.5}), "seed": ("7", 7), "n": ("2", 2), "num_beams": ("4", 4),
    "length_penalty": ("0.5", 0.5), "logprobs": ("True", True), "top_logprobs": ("3", 3),
    "json_schema": ('{"type": "object"}', {"type": "object"}), "regex": ("[0-9]+ a", "[0-9]+ a"),
    "choices": ('["yes", "no"]', ("yes", "no")), "grammar": ("start: A", "start: A"),
}  # fmt: skip


@pytest.mark.parametrize("field", dataclasses.fields(SamplingParams), ids=lambda field: field.name)
def test_every_parameter_is_set_and_shown_as_it_could_be_set(talk: Talk, field: dataclasses.Field) -> None:
    typed, value = VALUES[field.name]
    shown = said(talk, f"/set {field.name} {typed}")
    assert getattr(talk.params, field.name) == value
    assert said(talk, f"/set {field.name}") == shown
    assert shown in said(talk, "/set").splitlines()
    before, talk.params = talk.params, SamplingParams()
    said(talk, f"/set {shown}")
    assert talk.params == before


@pytest.mark.parametrize(("typed", "stop"), [("User:", ("User:",)), ("5", ("5",)), ('"a b"', ("a b",)), ("[]", ())])
def test_one_stop_string_needs_no_quotes(talk: Talk, typed: str, stop: tuple) -> None:
    said(talk, f"/set stop {typed}")
    assert talk.params.stop == stop


def test_none_puts_back_what_is_none_by_itself(talk: Talk) -> None:
    said(talk, "/set max_gen_len 9")
    assert said(talk, "/set max_gen_len None") == "max_gen_len none"
    assert talk.params == SamplingParams()


def test_parameters_that_the_build_cannot_run_are_refused(talk: Talk, refused: Callable[[str], str]) -> None:
    def check(params: SamplingParams) -> None:
        raise ParameterError(f"num_beams={params.num_beams} is more than max_batch_size=1")

    talk.check = check
    assert refused("/set num_beams 4") == "num_beams=4 is more than max_batch_size=1"


def test_statistics_are_of_the_last_answer_and_of_the_talk(talk: Talk) -> None:
    context = talk.conversation.prompt_tokens("", talk.chat)
    assert said(talk, "/stats").startswith("Nothing was answered yet.\n")
    talk.turns = [Turn(100, 10, 110, 0.5, 1.0), Turn(120, 30, 40, 0.25, 4.0)]
    rows = [re.split(r"  +", row) for row in said(talk, "/stats").splitlines()]
    assert rows == [
        ["", "last answer", "talk"],
        ["tokens in", "120", "220"],
        ["tokens out", "30", "40"],
        ["computed of these", "40", "150"],
        ["first token (s)", "0.25", "0.38"],
        ["tokens/s out", "7.5", "8.0"],
        ["context used", f"{context} of 512 tokens, before the next message"],
    ]


def test_statistics_of_drafts_are_shown_where_there_are_any(talk: Talk) -> None:
    talk.turns = [Turn(100, 10, 110, 0.5, 1.0, Counts(8, 6, 2)), Turn(120, 30, 40, 0.25, 4.0, Counts(10, 24, 20))]
    rows = [re.split(r"  +", row) for row in said(talk, "/stats").splitlines()]
    assert rows[6:9] == [["drafted", "24", "30"], ["of these right", "20", "22"], ["tokens a step", "3.00", "2.22"]]
    assert rows[5][0] == "tokens/s out" and rows[9][0] == "context used"


def test_help_lists_every_command_and_how_to_type(talk: Talk) -> None:
    text = said(talk, "/help")
    for name in (*COMMANDS, "Alt-Enter", "Ctrl-C", "Ctrl-D", "pasted lines", "//"):
        assert name in text
    assert max(map(len, text.splitlines())) <= 120


def test_exit_leaves(talk: Talk) -> None:
    assert respond(talk, "/exit") == Reply(leave=True)
