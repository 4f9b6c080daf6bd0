"""The Llama-2 model: its architecture, attention, linear layers and KV cache."""

from llama.model.args import ModelArgs
from llama.model.transformer import Transformer

__all__ = ["ModelArgs", "Transformer"]
