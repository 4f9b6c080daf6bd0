"""What callers get: the dicts of completions, answers and scores."""

from collections.abc import Mapping
from typing import Any, NamedTuple, TypedDict

from typing_extensions import NotRequired

from llama.chat import Message
from llama.request import FinishReason


class TopLogprob(TypedDict):
    token: int
    piece: str
    logprob: float


class Result(TypedDict, total=False):
    """What every prediction carries; `tokens`, `token_ids` and `logprobs` where asked, `samples` where n > 1."""

    tokens: list[str]
    token_ids: list[int]
    logprobs: list[float]
    top_logprobs: list[list[TopLogprob]]
    finish_reason: FinishReason
    seed: int | None  # None: of a refused dialog, where none was given
    prompt_tokens: int
    completion_tokens: int
    time_to_first_token: float | None  # seconds since the request was added
    time: float  # seconds in all
    drafted_tokens: int  # where the build speculates: how many drafts were verified,
    accepted_tokens: int  # how many of them were right,
    tokens_per_step: float  # and how many tokens a step made on average


class CompletionPrediction(Result, total=False):
    generation: str
    samples: list["CompletionPrediction"]


class InfillingPrediction(Result, total=False):
    generation: str  # what belongs in the gap
    full_text: str  # the prefix, that, and the suffix
    samples: list["InfillingPrediction"]


class ChatPrediction(Result, total=False):
    generation: Message
    samples: list["ChatPrediction"]


class Score(TypedDict):
    """A text's tokens and log p(token t | tokens before t), the first None; perplexity is None for a lone token.

    `bits_per_byte` is there where a text was scored by windows; None for an empty text.
    """

    tokens: list[int]
    pieces: list[str]
    logprobs: list[float | None]
    top_logprobs: list[list[TopLogprob] | None] | None
    perplexity: float | None
    bits_per_byte: NotRequired[float | None]


class TokenScores(NamedTuple):
    """Log p of each token that was asked for, and whether each is the most probable one in its place."""

    logprobs: list[float]
    is_greedy: bool


def samples_of(prediction: Mapping[str, Any]) -> list[Any]:
    """All samples of a prompt: a prediction that is its only one stands for itself."""
    samples: list[Any] = prediction.get("samples", [prediction])
    return samples


def completion_tokens(prediction: Mapping[str, Any]) -> int:
    """Of all samples."""
    return sum(sample["completion_tokens"] for sample in samples_of(prediction))
