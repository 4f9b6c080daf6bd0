"""What a command gets for the words of a shell: text as it was typed, and an error for what it does not take."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llama.cli.arguments import Flag, arguments, as_utf8, meant, with_flags
from llama.errors import ParameterError

SHARED = {
    "temperature": Flag(float, 0.6, "how varied."),
    "tokens": Flag(Sequence[int], (), "a list."),
    "bias": Flag(Mapping[int, float], {}, "a table."),
    "top": Flag(int | None, None, "a number or nothing."),
}
TEXTS = [
    "123", "[1,2]", "{'a': 1}", "true", "None", "a=b", "=a", "==", "", " ", "a\nb\r\n", "😀é", "'\"`$(ls)\\", "FIRE",
    "1e5", "()", "# not a comment", "--json", "--help", "-h", "-x", "-5", "--prompt=x", "--", "\x00", "\u2028",
]  # fmt: skip
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]))


def called(*given: str, command: Any = None) -> dict[str, Any]:
    """What a command's body gets for `given`."""
    found: dict[str, Any] = {}

    @with_flags(group=SHARED)
    def command_of_all_kinds(
        *texts: str, prompt: Sequence[str] = (), json: bool = False, ordered: bool = True, system: str | None = None,
        n: int = 1, group: dict[str, Any],
    ) -> None:  # fmt: skip
        found.update(texts=texts, prompt=prompt, json=json, ordered=ordered, system=system, n=n, **group)

    run(command_of_all_kinds, *given)
    return found


def run(command: Any, *given: str) -> None:
    read = arguments(command, given, "llama it")
    assert read is not None
    places, named = read
    command(*places, **named)


def copied(file: str, to: str = "here", *, output: str, count: int = 1, quiet: bool = False) -> None:
    raise AssertionError("not to be run")


# ------------------------------------------------------------------------------------------------------------ texts


@settings(deadline=None)
@given(st.lists(ANY_TEXT), ANY_TEXT, ANY_TEXT)
@example(TEXTS, "--json", "-")
def test_text_arrives_as_it_was_typed(texts: list[str], prompt: str, system: str) -> None:
    """By its place, as one of several of a flag, and as the text of a flag: nothing is read into it."""
    found = called(f"--prompt={prompt}", f"--system={system}", "--json", "--", *texts)
    assert (found["texts"], found["prompt"], found["system"]) == (tuple(texts), [prompt], system)
    assert found["json"] is True


@pytest.mark.parametrize("text", [text for text in TEXTS if not text.startswith("-")])
def test_text_needs_no_mark_unless_it_begins_with_a_hyphen(text: str) -> None:
    assert called(text, "-", "--json", text)["texts"] == (text, "-", text)


def test_a_flag_of_texts_may_be_given_several_times() -> None:
    """In their order; the value that begins with a hyphen is joined to the flag."""
    assert called("--prompt", "one", "--prompt=-2-", "--prompt", "")["prompt"] == ["one", "-2-", ""]


def test_bytes_of_any_locale_are_read_as_utf8() -> None:
    """What they were in the shell, however Python decoded them; and no others."""
    assert as_utf8(os.fsdecode("é😀".encode())) == "é😀"
    with pytest.raises(ParameterError, match=r"the argument 'a\\udcff' is not UTF-8 text: type it in UTF-8"):
        arguments(copied, [os.fsdecode(b"a\xff")], "llama it")


# ------------------------------------------------------------------------------------------------------------ flags


@pytest.mark.parametrize(
    ("given", "name", "value"),
    [
        (["--json", "text"], "json", True),
        (["--json=true"], "json", True),
        (["--json=False"], "json", False),
        (["--noordered"], "ordered", False),
        (["--no-ordered"], "ordered", False),
        (["--no_ordered", "text"], "ordered", False),
        (["--ordered"], "ordered", True),
        (["--temperature", "-0.5"], "temperature", -0.5),
        (["--temperature", "-.5"], "temperature", -0.5),
        (["--temperature=1e-3"], "temperature", 1e-3),
        (["--n", "3"], "n", 3),
        (["-n", "3"], "n", 3),
        (["--top=None"], "top", None),
        (["--top", "7"], "top", 7),
        (["--tokens=5,13"], "tokens", (5, 13)),
        (["--tokens", "[5]"], "tokens", [5]),
        (["--bias={5:-2.5}"], "bias", {5: -2.5}),
        (["--n=many"], "n", "many"),
        (["--system=None"], "system", "None"),
        (["--system", "-"], "system", "-"),
        (["--system="], "system", ""),
        (["--system=a=b"], "system", "a=b"),
        (["text"], "temperature", 0.6),
        ([], "bias", {}),
    ],
)
def test_a_flag_has_the_value_that_was_meant(given: list[str], name: str, value: Any) -> None:
    """A switch takes no word after it; all but text is read as Python would."""
    found = called(*given)
    assert found[name] == value and type(found[name]) is type(value)
    assert found["texts"] == (("text",) if "text" in given else ())


@pytest.mark.parametrize("flag", ["--max_step_tokens", "--max-step-tokens", "--max_step-tokens"])
def test_a_hyphen_is_as_good_as_an_underscore(flag: str) -> None:
    def command(*, max_step_tokens: int) -> None:
        assert max_step_tokens == 5

    run(command, flag, "5")
    assert arguments(command, [f"{flag}=5"], "llama it") == ([], {"max_step_tokens": 5})


def test_positional_texts_fill_what_no_flag_gave() -> None:
    assert arguments(copied, ["123", "--output", "o"], "") == ([], {"output": "o", "file": "123"})
    found = arguments(copied, ["there", "--file=-x", "--output=o"], "")
    assert found == ([], {"file": "-x", "output": "o", "to": "there"})


def test_texts_come_after_all_that_has_a_place() -> None:
    def command(file: str, to: str = "here", *texts: str, n: int = 1) -> None: ...

    assert arguments(command, ["a", "--n=2", "b", "c", "d"], "") == (["a", "b", "c", "d"], {"n": 2})
    assert arguments(command, ["a"], "") == ([], {"file": "a"})
    assert arguments(command, ["b", "c", "--file=a"], "") == (["a", "b", "c"], {})


@pytest.mark.parametrize("given", [["--help"], ["-h"], ["in", "--count", "3", "--help", "--bogus"], ["--quiet", "-h"]])
def test_help_can_be_asked_for_anywhere_before_an_error(given: list[str]) -> None:
    assert arguments(copied, given, "llama it") is None


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["in", "--outptu=o"], "there is no flag '--outptu': did you mean --output?"),
        (["in", "--out=o"], "there is no flag '--out': did you mean --output?"),
        (["in", "--bogus"], "there is no flag '--bogus': llama it --help lists what there is"),
        (["-x"], "there is no flag '-x': llama it --help lists what there is (text that begins with - goes after --)"),
        (["- one\n- two"], r"there is no flag '- one\n- two': llama it --help"),
        (["--" + "x" * 99], f"there is no flag '--{'x' * 57}: llama it --help"),
        (["--nocount"], "there is no flag '--nocount': did you mean --count?"),
        (["in", "--output"], "--output needs a value: write --output=VALUE"),
        (["in", "--output", "--quiet"], "--output needs a value: write --output=VALUE"),
        (["in", "--output", "-q"], "--output needs a value"),
        (["in", "--output", "--"], "--output needs a value"),
        (["in", "--output=1", "--output=1"], "--output was given 2 times: give it once"),
        (["in", "--output=o", "--quiet", "--noquiet"], "--quiet was given 2 times: give it once"),
        (["in", "--quiet=1"], "--quiet is a switch: give it without a value, not '1'"),
        (["in", "--noquiet=true"], "--noquiet is a switch: give it without a value, not 'true'"),
        (["in"], "--output is missing: llama it --help says what it is"),
        (["--output=o"], "FILE is missing: llama it --help says what it is"),
        (["in", "to", "more", "--output=o"], "nothing takes 'more' here: llama it --help says what there is to give"),
        (["in", "to", "--file=x", "--output=o"], "nothing takes 'to' here"),
    ],
)
def test_what_a_command_does_not_take_is_one_line(given: list[str], said: str) -> None:
    with pytest.raises(ParameterError) as error:
        arguments(copied, given, "llama it")
    assert str(error.value).startswith(said) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("scroe", "did you mean -score?"), ("ver", "did you mean -verify?"), ("", "llama --help lists what there is"),
        ("Once upon a time", "llama --help lists what there is"),
    ],
)  # fmt: skip
def test_the_nearest_name_is_offered(typed: str, said: str) -> None:
    assert meant(typed, {"score": 1, "verify": 2}, "llama", "-") == said


# ----------------------------------------------------------------------------------------------------- shared flags


def test_shared_flags_reach_the_command_as_one_argument() -> None:
    """Those that were not given with their defaults; and they are in its signature and its docstring."""
    found = {}

    @with_flags(a={"x": Flag(int, 1, "the x.")}, b={"y": Flag(str, "y", "the y.")})
    def command(own: str, *, a: dict[str, Any], b: dict[str, Any]) -> None:
        """Do.

        Args:
            own: its own.
        """
        found.update(own=own, a=a, b=b)

    command("z", y="Y")
    assert found == {"own": "z", "a": {"x": 1}, "b": {"y": "Y"}}
    assert command.__name__ == "command" and command.groups == {"a": ("x",), "b": ("y",)}
    own = "Args:\n    own: its own.\n    quiet: nothing on stderr but errors.\n    x: the x.\n    y: the y."
    assert command.__doc__.endswith(own)
