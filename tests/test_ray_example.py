"""The example for Ray Data, on a Ray of this machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from near_ties import refuse_near_ties

from llama import Llama, SamplingParams

pytest.importorskip("ray", reason='needs Ray: pip install "ray[data]"')


def test_ray_completes_a_file(tmp_path: Path, demo_float32: Path) -> None:
    """Every prompt once, as the library itself completes it; a prompt that cannot run has its error."""
    prompts = ["Once upon a time", "Ben wanted a red kite.", "word " * 600, "Mia"]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": prompt}) for prompt in prompts) + "\n")
    command = [sys.executable, str(ROOT / "examples" / "ray_batch.py"), "--prompts_file", str(file), "--output"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    done = subprocess.run(
        [*command, str(tmp_path / "out"), "--ckpt_dir", str(demo_float32), "--temperature", "0", "--max_gen_len", "8"],
        capture_output=True, text=True, timeout=300, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for path in (tmp_path / "out").iterdir() for line in path.read_text().splitlines()]
    by_prompt = {row["prompt"]: row for row in rows}
    assert len(rows) == len(by_prompt) == len(prompts)
    llama = Llama.build(str(demo_float32), str(demo_float32 / "tokenizer.model"), 512, 16)
    refuse_near_ties(llama)  # which prompts share a batch is Ray's choice, and moves a rounding
    own = dict(llama.run_each(prompts, SamplingParams(temperature=0, max_gen_len=8)))
    for index, prompt in enumerate(prompts):
        row, alone = by_prompt[prompt], own[index]
        if isinstance(alone, dict):
            assert (row["text"], row["error"]) == (alone["generation"], "")
        else:
            assert (row["text"], row["error"]) == ("", str(alone))
