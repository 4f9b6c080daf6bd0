"""What a user can cause and can mend: each message says what was found, what was expected and what to do."""

from llama.gate import one_line


class LlamaError(ValueError):
    """The base of every error that is the caller's to mend; commands print its message and exit with code 2.

    The message is one printable line wherever it is shown, whatever the file or name that it quotes.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class CheckpointError(LlamaError):
    """The checkpoint folder, its params.json or its weights are not what a Llama-2 checkpoint is."""


class TokenizerError(LlamaError):
    """The tokenizer file is missing, of another kind, or of another vocabulary than the weights."""


class PromptCacheError(LlamaError):
    """A file is no prompt cache, is damaged, or was made with another model, or none can be made."""


class PromptError(LlamaError):
    """A prompt or dialog cannot be run as it stands."""


class ParameterError(LlamaError):
    """A parameter is out of its range, or contradicts another."""


class DeviceError(LlamaError):
    """The device, the number of processes or the free memory does not allow what was asked for."""


class PeerError(LlamaError):
    """Another process of this run has ended, or cannot be reached."""


class NumericalError(LlamaError):
    """The model gave NaN or infinite logits."""
