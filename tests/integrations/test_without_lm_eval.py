"""What is said where lm-evaluation-harness is not installed."""

import subprocess
import sys

from conftest import ROOT


def test_the_command_names_what_is_missing() -> None:
    code = (
        "import runpy, sys; sys.modules['lm_eval'] = None\n"
        "runpy.run_module('llama.integrations.lm_eval', run_name='__main__', alter_sys=True)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    said = 'lm_eval: this needs lm_eval, which is not here: pip install "llama-runner[eval]"\n'
    assert (done.returncode, done.stderr) == (2, said)
