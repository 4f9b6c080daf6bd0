"""The peers of the benchmarks: the same checkpoint in Hugging Face transformers, driven as its users drive it."""

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from transformers_peer import transformers_model


class Transformers:
    """transformers' `generate` on a folder in Meta's layout, in the checkpoint's dtype on the CPU."""

    name = "transformers"

    def __init__(self, folder: Path) -> None:
        params = json.loads((folder / "params.json").read_text())
        weights = torch.load(folder / "consolidated.00.pth", weights_only=True, mmap=True)
        params["vocab_size"] = weights["tok_embeddings.weight"].shape[0]
        self.model = transformers_model(weights, params)

    @torch.inference_mode()
    def generate(self, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        """Exactly `new_tokens` greedy tokens after each prompt, in one left-padded batch."""
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        out = self.model.generate(
            ids, attention_mask=mask, do_sample=False, max_new_tokens=new_tokens, min_new_tokens=new_tokens,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        return out[:, longest:].tolist()
