"""The Llama-2 chat format, to the token."""

import os

import pytest

from llama.chat import check_dialog, format_dialog, has_special_tags
from llama.errors import PromptError
from llama.tokenizer import Tokenizer


class Recorder:
    """A tokenizer that notes what it is asked to encode: BOS 1, one token 9 for the text, EOS 2."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def encode(self, s: str, bos: bool, eos: bool) -> list[int]:
        self.texts.append(s)
        return [1] * bos + [9] + [2] * eos


def message(role: str, content: str) -> dict:
    return {"role": role, "content": content}


SYSTEM, USER, ANSWER = message("system", "Be cute"), message("user", " Hi? "), message("assistant", "\nHo! ")


@pytest.mark.parametrize(
    ("dialog", "texts"),
    [
        ([USER], ["[INST] Hi? [/INST]"]),
        ([SYSTEM, USER], ["[INST] <<SYS>>\nBe cute\n<</SYS>>\n\n Hi? [/INST]"]),
        ([USER, ANSWER, USER], ["[INST] Hi? [/INST] Ho! ", "[INST] Hi? [/INST]"]),
        ([SYSTEM, USER, ANSWER, USER, ANSWER, message("user", "b")],
         ["[INST] <<SYS>>\nBe cute\n<</SYS>>\n\n Hi? [/INST] Ho! ", "[INST] Hi? [/INST] Ho! ", "[INST] b [/INST]"]),
    ],
)  # fmt: skip
def test_what_is_encoded(dialog: list[dict], texts: list[str]) -> None:
    """Each exchange by itself between BOS and EOS, the last one open; the system message in the first."""
    recorder = Recorder()
    prompt = format_dialog(dialog, recorder)
    assert recorder.texts == texts
    assert prompt.tokens == [1, 9, 2] * (len(texts) - 1) + [1, 9]
    assert prompt.text == "".join(f"<s>{text}</s>" for text in texts[:-1]) + f"<s>{texts[-1]}"


def test_metas_own_tokens() -> None:
    """With Meta's tokenizer the dialog of the format's definition gives exactly these tokens."""
    path = os.environ.get("LLAMA_TOKENIZER_PATH")
    if not path:
        pytest.skip("LLAMA_TOKENIZER_PATH does not name Meta's tokenizer.model")
    dialog = [SYSTEM, message("user", "What is PyTorch?")]
    assert format_dialog(dialog, Tokenizer(path)).tokens == [
        1, 518, 25580, 29962, 3532, 14816, 29903, 6778, 13, 3629, 274, 1082, 13, 29966, 829, 14816, 29903, 6778, 13, 13,
        5618, 338, 10772, 29911, 25350, 29973, 518, 29914, 25580, 29962,
    ]  # fmt: skip


@pytest.mark.parametrize("tag", ["[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"])
def test_special_tags_are_found_in_any_message(tag: str) -> None:
    tagged = message("user", f"a {tag} b")
    assert has_special_tags([SYSTEM, tagged])
    assert has_special_tags([message("system", tag), USER])
    assert has_special_tags([USER, message("assistant", tag), USER])
    assert not has_special_tags([SYSTEM, USER, ANSWER, message("user", "[inst] <SYS>")])


@pytest.mark.parametrize(
    ("dialog", "said"),
    [
        ([], "dialog 4 is empty"),
        ("hello", "dialog 4 is str, not a list of messages"),
        (7, "dialog 4 is int, not a list of messages"),
        (["hello"], "dialog 4, message 0 is not {'role': …, 'content': …}: 'hello'"),
        ([{"role": "user"}], "dialog 4, message 0 is not"),
        ([message("user", 5)], "dialog 4, message 0: content is int, not text"),
        ([SYSTEM], "dialog 4 is a system message alone"),
        ([ANSWER], "dialog 4, message 0 has role 'assistant' instead of 'user'"),
        ([USER, USER], "dialog 4, message 1 has role 'user' instead of 'assistant'"),
        ([SYSTEM, SYSTEM, USER], "dialog 4, message 1 has role 'system' instead of 'user'"),
        ([USER, ANSWER, SYSTEM], "dialog 4, message 2 has role 'system' instead of 'user'"),
        ([message("tool", "x")], "dialog 4, message 0 has role 'tool' instead of 'user'"),
        ([USER, ANSWER], "dialog 4 ends with 'assistant'"),
    ],
)
def test_wrong_dialogs_are_named(dialog: object, said: str) -> None:
    with pytest.raises(PromptError) as error:
        check_dialog(dialog, "dialog 4")
    assert str(error.value).startswith(said)


def test_right_dialogs_pass() -> None:
    for dialog in ([USER], [SYSTEM, USER], [USER, ANSWER, USER], (SYSTEM, USER, ANSWER, USER)):
        check_dialog(dialog, "dialog 0")
