"""Why a request is not answered, as OpenAI's error objects say it."""

from dataclasses import dataclass, field

from llama.errors import LlamaError, ParameterError, PromptError

_CHARACTERS = 1000  # of an error that quotes a request


@dataclass(slots=True)
class Refusal(Exception):
    """An answer that is an error: its HTTP status, and what OpenAI's object says."""

    status: int
    message: str
    code: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def body(self) -> dict[str, dict[str, str | None]]:
        return {"error": {"message": self.message, "type": self._type, "param": None, "code": self.code}}

    @property
    def _type(self) -> str:
        if self.status == 429:
            return "rate_limit_error"
        return "server_error" if self.status >= 500 else "invalid_request_error"


def refusal_of(error: LlamaError) -> Refusal:
    """What is wrong with a request is its sender's to mend; all else, such as logits that are NaN, is not."""
    said = str(error)
    said = said if len(said) <= _CHARACTERS else f"{said[:_CHARACTERS]} …"
    return Refusal(400 if isinstance(error, PromptError | ParameterError) else 500, said)
