"""The body of a request → what it asks for, checked. Runs beside the event loop: reading may take a while."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llama import openai
from llama.chat import Dialog
from llama.errors import LlamaError, ParameterError
from llama.infilling import Infilling
from llama.jobs import Job
from llama.request import SamplingParams
from llama.server.limits import CHARACTERS, Limits, check_params
from llama.server.refusals import Refusal, refusal_of
from llama.wording import utf8

if TYPE_CHECKING:
    from llama.generation import Llama


@dataclass(frozen=True, slots=True)
class Question:
    """What a body asks for."""

    chat: bool
    prompt: str | Dialog | Infilling
    params: SamplingParams
    stream: bool
    include_usage: bool


def read(data: bytes, chat: bool, model: str, limits: Limits) -> Question:
    """What a body asks of the model of that name. Raises Refusal."""
    with _refusing():
        text = utf8(data, "the body is ")
        try:
            body = openai.parse(text)
        except ValueError as error:
            raise Refusal(400, f"the body is not JSON: {error!s:.200}") from None
        return _question(body, chat, model, limits)


def job(question: Question, llama: "Llama", limits: Limits) -> Job:
    """What the engine is to do for a question: its prompt as tokens, its form compiled. Raises Refusal."""
    with _refusing():
        made = llama.job(question.prompt, question.params)
    if made.samples and (length := len(made.samples[0].request.prompt)) > limits.prompt_tokens:
        raise _too_long(f"{length} tokens", limits)
    return made


@contextmanager
def _refusing() -> Iterator[None]:
    """What is wrong with a body is a Refusal."""
    try:
        yield
    except LlamaError as error:
        raise refusal_of(error) from None


def _question(body: Any, chat: bool, model: str, limits: Limits) -> Question:
    if not isinstance(body, dict):
        raise Refusal(400, f"the body is a JSON {type(body).__name__}, not an object")
    if body.get("model") not in (None, model):
        asked = f"{body['model']!r:.60}"
        raise Refusal(404, f"the model {asked} does not exist: this service has {model!r}", "model_not_found")
    stream, include_usage = _streaming(body)
    prompt, given, theirs = openai.read_body(body, chat)
    _check_characters(prompt, limits)
    with openai.in_their_words(theirs):
        params = SamplingParams(**{"max_gen_len": limits.completion_tokens, **given})
        check_params(params, limits)
    return Question(chat, prompt, params, stream, include_usage)


def _streaming(body: dict[str, Any]) -> tuple[bool, bool]:
    """Whether events are asked for, and the usage as the last of them; both are taken out of the body."""
    stream, options = body.pop("stream", None), body.pop("stream_options", None)
    if stream not in (None, True, False):
        raise ParameterError(f"stream={stream!r:.60} is out of range: expected true or false")
    if options is None:
        return bool(stream), False
    if not isinstance(options, dict) or not stream:
        raise ParameterError("stream_options is an object beside stream=true: expected nothing else")
    openai.refuse_unknown(options, ("include_usage",), "stream_options")
    usage = options.get("include_usage")
    if usage not in (None, True, False):
        raise ParameterError(f"stream_options.include_usage={usage!r:.60} is out of range: expected true or false")
    return True, bool(usage)


def _check_characters(prompt: Any, limits: Limits) -> None:
    """Raise Refusal for a prompt that is surely too long before it is made into tokens, which takes its time."""
    if (count := sum(map(len, _texts(prompt)))) > CHARACTERS * limits.prompt_tokens:
        raise _too_long(f"{count} characters", limits)


def _texts(prompt: Any) -> Sequence[str]:
    """The texts of a prompt; what is none is refused elsewhere."""
    if isinstance(prompt, Infilling):
        return prompt.prefix, prompt.suffix
    if isinstance(prompt, str):
        return (prompt,)
    contents = [message.get("content") for message in prompt if isinstance(message, dict)]
    return [content for content in contents if isinstance(content, str)]


def _too_long(length: str, limits: Limits) -> Refusal:
    said = f"the prompt has {length}, more than the {limits.prompt_tokens} tokens that one may have here: shorten it"
    return Refusal(400, said, "context_length_exceeded")
