"""What a request must be, for an engine of given sizes to run it."""

from llama.errors import ParameterError, PromptError
from llama.request import Request


def check_request(request: Request, vocab_size: int, max_seq_len: int, slots: int) -> None:
    """Raise PromptError or ParameterError where a request can never run."""
    _check_prompt(request, vocab_size, max_seq_len)
    params, name = request.params, request.name
    if params.num_beams > slots:
        raise ParameterError(
            f"num_beams={params.num_beams} is more than max_batch_size={slots}: lower it, or build with a larger"
            " max_batch_size"
        )
    if params.num_beams > 1 and request.prompt_logprobs:
        raise ParameterError(f"{name}: num_beams={params.num_beams} with echo and logprobs: score the prompt apart")
    listed = {*params.logit_bias, *params.stop_token_ids, *(t for word in params.bad_words for t in word)}
    if listed and max(listed) >= vocab_size:
        raise ParameterError(f"{name}: token {max(listed)} in its parameters; expected ids from 0 to {vocab_size - 1}")


def _check_prompt(request: Request, vocab_size: int, max_seq_len: int) -> None:
    prompt, name = request.prompt, request.name
    if not prompt:
        raise PromptError(f"{name} has no tokens: begin it with the tokenizer's bos_id")
    if set(map(type, prompt)) != {int} or min(prompt) < 0 or max(prompt) >= vocab_size:
        wrong = next(t for t in prompt if type(t) is not int or not 0 <= t < vocab_size)
        raise PromptError(f"{name} has token {wrong!r}: expected ids from 0 to {vocab_size - 1}")
    generates = request.params.max_gen_len != 0
    if len(request.computed) + generates > max_seq_len:
        problem = "which leaves no room to generate within" if generates else "more than"
        raise PromptError(
            f"{name} has {len(prompt)} tokens, {problem} max_seq_len={max_seq_len}: shorten it, or build with a larger"
            " max_seq_len"
        )
