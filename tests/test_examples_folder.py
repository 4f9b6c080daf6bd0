"""The small scripts of examples/ run on the demo, and print what the library gives."""

import math
import os
import re
import subprocess
import sys

import pytest
from conftest import DEMO, ROOT

from llama import Llama

LAUNCH = {"model_parallel": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]}


def printed(name: str, *arguments: str) -> list[str]:
    """The lines that a script prints on stdout."""
    command = [sys.executable, *LAUNCH.get(name, []), str(ROOT / "examples" / f"{name}.py"), *arguments]
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(
        command, capture_output=True, encoding="utf-8", timeout=240, env={**environment, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def llama() -> Llama:
    return Llama.build(str(DEMO), max_seq_len=256)


def test_the_page_of_python_names_every_example() -> None:
    page = (ROOT / "docs" / "python.md").read_text()
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == set(re.findall(r"\.\./examples/(\w+\.py)", page))


def test_streaming_prints_a_text_and_an_answer() -> None:
    text, _, answer, counted = printed("streaming", "--max_gen_len", "12")
    assert text.strip() and re.fullmatch(r"\d+ pieces: .*\w.*", answer)
    assert re.fullmatch(r"\d+ tokens in, \d+ out, (stop|length)", counted)


def test_scoring_prefers_the_ending_that_makes_sense(llama: Llama) -> None:
    """And its perplexities are the library's, but for rounding."""
    rows = [re.match(r"perplexity +([\d.]+), log p of the ending +(-[\d.]+): (.*)", row) for row in printed("scoring")]
    assert len(rows) == 3 and all(rows)
    assert max(rows, key=lambda row: float(row[2])) is rows[0]
    for row, score in zip(rows, llama.score([row[3] for row in rows]), strict=True):
        assert math.isclose(float(row[1]), score["perplexity"], rel_tol=0.1)


def test_batch_has_a_line_for_each_prompt_and_an_error_where_one_fails() -> None:
    lines = printed("batch", "--max_gen_len", "4")
    assert sorted(line[0] for line in lines) == ["0", "1", "2", "3"]
    assert [line for line in lines if "failed" in line] == [line for line in lines if line.startswith("2 failed: the")]


def test_sampling_shows_each_way() -> None:
    lines = printed("sampling", "--max_gen_len", "4")
    assert len([line for line in lines if line.endswith(":")]) == 6
    assert [float(line.split()[0]) for line in lines[-3:]] == sorted(float(line.split()[0]) for line in lines[-3:])[
        ::-1
    ]


def test_model_parallel_gives_each_process_a_part(llama: Llama) -> None:
    weights, text = printed("model_parallel", "--max_gen_len", "4")
    whole = sum(parameter.numel() for parameter in llama.model.parameters())
    assert whole / 2 <= int(weights.split()[0]) < 0.6 * whole and text.startswith("Ben wanted a red kite. ")
