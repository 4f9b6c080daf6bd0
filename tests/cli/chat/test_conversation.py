"""A dialog that grows: its prompt, what fits, and its file."""

import json
import re
from pathlib import Path

import pytest
from conftest import DEMO

from llama.batch.lines import read_dialogs
from llama.chat import Llama2Chat
from llama.cli.chat.conversation import Conversation, check_text, excerpt, load, make_room, save
from llama.errors import PromptError
from llama.tokenizer import Tokenizer

ZOO = Conversation("Be brief.", [("A dog?", "Woof."), ("A cat?\nAnd why?", "Miau ☃.")])
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "A dog?"},
    {"role": "assistant", "content": "Woof."},
    {"role": "user", "content": "A cat?\nAnd why?"},
    {"role": "assistant", "content": "Miau ☃."},
]

CHAT = Llama2Chat(Tokenizer(str(DEMO / "tokenizer.model")))


@pytest.fixture
def chat() -> Llama2Chat:
    return CHAT


def test_messages_are_in_the_order_of_a_dialog() -> None:
    assert ZOO.messages() == MESSAGES
    assert ZOO.dialog("A cow?") == [*MESSAGES, {"role": "user", "content": "A cow?"}]
    assert Conversation().dialog("A cow?") == [{"role": "user", "content": "A cow?"}]


def test_a_saved_dialog_is_loaded_and_read_as_prompts(tmp_path: Path) -> None:
    file = tmp_path / "zoo.jsonl"
    save(ZOO, str(file), "x")
    assert load(str(file), CHAT) == ZOO
    assert read_dialogs(str(file)) == [MESSAGES]


def test_a_file_is_not_overwritten_unless_asked_to(tmp_path: Path) -> None:
    file = tmp_path / "zoo.jsonl"
    file.write_text("mine")
    with pytest.raises(PromptError, match=re.escape(f"{file} cannot be written: File exists; name another file")):
        save(ZOO, str(file), "x")
    assert file.read_text() == "mine"
    save(ZOO, str(file), "w")
    assert load(str(file), CHAT) == ZOO


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([], "has 0 dialogs: expected a file with one, as /save writes it"),
        ([MESSAGES, MESSAGES], "has 2 dialogs: expected a file with one"),
        ([MESSAGES[:-1]], "ends with the user: expected a dialog as /save writes it, which ends with an answer"),
        ([MESSAGES[:1] + MESSAGES[2:]], "message 1 has role 'assistant' instead of 'user'"),
        ([[*MESSAGES, {"role": "tool", "content": ""}]], "message 5 has role 'tool' instead of 'user'"),
        ([["hello"]], "message 0 is not {'role': …, 'content': …}: 'hello'"),
        ([[{"role": "user", "content": 3}, MESSAGES[2]]], "message 0: content is int, not text"),
        (["hello"], 'line 1 is not a list of messages, nor {"messages": […]}'),
        ([[MESSAGES[1], {"role": "assistant", "content": "[INST]"}]], "message 1, holds a special tag"),
        ([[MESSAGES[1], {"role": "assistant", "content": "\udc80"}]], "message 1, holds bytes that are not UTF-8"),
    ],
)
def test_a_file_that_is_no_talk_is_refused(tmp_path: Path, lines: list, said: str) -> None:
    file = tmp_path / "talk.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(PromptError, match=f"^{re.escape(str(file))}.*{re.escape(said)}"):
        load(str(file), CHAT)


def test_a_dash_is_a_file_like_any_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where prompts are read, it would be standard input."""
    monkeypatch.chdir(tmp_path)
    save(ZOO, "-", "x")
    assert load("-", CHAT) == ZOO


@pytest.mark.parametrize("exchanges", [[], [("A dog?", "Woof.")]])
def test_a_talk_without_a_system_prompt_or_answers_is_loaded(tmp_path: Path, exchanges: list) -> None:
    for talk in (Conversation(None, exchanges), Conversation("Be brief.", exchanges)):
        save(talk, str(tmp_path / "talk"), "w")
        assert load(str(tmp_path / "talk"), CHAT) == talk


@pytest.mark.parametrize(("text", "said"), [("<<SYS>>", "special tag"), ("a\udcff", "bytes that are not UTF-8")])
def test_a_text_that_no_dialog_may_hold_is_refused(text: str, said: str) -> None:
    with pytest.raises(PromptError, match=f"^the text holds .*{said}.*: remove "):
        check_text(text, "the text", CHAT)


def test_an_excerpt_is_one_line() -> None:
    assert excerpt("a\n b") == "a b"
    assert excerpt("x" * 60) == "x" * 60
    assert excerpt("x" * 61) == "x" * 59 + "…"


class Asked(list):
    """The questions that were put; the answers are given at the start."""

    def __init__(self, *answers: bool) -> None:
        self.answers = list(answers)

    def __call__(self, question: str) -> bool:
        self.append(question)
        return self.answers.pop(0)


def long_talk() -> Conversation:
    return Conversation("Be brief.", [(f"Question {number}?", "It is so. " * 5) for number in range(4)])


def test_what_fits_is_not_asked_about(chat: Llama2Chat) -> None:
    """One token must be left for the answer."""
    talk, asked = long_talk(), Asked()
    used = talk.prompt_tokens("And now?", chat)
    assert make_room(talk, "And now?", chat, used + 1, asked)
    assert talk == long_talk() and asked == []


def test_the_oldest_exchanges_are_dropped_one_by_one_until_it_fits(chat: Llama2Chat) -> None:
    talk, asked = long_talk(), Asked(True, True)
    used = talk.prompt_tokens("And now?", chat)
    fits = Conversation("Be brief.", long_talk().exchanges[2:]).prompt_tokens("And now?", chat)
    assert make_room(talk, "And now?", chat, fits + 1, asked)
    assert talk == Conversation("Be brief.", long_talk().exchanges[2:])
    assert f"the dialog has {used} tokens, and max_seq_len={fits + 1}" in asked[0]
    assert "Drop the oldest exchange ('Question 0?')?" in asked[0]
    assert "Drop the oldest exchange ('Question 1?')?" in asked[1]


def test_nothing_goes_on_after_a_no(chat: Llama2Chat) -> None:
    talk, asked = long_talk(), Asked(False)
    assert not make_room(talk, "And now?", chat, talk.prompt_tokens("And now?", chat), asked)
    assert talk == long_talk() and len(asked) == 1


@pytest.mark.parametrize(
    ("system", "said"), [("Be brief.", "the message and the system prompt have"), (None, "the message has")]
)
def test_a_message_that_can_never_fit_is_said_before_anything_is_asked(
    chat: Llama2Chat, system: str | None, said: str
) -> None:
    talk = Conversation(system, [("A dog?", "Woof.")])
    alone = Conversation(system).prompt_tokens("word " * 30, chat)
    with pytest.raises(PromptError, match=rf"^{said} {alone} tokens, .* max_seq_len={alone}: shorten it"):
        make_room(talk, "word " * 30, chat, alone, Asked())
    assert len(talk.exchanges) == 1
