"""What completions look like on stdout: while they are made, whole, as JSON; and that none can steer a terminal."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from llama import SamplingParams
from llama.cli.output import has_colour, in_order, prediction_fields, show_completions
from llama.errors import PromptError

GREEDY = SamplingParams(temperature=0)
ESCAPE = "\x1b[31mred\x07\x9b1m\x7f"
SHOWN = "␛[31mred␇\ufffd1m␡"


class Script:
    """Stands for a model: what its `run_each` does is a list of pieces of text, and of results, with their indices."""

    read: Callable[[], str]  # what stdout has so far

    def __init__(self, *events: tuple[int, Any]) -> None:
        self.events = events
        self.states: list[str] = []  # what was on stdout before each event

    def run_each(
        self, texts: Sequence[str], params: SamplingParams, on_text: Callable[[int, str], None] | None
    ) -> Iterator[tuple[int, Any]]:
        for index, event in self.events:
            self.states.append(self.read())
            if not isinstance(event, str):
                yield index, event
            elif on_text:
                on_text(index, event)


def made(*samples: str) -> dict[str, Any]:
    """A prediction of one or several samples."""
    dicts = [{"generation": text, "finish_reason": "stop", "seed": 1} for text in samples]
    return {**dicts[0], "samples": dicts} if len(dicts) > 1 else dicts[0]


@pytest.fixture
def show(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[str, str]]:
    """show(texts, script, terminal=…, …): (stdout, stderr) of `show_completions`."""

    def show(
        texts: Sequence[str], script: Script, *, terminal: bool = False, as_json: bool = False, as_tokens: bool = False,
        params: SamplingParams = GREEDY, speaks: bool = True,
    ) -> tuple[str, str]:  # fmt: skip
        monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
        out, err = "", ""

        def read() -> str:
            nonlocal out, err
            new = capsys.readouterr()
            out, err = out + new.out, err + new.err
            return out

        script.read = read
        results = show_completions(script, texts, params, as_json=as_json, as_tokens=as_tokens, speaks=speaks)
        assert len(results) == len(texts)
        return read(), err

    return show


TWO = [(0, "on"), (1, "u"), (0, "ce\n"), (1, "p"), (1, made("up")), (0, made("once\n"))]


def test_a_terminal_gets_text_while_it_is_made(show: Callable[..., tuple[str, str]]) -> None:
    """The second text waits for its turn, in which it comes at once."""
    script = Script(*TWO)
    out, err = show(["a", "b"], script, terminal=True)
    one = "==> a <==\non"
    assert script.states == ["", one, one, f"{one}ce\n", f"{one}ce\n", f"{one}ce\n"]
    assert (out, err) == ("==> a <==\nonce\n\n\n==> b <==\nup\n", "")


@pytest.mark.parametrize("params", [GREEDY, SamplingParams(num_beams=2)])
def test_a_pipe_gets_each_text_whole_and_in_its_turn(
    show: Callable[..., tuple[str, str]], params: SamplingParams
) -> None:
    """The same bytes as a terminal; and so does a terminal where beams are searched, which may change their minds."""
    script = Script(*TWO, (2, made("x")))
    out, _ = show(["a", "b", "c"], script, params=params, terminal=params is not GREEDY)
    both = "==> a <==\nonce\n\n\n==> b <==\nup\n"
    assert script.states == [""] * 6 + [both] and out == f"{both}\n==> c <==\nx\n"


@pytest.mark.parametrize("terminal", [True, False])
def test_a_single_text_has_no_heading_and_samples_follow(show: Callable[..., tuple[str, str]], terminal: bool) -> None:
    script = Script((0, "one"), (0, made("one", "two", "three")))
    out, _ = show(["a"], script, terminal=terminal)
    assert out == "one\n--- sample 2\ntwo\n--- sample 3\nthree\n"


def test_a_text_that_fails_does_not_lose_the_others(show: Callable[..., tuple[str, str]]) -> None:
    """Whether it cannot begin or fails midway; those after it are still shown while they are made."""
    error = PromptError("the prompt is too long")
    for terminal, out in ((True, "==> a <==\n\n\n==> b <==\nhalf\n\n==> c <==\nye"), (False, "")):
        script = Script((0, error), (2, "ye"), (1, "half"), (1, error), (2, "s"), (2, made("yes")))
        shown, err = show(["a", "b", "c"], script, terminal=terminal)
        assert script.states[4] == out
        assert err == "llama: prompt 0: the prompt is too long\nllama: prompt 1: the prompt is too long\n"
        assert shown.endswith("\n==> c <==\nyes\n")
    assert show(["a"], Script((0, error)))[1] == "llama: the prompt is too long\n"


def test_json_is_a_line_a_text(show: Callable[..., tuple[str, str]]) -> None:
    """In the order of the texts, with what was asked in it; the error of one is no record."""
    script = Script((2, made("z\x1b", "w")), (0, made("é\n")), (1, PromptError("no")))
    out, err = show(["a\n", "b", "c"], script, terminal=True, as_json=True)
    first, second = map(json.loads, out.splitlines())
    assert first == {"prompt": "a\n", "text": "é\n", "finish_reason": "stop", "seed": 1}
    assert (second["text"], [sample["text"] for sample in second["samples"]]) == ("z\x1b", ["z\x1b", "w"])
    assert "é" in out and "\x1b" not in out and err == "llama: prompt 1: no\n"


def test_tokens_are_shown_in_colour_where_it_is_wanted(
    show: Callable[..., tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a terminal, unless NO_COLOR is set and not empty."""
    prediction = {**made("hi"), "tokens": ["hi"], "logprobs": [-0.5]}
    for terminal, no_color, colour in ((True, "", True), (True, "1", False), (False, "", False)):
        monkeypatch.setenv("NO_COLOR", no_color)
        out, _ = show(["a"], Script((0, prediction)), terminal=terminal, as_tokens=True)
        assert ("\x1b[" in out) == colour == has_colour() and "60.7 %" in out and out.endswith("\n")


@pytest.mark.parametrize("as_json", [True, False])
def test_another_rank_runs_and_says_nothing(show: Callable[..., tuple[str, str]], as_json: bool) -> None:
    script = Script((1, PromptError("no")), *TWO[:1], (0, made("once")))
    assert show(["a", "b"], script, terminal=True, as_json=as_json, speaks=False) == ("", "")


# ------------------------------------------------------------------------------------------------------------- parts


def test_what_is_shown_in_a_terminal_is_harmless(show: Callable[..., tuple[str, str]]) -> None:
    """Texts, their samples and headings; a pipe gets a text as it is."""
    for params in (GREEDY, SamplingParams(num_beams=2)):
        script = Script((0, ESCAPE), (0, made(ESCAPE, ESCAPE)), (1, made("")))
        out, _ = show([ESCAPE, "b"], script, terminal=True, params=params)
        assert out == f"==> {SHOWN} <==\n{SHOWN}\n--- sample 2\n{SHOWN}\n\n==> b <==\n\n"
    assert show(["a"], Script((0, made(ESCAPE))))[0] == f"{ESCAPE}\n"


def test_a_heading_is_one_line_of_a_long_text(show: Callable[..., tuple[str, str]]) -> None:
    out, _ = show(["a\n b\t" + "c" * 80, "d" * 70], Script((0, made("")), (1, made(""))))
    assert out == f"==> a b {'c' * 66}… <==\n\n\n==> {'d' * 70} <==\n\n"


def test_results_come_in_their_order() -> None:
    def results() -> Iterator[tuple[int, str]]:
        for index in (2, 0, 1, 4, 3):
            seen.append(index)
            yield index, "abcde"[index]

    seen: list[int] = []
    assert [(index, one, len(seen)) for index, one in in_order(results())] == [
        (0, "a", 2), (1, "b", 3), (2, "c", 3), (3, "d", 5), (4, "e", 5),
    ]  # fmt: skip


def test_a_prediction_has_its_text_first() -> None:
    fields = prediction_fields(made("a", "b"))
    assert next(iter(fields)) == "text" and "generation" not in json.dumps(fields)
