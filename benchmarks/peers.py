"""The peers of the benchmarks: the same checkpoint in Hugging Face transformers and in llama.cpp."""

import ctypes
import json
import sys
from pathlib import Path

import numpy as np
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


class LlamaCpp:
    """llama.cpp's own functions on a GGUF file, through llama-cpp-python, with its cache in float16."""

    name = "llama.cpp"

    def __init__(self, path: Path, threads: int, max_seq_len: int, sequences: int) -> None:
        import llama_cpp

        self._lib = llama_cpp
        self._quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)  # kept: the library holds a pointer
        llama_cpp.llama_log_set(self._quiet, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        options = llama_cpp.llama_model_default_params()
        options.n_gpu_layers = 0
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), options)
        context = llama_cpp.llama_context_default_params()
        context.n_seq_max = sequences
        context.n_ctx = max_seq_len * sequences
        context.n_batch, context.n_ubatch = 4096, 512
        context.n_threads = context.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, context)
        self._batch = llama_cpp.llama_batch_init(4096, 0, 1)
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))

    def generate(self, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        """Exactly `new_tokens` greedy tokens after each prompt; all prompts are read in one batch."""
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), False)
        rows = [(t, at, s, at == len(p) - 1) for s, p in enumerate(prompts) for at, t in enumerate(p)]
        out: list[list[int]] = [[token] for token in self._decode(rows)]
        for step in range(new_tokens - 1):
            rows = [(out[s][-1], len(p) + step, s, True) for s, p in enumerate(prompts)]
            for own, token in zip(out, self._decode(rows), strict=True):
                own.append(token)
        return out

    def logits(self, tokens: list[int]) -> np.ndarray:
        """What it says after each token of one sequence: (tokens, vocabulary)."""
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), False)
        return np.stack(self._computed([(token, at, 0, True) for at, token in enumerate(tokens)]))

    def _decode(self, rows: list[tuple[int, int, int, bool]]) -> list[int]:
        """The best token of each row whose logits are wanted."""
        return [int(row.argmax()) for row in self._computed(rows)]

    def _computed(self, rows: list[tuple[int, int, int, bool]]) -> list[np.ndarray]:
        """Compute rows (token, position, sequence, whether its logits are wanted); the logits of each such row."""
        batch = self._batch
        for i, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = sequence
        batch.n_tokens = len(rows)
        if self._lib.llama_decode(self._context, batch):
            raise RuntimeError("llama_decode failed")
        shape = (self._vocabulary,)
        logits = (self._lib.llama_get_logits_ith(self._context, i) for i, row in enumerate(rows) if row[3])
        return [np.ctypeslib.as_array(pointer, shape=shape).copy() for pointer in logits]
