"""What one request may ask for, and what one connection may take. The numbers without an option are here."""

import json
from dataclasses import dataclass

from llama.errors import ParameterError
from llama.request import SamplingParams

BODY_BYTES = 4 << 20  # of one request
BODIES_BYTES = 64 << 20  # of all that are being read at once
UNREAD_BYTES = 64 << 20  # of a body that is too large: so many are thrown away before it is refused
HEAD_BYTES = 16 << 10  # of a request's line and headers
HEAD_SECONDS = 10  # until they are there, from the connection's beginning or the response before
BODY_SECONDS = 30  # until all of it is there
STALL_SECONDS = 30  # for which a reader may take nothing of what waits for it
CONNECTIONS = 512  # at once: one more takes the place of the idlest one
READERS = 2  # bodies that are made into tokens at once
CHARACTERS = 128  # of a prompt for each token that it may have: no vocabulary has longer pieces
_MOST = {"top_logprobs": 20, "stop": 16, "stop_token_ids": 256, "bad_words": 256, "logit_bias": 1024}
_STOP_CHARACTERS = 1000
_BAD_WORD_TOKENS = 64
_FORM_CHARACTERS = 64 << 10  # of a form as JSON
_LOGPROBS = 1 << 18  # that a request may get: each takes some hundred bytes until the answer is sent


@dataclass(frozen=True, slots=True)
class Limits:
    """What the options say."""

    prompt_tokens: int
    completion_tokens: int
    places: int  # samples that run or wait


def check_params(params: SamplingParams, limits: Limits) -> None:
    """Raise ParameterError where a request would cost more memory, or time between steps, than its share."""
    tokens = limits.completion_tokens if params.max_gen_len is None else params.max_gen_len
    if tokens > limits.completion_tokens:
        raise ParameterError(
            f"max_gen_len={tokens} is more than the {limits.completion_tokens} tokens that a completion may have here"
        )
    if params.n > limits.places:
        raise ParameterError(f"n={params.n} is more than the {limits.places} samples that may run or wait here")
    if (count := params.n * tokens * params.top_logprobs) > _LOGPROBS:
        raise ParameterError(
            f"n={params.n} samples of up to {tokens} tokens with top_logprobs={params.top_logprobs} are {count}"
            f" log-probabilities: at most {_LOGPROBS} are given here; lower one of them, or max_gen_len"
        )
    for name, most in _MOST.items():
        value = getattr(params, name)
        if (count := value if isinstance(value, int) else len(value)) > most:
            raise ParameterError(f"{name} asks for {count}: at most {most} are given here")
    if max(map(len, params.stop), default=0) > _STOP_CHARACTERS:
        raise ParameterError(f"stop has a text of more than {_STOP_CHARACTERS} characters")
    if max(map(len, params.bad_words), default=0) > _BAD_WORD_TOKENS:
        raise ParameterError(f"bad_words has a sequence of more than {_BAD_WORD_TOKENS} tokens")
    if params.form and (size := len(json.dumps(params.form[1], ensure_ascii=False))) > _FORM_CHARACTERS:
        raise ParameterError(f"{params.form[0]} has {size} characters: at most {_FORM_CHARACTERS} are compiled here")
