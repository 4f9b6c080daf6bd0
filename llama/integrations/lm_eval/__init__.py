"""lm-evaluation-harness: importing this makes the model `llama_runner` known to it."""

from importlib.util import find_spec

if find_spec("lm_eval"):  # else __main__.py, before which Python imports this, says what is missing
    from llama.integrations.lm_eval.model import LlamaRunner

    __all__ = ["LlamaRunner"]
