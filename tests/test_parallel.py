"""Several processes on gloo do what one does, under torchrun too."""

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
import torch
from checkpoints import save
from conftest import DEMO, ROOT, Ended
from near_ties import assert_agree, logits_of
from peers import run

from llama import Llama, SamplingParams, parallel

Done = subprocess.CompletedProcess
PROMPTS = [[1, 5, 9, 200, 17], [1, 7], [1, 33, 301, 44, 80, 80, 12, 9, 5]]
SIZES = {"max_seq_len": 64, "max_batch_size": 2}  # fewer slots than prompts: they take turns
WORKER = f"""
import runpy, sys
sys.path.insert(0, {str(ROOT / "tests")!r})
runpy.run_path({str(ROOT / "tests" / "parallel_worker.py")!r}, run_name="__main__")
"""
SCRIPTS = ["example_text_completion.py", "example_chat_completion.py"]


def torchrun(processes: int, script: Path, *arguments: str) -> Done[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, str(script), *arguments]
    return subprocess.run(command, capture_output=True, encoding="utf-8", timeout=180, env=environment)


def run_worker(processes: int, folder: Path, builds: dict[str, dict]) -> tuple[list[dict[str, Any]], list[Ended]]:
    """What every rank wrote, and how it ended."""
    job = folder / "job.json"
    job.write_text(json.dumps({"out": str(folder), "prompts": PROMPTS, "builds": builds}))
    ended = list(run(folder, WORKER, str(job), processes=processes).values())
    assert [code for code, _, _ in ended] == [0] * processes, ended
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(processes)], ended


def options(folder: Path, **more: Any) -> dict[str, Any]:
    given = {"ckpt_dir": str(folder), "tokenizer_path": str(DEMO / "tokenizer.model"), "device": "cpu", **SIZES}
    return {**given, "dtype": "float32", **more}


@pytest.fixture(scope="module")
def alone(build: Callable[..., Llama]) -> dict[str, Any]:
    """What one process makes of the prompts."""
    llama = build(**SIZES)
    greedy, logprobs = llama.generate(PROMPTS, 12, 0, logprobs=True, echo=True)
    sampled, _ = llama.generate(PROMPTS, 12, 1.0, 0.95)
    return {"greedy": greedy, "logprobs": logprobs, "sampled": sampled, "logits": logits_of(llama)}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, small: dict, weights: dict) -> tuple[list[dict], list[Ended]]:
    """Two processes, each build split over both: of 1, 2 and 4 shards, in bfloat16, with a fresh seed."""
    out = tmp_path_factory.mktemp("two")
    folders = {n: save(out / f"shards{n}", small, weights, n) for n in (1, 2, 4)}
    builds = {f"{n} shards": options(folder) for n, folder in folders.items()}
    builds["bfloat16"] = options(folders[2], dtype="bfloat16")
    builds["decode loop"] = options(folders[2], loop=True)
    builds["fresh seed"] = options(folders[1], seed=None)
    return run_worker(2, out, builds)


def assert_same_as_alone(found: dict[str, Any], alone: dict[str, Any]) -> None:
    """Their sums are added in another order."""
    sizes = [len(prompt) for prompt in PROMPTS]
    greedy = ([row[n:] for row, n in zip(of["greedy"], sizes, strict=True)] for of in (found, alone))
    agreed = assert_agree(*greedy, PROMPTS, alone["logits"])
    assert_agree(
        found["sampled"], alone["sampled"], PROMPTS, alone["logits"], SamplingParams(temperature=1.0, top_p=0.95)
    )
    for row, expected, size, n in zip(found["logprobs"], alone["logprobs"], sizes, agreed, strict=True):
        assert row[: size + n] == pytest.approx(expected[: size + n], abs=1e-4)


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_two_processes_say_what_one_says(two: tuple, alone: dict[str, Any], shards: int) -> None:
    """1 → 2, 2 → 2, 4 → 2: the same greedy and sampled tokens, log-probabilities within 1e-4."""
    ranks, _ = two
    assert [rank["model_parallel"] for rank in ranks] == [[0, 2, 2], [1, 2, 2]]
    for rank in ranks:
        assert_same_as_alone(rank[f"{shards} shards"], alone)


def test_two_processes_run_ahead_of_their_hosts_alike(two: tuple, alone: dict[str, Any]) -> None:
    """With decode steps that are launched before the last one is read, as on CUDA: what one process says without."""
    for rank in two[0]:
        assert rank["decode loop"]["ahead"] > 10
        assert_same_as_alone(rank["decode loop"], alone)


def test_all_ranks_decide_alike(two: tuple) -> None:
    """Also in bfloat16, and with a seed that nobody chose."""
    first, second = two[0]
    for name in ("bfloat16", "fresh seed", "1 shards"):
        assert first[name] == second[name]
    assert all(len(row) > len(prompt) for row, prompt in zip(first["bfloat16"]["greedy"], PROMPTS, strict=True))


def test_only_rank_0_talks(two: tuple) -> None:
    """One line a build, nothing on stdout (fairscale's announcements are not passed on)."""
    ranks, ended = two
    lines = [line for _, _, err in ended for line in err.splitlines() if line.startswith("llama:")]
    assert [out for _, out, _ in ended] == ["", ""]
    assert len(lines) == 6 and all("on cpu, split over 2 processes, max_seq_len=64" in line for line in lines)
    assert f"seed={ranks[0]['fresh seed']['seed']}," in lines[-1]


def test_replicas_times_model_parallel_size_is_the_world(
    tmp_path: Path, small: dict, weights: dict, alone: dict[str, Any]
) -> None:
    """Four processes as two replicas of a model split over two."""
    folder = save(tmp_path / "shards2", small, weights, 2)
    ranks, ended = run_worker(4, tmp_path, {"replicas": options(folder, model_parallel_size=2)})
    assert [rank["model_parallel"] for rank in ranks] == [[0, 2, 4], [1, 2, 4], [0, 2, 4], [1, 2, 4]]
    for rank in ranks:
        assert_same_as_alone(rank["replicas"], alone)
    assert sum(err.count("split over 2 processes × 2 replicas") for _, _, err in ended) == 1


# ------------------------------------------------------------------------------------------------------- the scripts


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_under_torchrun_prints_what_it_prints_alone(
    demo_float32: Path, script: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The demo's answers at temperature 0, and once: from rank 0."""
    arguments = ["--ckpt_dir", str(demo_float32), "--temperature", "0", "--max_gen_len", "64"]
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    runpy.run_path(str(ROOT / script), run_name="__main__")
    plain = capfd.readouterr().out
    both = torchrun(2, ROOT / script, *arguments)
    assert both.returncode == 0, both.stderr
    assert plain.strip() and both.stdout == plain
    assert both.stderr.count("llama: ") == both.stderr.count("float32 on cpu, split over 2 processes") == 1


# ---------------------------------------------------------------------------------------------------- a rank that fails


def through_ours(stderr: str) -> list[str]:
    """The files of ours that tracebacks go through, told by where they are: PyTorch's may lie below a llama/ too."""
    package = Path(parallel.__file__).resolve().parent
    files = map(Path, re.findall('File "(.*?)"', stderr))
    return [f.name for f in files if package in f.resolve().parents or f.name in (*SCRIPTS, "command.py")]


def assert_said_once(done: Done[str], said: str) -> None:
    """The run failed, with our line once; of the tracebacks (torchrun has its own) none goes through our files."""
    assert done.returncode != 0
    assert done.stderr.count(said) == 1, done.stderr
    assert not through_ours(done.stderr), done.stderr


def test_a_traceback_is_ours_wherever_the_clone_is() -> None:
    ours = [parallel.__file__, str(Path(parallel.__file__).parent / "kernels" / "ops.py"), str(ROOT / SCRIPTS[0])]
    others = [torch.__file__, "/srv/llama/.venv/lib/torch/run.py", str(ROOT / ".venv" / "lib" / "torch" / "run.py")]
    lines = [f'  File "{path}", line 7, in run\n' for path in ours + others]
    assert through_ours("".join(lines)) == ["parallel.py", "ops.py", SCRIPTS[0]]


def test_a_checkpoint_that_no_rank_can_read_is_reported_once(tmp_path: Path, small: dict, weights: dict) -> None:
    folder = save(tmp_path, small, weights, 2)
    (folder / "consolidated.01.pth").write_text("<html>404</html>")
    paths = ["--ckpt_dir", str(folder), "--tokenizer_path", str(DEMO / "tokenizer.model")]
    done = torchrun(2, ROOT / SCRIPTS[0], *paths)
    assert_said_once(done, f"{SCRIPTS[0]}: {folder}/consolidated.01.pth is an HTML page (16 bytes), not weights")


def test_a_world_size_that_divides_nothing_is_reported_once(ckpt_dir: Path) -> None:
    paths = ["--ckpt_dir", str(ckpt_dir), "--tokenizer_path", str(DEMO / "tokenizer.model")]
    done = torchrun(3, ROOT / SCRIPTS[1], *paths)
    assert_said_once(done, "1 shard, but 8 heads cannot be split over 3 processes: start 1, 2 or 4\n")


FAIL_ON_RANK_1 = """
import os, sys, time
import torch
from llama import in_a_shell, parallel
from llama.errors import DeviceError

with in_a_shell():
    if {group}:
        parallel.initialize(torch.device("cpu"), None)
    if os.environ["RANK"] == "1":
        raise DeviceError("only this rank's device is missing")
    time.sleep(60)
"""


@pytest.mark.parametrize("group", [True, False])
def test_an_error_of_one_rank_alone_is_reported(tmp_path: Path, group: bool) -> None:
    """Whichever rank it is, and also before the processes have met, as for a rank without a CUDA device."""
    script = tmp_path / "command.py"
    script.write_text(FAIL_ON_RANK_1.format(group=group))
    assert_said_once(torchrun(2, script), "command.py: only this rank's device is missing\n")
