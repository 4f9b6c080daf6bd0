"""What the service chose: `ServeOptions`, the flags of `llama serve` beside the model's."""

from dataclasses import dataclass, field

from llama.errors import ParameterError
from llama.options import check_sizes


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """Where the service listens, who may ask and how much; checked where it is made (raises ParameterError).

    The help texts are those of the command's flags.
    """

    host: str = field(
        default="127.0.0.1", metadata={"help": "the address to listen at; 0.0.0.0 is every one of this machine."}
    )
    port: int = field(default=8000, metadata={"help": "the port to listen at; 0 is any that is free."})
    api_key: str | None = field(
        default=None,
        metadata={"help": "what requests must bring; else LLAMA_API_KEY, which no other user of this machine sees."},
    )
    allow_unauthenticated: bool = field(
        default=False, metadata={"help": "listen beyond this machine though there is no key."}
    )
    max_queue: int = field(
        default=256, metadata={"help": "how many samples may wait for those that run; more are told to come later."}
    )
    max_prompt_tokens: int | None = field(
        default=None, metadata={"help": "the most tokens of a prompt; up to max_seq_len if left out."}
    )
    max_completion_tokens: int | None = field(
        default=None, metadata={"help": "the most tokens of a completion; up to max_seq_len if left out."}
    )
    drain_seconds: float = field(
        default=30, metadata={"help": "how long what still runs may go on when the service is ended."}
    )

    def __post_init__(self) -> None:
        if type(self.port) is not int or not 0 <= self.port < 65536:
            raise ParameterError(f"port={self.port!r} is out of range: expected an integer from 0 (any) to 65535")
        if self.max_queue != 0:
            check_sizes(max_queue=self.max_queue)
        optional = {"max_prompt_tokens": self.max_prompt_tokens, "max_completion_tokens": self.max_completion_tokens}
        check_sizes(**{name: value for name, value in optional.items() if value is not None})
        if type(self.drain_seconds) not in (int, float) or not 0 <= self.drain_seconds <= 1e6:
            raise ParameterError(f"drain_seconds={self.drain_seconds!r} is out of range: expected 0 to 1e6")
