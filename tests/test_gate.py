"""Nothing that a file, a name or a model says acts on a terminal, and every error is one line."""

import io
import json
import os
import pickle
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pexpect
import pytest
import torch
from conftest import DEMO
from hypothesis import given
from hypothesis import strategies as st

from llama import LlamaError, errors, gate, in_a_shell
from llama.cli import shell
from llama.gate import harmless, json_line, one_line

EVIL = "a\x1b[2J\x1b]0;owned\x07\r\nllama: all is well\x9b31m\u202e\u2028"  # each of it acts on some terminal
ACTING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
ANY_TEXT = st.text(st.characters(), max_size=30)  # half surrogates too


# ---------------------------------------------------------------------------------------------------------- the gate


def test_no_character_steers_a_terminal() -> None:
    """Every control character is shown instead, but newline and tab; all other text stays as it is."""
    every = "".join(map(chr, [*range(0x20), *range(0x7F, 0xA0)]))
    assert not set(harmless(every)) & set(every) - set("\n\t") and len(harmless(every)) == len(every)
    assert harmless("é😀\tשלום\n") == "é😀\tשלום\n"
    assert harmless("a\u202eb\u2066c\u2028d") == "a\ufffdb\ufffdc\ufffdd"


@given(ANY_TEXT)
def test_whatever_comes_goes_through_the_gate_harmlessly(text: str) -> None:
    assert not ACTING.search(harmless(text))
    line = one_line(text)
    assert line.isprintable() and one_line(line) == line
    assert (line == text) == text.isprintable()
    record = json_line({"text": text})
    assert not ACTING.search(record) and json.loads(record) == {"text": text} and len(record.splitlines()) == 1


def test_names_are_escaped_as_python_escapes_them() -> None:
    assert one_line("é\x1b[2J\n\t\u202e\udcff") == r"é\x1b[2J\n\t\u202e\udcff"


@pytest.mark.parametrize("kind", [LlamaError, *LlamaError.__subclasses__()])
def test_every_error_is_one_printable_line(kind: type[LlamaError]) -> None:
    """Also in a script of one's own, and after it went to another process."""
    error = kind(f"{EVIL} is refused")
    assert str(error).isprintable() and str(error).endswith(" is refused")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert kind in vars(errors).values()


@pytest.mark.parametrize(("terminal", "expected"), [(True, "a␛\n"), (False, "a\x1b\n")])
def test_a_pipe_gets_a_text_exactly(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], terminal: bool, expected: str
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    gate.show("a\x1b")
    assert capsys.readouterr().out == expected


def test_what_is_said_is_one_line_on_stderr(monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing where stderr is closed: stdout is not its stand-in."""
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.StringIO())
    gate.to_stderr(EVIL)
    assert sys.stderr.getvalue().count("\n") == 1 and not ACTING.search(sys.stderr.getvalue())
    monkeypatch.setattr(sys, "stderr", None)
    gate.to_stderr("lost")
    assert sys.stdout.getvalue() == ""


def test_a_warning_of_a_library_is_one_line(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """Where the program runs as a command does."""
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # so that it is put back
    with in_a_shell():
        warnings.warn(EVIL, stacklevel=1)
    out, err = capfd.readouterr()
    assert out == "" and err == f"llama: {one_line(EVIL)}\n"


# -------------------------------------------------------------------------------------------------- from every source


@pytest.fixture
def broken(tmp_path: Path) -> Callable[..., Path]:
    """broken(folder="x", params={…}, tensors={…}, files={…}): the demo, changed so, in a folder of that name."""

    def broken(
        folder: str = "x", params: dict[str, Any] | None = None, tensors: dict[str, Any] | None = None,
        files: dict[str, str] | None = None,
    ) -> Path:  # fmt: skip
        made = tmp_path / folder
        made.mkdir()
        for name in ("tokenizer.model", "consolidated.00.pth"):
            (made / name).write_bytes((DEMO / name).read_bytes())
        sizes = json.loads((DEMO / "params.json").read_text())
        (made / "params.json").write_text(json.dumps({**sizes, **(params or {})}))
        if tensors:
            whole = torch.load(made / "consolidated.00.pth", weights_only=True)
            torch.save({**whole, **tensors}, made / "consolidated.00.pth")
        for name, text in (files or {}).items():
            (made / name).write_text(text)
        return made

    return broken


def in_terminal(*words: str) -> tuple[int, str]:
    """(Exit code, all that a terminal gets) of a run of the command: stdout and stderr are one terminal."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "dumb", "NO_COLOR": "1"}
    child = pexpect.spawn(
        sys.executable, ["-m", "llama", *words], env=environment, timeout=180, dimensions=(50, 500), echo=False
    )
    child.expect(pexpect.EOF)
    child.close()
    return child.exitstatus, child.before.decode().replace("\r\n", "\n")


def in_process(words: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """The same of a pipe, in this process."""
    from llama.cli.commands import COMMANDS

    monkeypatch.setattr(sys, "argv", ["llama", *words])
    with pytest.raises(SystemExit) as ended:
        shell.run(COMMANDS)
    out, err = capfd.readouterr()
    assert out == ""
    return ended.value.code, err


SOURCES: dict[str, dict[str, Any]] = {
    "tensor": {"tensors": {EVIL: torch.zeros(2)}},
    "key": {"params": {EVIL: True}},
    "value": {"params": {"rope_scaling": EVIL}},
    "value of a size": {"params": {"dim": EVIL}},
    "value of quantize": {"params": {"quantize": EVIL}},
    "folder": {"folder": EVIL, "params": {"rope_scaling": 1}},
    "shard": {"files": {f"consolidated.{EVIL}.pth": ""}},
    "checklist": {"files": {"checklist.chk": f"{'0' * 32}  a\x1b[2J\x9b31m\u202e\n{'0' * 32}  consolidated.00.pth\n"}},
}
LOADING = ("info", "complete", "reshard", "quantize")
COMMANDS = {
    "info": ["info"],
    "complete": ["complete", "Ben", "--max_gen_len", "1", "--quiet", "--ckpt_dir"],
    "verify": ["verify", "--quiet"],
    "reshard": ["reshard", "--model_parallel_size", "2", "--quiet", "--out", "out", "--ckpt_dir"],
    "quantize": ["quantize", "--quantize", "int8", "--quiet", "--out", "out", "--ckpt_dir"],
}


@pytest.mark.parametrize(
    ("source", "command"),
    [(source, "verify") for source in ("folder", "checklist")]
    + [(source, command) for source in SOURCES for command in LOADING if source != "checklist"],
)
def test_an_error_that_quotes_a_file_is_one_harmless_line(
    broken: Callable[..., Path], source: str, command: str, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str], tmp_path: Path,
) -> None:  # fmt: skip
    """Of each kind of file, by each command that reads it."""
    monkeypatch.chdir(tmp_path)
    folder = broken(**SOURCES[source])
    code, said = in_process([*COMMANDS[command], str(folder)], monkeypatch, capfd)
    assert code == 2 and said.startswith("llama: ") and r"a\x1b[2J" in said.replace(r"\u001b", r"\x1b"), said
    assert said.endswith("\n") and said[:-1].isprintable(), said


@pytest.mark.parametrize(
    "words",
    [
        ["complete", "x", "--ckpt_dir", EVIL, "--tokenizer_path", EVIL],
        ["complete", "x", "--ckpt_dir", str(DEMO), "--tokenizer_path", EVIL],
        ["complete", "x", "--html", f"{EVIL}/{EVIL}"],
        ["complete", "x", "--quiet", "--device", EVIL],
        ["score", EVIL],
        ["batch", EVIL, "--output", "x"],
        ["batch", os.devnull, "--output", f"{EVIL}/{EVIL}"],
        ["info", EVIL],
        [EVIL],
        ["info", f"--{EVIL}"],
    ],
)
def test_an_error_that_quotes_what_was_typed_is_one_harmless_line(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    code, said = in_process(words, monkeypatch, capfd)
    assert code == 2 and said.startswith("llama: ") and said[-1] == "\n" and said[:-1].isprintable(), said


@pytest.mark.parametrize(
    "words",
    [
        ["info", "FOLDER"],
        ["verify", "FOLDER"],
        ["complete", "--ckpt_dir", "FOLDER", EVIL, "--max_gen_len", "3", "--n", "2", "--json"],
        ["complete", "--ckpt_dir", "FOLDER", EVIL, "b", "--max_gen_len", "3", "--show_prompt"],
        ["batch", "FILE", "--ckpt_dir", "FOLDER", "--output", f"FOLDER{EVIL}out", "--max_gen_len", "3"],
    ],
)
def test_what_works_is_harmless_in_a_terminal(broken: Callable[..., Path], tmp_path: Path, words: list[str]) -> None:
    """The model writes ESC (byte token 30) wherever it is asked to; lines end as they should, and nothing else acts."""
    folder = broken(EVIL, params={f"_{EVIL}": None, "description": EVIL})
    sums = re.sub(rb".*params.json\n", b"", (DEMO / "checklist.chk").read_bytes())
    (folder / "checklist.chk").write_bytes(sums)
    (tmp_path / "f").write_text(f"{EVIL}\nb\n", encoding="utf-8", newline="")
    words = [word.replace("FOLDER", str(folder)).replace("FILE", str(tmp_path / "f")) for word in words]
    biased = ["--logit_bias", "{30: 100}"] if words[0] in ("complete", "batch") else []
    code, said = in_terminal(*words, *biased)
    assert code == 0, said
    plain = re.sub(r"\r(requests|verifying): [^\r\n]*", "", said)  # bars, which move by carriage returns
    assert not ACTING.search(plain), plain


def test_a_pipe_gets_the_models_text_exactly(tmp_path: Path) -> None:
    words = ["complete", "b", "--max_gen_len", "3", "--logit_bias", "{30: 100}", "--quiet", "--temperature", "0"]
    done = subprocess.run([sys.executable, "-m", "llama", *words], capture_output=True, check=True)
    assert done.stdout == b"\x1b\x1b\x1b\n"
