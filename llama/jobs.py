"""`Job`: one prompt of a call, and the prediction that its finished samples make."""

from dataclasses import dataclass, field
from typing import TypeVar

from llama.chat import REFUSAL, Dialog
from llama.errors import LlamaError
from llama.infilling import Infilling
from llama.output import Output
from llama.predictions import ChatPrediction, CompletionPrediction, InfillingPrediction
from llama.request import Prompt, SamplingParams

P = TypeVar("P", CompletionPrediction, ChatPrediction, InfillingPrediction)


@dataclass(slots=True)
class Job:
    """A prompt's samples: none where nothing is run, as the dialog is refused or `rejection` says what is wrong."""

    params: SamplingParams
    index: int  # of the prompt in its call
    samples: list[Output] = field(default_factory=list)
    rejection: LlamaError | None = None

    @property
    def ended(self) -> bool:
        return all(sample.ended for sample in self.samples)

    @property
    def error(self) -> LlamaError | None:
        """Why the prompt has no prediction: what was wrong with it, or the first error that a sample met."""
        return self.rejection or next((s.request.error for s in self.samples if s.request.error), None)

    def take(self) -> str:
        """The text of the first sample since the last take."""
        return self.samples[0].take()


def prediction(
    job: Job, prompt: str | Prompt | Dialog | Infilling
) -> CompletionPrediction | ChatPrediction | InfillingPrediction:
    """What came of a text, a dialog or a gap."""
    if isinstance(prompt, Infilling):
        return infilled(job, prompt)
    return completion(job) if isinstance(prompt, str | Prompt) else answer(job)


def completion(job: Job) -> CompletionPrediction:
    # mypy: a subtype of Result might bring another `samples`; what `result` makes has none.
    predictions: list[CompletionPrediction] = [
        {"generation": s.text, **s.result()}  # type: ignore[typeddict-item]
        for s in job.samples
    ]
    return _with_samples(predictions)


def infilled(job: Job, infilling: Infilling) -> InfillingPrediction:
    predictions: list[InfillingPrediction] = [
        {"generation": s.text, "full_text": infilling.prefix + s.text + infilling.suffix, **s.result()}  # type: ignore[typeddict-item]  # as there
        for s in job.samples
    ]
    return _with_samples(predictions)


def answer(job: Job) -> ChatPrediction:
    """The assistant's message, or the refusal of a dialog that was not run."""
    if not job.samples:
        return _refused(job.params)
    predictions: list[ChatPrediction] = [
        {"generation": {"role": "assistant", "content": s.text}, **s.result()}  # type: ignore[typeddict-item]  # as there
        for s in job.samples
    ]
    return _with_samples(predictions)


def _with_samples(predictions: list[P]) -> P:
    """The prediction of the first sample; with several, `samples` has them all."""
    return {**predictions[0], "samples": predictions} if len(predictions) > 1 else predictions[0]


def _refused(params: SamplingParams) -> ChatPrediction:
    prediction: ChatPrediction = {"generation": {"role": "assistant", "content": REFUSAL}}
    if params.logprobs:
        prediction |= {"tokens": [], "token_ids": [], "logprobs": []}
    return {
        **prediction, "finish_reason": "refused", "seed": params.seed, "prompt_tokens": 0, "completion_tokens": 0,
        "time_to_first_token": None, "time": 0.0,
    }  # fmt: skip
