"""The flags that several commands share: how a model is built, and how tokens are chosen."""

import dataclasses
from typing import Any

from llama.cli.arguments import Flag
from llama.paths import FilePath
from llama.request import SamplingParams, default_of

MODEL = {
    "ckpt_dir": Flag(
        FilePath | None,
        None,
        "folder with consolidated.00.pth and params.json; else LLAMA_CKPT_DIR, else the bundled demo.",
    ),
    "tokenizer_path": Flag(
        FilePath | None, None, "tokenizer.model; else in the folder, LLAMA_TOKENIZER_PATH, beside the folder."
    ),
    "max_seq_len": Flag(int, 2048, "the most tokens of one sequence, prompt and completion."),
    "max_batch_size": Flag(int | None, None, "how many sequences are held at once; more than that take turns."),
    "model_parallel_size": Flag(int | None, None, "how many of torchrun's processes share one model; all if left out."),
    "seed": Flag(int | None, 1, "where all noise comes from; None takes another at each start."),
    "device": Flag(str | None, None, "cuda, mps or cpu; the first of these that is there if left out."),
    "dtype": Flag(str | None, None, "bfloat16, float16 or float32; the checkpoint's if the device is fast in it."),
    "quantize": Flag(str | None, None, "hold the matrices in int8 or int4; as they are stored if left out."),
    "kv_dtype": Flag(str | None, None, "hold the KV cache in fp8, in half the memory; as the weights if left out."),
    "threads": Flag(
        int | None, None, "how many threads a process uses on a CPU; as many as there are cores if left out."
    ),
    "compile": Flag(bool, False, "run the layers through torch.compile, which takes its time at the first steps."),
    "verify": Flag(bool, False, "compare the files with the checkpoint's checklist.chk first."),
    "max_step_tokens": Flag(int | None, None, "the most tokens of one step; long prompts are read in such chunks."),
}
_MEANING = {
    "temperature": "0 always takes the most probable token; higher is more varied.",
    "top_p": "sample from the most probable tokens that together have this probability.",
    "top_k": "sample from this many most probable tokens; 0 is off.",
    "min_p": "sample from tokens at least this many times as probable as the best; 0 is off.",
    "repetition_penalty": "makes tokens of the prompt and completion less probable; 1 is off.",
    "presence_penalty": "subtracted once from the logits of tokens in the completion.",
    "frequency_penalty": "subtracted each time from the logits of tokens in the completion.",
    "min_gen_len": "no end token, stop token or stop string ends it within so many tokens.",
    "max_gen_len": "the most tokens of a completion; up to max_seq_len if left out.",
    "stop": "a text that ends the completion, which is cut before it; may be given several times.",
    "stop_token_ids": "token ids that end the completion, such as 5,13.",
    "bad_words": "token sequences that are never produced, such as [[5,13],[7]].",
    "logit_bias": "numbers added to the logits of tokens, such as {5:-2.5}.",
    "n": "how many samples of each prompt.",
    "num_beams": "beam search with so many beams; 1 is off.",
    "length_penalty": "of beam search: above 0 favours longer texts.",
    "logprobs": "show the log-probability of each token.",
    "top_logprobs": "show so many of the most probable tokens at each place.",
}
SAMPLING = {
    field.name: Flag(
        field.type,
        default_of(field),
        _MEANING[field.name],
    )
    for field in dataclasses.fields(SamplingParams)
    if field.name != "seed"  # the seed of the model's flags, from which each request's is derived
}


def sampling_params(given: dict[str, Any]) -> SamplingParams:
    """The SamplingParams of the flags; a lone token stands for a list of one. Raises ParameterError."""
    tokens = given["stop_token_ids"]
    return SamplingParams(**{**given, "stop_token_ids": (tokens,) if isinstance(tokens, int) else tokens})
