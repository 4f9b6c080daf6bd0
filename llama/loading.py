"""A checkpoint folder and a tokenizer's path → a model on this machine, and its tokenizer: what `build` decides."""

from pathlib import Path

import torch

from llama import parallel
from llama.checkpoint import memory
from llama.checkpoint.checklist import verify as verify_checklist
from llama.checkpoint.files import find_shards, open_shards, vocabulary
from llama.checkpoint.loader import load as load_model
from llama.checkpoint.params import read_params
from llama.device import choose_device, default_threads, parse_dtype
from llama.errors import CheckpointError, TokenizerError
from llama.kernels.dispatch import why_not
from llama.model.kv_cache import check_kv_dtype
from llama.model.transformer import Transformer
from llama.quantization.formats import check_format
from llama.tokenizer import Tokenizer

LLAMA_2_VOCABULARY = 32000


def load(
    folder: Path, tokenizer_path: str, max_seq_len: int, max_batch_size: int, model_parallel_size: int | None,
    *, device: str | torch.device | None, dtype: str | torch.dtype | None, quantize: str | None, kv_dtype: str | None,
    threads: int | None, compile: bool, verify: bool, max_step_tokens: int | None,
) -> tuple[Transformer, Tokenizer, int]:  # fmt: skip
    """The model, the tokenizer, and the most tokens of a step; the parameters are those of `Llama.build`."""
    memory.check_sizes(
        max_seq_len=max_seq_len,
        max_batch_size=max_batch_size,
        max_step_tokens=1 if max_step_tokens is None else max_step_tokens,
        threads=1 if threads is None else threads,
    )
    check_format(quantize)
    place, wanted_dtype = choose_device(device), parse_dtype(dtype)
    check_kv_dtype(kv_dtype, place)
    if threads is not None or place.type == "cpu":
        torch.set_num_threads(threads or default_threads())
    parallel.initialize(place, model_parallel_size)
    find_shards(folder)  # a missing file is said before what is in another
    args, ignored = read_params(folder)
    if verify and parallel.local_rank() == 0:  # once a machine; where it fails, torchrun ends the others
        verify_checklist(folder, progress=parallel.rank() == 0)
    tokenizer = Tokenizer(tokenizer_path)
    shards = open_shards(folder)
    args.vocab_size = _check_vocabulary(args.vocab_size, vocabulary(shards, folder), tokenizer)
    args.max_seq_len, args.max_batch_size, args.kv_dtype = max_seq_len, max_batch_size, kv_dtype
    step_tokens = max_step_tokens or memory.step_tokens(place)
    model = load_model(folder, shards, args, place, wanted_dtype, step_tokens, quantize)
    if compile:
        from llama.model.compiled import compile_layers  # it brings in half of a compiler

        compile_layers(model)
    if (args.quantize or place.type == "cuda") and (reason := why_not(place)):
        parallel.say(f"llama: {reason}")
    if ignored:
        parallel.say(f"llama: ignored in params.json: {', '.join(ignored)}")
    return model, tokenizer, step_tokens


def chosen(model: Transformer) -> str:
    """What was chosen, for the one line that `Llama.build` says."""
    args, mp, world = model.params, parallel.model_parallel_size(), parallel.world_size()
    split = f"split over {mp} processes" if mp > 1 else "1 process"
    replicas = f" × {world // mp} replicas" if world > mp else ""
    bits = f"{args.quantize} weights, " if args.quantize else ""
    cache = f", cache in {args.kv_dtype}" if args.kv_dtype else ""
    return (
        f"{bits}{str(model.dtype).removeprefix('torch.')}{cache} on {model.device}, {split}{replicas},"
        f" max_seq_len={args.max_seq_len}, max_batch_size={args.max_batch_size}"
    )


def _check_vocabulary(declared: int, weights: int, tokenizer: Tokenizer) -> int:
    """The vocabulary size, on which params.json (−1: not said), the weights and the tokenizer must agree."""
    found = tokenizer.n_words
    if weights == found and declared in (-1, found):
        return found
    said = "nothing" if declared == -1 else str(declared)
    facts = (
        f"the weights have {weights} tokens, the tokenizer {tokenizer.model_path} has {found}, params.json says {said}"
    )
    if declared == weights or (declared == -1 and weights == LLAMA_2_VOCABULARY):
        raise TokenizerError(f"{facts}: the tokenizer looks wrong; use the one that came with these weights")
    if declared == found or (declared == -1 and found == LLAMA_2_VOCABULARY):
        raise CheckpointError(f"{facts}: the weights look wrong; use those that belong to this tokenizer")
    raise TokenizerError(f"{facts}: they do not belong together, and the tokenizer looks wrong; use the weights' own")
