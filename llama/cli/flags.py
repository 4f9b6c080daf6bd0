"""The flags that several commands share: how a model is built, and how tokens are chosen."""

import dataclasses
from collections.abc import Collection
from typing import Any

from llama.bench.figures import LONGEST
from llama.cli.arguments import Flag
from llama.errors import ParameterError
from llama.grammar import check
from llama.options import RunOptions
from llama.paths import FilePath, read
from llama.request import SamplingParams, default_of
from llama.response_format import parse_object
from llama.server.options import ServeOptions
from llama.wording import utf8

_MOST_BYTES = 1 << 24  # of a file with a form

# Where a flag differs from its field: a shell names a device, and the two sizes may be left out.
_IN_A_SHELL: dict[str, tuple[Any, Any]] = {
    "max_batch_size": (int | None, None), "device": (str | None, None), "dtype": (str | None, None),
    "json_schema": (FilePath | None, None), "grammar": (FilePath | None, None),
}  # fmt: skip


def _flags(options: type, *, without: Collection[str] = ()) -> dict[str, Flag]:
    """A flag for each field of a dataclass, whose metadata has its help text."""
    return {
        field.name: Flag(*(_IN_A_SHELL.get(field.name) or (field.type, default_of(field))), field.metadata["help"])
        for field in dataclasses.fields(options)
        if field.name not in without
    }


MODEL = {
    "ckpt_dir": Flag(
        FilePath | None,
        None,
        "Meta's or Hugging Face's folder, or a .gguf file; else LLAMA_CKPT_DIR, else the bundled demo.",
    ),
    "tokenizer_path": Flag(
        FilePath | None, None, "tokenizer.model or .json; else in the folder, LLAMA_TOKENIZER_PATH, beside the folder."
    ),
    **_flags(RunOptions),
}
PLACEMENT = {name: MODEL[name] for name in ("max_memory", "device_map")}
SCORING_MODEL = {name: flag for name, flag in MODEL.items() if name not in ("speculate", "draft_tokens")}
BENCH_MODEL = {
    **{name: flag for name, flag in SCORING_MODEL.items() if name not in PLACEMENT},  # of one device
    "max_seq_len": Flag(
        int, LONGEST, "the most tokens of one sequence: a context of 2048, and what is decoded after it."
    ),
    "max_batch_size": Flag(
        int | None, None, "the most sequences that decode at once; if left out what fits, up to 64."
    ),
}
ONE_PROCESS_MODEL = {name: flag for name, flag in MODEL.items() if name != "model_parallel_size"}
SERVICE = _flags(ServeOptions)
GAP = {
    "prefix": Flag(str | None, None, "the text before a gap."),
    "suffix": Flag(str | None, None, "the text behind it."),
    "infill": Flag(FilePath | None, None, "the file of a text with a gap, marked <FILL_ME>; - is the standard input."),
    "suffix_first": Flag(bool, False, "let the model read what is behind the gap first."),
}
SAMPLING = _flags(SamplingParams, without=("seed",))  # the model's is the one from which each request's is derived


def sampling_params(given: dict[str, Any]) -> SamplingParams:
    """The SamplingParams of the flags; a lone token stands for a list of one. Raises ParameterError."""
    tokens = given["stop_token_ids"]
    given = {**given, "stop_token_ids": (tokens,) if isinstance(tokens, int) else tokens}
    for name in ("json_schema", "grammar"):
        given[name] = given[name] and _text(given[name], name)
    if given["json_schema"]:
        given["json_schema"] = parse_object(given["json_schema"], "json_schema")
    params = SamplingParams(**given)
    if params.form:
        check(*params.form)  # now: to load a model takes a while
    return params


def _text(file: str, name: str) -> str:
    try:
        data = read(file, _MOST_BYTES)
    except OSError as error:
        raise ParameterError(f"{name}={file!r} cannot be read: {error.strerror}") from None
    return utf8(data, f"{file} is ")
