"""A runner for Llama-2 checkpoints in Meta's layout."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llama.chat import Dialog, Message, Role
    from llama.errors import LlamaError
    from llama.generation import Llama
    from llama.model import ModelArgs, Transformer
    from llama.predictions import ChatPrediction, CompletionPrediction
    from llama.request import SamplingParams
    from llama.script import in_a_shell, show
    from llama.tokenizer import StreamDecoder, Tokenizer

__version__ = "0.2.0"

_HOMES = {
    "Llama": "generation", "CompletionPrediction": "output", "ChatPrediction": "output", "ModelArgs": "model",
    "Transformer": "model", "SamplingParams": "request", "Tokenizer": "tokenizer", "StreamDecoder": "tokenizer",
    "Dialog": "chat", "Message": "chat", "Role": "chat", "LlamaError": "errors",
    "in_a_shell": "script", "show": "script",
}  # fmt: skip
__all__ = ["ChatPrediction", "CompletionPrediction", "Dialog", "Llama", "LlamaError", "Message", "ModelArgs", "Role",
           "SamplingParams", "StreamDecoder", "Tokenizer", "Transformer", "__version__", "in_a_shell",
           "show"]  # fmt: skip


def __getattr__(name: str) -> object:
    """Import a public name at its first use: a command that needs no torch does not wait for it."""
    if name not in _HOMES:
        raise AttributeError(f"module 'llama' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"llama.{_HOMES[name]}"), name)
