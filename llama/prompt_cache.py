"""Prompt caches: the KV cache of a prompt's beginning as a file, which starts that prompt without computing it again.

A file is in the safetensors format: the tokens, and of each layer their keys and values, as the cache holds them. Its
metadata says what the numbers were made with, and has a sum over all of them. Nothing of a file is used unless all of
it is as expected: another model's numbers would give text that only looks right.
"""

import json
import os
import tempfile
import zlib
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from llama import parallel
from llama.engine.engine import Engine
from llama.errors import DeviceError, ParameterError, PromptCacheError
from llama.output import Output
from llama.paths import opened
from llama.request import Request, SamplingParams
from llama.tokenizer import BaseTokenizer

VERSION = "1"  # of what the file holds
_VERSION, _MADE_WITH, _SUM = "llama_prompt_cache", "made_with", "crc32"  # the keys of its metadata
_TOKENS = "tokens"
_CHOOSE = "name another file, or remove it"

MadeWith = dict[str, Any]  # all that decides the numbers, by name


@dataclass(frozen=True, slots=True)
class Prefix:
    """Tokens, and the rows of the KV cache that are theirs, as `KVCache.read_prefix` gives them."""

    tokens: list[int]
    rows: list[Tensor]


class PrefixRun(Output):
    """The run of a prompt without a completion, whose rows are copied when it ends: soon its slot may serve another."""

    def __init__(self, engine: Engine, tokenizer: BaseTokenizer, tokens: list[int]) -> None:
        request = Request(tokens, SamplingParams(temperature=0, max_gen_len=0), 0, frozenset(), name="the prompt")
        engine.check(request)
        super().__init__(engine, tokenizer, request, 0, echo=False)
        self.rows: list[Tensor] | None = None
        self.failed: Exception | None = None

    def observe(self, request: Request) -> None:
        try:
            self.rows = self._engine.read_prefix(request.prompt) if request.finish_reason == "length" else None
        except (RuntimeError, MemoryError) as error:  # no memory, say: of no concern to the thread that took the step
            self.failed = error
        super().observe(request)

    def prefix(self) -> Prefix:
        """What was computed. Raises what kept it from that."""
        if error := self.request.error or self.failed:
            raise error
        assert self.rows is not None  # the run ended, and its slot held them
        return Prefix(self.request.prompt, self.rows)


def made_with(engine: Engine, weights: str) -> MadeWith:
    """All that decides the numbers of an engine's cache; `weights` says which those are, see `fingerprint_of`.

    Rounding, which differs by processor and number of threads, is left out, unless results are to be the same to the
    bit. Raises DeviceError where the model is split over several processes.
    """
    model = engine.model
    if (processes := parallel.model_parallel_size()) > 1:
        raise DeviceError(
            f"this model is split over {processes} processes, each with a part of the KV cache, and a prompt cache"
            " holds all of it: leave the prompt cache out, or run the model in one process"
        )
    left_out = ("max_batch_size", "max_seq_len", "quantize")
    sizes = {name: value for name, value in asdict(model.params).items() if name not in left_out}
    scaling = model.params.rope_scaling
    made: MadeWith = {
        **sizes,
        "dtype": _name(model.dtype),
        "quantize": model.weight_format,
        "kv_dtype": _name(engine.cache.keys[0].dtype),
        "batch_invariant": model.batch_invariant,
        # Then the angles of all positions depend on how long a text may become.
        "max_seq_len": engine.max_seq_len if scaling and scaling.kind == "dynamic" else None,
        "weights": weights,
    }
    given: MadeWith = json.loads(json.dumps(made))  # as a file has it: without tuples
    return given


def write(path: str, prefix: Prefix, made: MadeWith) -> None:
    """Write the file beside its place, and rename it. Raises ParameterError where it cannot be written."""
    target, described = os.path.realpath(path), json.dumps(made)
    tensors = dict(zip(_names(len(prefix.rows) // 2), prefix.rows, strict=True))
    tensors[_TOKENS] = torch.tensor(prefix.tokens)
    metadata = {_VERSION: VERSION, _MADE_WITH: described, _SUM: _sum(described, tensors)}
    partial = None
    try:
        descriptor, partial = tempfile.mkstemp(".partial", f"{os.path.basename(target)}.", os.path.dirname(target))
        os.close(descriptor)
        save_file(tensors, partial, metadata)
        os.replace(partial, target)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ParameterError(f"{path} cannot be written: {reason}; {_CHOOSE}") from None
    finally:
        if partial is not None:
            with suppress(FileNotFoundError):
                os.unlink(partial)


def read(path: str, engine: Engine, made: MadeWith) -> Prefix:
    """What a file holds, memory-mapped. Raises PromptCacheError unless it is whole, `made` so, and has room here."""
    tensors, metadata = _opened(path)
    if metadata.get(_VERSION) != VERSION:
        version = metadata.get(_VERSION)
        kind = "a safetensors file of another kind" if version is None else f"of version {version:.20}"
        raise PromptCacheError(f"{path} is {kind}, not a prompt cache of version {VERSION}: {_CHOOSE}")
    described = metadata.get(_MADE_WITH, "")
    _check_same(path, _object(path, described), made)
    tokens = _tokens(path, tensors, engine)
    expected = dict.fromkeys(_names(len(engine.cache.keys)), _kind(_row_like(engine, len(tokens))))
    found = {name: _kind(tensor) for name, tensor in tensors.items() if name != _TOKENS}
    if found != expected or metadata.get(_SUM) != _sum(described, tensors):
        raise _damaged(path)
    return Prefix(tokens, [tensors[name] for name in expected])


def _opened(path: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, memory-mapped, and its metadata."""
    try:
        with opened(path):  # a pipe might never begin
            pass
    except OSError as error:
        raise PromptCacheError(f"{path} cannot be read: {error.strerror}; name a file that save_prefix wrote") from None
    try:
        file: Any = safe_open(path, framework="pt")  # it checks that the header fits the file, and maps the file
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118  # no dict
    except Exception as error:  # of a damaged header: of the library's own class, or of PyTorch's making
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise PromptCacheError(f"{path} is no prompt cache, or a damaged one ({first:.200}): {_CHOOSE}") from None


def _object(path: str, described: str) -> MadeWith:
    try:
        given = json.loads(described)
    except (ValueError, RecursionError):
        raise _damaged(path) from None
    if not isinstance(given, dict):
        raise _damaged(path)
    return given


def _check_same(path: str, was: MadeWith, now: MadeWith) -> None:
    """Raise PromptCacheError, which names the first thing that differs, unless nothing does."""
    for name in (*now, *(was.keys() - now.keys())):
        if was.get(name) == now.get(name):
            continue
        if name == "weights":
            raise PromptCacheError(f"{path} was made with the weights of another checkpoint of this shape: {_CHOOSE}")
        raise PromptCacheError(
            f"{path} was made with {name:.40}={was.get(name)!r:.60}, this model has {now.get(name)!r:.60}: {_CHOOSE}"
        )


def _tokens(path: str, tensors: dict[str, Tensor], engine: Engine) -> list[int]:
    stored = tensors.get(_TOKENS)
    if stored is None or stored.dtype != torch.int64 or stored.dim() != 1 or not len(stored):
        raise _damaged(path)
    if len(stored) > engine.max_seq_len:
        raise PromptCacheError(
            f"{path} holds {len(stored)} tokens, more than max_seq_len={engine.max_seq_len}: build with a larger"
            " max_seq_len"
        )
    tokens: list[int] = stored.tolist()
    if min(tokens) < 0 or max(tokens) >= engine.model.params.vocab_size:
        raise _damaged(path)
    return tokens


def _row_like(engine: Engine, length: int) -> Tensor:
    """Of the shape and dtype that the rows of so many tokens have in each layer."""
    keys = engine.cache.keys[0]
    return torch.empty((keys.shape[0], length, keys.shape[3]), dtype=keys.dtype, device="meta")


def _kind(tensor: Tensor) -> tuple[torch.dtype, torch.Size]:
    return tensor.dtype, tensor.shape


def _names(layers: int) -> list[str]:
    """Those of the rows, in the order of `KVCache.read_prefix`."""
    return [f"layers.{layer}.{kind}" for kind in ("keys", "values") for layer in range(layers)]


def _sum(described: str, tensors: dict[str, Tensor]) -> str:
    """CRC-32 of what is said of the numbers, and of the numbers in the order of their names."""
    total = zlib.crc32(described.encode())
    for name in sorted(tensors):
        data: Any = tensors[name].reshape(-1).view(torch.uint8).numpy()
        total = zlib.crc32(data, zlib.crc32(name.encode(), total))
    return f"{total:08x}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _damaged(path: str) -> PromptCacheError:
    return PromptCacheError(f"{path} is damaged: remove it, and make it again")
