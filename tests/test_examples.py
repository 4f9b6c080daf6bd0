"""The two example scripts, as people run them; and how a command finds its paths and ends."""

import json
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import DEMO, ROOT

from llama import LlamaError
from llama.batch.lines import read_dialogs, read_prompts
from llama.chat import REFUSAL
from llama.checkpoint.find import find_checkpoint
from llama.errors import PromptError

TEXT, CHAT = "example_text_completion.py", "example_chat_completion.py"
SEPARATOR = "\n\n==================================\n\n"
DIALOG = [{"role": "user", "content": "What sound does a dog make?"}]


def run_script(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / name), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, encoding="utf-8", timeout=120, env=environment)


def blocks(stdout: str) -> list[str]:
    """What was printed for each prompt."""
    assert stdout.endswith(SEPARATOR)
    return stdout.removesuffix(SEPARATOR).split(SEPARATOR)


# ------------------------------------------------------------------------------------------------------- what they say


def test_the_text_example_completes_its_prompts_with_the_demo() -> None:
    """Without arguments: the demo checkpoint, which is said, and an answer under every prompt."""
    done = run_script(TEXT)
    assert done.returncode == 0, done.stderr
    first, second = done.stderr.splitlines()
    assert first == "llama: no --ckpt_dir: running the bundled demo checkpoint"
    assert second.startswith(f"llama: {DEMO}, ") and "max_seq_len=256, max_batch_size=4, seed=1" in second
    prompts = runpy.run_path(str(ROOT / TEXT))["PROMPTS"]
    for prompt, block in zip(prompts, blocks(done.stdout), strict=True):
        assert re.fullmatch(re.escape(prompt) + r"\n> .*\w.*", block, re.DOTALL), block


def test_the_chat_example_answers_its_dialogs_with_the_demo() -> None:
    """Every message of a dialog, then the answer; the one that smuggles tags is refused and the others are answered."""
    done = run_script(CHAT, "--temperature", "0")
    assert done.returncode == 0, done.stderr
    dialogs = runpy.run_path(str(ROOT / CHAT))["DIALOGS"]
    answers = []
    for dialog, block in zip(dialogs, blocks(done.stdout), strict=True):
        *messages, answer = block.split("\n\n")
        assert messages == [f"{message['role'].capitalize()}: {message['content']}" for message in dialog]
        assert answer.startswith("> Assistant: ") and answer != "> Assistant: "
        answers.append(answer)
    assert answers[-1] == f"> Assistant: {REFUSAL}" and REFUSAL not in "".join(answers[:-1])


def test_the_text_example_takes_a_file_of_prompts(tmp_path: Path) -> None:
    """More of them than max_batch_size, in UTF-8, with a checkpoint whose tokenizer is found beside its weights."""
    prompts = ["Once upon a time", "Ben", "Zoë wanted 一 kite.", "The bear", "Mia ran", " Two  spaces"]
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(prompts), encoding="utf-8")
    arguments = ["--prompts_file", str(file), "--max_gen_len", "4", "--max_batch_size", "2", "--ckpt_dir", str(DEMO)]
    done = run_script(TEXT, *arguments)
    assert done.returncode == 0 and len(done.stderr.splitlines()) == 1, done.stderr
    assert [block.split("\n> ")[0] for block in blocks(done.stdout)] == prompts


def test_the_chat_example_takes_a_file_of_dialogs(tmp_path: Path) -> None:
    file = tmp_path / "dialogs.jsonl"
    file.write_text(f"{json.dumps(DIALOG)}\n" + json.dumps({"messages": DIALOG}) + "\n")
    done = run_script(CHAT, "--prompts_file", str(file), "--max_gen_len", "8", "--temperature", "0")
    assert done.returncode == 0, done.stderr
    first, second = blocks(done.stdout)
    assert first == second and first.startswith("User: What sound does a dog make?\n\n> Assistant: ")


# ------------------------------------------------------------------------------------------------------ their errors


Shell = Callable[..., str]


@pytest.fixture
def fails(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Shell:
    """Run a script with arguments, as `python SCRIPT …` does but in this process; return its one line of error.

    Checked on the way: exit code 2, no answer, and on stderr only that line, beginning with the script's name,
    after the lines of the build.
    """

    def fails(script: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [str(ROOT / script), *arguments])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        out, err = capfd.readouterr()
        *before, last = err.splitlines()
        assert ended.value.code == 2 and out == ""
        assert all(line.startswith("llama: ") for line in before), err
        assert last.startswith(f"{script}: "), err
        return last.removeprefix(f"{script}: ")

    return fails


def test_an_error_in_a_real_shell_is_one_line_and_code_2(tmp_path: Path) -> None:
    """The process itself, once: what `fails` checks of the others."""
    done = run_script(TEXT, "--ckpt_dir", str(tmp_path / "none"), "--tokenizer_path", str(DEMO / "tokenizer.model"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"{TEXT}: checkpoint folder {tmp_path}/none does not exist: check ckpt_dir\n"


@pytest.mark.parametrize(
    ("script", "arguments", "said"),
    [
        (TEXT, ["--top_p", "2"], "top_p=2 is out of range: expected above 0 and at most 1"),
        (CHAT, ["--top_p", "0"], "top_p=0 is out of range"),
        (TEXT, ["--temperature", "-1"], "temperature=-1 is out of range: expected 0 (argmax) to 1e38"),
        (CHAT, ["--temperature", "warm"], "temperature='warm' is out of range"),
        (TEXT, ["--max_gen_len", "1.5"], "max_gen_len=1.5 is out of range"),
        (CHAT, ["--max_seq_len", "0"], "max_seq_len=0 is out of range: expected an integer, 1 or more"),
        (TEXT, ["--max_batch_size", "many"], "max_batch_size='many' is out of range"),
        (TEXT, ["--max_seq_len", "4"], "prompt 0 has "),
        (CHAT, ["--max_seq_len", "4"], "dialog 0 has "),
        (TEXT, ["--prompts_file", "none.txt"], "prompts file none.txt cannot be read: No such file or directory"),
        (CHAT, ["--prompts_file", "/"], "prompts file / cannot be read: Is a directory"),
        (TEXT, ["--tokenizer_path", "x"], "--tokenizer_path was given without --ckpt_dir: give both, or neither"),
    ],
)
def test_a_wrong_argument_is_one_line(fails: Shell, script: str, arguments: list[str], said: str) -> None:
    assert fails(script, *arguments).startswith(said)


@pytest.mark.parametrize("script", [TEXT, CHAT])
def test_a_missing_folder_is_one_line(fails: Shell, tmp_path: Path, script: str) -> None:
    """With or without a tokenizer named, it is the folder that is missing."""
    missing = ["--ckpt_dir", str(tmp_path / "none")]
    assert "none does not exist" in fails(script, *missing, "--tokenizer_path", str(DEMO / "tokenizer.model"))
    assert "none does not exist" in fails(script, *missing)


def test_a_tokenizer_that_is_a_web_page_is_one_line(fails: Shell, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_text("<!doctype html>")
    paths = ["--ckpt_dir", str(DEMO), "--tokenizer_path", str(tmp_path / "tokenizer.model")]
    assert fails(TEXT, *paths).startswith(f"tokenizer {tmp_path}/tokenizer.model is an HTML page (15 bytes)")


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([json.dumps(DIALOG), "", '[{"role": "user"'], " line 3 is not JSON ("),
        ([json.dumps(DIALOG), '"hello"'], ' line 2 is not a list of messages, nor {"messages": […]}'),
        (['{"prompt": "hello"}'], " line 1 is not a list of messages"),
        ([json.dumps([*DIALOG, {"role": "assistant", "content": "Woof."}])], "dialog 0 ends with 'assistant'"),
        ([json.dumps(DIALOG), "[]"], "dialog 1 is empty"),
        ([json.dumps([{"role": "system", "content": "Be cute."}])], "dialog 0 is a system message alone"),
        ([json.dumps([{"role": "user", "text": "hello"}])], "dialog 0, message 0 is not {'role': …, 'content': …}"),
    ],
)
def test_a_bad_dialog_in_a_file_is_one_line(fails: Shell, tmp_path: Path, lines: list[str], said: str) -> None:
    file = tmp_path / "dialogs.jsonl"
    file.write_text("\n".join(lines))
    line = fails(CHAT, "--prompts_file", str(file))
    assert line.startswith(f"{file}{said}" if said.startswith(" ") else said)


def test_an_unknown_flag_is_an_error() -> None:
    """fire's own, in its own words."""
    done = run_script(TEXT, "--temprature", "0", "--max_gen_len", "1")
    assert done.returncode == 2 and "Could not consume arg: --temprature" in done.stderr


def test_a_path_like_a_number_says_how_to_write_it(fails: Shell) -> None:
    assert fails(TEXT, "--ckpt_dir", "7") == "ckpt_dir=7 is not a path: in a shell, write ./7 for a name like a number"


# ------------------------------------------------------------------------------------------------------------- paths


def test_without_paths_a_command_runs_the_demo(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Rank 0 says so, and no other."""
    for rank, said in (("1", ""), ("0", "llama: no --ckpt_dir: running the bundled demo checkpoint\n")):
        monkeypatch.setenv("RANK", rank)
        assert find_checkpoint(None, None) == (str(DEMO), str(DEMO / "tokenizer.model"))
        assert capsys.readouterr().err == said


def test_a_tokenizer_is_found_in_the_folder_or_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Meta's download has one tokenizer.model beside the folders of all sizes; one inside is nearer."""
    folder = tmp_path / "llama-2-7b"
    folder.mkdir()
    beside, inside = tmp_path / "tokenizer.model", folder / "tokenizer.model"
    with pytest.raises(LlamaError, match=f"no tokenizer.model in {folder} or beside it: name it with --tokenizer_path"):
        find_checkpoint(str(folder), None)
    beside.touch()
    for written in (folder, f"{folder}/"):
        assert find_checkpoint(str(written), None) == (str(written), str(beside))
    inside.touch()
    assert find_checkpoint(str(folder), None)[1] == str(inside)
    assert find_checkpoint(str(folder), "other.model")[1] == "other.model"
    assert capsys.readouterr().err == ""


def test_a_tokenizer_is_found_beside_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--ckpt_dir .` is a folder too, with a place beside it."""
    folder = tmp_path / "llama-2-7b"
    folder.mkdir()
    (tmp_path / "tokenizer.model").touch()
    monkeypatch.chdir(folder)
    assert Path(find_checkpoint(".", None)[1]).samefile(tmp_path / "tokenizer.model")


# ------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize(
    ("data", "prompts"),
    [
        (b"one\ntwo\n", ["one", "two"]),
        (b"one\ntwo", ["one", "two"]),
        (b"one\r\ntwo\r\n", ["one", "two"]),
        (b"\n\none\n   \n\t\r\ntwo\n\n", ["one", "two"]),
        (b"  one \n", ["  one "]),
        ("a\u2028b\x0bc\x85d\re\n二\n".encode(), ["a\u2028b\x0bc\x85d\re", "二"]),
        ("\ufeffone\ntwo\n".encode(), ["one", "two"]),  # a byte order mark, as Windows' editors write
        (b"", []),
    ],
)
def test_a_prompt_is_a_line(tmp_path: Path, data: bytes, prompts: list[str]) -> None:
    """Only a line feed ends it, with or without a carriage return; blank lines are left out, spaces are kept."""
    file = tmp_path / "prompts.txt"
    file.write_bytes(data)
    assert read_prompts(str(file)) == prompts


@pytest.mark.parametrize("before", [b"", b"[]\n", b"[1, 2]\n" * 5000])
def test_bytes_that_are_no_text_are_found_where_they_are(tmp_path: Path, before: bytes) -> None:
    """The message names the byte's place in its line, and the line."""
    file = tmp_path / "prompts.txt"
    file.write_bytes(before + b"\xff\n")
    said = rf"prompts\.txt line {before.count(10) + 1} is not UTF-8 text \(invalid start byte at byte 0\)"
    for read in (read_prompts, read_dialogs):
        with pytest.raises(PromptError, match=said):
            read(str(file))


@pytest.mark.parametrize("data", [b"\xef\xbb\xbf%s\n", b"%s\r\n", b"\n%s"])
def test_a_dialog_is_a_line_of_json(tmp_path: Path, data: bytes) -> None:
    """A list of messages, or an object that has one as "messages", whatever else it has."""
    file = tmp_path / "dialogs.jsonl"
    values: list[Any] = [DIALOG, {"id": 7, "messages": DIALOG}, [{"role": "user", "content": "a\u2028b"}]]
    lines = b"\n".join(json.dumps(value, ensure_ascii=False).encode() for value in values)
    file.write_bytes(data % lines)
    assert read_dialogs(str(file)) == [DIALOG, DIALOG, values[2]]
