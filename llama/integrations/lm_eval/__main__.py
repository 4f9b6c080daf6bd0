"""The harness's own command, which knows the model `llama_runner`."""

from lm_eval.__main__ import cli_evaluate

import llama.integrations.lm_eval  # noqa: F401  # registers it
from llama.script import in_a_shell

if __name__ == "__main__":
    with in_a_shell("lm_eval"):
        cli_evaluate()
