"""A talk in a pseudo-terminal, as a person has it: in one process, and in two under torchrun."""

import contextlib
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pexpect
import pytest
from peers import run
from talks import (
    CTRL_A,
    CTRL_C,
    CTRL_D,
    DOG,
    EMPTY,
    ENDLESS,
    ESCAPE,
    HAS_READ,
    LEFT,
    READS,
    TORCHRUN,
    UP,
    WOOF,
    assert_as_it_was,
    command,
    end,
    environment,
    start,
)

from llama import Llama, log
from llama.chat import REFUSAL, Dialog
from llama.cli.chat import session
from llama.errors import PromptError
from llama.request import SamplingParams
from llama.tokenizer import Tokenizer


def say(child: pexpect.spawn, keys: str, end: str = "\r") -> str:
    """Type a line; what comes back until the editor reads again, as it looks on the screen."""
    child.send(keys + end)
    child.expect_exact(HAS_READ)
    return heard(child)


def heard(child: pexpect.spawn) -> str:
    child.expect_exact(READS)
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", child.before).replace("\r", "").removeprefix("\n")


def saved(child: pexpect.spawn, file: Path) -> list[str]:
    """The contents of the dialog's messages, by way of /save."""
    file.unlink(missing_ok=True)
    assert say(child, f"/save {file}").startswith("Saved ")
    return [message["content"] for message in json.loads(file.read_text())["messages"]]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pexpect.spawn]:
    child = start(tmp_path_factory.mktemp("home"), *command(4096))
    yield child
    child.close(force=True)


@pytest.fixture
def child(running: pexpect.spawn) -> pexpect.spawn:
    """A terminal with an empty dialog; starting one for each test would take long."""
    for line in ("/reset", "/system none", "/set temperature 0", "/set min_gen_len 0", "/set max_gen_len none"):
        say(running, line)
    return running


# ------------------------------------------------------------------------------------------------------------- typing


def test_a_message_is_answered(child: pexpect.spawn) -> None:
    assert say(child, DOG) == WOOF


def test_what_is_typed_can_be_edited_and_brought_back(child: pexpect.spawn, tmp_path: Path) -> None:
    typed = "hat sound does a dog makee?" + LEFT + "\x7f" + CTRL_A + "W"
    assert say(child, typed) == WOOF
    assert say(child, UP) == WOOF
    assert saved(child, tmp_path / "talk") == [DOG, WOOF.strip()] * 2


@pytest.mark.parametrize(
    "typed", ["a\\\rb \\ c", f"a{ESCAPE}\rb \\ c", f"{ESCAPE}[200~a\rb \\ c{ESCAPE}[201~"], ids=["\\", "Alt", "pasted"]
)
def test_a_message_may_have_several_lines(child: pexpect.spawn, tmp_path: Path, typed: str) -> None:
    """By a backslash at the end of a line, by Alt-Enter, and pasted."""
    say(child, typed)
    assert saved(child, tmp_path / "talk")[0] == "a\nb \\ c"


def test_blank_lines_are_not_sent(child: pexpect.spawn) -> None:
    assert say(child, "  ") == ""
    assert say(child, "/undo") == EMPTY


def test_ctrl_c_clears_the_line_and_says_how_to_leave(child: pexpect.spawn) -> None:
    assert say(child, "abc", end=CTRL_C) == ""
    assert say(child, "", end=CTRL_C) == "llama: Ctrl-D or /exit leaves\n"


# ----------------------------------------------------------------------------------------------------------- commands


def test_only_messages_are_sent(child: pexpect.spawn, tmp_path: Path) -> None:
    assert say(child, "/retri").startswith("llama: there is no command /retri: did you mean /retry?")
    assert say(child, "/undo") == EMPTY
    say(child, "//retri")
    assert saved(child, tmp_path / "talk")[0] == "/retri"


def test_the_system_prompt_counts_and_can_be_removed(child: pexpect.spawn) -> None:
    say(child, "/system Answer in capital letters.")
    assert say(child, DOG) == "A DOG SAYS WOOF.\n"
    say(child, "/system none")
    assert say(child, "/retry").endswith(WOOF)


def test_retry_gives_another_sample_in_the_place_of_the_last(child: pexpect.spawn, tmp_path: Path) -> None:
    for line in ("/set temperature 5", "/set max_gen_len 30", "/set min_gen_len 30"):
        say(child, line)
    first, second = say(child, DOG), say(child, "/retry")
    assert first != second
    assert "cut at max_gen_len=30" in second
    assert len(saved(child, tmp_path / "talk")) == 2


def test_a_dialog_is_saved_and_loaded_without_steering_the_terminal(child: pexpect.spawn, tmp_path: Path) -> None:
    file = tmp_path / "talk"
    messages = [{"role": "user", "content": "Red?"}, {"role": "assistant", "content": "\x1b[31mred\x07\n\ttab"}]
    file.write_text(json.dumps({"messages": messages}))
    assert say(child, f"/load {file}").startswith("> Red?\n␛[31mred␇\n\ttab\nLoaded 1 exchange from")
    assert say(child, f"/save {file}") == ""
    child.expect_exact("exists. Overwrite it? [y/n]")
    assert say(child, "n") == "Not saved.\n"


def test_control_characters_of_the_model_are_shown_as_pictures(child: pexpect.spawn, tokenizer: Tokenizer) -> None:
    token = next(t for t in range(tokenizer.n_words) if tokenizer.surface(t) == 0x1B)
    say(child, f'/set logit_bias {{"{token}": 1000}}')
    say(child, "/set max_gen_len 3")
    answer = say(child, DOG)
    say(child, "/set logit_bias {}")
    assert answer == "␛␛␛\nllama: cut at max_gen_len=3\n"


def test_other_samples_and_alternatives_are_shown(child: pexpect.spawn, tmp_path: Path) -> None:
    say(child, "/set n 2")
    assert say(child, DOG) == f"{WOOF}--- sample 2, which the talk does not keep\n{WOOF}"
    say(child, "/set n 1")
    say(child, "/set top_logprobs 2")
    table = say(child, "/retry")
    say(child, "/set top_logprobs 0")
    assert re.search(r"␣says +100\.0 % │ ␣says +100\.0 %", table)
    assert saved(child, tmp_path / "talk") == [DOG, WOOF.strip()]


def test_special_tags_are_refused_and_leave_no_trace(child: pexpect.spawn) -> None:
    assert say(child, "a [INST] b") == f"llama: {REFUSAL}\n"
    assert say(child, "/undo") == EMPTY


def test_parameters_that_the_build_cannot_run_are_not_set(child: pexpect.spawn) -> None:
    assert "max_batch_size=1" in say(child, "/set num_beams 2")
    assert say(child, DOG) == WOOF


def test_a_message_that_is_not_utf_8_is_refused_and_leaves_no_trace(child: pexpect.spawn) -> None:
    os.write(child.child_fd, b"a\xff")
    assert say(child, "") == "llama: the text holds half a surrogate pair, which has no UTF-8 form: remove it\n"
    assert say(child, "/undo") == EMPTY


def test_an_empty_answer_is_said(child: pexpect.spawn) -> None:
    say(child, "/set stop A")
    answer = say(child, DOG)
    say(child, "/set stop []")
    assert answer == "llama: the answer is empty; /retry asks again\n"


def test_a_tag_in_an_answer_is_told_apart_from_one_in_the_message(
    demo: Llama, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The model may write what no dialog may hold. (The terminal is left out here.)"""
    complete = demo.chat_completion

    def answer(dialogs: list[Dialog], params: SamplingParams, on_text: Callable[[int, str], None]) -> list[dict]:
        """As the model, but to one message with a tag."""
        results = complete(dialogs, params=params)
        if dialogs[0][-1]["content"] == "Tag!":
            results[0]["generation"]["content"] = "[/INST]"
        on_text(0, results[0]["generation"]["content"])
        return results

    lines = ["Tag!", DOG, "/undo", DOG]
    monkeypatch.setattr(demo, "chat_completion", answer)
    monkeypatch.setattr(session, "lines", lambda: iter(lines))
    monkeypatch.setattr(session, "prepared", lambda keys_as_bytes: contextlib.nullcontext())
    with log.quiet():
        session.talk(demo, SamplingParams(temperature=0), system=None)
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "[/INST]"
    assert f"llama: {REFUSAL} An earlier message has one: /undo takes it back." in said
    assert said[-2:] == ["Taken back: Tag!", WOOF.strip()]


def test_a_turn_computes_only_what_is_new(child: pexpect.spawn) -> None:
    """The second message, the tags around it, and its answer; a retry only the answer and the prompt's last token."""
    say(child, DOG)
    _, read, made, _ = last_turn(child)
    say(child, "What sound does a cat make?")
    computed, read_then, made_then, context = last_turn(child)
    assert read_then + made_then - (read + made) <= computed <= read_then + made_then - (read + made) + 3
    assert context > read_then + made_then
    say(child, "/retry")
    assert last_turn(child)[0] <= made_then + 3


def last_turn(child: pexpect.spawn) -> tuple[int, int, int, int]:
    """Tokens (computed, in, out, of the context) of the last answer, by way of /stats."""
    rows = say(child, "/stats")
    names = ("computed of these", "tokens in", "tokens out", "context used")
    return tuple(int(re.search(rf"^{name} +(\d+)", rows, re.MULTILINE)[1]) for name in names)


# ------------------------------------------------------------------------------------------------- stopping an answer


def stop_midway(child: pexpect.spawn) -> str:
    """Ask what is answered without end, and press Ctrl-C when a line of it is there; all that came."""
    say(child, ENDLESS)
    child.send(DOG + "\r")
    child.expect_exact(HAS_READ)
    child.expect(r"woof[^\x1b]{40}")  # streamed: it has not ended
    child.send(CTRL_C)
    begun = child.match[0]
    return begun + heard(child)


def test_ctrl_c_stops_an_answer_and_keeps_the_talk(child: pexpect.spawn, tmp_path: Path) -> None:
    assert stop_midway(child).endswith("\nllama: stopped; what was said so far is kept\n")
    say(child, "/set min_gen_len 0")
    question, answer = saved(child, tmp_path / "talk")
    assert question == DOG and answer.startswith("A dog says woof.")
    _, read, made, context = last_turn(child)
    assert read > 10 and made > 10 and context < 4096
    assert say(child, "/undo") == f"Taken back: {DOG}\n"
    assert say(child, DOG) == WOOF


def test_an_answer_stopped_before_it_began_leaves_no_trace(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Here it would be newlines without end. Then Ctrl-D leaves the talk, and nothing was written."""
    child = start(tmp_path, *command(4096, "--show_prompt"))
    assert "llama: /help lists what can be done; Ctrl-D leaves" in child.before
    say(child, "/help")
    newline = next(t for t in range(tokenizer.n_words) if tokenizer.surface(t) == ord("\n"))
    say(child, f'/set logit_bias {{"{newline}": 1000}}')
    say(child, ENDLESS)
    child.send(DOG + "\r")
    child.expect_exact("llama: prompt")
    child.send(CTRL_C)
    child.expect_exact("llama: stopped")
    heard(child)
    assert say(child, "/undo") == EMPTY
    child.send(CTRL_D)
    assert end(child) == 0
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------------------------------- the full context


OTHERS = ["What sound does a cat make?", "What sound does a cow make?"]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pexpect.spawn]:
    child = start(tmp_path_factory.mktemp("home"), *command(60))
    yield child
    child.close(force=True)


@pytest.fixture
def narrow(small: pexpect.spawn) -> pexpect.spawn:
    """After two exchanges: the first ends at token 22, the second at 45, and a third message alone ends at 62."""
    for line in ("/reset", "/set min_gen_len 0"):
        say(small, line)
    assert say(small, DOG) == WOOF and say(small, OTHERS[0]) == "A cat says meow.\n"
    return small


def asked(child: pexpect.spawn, keys: str, question: str) -> str:
    """Type a line that is answered with a question; what comes before the question."""
    before = say(child, keys)
    child.expect_exact(f"{question} [y/n]")
    return before


def test_a_full_context_is_said_and_the_oldest_exchange_dropped_after_a_yes(
    narrow: pexpect.spawn, tmp_path: Path
) -> None:
    question = f"Drop the oldest exchange ('{DOG}')?"
    assert asked(narrow, OTHERS[1], question) == ""
    assert say(narrow, "n") == "llama: not sent; nothing was dropped\n"
    asked(narrow, OTHERS[1], question)
    assert say(narrow, "", end=CTRL_C) == "llama: not sent; nothing was dropped\n"
    asked(narrow, OTHERS[1], question)
    assert say(narrow, "maybe") == ""
    assert say(narrow, "y") == "A cow says moo.\n"
    assert saved(narrow, tmp_path / "talk")[::2] == OTHERS


def test_an_answer_that_the_context_cuts_can_be_given_more_room(narrow: pexpect.spawn, tmp_path: Path) -> None:
    """Without the oldest exchange; the last one's own length cuts it still, and there is no more to drop."""
    cut = "\nllama: cut: the context is full (all max_seq_len=60 tokens)\n"
    question = f"Drop the oldest exchange ('{DOG}') and answer again?"
    say(narrow, ENDLESS)
    assert asked(narrow, "/retry", question).endswith(cut)
    assert say(narrow, "n") == ""
    assert saved(narrow, tmp_path / "talk")[::2] == [DOG, OTHERS[0]]
    asked(narrow, "/retry", question)
    assert say(narrow, "y").endswith(cut)
    assert saved(narrow, tmp_path / "talk")[::2] == OTHERS[:1]


def test_a_message_that_can_never_fit_is_not_kept(narrow: pexpect.spawn) -> None:
    answer = say(narrow, "word " * 70)
    assert re.match(r"llama: the message has \d+ tokens, .* no room .* within max_seq_len=60: shorten it", answer)
    assert say(narrow, "/undo") == f"Taken back: {OTHERS[0]}\n"


# ----------------------------------------------------------------------------------------------- beginning and leaving


def test_quiet_greets_nobody_and_show_prompt_shows_it(tmp_path: Path) -> None:
    """Then SIGTERM ends the talk: the terminal is as it was."""
    child = start(tmp_path, *command(512, "--system", "Answer in capital letters.", "--quiet", "--show_prompt"))
    assert "/help" not in child.before
    shown = say(child, DOG)
    assert re.match(r"llama: prompt '<s>\[INST\] <<SYS>>\\nAnswer in .*\[/INST\]', \d+ tokens: \[1, ", shown)
    assert shown.endswith("\nA DOG SAYS WOOF.\n")
    child.kill(signal.SIGTERM)
    child.expect(pexpect.EOF)
    assert_as_it_was(child)
    child.close()
    assert child.exitstatus == 128 + signal.SIGTERM


IN_A_FINALIZER = """
import os, signal, time
from llama.cli.chat.terminal import prepared

class Dying:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(1000):  # somewhere here the handler runs
            pass

with prepared(keys_as_bytes=False):
    Dying()
    print("still there", flush=True)
    time.sleep(100)
"""


def test_sigterm_in_a_finalizer_ends_it_too(tmp_path: Path) -> None:
    """Python drops what a finalizer raises."""
    child = pexpect.spawn(sys.executable, ["-c", IN_A_FINALIZER], env=environment(tmp_path), timeout=60)
    child.expect_exact("still there")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 128 + signal.SIGTERM


def test_a_system_prompt_with_special_tags_is_an_error(demo: Llama) -> None:
    with pytest.raises(PromptError, match=r"^the system prompt holds a special tag"):
        session.talk(demo, SamplingParams(), system="[INST]")


# ----------------------------------------------------------------------------------------------------- under torchrun


def test_two_processes_talk_as_one(tmp_path: Path) -> None:
    """Ctrl-C stops their answer and ends neither; what is said is said once; the terminal is left as it was."""
    child = start(tmp_path, *TORCHRUN, *command(4096))
    assert "split over 2 processes" in child.before
    assert say(child, DOG) == WOOF
    assert say(child, "a [INST] b") == f"llama: {REFUSAL}\n"
    assert say(child, "", end=CTRL_C) == "llama: Ctrl-D or /exit leaves\n"
    assert stop_midway(child).endswith("\nllama: stopped; what was said so far is kept\n")
    say(child, "/set min_gen_len 0")
    assert len(saved(child, tmp_path / "talk")) == 4
    assert say(child, "/undo") == f"Taken back: {DOG}\n"
    assert say(child, "What sound does a cat make?") == "A cat says meow.\n"
    child.send("/exit\r")
    child.expect(pexpect.EOF)
    assert_as_it_was(child)
    child.close()
    assert child.exitstatus == 0


PATIENCE = """
import time
from datetime import timedelta
import torch
from llama import parallel

torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=1))
group = parallel.patient_group()
time.sleep(0 if parallel.rank() else 2)
said = parallel.broadcast(f"said by {parallel.rank()}", torch.device("cpu"), group)
print(said)
"""


def test_processes_wait_for_a_person_longer_than_for_each_other(tmp_path: Path) -> None:
    """A second here, as 10 to 30 minutes elsewhere."""
    for code, out, err in run(tmp_path, PATIENCE).values():
        assert (code, out) == (0, "said by 0\n"), err
