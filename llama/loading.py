"""A checkpoint folder and a tokenizer's path → a model on this machine, and its tokenizer: what `build` decides."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from llama import log, parallel
from llama.chat import ChatFormat
from llama.checkpoint import loader, placing
from llama.checkpoint.fingerprint import fingerprint_of
from llama.checkpoint.source import Source, open_source
from llama.checkpoint.verify import verify
from llama.device import choose_device, default_threads, parse_dtype
from llama.engine.draft_model import DraftModel
from llama.engine.drafts import Lookup, Speculation
from llama.errors import CheckpointError, DeviceError, TokenizerError
from llama.kernels.decode_step import rows_alike
from llama.kernels.dispatch import why_not
from llama.model.args import ModelArgs
from llama.model.kv_cache import check_kv_dtype
from llama.model.stages import device_of
from llama.model.transformer import Transformer
from llama.options import LOOKUP, RunOptions
from llama.placement import Placement
from llama.text.chat_files import chat_format
from llama.text.tokenizer_files import open_tokenizer
from llama.tokenizer import BaseTokenizer

LLAMA_2_VOCABULARY = 32000


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model and what belongs to it."""

    model: Transformer
    tokenizer: BaseTokenizer
    files: tuple[Path, ...]  # of the checkpoint
    fingerprint: Callable[[], str]  # of its weights
    end_ids: tuple[int, ...]  # the tokens that end a text, beside the tokenizer's own
    chat: ChatFormat


def load(folder: Path, tokenizer_path: str, options: RunOptions) -> Loaded:
    """The model of a checkpoint folder, as the options say, and its tokenizer."""
    device, dtype = _device(options), parse_dtype(options.dtype)
    check_kv_dtype(options.kv_dtype, device)
    if options.speculate and device.type != "cpu":
        raise DeviceError(
            f"speculate={options.speculate!r} drafts tokens for a model on a CPU only, not on {device}: leave it out"
        )
    if options.threads is not None or device.type == "cpu":
        torch.set_num_threads(options.threads or default_threads())
    parallel.initialize(device, options.model_parallel_size)
    source = open_source(folder)
    if source.window is not None and options.max_seq_len > source.window:
        raise CheckpointError(
            f"{folder} looks back {source.window} tokens and no further (sliding_window), which is not computed here:"
            f" choose max_seq_len up to {source.window}, where that makes no difference"
        )
    if options.verify and parallel.local_rank() == 0:  # once a machine; where it fails, torchrun ends the others
        verify(folder)
    tokenizer = open_tokenizer(tokenizer_path)
    args = replace(
        source.args, vocab_size=_check_vocabulary(source, tokenizer),
        max_seq_len=options.max_seq_len, max_batch_size=options.max_batch_size,
    )  # fmt: skip
    fingerprint = fingerprint_of(source.files)
    placement = _placement(args, options, source, device, dtype)
    model = loader.load(source, args, options, device, dtype, placement)
    if options.compile:
        from llama.model.compiled import compile_layers  # it brings in half of a compiler

        compile_layers(model)
    if (model.weight_format or device.type == "cuda") and (reason := why_not(device)):
        log.say(reason)
    for note in source.notes:
        log.say(note)
    if source.ignored:
        log.say(f"ignored in params.json: {', '.join(source.ignored)}")
    if source.trained_length is not None and options.max_seq_len > source.trained_length:
        log.say(
            f"max_seq_len={options.max_seq_len} is more than the {source.trained_length} positions that this model was"
            " made for: text beyond them may be bad"
        )
    return Loaded(model, tokenizer, (*source.described_by, *source.files), fingerprint, source.end_ids,
                  chat_format(folder, options.chat_template, tokenizer))  # fmt: skip


def _device(options: RunOptions) -> torch.device:
    """The device of the model, or the main one of those that it is laid over."""
    if not options.places:
        return choose_device(options.device)
    main = placing.main_device(options)
    placing.check_here(main)
    return torch.device(main)


def _placement(
    args: ModelArgs, options: RunOptions, source: Source, device: torch.device, dtype: torch.dtype | None
) -> Placement | None:  # fmt: skip
    """Where the model goes, if several devices may share it."""
    if not options.places:
        return None
    placement = placing.place(args, options, source, device, dtype)
    for name in placement.devices:
        check_kv_dtype(options.kv_dtype, device_of(name))
    return placement


def speculation(model: Transformer, options: RunOptions, max_step_tokens: int) -> Speculation | None:
    """What drafts tokens for the model, if the options ask for it."""
    if options.speculate is None:
        return None
    drafter = Lookup() if options.speculate == LOOKUP else _draft_model(model, options, max_step_tokens)
    return Speculation(options.speculate, drafter, options.draft_tokens, min(rows_alike(model), max_step_tokens))


def _draft_model(model: Transformer, options: RunOptions, max_step_tokens: int) -> DraftModel:
    """The model that `speculate` names, with room for the same sequences."""
    folder, sizes = Path(str(options.speculate)), model.params
    source = open_source(folder)
    if source.vocab_size != sizes.vocab_size:
        raise CheckpointError(
            f"{folder} cannot draft tokens for this model: it has {source.vocab_size} tokens, not {sizes.vocab_size};"
            " use a smaller model of the same vocabulary"
        )
    if source.window is not None and sizes.max_seq_len > source.window:
        raise CheckpointError(
            f"{folder} looks back {source.window} tokens and no further: choose max_seq_len up to that"
        )
    args = replace(source.args, vocab_size=sizes.vocab_size, max_seq_len=sizes.max_seq_len,
                   max_batch_size=sizes.max_batch_size)  # fmt: skip
    own = replace(options, quantize=None if source.args.quantize else options.quantize)
    drafting = loader.load(source, args, own, model.device, parse_dtype(options.dtype))
    cost = _weight_bytes(drafting) / _weight_bytes(model)
    return DraftModel(drafting, sizes.max_batch_size, sizes.max_seq_len, max_step_tokens, cost)


def _weight_bytes(model: Transformer) -> int:
    """Those that a token needs: its time is that of reading them."""
    return sum(weight.nbytes for name, weight in model.named_parameters() if not name.startswith("tok_embeddings"))


def chosen(model: Transformer, options: RunOptions) -> str:
    """What was chosen, for the one line that `Llama.build` says."""
    mp, world = parallel.model_parallel_size(), parallel.world_size()
    split = f"split over {mp} processes" if mp > 1 else "1 process"
    replicas = f" × {world // mp} replicas" if world > mp else ""
    held = model.weight_format or str(model.output.weight.dtype).removeprefix("torch.")
    bits = f"{held} weights, " if held != str(model.dtype).removeprefix("torch.") else ""
    cache = f", cache in {model.kv_dtype}" if model.kv_dtype else ""
    drafts = f", speculate={options.speculate}" if options.speculate else ""
    where = str(model.device) if model.placement is None else model.placement.words
    return (
        f"{bits}{str(model.dtype).removeprefix('torch.')}{cache} on {where}, {split}{replicas},"
        f" max_seq_len={options.max_seq_len}, max_batch_size={options.max_batch_size}{drafts}"
    )


def _check_vocabulary(source: Source, tokenizer: BaseTokenizer) -> int:
    """The vocabulary size, on which params.json (−1: not said), the weights and the tokenizer must agree.

    Where tables are padded, the tokenizer may have fewer tokens.
    """
    declared, weights, words = source.args.vocab_size, source.vocab_size, tokenizer.n_words
    if weights == declared and source.pads_vocabulary and words <= weights:
        return weights
    if weights == words and declared in (-1, words):
        return words
    said, described = "nothing" if declared == -1 else str(declared), source.described_by[0].name
    facts = (
        f"the weights have {weights} tokens, the tokenizer {tokenizer.model_path} has {words}, {described} says {said}"
    )
    if declared == weights or (declared == -1 and weights == LLAMA_2_VOCABULARY):
        raise TokenizerError(f"{facts}: the tokenizer looks wrong; use the one that came with these weights")
    if declared == words or (declared == -1 and words == LLAMA_2_VOCABULARY):
        raise CheckpointError(f"{facts}: the weights look wrong; use those that belong to this tokenizer")
    raise TokenizerError(f"{facts}: they do not belong together, and the tokenizer looks wrong; use the weights' own")
