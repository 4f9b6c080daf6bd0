"""Run what README and docs/ show, in one process: python tests/transcripts.py < pages > what came of it, as JSON

Input: a list of pages, each a list of (kind, text): "sh", the words of a shell command, or "python", code of the page.
Output: for each of them what a terminal would show. Each page has a folder of its own, with the demo checkpoint in it.
A choice of a token that another processor's rounding could turn over is an error, so what is shown holds everywhere.
"""

import contextlib
import io
import json
import logging
import os
import runpy
import shlex
import sys
import tempfile
import traceback
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the pages show a CPU

import near_ties
import torch

from llama import Llama

ROOT = Path(__file__).resolve().parent.parent
CLEAR = {torch.float32: near_ties.CLEAR, torch.bfloat16: 0.15}  # how far the best two tokens must be from each other


def build_refusing_near_ties() -> None:
    """From here on `Llama.build` makes models that refuse near-ties."""
    build = Llama.build

    def refusing(*args: Any, **kwargs: Any) -> Llama:
        llama = build(*args, **kwargs)
        near_ties.CLEAR = CLEAR[llama.model.dtype]
        near_ties.refuse_near_ties(llama)
        return llama

    Llama.build = staticmethod(refusing)


def make_folder(folder: Path) -> None:
    """What a clone holds of what the pages name: the demo checkpoint and the scripts."""
    (folder / "llama").mkdir()
    (folder / "llama" / "demo").symlink_to(ROOT / "llama" / "demo")
    for script in (*ROOT.glob("example_*.py"), ROOT / "examples"):
        (folder / script.name).symlink_to(script)


def command(text: str) -> None:
    """A command of the shell: `llama …`, or `python SCRIPT …`."""
    program, *words = shlex.split(text)
    if program == "llama":
        sys.argv = ["llama", *words]
        runpy.run_module("llama", run_name="__main__", alter_sys=False)
    else:
        assert program == "python", f"{text}: neither llama nor python"
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


def shown(kind: str, text: str, names: dict[str, Any]) -> str:
    """What a terminal shows of a command, or of code of a page whose `names` it shares."""
    screen = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
    with contextlib.redirect_stdout(screen), contextlib.redirect_stderr(screen), warnings.catch_warnings():
        try:
            command(text) if kind == "sh" else exec(text, names)
        except SystemExit as end:
            if isinstance(end.code, str):
                print(end.code)
        except BaseException:
            traceback.print_exc()
    screen.flush()
    return screen.buffer.getvalue().decode()


def main() -> None:
    build_refusing_near_ties()
    results = []
    for page in json.load(sys.stdin):
        with tempfile.TemporaryDirectory() as folder:
            make_folder(Path(folder))
            os.chdir(folder)
            names: dict[str, Any] = {}
            results.append([shown(kind, text, names) for kind, text in page])
            os.chdir(ROOT)
            logging.getLogger("llama").setLevel(logging.NOTSET)
    json.dump(results, sys.__stdout__)


if __name__ == "__main__":
    main()
