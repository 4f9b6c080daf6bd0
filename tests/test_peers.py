"""Processes that part: at the end of a script, after an error, and where one of them is killed in the middle."""

import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pexpect
import pytest
import torch.distributed as dist
from conftest import DEMO
from talks import DOG, READS, assert_as_it_was, command, end, environment

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
Ended = tuple[int, str, str]
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


class Run:
    """Processes as torchrun starts them, but without torchrun, which would end the others where one fails.

    They meet at a store of this process, as of torchrun's, or (`hosts`) at one that the first of them has.
    """

    def __init__(self, home: Path, processes: int = 2, *, hosts: bool = False) -> None:
        self._store = None if hosts else dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._processes: dict[int, subprocess.Popen[str]] = {}
        self._common = {
            **environment(home), "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self._store.port if self._store else free_port()),
            "TORCHELASTIC_USE_AGENT_STORE": str(not hosts), "TORCHELASTIC_RESTART_COUNT": "0",
        }  # fmt: skip

    def environment(self, rank: int, dies: int | None) -> dict[str, str]:
        return {**self._common, "RANK": str(rank), "LOCAL_RANK": str(rank), "DIES": str(dies)}

    def start(self, rank: int, code: str, *words: str, dies: int | None = None) -> None:
        command = [sys.executable, "-c", code, *words]
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        settings = self.environment(rank, dies)
        self._processes[rank] = subprocess.Popen(command, **pipes, encoding="utf-8", env=settings)

    def ends(self) -> dict[int, Ended]:
        """How each process ended: its exit code, what it said on stdout and on stderr."""
        try:
            said = {rank: process.communicate(timeout=180) for rank, process in self._processes.items()}
            return {rank: (self._processes[rank].returncode, *said[rank]) for rank in said}
        finally:
            for process in self._processes.values():
                process.kill()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def run(
    home: Path, code: str, *words: str, processes: int = 2, dies: int | None = None, hosts: bool = False
) -> dict[int, Ended]:
    together = Run(home, processes, hosts=hosts)
    for rank in range(processes):
        together.start(rank, code, *words, dies=dies)
    return together.ends()


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
