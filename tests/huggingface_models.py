"""Small random models of transformers, and folders of them as `save_pretrained` writes them."""

import shutil
from pathlib import Path
from typing import Any

import torch
from conftest import DEMO

SIZES = {"hidden_size": 96, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 6,
         "num_key_value_heads": 2, "max_position_embeddings": 64, "vocab_size": 1024}  # fmt: skip


def make(kind: str = "Llama", seed: int = 0, **config: Any) -> Any:
    """A model of LlamaForCausalLM, MistralForCausalLM or Qwen2ForCausalLM whose biases and norms are random too."""
    import transformers

    torch.manual_seed(seed)
    made = getattr(transformers, f"{kind}Config")(**{**SIZES, **config})
    model = getattr(transformers, f"{kind}ForCausalLM")(made).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.normal_(1.0 if "norm" in name else 0.0, 0.2)
            else:
                parameter.normal_(0, 1.5 * parameter.shape[1] ** -0.5)
        model.tie_weights()
    return model


def save(model: Any, folder: Path, **options: Any) -> Path:
    """The model in a folder, with the demo's tokenizer."""
    model.save_pretrained(folder, **options)
    shutil.copyfile(DEMO / "tokenizer.model", folder / "tokenizer.model")
    return folder
