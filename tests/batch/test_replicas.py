"""Several replicas under torchrun on gloo: the same bytes as one process, and a rank that dies."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch
from batch_files import environment, lines, records, sorted_lines
from conftest import ROOT, Ended
from peers import run

from llama.batch.replicas import SILENT
from llama.cli.commands import main

FLAGS = ["--max_seq_len", "256", "--max_batch_size", "2", "--device", "cpu"]
COMMAND = "from llama.cli.commands import main\nmain()"


def words(file: Path, output: Path, *more: str, length: int = 30) -> list[str]:
    return ["batch", str(file), "--output", str(output), *FLAGS, "--max_gen_len", str(length), *more]


def command(processes: int, *arguments: Path | str) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return [sys.executable, *launcher, "-m", "llama", *words(*arguments)]


def call(processes: int, *arguments: Path | str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(processes, *arguments), capture_output=True, encoding="utf-8", timeout=300, cwd=ROOT, env=environment()
    )


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """This process computes with as many as those that it is compared with."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without bad lines, which would make torchrun report a failure of its own."""
    file = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    file.write_text("\n".join(line for line in lines(120) if "torn" not in line) + "\n")
    return file


@pytest.fixture(scope="module")
def alone(prompts: Path) -> list[bytes]:
    """What one process writes: this one."""
    output = prompts.parent / "alone"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["llama", *words(prompts, output, "--quiet")])
        main()
    return sorted_lines(output)


def test_two_replicas_write_what_one_process_does(prompts: Path, alone: list[bytes], tmp_path: Path) -> None:
    """Each some of it, in the end in one file; and one progress line for both."""
    output = tmp_path / "out"
    done = call(2, prompts, output, "--model_parallel_size", "1", "--ordered")
    assert done.returncode == 0 and not done.stdout, done.stderr
    assert "1 process × 2 replicas" in done.stderr
    assert done.stderr.count(f"llama: {len(alone)} of {len(alone)} requests in {output}") == 1
    assert sorted_lines(output) == alone
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.run"]


def test_two_replicas_of_two_processes_each(tmp_path: Path) -> None:
    """World size = replicas × model-parallel size; the same bytes as one model split over two processes."""
    few = tmp_path / "few.txt"
    few.write_text("".join(f"Tom had {n} dogs.\n" for n in range(20)))  # a block for each replica
    one = run(tmp_path, COMMAND, *words(few, tmp_path / "one", length=8), processes=2)
    two = run(tmp_path, COMMAND, *words(few, tmp_path / "two", "--model_parallel_size", "2", length=8), processes=4)
    assert {code for code, _, _ in [*one.values(), *two.values()]} == {0}, (one, two)
    assert "split over 2 processes × 2 replicas" in two[0][2]
    assert sorted_lines(tmp_path / "one") == sorted_lines(tmp_path / "two")


@pytest.mark.parametrize("dies", [0, 1])
def test_a_rank_that_dies_fails_the_run_and_a_rerun_resumes(
    here: Callable[..., Ended], prompts: Path, alone: list[bytes], tmp_path: Path, dies: int
) -> None:
    """With any number of replicas: also one alone finishes what two began."""
    output = tmp_path / "out"
    log = open(tmp_path / "log", "w+")  # noqa: SIM115
    two = command(2, prompts, output, "--model_parallel_size", "1")
    begun = subprocess.Popen(two, cwd=ROOT, env=environment(), stdout=log, stderr=log)
    part = output.with_name("out.part1")
    while begun.poll() is None and not (part.exists() and part.stat().st_size and output.stat().st_size):
        time.sleep(0.02)
    assert begun.poll() is None, (tmp_path / "log").read_text()
    os.kill(rank_process(begun.pid, dies), signal.SIGKILL)
    assert begun.wait(120) != 0
    assert 0 < len(records(output)) + len(part.read_bytes().splitlines()) < len(alone)
    code, _, said = here(*words(prompts, output))
    assert code == 0, said
    assert "requests already" in said and not part.exists()
    assert sorted_lines(output) == alone


def rank_process(launcher: int, rank: int) -> int:
    for child in psutil.Process(launcher).children(recursive=True):
        if child.environ().get("RANK") == str(rank):
            return child.pid
    raise AssertionError(f"no process of rank {rank}")


def test_a_silent_replica_is_given_up(tmp_path: Path) -> None:
    """On another machine nobody kills the rest: rank 0 itself stops waiting."""
    script = tmp_path / "silent.py"
    script.write_text(
        "import os, time, torch\n"
        "from llama import parallel\nfrom llama.batch import replicas\n"
        "replicas.SILENT, replicas.BEAT = 1.0, 0.1\n"
        "parallel.initialize(torch.device('cpu'), 1)\n"
        "group = replicas.Replicas(torch.device('cpu'))\n"
        "if parallel.rank() == 1:\n"
        "    time.sleep(1.5)\n"
        "    group._ended.set()  # no more signs of life, and never an end\n"
        "    time.sleep(60)\n"
        "began = time.monotonic()\n"
        "try:\n"
        "    for _ in group.wait(): pass\n"
        "except replicas.PeerError as error:\n"
        "    print('waited', time.monotonic() - began > 2, error, flush=True)\n"
        "    os._exit(7)\n"
    )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    done = subprocess.run(launcher, capture_output=True, text=True, timeout=120, env=environment(), cwd=ROOT)
    assert done.returncode == 1
    assert "waited True replica 1 of 2 gave no sign of life for 1 s" in done.stdout
    assert SILENT >= 60
