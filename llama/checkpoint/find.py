"""Where a checkpoint and its tokenizer lie: as named, as the environment says, or the demo that is bundled."""

import os
from pathlib import Path

from llama import log
from llama.errors import LlamaError
from llama.paths import FilePath, expanded
from llama.text.tokenizer_files import tokenizer_in

DEMO = Path(__file__).parent.parent / "demo"  # the bundled checkpoint


def find_checkpoint(ckpt_dir: str | None, tokenizer_path: str | None) -> tuple[str, str]:
    """(Checkpoint folder, tokenizer file): those given, else those of LLAMA_CKPT_DIR and LLAMA_TOKENIZER_PATH.

    A tokenizer that was not named is looked for in the folder, in the environment and beside the folder. Without any
    folder it is the demo's, which is said in one line.
    """
    if ckpt_dir is None:
        named = _from_environment("LLAMA_CKPT_DIR")
        if not named and tokenizer_path is not None:
            raise LlamaError("--tokenizer_path was given without --ckpt_dir: give both, or neither for the demo")
        log.say(f"no --ckpt_dir: running {f'LLAMA_CKPT_DIR={named}' if named else 'the bundled demo checkpoint'}")
        ckpt_dir = named or str(DEMO)
    folder = expanded(ckpt_dir, "ckpt_dir")
    tokenizer = _find_tokenizer(Path(folder)) if tokenizer_path is None else tokenizer_path
    return folder, expanded(tokenizer, "tokenizer_path")


def _from_environment(name: str) -> FilePath | None:
    """The path that a variable names; one that is empty counts as not set."""
    return expanded(value, name) if (value := os.environ.get(name)) else None


def _find_tokenizer(folder: Path) -> Path:
    beside = Path(os.path.abspath(folder)).parent / "tokenizer.model"
    if inside := tokenizer_in(folder):
        return inside
    if named := _from_environment("LLAMA_TOKENIZER_PATH"):
        return Path(named)
    if not beside.is_file() and folder.is_dir():  # a folder that is not there is the loader's to report
        raise LlamaError(f"no tokenizer.model in {folder} or beside it: name it with --tokenizer_path")
    return beside


def find_folder(ckpt_dir: str | None) -> Path:
    """The checkpoint folder of a command that needs no tokenizer."""
    found = ckpt_dir or _from_environment("LLAMA_CKPT_DIR")
    if not found:
        log.say("no checkpoint folder: this is the bundled demo checkpoint")
    return Path(found or DEMO)
