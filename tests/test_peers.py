"""Processes that part: at the end of a script, after an error, and where one of them is killed in the middle."""

import re
import signal
import sys
from pathlib import Path

import pexpect
import pytest
from conftest import DEMO
from peers import Run, run
from talks import DOG, READS, assert_as_it_was, command, end

BUILD = f"""
from llama import Llama
llama = Llama.build({str(DEMO)!r}, {str(DEMO / "tokenizer.model")!r}, 256, 2, device="cpu", threads=1)
"""
COMPLETE = """
print(llama.text_completion(["Once upon a time"], temperature=0, max_gen_len=16)[0]["generation"], flush=True)
"""
MORTAL = """
import os, signal
from llama.model.transformer import Transformer

forward, steps = Transformer.forward, iter(range(5, -1, -1))

def mortal(*given):
    if not next(steps, 1) and os.environ["RANK"] == os.environ["DIES"]:
        os.kill(os.getpid(), signal.SIGKILL)
    return forward(*given)

Transformer.forward = mortal
"""
COMMAND = f"{MORTAL}\nfrom llama.cli.commands import main\nmain()"
CATCHES = f"""
from llama.errors import PeerError
try:
    {COMPLETE.strip()}
except PeerError as error:
    print("caught:", error, flush=True)
    raise
"""
GONE = r"another process of this run has ended, or cannot be reached \("
FLAGS = ["--device", "cpu", "--max_gen_len", "100", "--quiet"]
FAILS = """
import fairscale.nn.model_parallel.initialize as groups

def catches(group):
    try:
        raise ValueError("caught")
    except ValueError as error:
        kept = error  # a cycle: its traceback holds this function's variables, the group among them

def fails(group):
    raise ValueError("uncaught")

catches(groups.get_model_parallel_group())
fails(groups.get_model_parallel_group())
"""


# ------------------------------------------------------------------------------------ a script that comes to its end

OWN_GROUP = "import torch.distributed as dist\ndist.init_process_group('gloo')\n"
COUNT = """
import atexit, os, time

def threads():
    return len(os.listdir("/proc/self/task"))

def report():
    until = time.monotonic() + 10  # one that has ended may be listed for a moment more
    while threads() > before and time.monotonic() < until:
        time.sleep(0.01)
    print(threads() - before, "threads are left", flush=True)

atexit.register(report)  # before any other, so it is called last
import torch, llama.generation
before = threads()
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="only Linux lists a process's threads there")
@pytest.mark.parametrize(
    ("script", "code"),
    [
        (BUILD + COMPLETE, 0),
        (BUILD + COMPLETE + "import torch.distributed as dist\ndist.destroy_process_group()", 0),
        (OWN_GROUP + BUILD + COMPLETE + "raise SystemExit(3)", 3),
        (BUILD + COMPLETE + FAILS, 1),
    ],
    ids=["plain", "destroys its group", "made its group", "fails"],
)
def test_a_script_ends_with_its_own_exit_code(tmp_path: Path, script: str, code: int) -> None:
    """No thread of gloo is left then: one that wants to come back to Python aborts the process, in most runs."""
    for ended in run(tmp_path, COUNT + script).values():
        assert ended[0] == code and ended[1].endswith("\n0 threads are left\n"), ended


# --------------------------------------------------------------------------------------------- one of them is killed


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("Once upon a time there was a mole\n" * 40)
    return file


@pytest.mark.parametrize(
    ("words", "processes", "dies", "hosts"),
    [("complete Once", 2, 0, True), ("complete Once", 4, 2, False), ("batch FILE --output OUT", 2, 1, False)],
)
def test_a_command_whose_peer_is_killed_says_so_in_one_line(
    tmp_path: Path, prompts: Path, words: str, processes: int, dies: int, hosts: bool
) -> None:
    """Once for the run, and every other process ends with exit code 2."""
    out = tmp_path / "out"
    given = words.replace("FILE", str(prompts)).replace("OUT", str(out)).split(" ")
    ended = run(tmp_path, COMMAND, *given, *FLAGS, processes=processes, dies=dies, hosts=hosts)
    assert ended.pop(dies)[0] == -signal.SIGKILL
    assert {(code, out) for code, out, _ in ended.values()} == {(2, "")}
    kept = f"; {out} has what is finished, and the same command again does the rest" if "batch" in words else ""
    said = "".join(err for _, _, err in ended.values())
    assert re.fullmatch(rf"llama: {GONE}.*\): start all of them again{re.escape(kept)}\n", said)


def test_a_script_whose_peer_is_killed_gets_an_error_of_ours(tmp_path: Path) -> None:
    """Where it is not caught that is one traceback, without those of gloo's error, and its end is one line."""
    _, (code, out, err) = run(tmp_path, MORTAL + BUILD + CATCHES, dies=0).values()
    assert code == 1 and re.fullmatch(rf"caught: {GONE}.*\n", out)
    assert err.count("Traceback") == 1 and re.search(rf"llama\.errors\.PeerError: {GONE}.*\n$", err)


def test_where_a_process_cannot_build_the_others_do_not_either(tmp_path: Path) -> None:
    """Nor do they say that they have loaded: else they would wait for it later, in a talk for ever."""
    wrong = BUILD.replace("tokenizer.model", "tokenizer.model' + '/none' * int(os.environ['RANK']) + '")
    (code, _, err), (other, _, _) = run(tmp_path, f"import os\n{wrong}").values()
    assert code == other == 1
    assert "loaded in" not in err and re.search(rf"llama\.errors\.PeerError: {GONE}.*\n$", err)


@pytest.mark.parametrize("dies", [0, 1])
def test_a_talk_whose_peer_is_killed_ends_in_one_line(tmp_path: Path, dies: int) -> None:
    """In the middle of an answer, or while the other one waits for a person; the terminal is left as it was."""
    together, words = Run(tmp_path, hosts=True), [COMMAND, *command()[2:]]
    child = pexpect.spawn(
        sys.executable, ["-c", *words], env=together.environment(0, 1), encoding="utf-8", timeout=180,
        dimensions=(50, 200),
    )  # fmt: skip
    together.start(1, *words, dies=1)
    child.expect_exact(READS)
    if dies == 0:
        child.kill(signal.SIGKILL)
        code, _, err = together.ends()[1]
        assert code == 2 and re.fullmatch(rf"llama: {GONE}.*\n", err)
    else:
        child.send(f"{DOG}\r")
        child.expect(rf"\nllama: {GONE}.*\): start all of them again\r\n$")
        assert_as_it_was(child)
        assert end(child) == 2 and together.ends()[1][0] == -signal.SIGKILL
    child.close(force=True)
