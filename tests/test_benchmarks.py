"""The benchmark for CUDA runs: on a tiny model, on a CPU."""

import re
import subprocess
import sys

from conftest import ROOT


def test_the_cuda_benchmark_checks_and_prints_every_table() -> None:
    words = [sys.executable, str(ROOT / "benchmarks" / "cuda.py"), "--tiny", "--nopeers"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    checked = re.findall(r"^\| (bf16|int8|int4|fp8 cache) \| (0\.\d+) \| (0\.\d+) \|", done.stdout, re.MULTILINE)
    assert [kind for kind, *_ in checked] == ["bf16", "int8", "int4", "fp8 cache"]
    assert all(0 < float(error) < float(most) for _, error, most in checked)
    assert re.search(r"copy: \d+ GB/s; bf16 products: \d+\.\d+ TFLOP/s", done.stdout)
    for kind in ("bf16", "int8", "int4", "fp8 cache"):
        assert f"{kind}, decode" in done.stdout
    rows = re.findall(r"^\| \d+ \| \d+ \| \d+ \| \d+ \| \d\.\d+ \|", done.stdout, re.MULTILINE)
    assert len(rows) == 8
    assert re.search(r"^\| 64 \| \d+ \| \d+\.\d \| \d+\.\d \| \d\.\d\d \| 0\.7 \|", done.stdout, re.MULTILINE)
    assert re.search(r"6 requests, 3 at once: \d+ new tokens/s, \d\.\d\d of the limit of \d+", done.stdout)
    assert "calls that wait for the device in 32 decode steps: none" in done.stdout


def test_without_a_gpu_it_says_what_can_be_run() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "cuda.py")],
        capture_output=True, text=True, cwd=ROOT, env={"CUDA_VISIBLE_DEVICES": "", "PATH": "/usr/bin"},
    )  # fmt: skip
    assert done.returncode == 1 and done.stderr == "no CUDA device: --tiny tries this script on a CPU\n"
