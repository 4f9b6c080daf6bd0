"""Standard streams that are closed, and libraries that write to stderr by themselves: of every command."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path

import fire
import pytest
from conftest import DEMO, ROOT

from llama import in_a_shell
from llama.cli import commands

OUT = "standard output is closed: send it to a file, a pipe or /dev/null\n"
COMMANDS = {
    "complete": ["complete", "Ben", "--max_gen_len=2"],
    "complete -": ["complete", "-", "--max_gen_len=2"],
    "chat": ["chat"],
    "batch": ["batch", "-", "--output=out.jsonl"],
    "batch -": ["batch", "-", "--output=-", "--ordered"],
    "score": ["score", "-"],
    "bench": ["bench", "--seconds=0.01", "--max_batch_size=1", "--max_seq_len=64"],
    "info": ["info"],
    "verify": ["verify"],
    "reshard": ["reshard", str(DEMO), "out", "--model_parallel_size=2"],
    "quantize": ["quantize", str(DEMO), "out", "--quantize=int4"],
    "convert": ["convert", str(DEMO), "out", "--to=hf"],
    "demo": ["demo"],
    "help": [],
    "help of one": ["batch", "--help"],
    "version": ["--version"],
    "completion": ["--", "--completion", "bash"],
    "a mistake": ["complte"],
}
MEASURED = re.compile("\n(free|largest|machine:|figure|load|peak memory|noisy:).*")  # memory and speed come and go
EXAMPLES = ("example_text_completion", "example_chat_completion")


Run = Callable[[], None]


def ends(run: Run) -> object:
    """The exit code of a run in this process."""
    try:
        run()
    except SystemExit as ended:
        return ended.code
    return 0


def example(name: str) -> None:
    """Run an example as `python it.py …` does."""
    main = __import__(name).main
    with in_a_shell():
        fire.Fire(main)


@pytest.fixture(params=[*COMMANDS, *EXAMPLES])
def command(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Each command and example in turn, its words in sys.argv, in a new folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT))
    script = request.param in EXAMPLES
    words = ["--max_gen_len=2", "--temperature=0"] if script else COMMANDS[request.param]
    monkeypatch.setattr(sys, "argv", ["it.py", *words])
    return partial(example, request.param) if script else commands.main


@pytest.mark.parametrize("closed", [{"stdout"}, {"stdout", "stdin"}, {"stdout", "stderr"}])
def test_closed_output_is_said_before_anything_is_done(
    command: Run, closed: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """In one line, with exit code 2; where stderr is closed as well, by the exit code alone."""
    for name in closed:
        monkeypatch.setattr(sys, name, None)
    assert ends(command) == 2
    said = "" if "stderr" in closed else f"{'llama' if command is commands.main else 'it.py'}: {OUT}"
    assert capfd.readouterr() == ("", said) and not list(tmp_path.iterdir())


def test_closed_input_is_empty_and_closed_stderr_silent(
    command: Run, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Exit code, results and files are those of a run with /dev/null in their places."""

    def found(streams: Callable[[str], object]) -> tuple[object, str, dict[Path, bytes]]:
        for name, mode in (("stdin", "r"), ("stderr", "w")):
            monkeypatch.setattr(sys, name, streams(mode))
        code = ends(command)
        out, err = capfd.readouterr()
        files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        for path in files:
            path.unlink()
        assert err == ""
        return code, MEASURED.sub("", out), files

    with open(os.devnull) as empty, open(os.devnull, "w") as nowhere:
        expected = found(lambda mode: empty if mode == "r" else nowhere)
    assert found(lambda mode: None) == expected


# --------------------------------------------------------------------------------------------------- in real processes


def closed(streams: str, *words: str, **more: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the command as a shell does that closes some streams, such as "<&- 2>&-"."""
    command = ["sh", "-c", f'exec "$@" {streams}', "sh", sys.executable, "-m", "llama", *words]
    environment = {**os.environ, **{name: str(value) for name, value in more.items() if name != "cwd"}}
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=more.get("cwd"))


@pytest.mark.parametrize("streams", [" ".join(s) for s in product(("", "<&-"), ("", ">&-"), ("", "2>&-"))])
def test_each_set_of_closed_streams(streams: str) -> None:
    done = closed(streams, "--version")
    assert done.returncode == (2 if ">&-" in streams.split() else 0)
    assert done.stdout.startswith("llama ") == (done.returncode == 0)
    assert done.stderr == (f"llama: {OUT}" if done.returncode and "2>&-" not in streams else "")


def test_nothing_gets_into_a_file_that_takes_the_place_of_a_stream(tmp_path: Path) -> None:
    """libgomp writes to the descriptor 2, whatever it leads to."""
    (tmp_path / "in").write_text("Ben\nMia\n")
    words = ("batch", "in", "--output", "out.jsonl", "--max_gen_len=1")
    done = closed("<&- 2>&-", *words, cwd=tmp_path, OMP_SCHEDULE="abc")
    assert (done.returncode, done.stdout) == (0, "")
    assert {json.loads(line)["line"] for line in (tmp_path / "out.jsonl").read_text().splitlines()} == {1, 2}
    assert all(b"libgomp" not in path.read_bytes() for path in tmp_path.iterdir())


# ------------------------------------------------------------------------------------ what native libraries say of it


@pytest.fixture
def noisy(tmp_path: Path) -> Path:
    """A folder with libraries that, while they are imported, write as libgomp does; the last one ends the process."""
    for name, end in (("sentencepiece", ""), ("torch", "raise SystemExit(7)")):
        (tmp_path / f"{name}.py").write_text(f"import os\nos.write(2, b'libgomp: Invalid value\\n')\n{end}\n")
    return tmp_path


@pytest.mark.parametrize("name", list(commands.COMMANDS))
def test_quiet_is_quiet_while_libraries_are_loaded(name: str, noisy: Path) -> None:
    """All but verify need torch; without --quiet they may say what they have to."""
    words = next((words for words in COMMANDS.values() if words[:1] == [name]), [name])  # serve would go on
    done = closed("</dev/null", *words, "--quiet", PYTHONPATH=noisy, cwd=noisy)
    assert (done.returncode, done.stderr) == (0 if name == "verify" else 7, "")


def test_libraries_may_say_what_they_have_to(noisy: Path) -> None:
    done = closed("", "info", PYTHONPATH=noisy)
    assert (done.returncode, done.stderr) == (7, "libgomp: Invalid value\n" * 2)
