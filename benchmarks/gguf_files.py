"""A random checkpoint of `models.py` as llama.cpp reads it: a GGUF file in bfloat16, and quantised copies of it.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The order of each head's numbers stays Meta's, which
is the one that llama.cpp's "llama" architecture turns.
"""

import ctypes
import json
from pathlib import Path

import torch
from sentencepiece import SentencePieceProcessor

from llama import ModelArgs

TOP = {"tok_embeddings": "token_embd", "norm": "output_norm", "output": "output"}
LAYER = {
    "attention.wq": "attn_q", "attention.wk": "attn_k", "attention.wv": "attn_v", "attention.wo": "attn_output",
    "feed_forward.w1": "ffn_gate", "feed_forward.w2": "ffn_down", "feed_forward.w3": "ffn_up",
    "attention_norm": "attn_norm", "ffn_norm": "ffn_norm",
}  # fmt: skip
PRECISIONS = {"bf16": None, "int8": "Q8_0", "int4": "Q4_0"}  # ours → the name of llama.cpp's format


def gguf_name(name: str) -> str:
    """layers.3.attention.wq.weight → blk.3.attn_q.weight."""
    parts = name.removesuffix(".weight").split(".")
    if parts[0] != "layers":
        return f"{TOP[parts[0]]}.weight"
    return f"blk.{parts[1]}.{LAYER['.'.join(parts[2:])]}.weight"


def make_gguf(folder: Path, precision: str) -> Path:
    """The checkpoint in `folder` as a GGUF file beside its own, made where it is not there."""
    target = folder / f"model-{precision}.gguf"
    if target.exists():
        return target
    partial = target.with_suffix(".partial")
    if precision == "bf16":
        _write(folder, partial)
    else:
        _quantize(make_gguf(folder, "bf16"), partial, PRECISIONS[precision])
    partial.rename(target)
    return target


def _write(folder: Path, target: Path) -> None:
    import gguf

    args = ModelArgs(**json.loads((folder / "params.json").read_text()))
    writer = gguf.GGUFWriter(target, "llama")
    writer.add_context_length(2048)
    writer.add_embedding_length(args.dim)
    writer.add_block_count(args.n_layers)
    writer.add_feed_forward_length(args.hidden_dim)
    writer.add_head_count(args.n_heads)
    writer.add_head_count_kv(args.kv_heads)
    writer.add_rope_dimension_count(args.head_dim)
    writer.add_layer_norm_rms_eps(args.norm_eps)
    writer.add_vocab_size(args.vocab_size)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    _add_tokenizer(writer, folder / "tokenizer.model")
    weights = torch.load(folder / "consolidated.00.pth", weights_only=True, mmap=True)
    for name, tensor in weights.items():
        if tensor.dim() == 1:
            writer.add_tensor(gguf_name(name), tensor.float().numpy())
        else:
            raw = tensor.view(torch.uint8).numpy()  # (rows, 2 · columns) bytes
            writer.add_tensor(gguf_name(name), raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tokenizer(writer, path: Path) -> None:  # type: ignore[no-untyped-def]
    import gguf

    model = SentencePieceProcessor(model_file=str(path))
    kinds = [(model.is_unknown, gguf.TokenType.UNKNOWN), (model.is_control, gguf.TokenType.CONTROL),
             (model.is_byte, gguf.TokenType.BYTE), (lambda token: True, gguf.TokenType.NORMAL)]  # fmt: skip
    tokens = range(model.vocab_size())
    writer.add_tokenizer_model("llama")
    writer.add_token_list([model.id_to_piece(token).encode() for token in tokens])
    writer.add_token_scores([model.get_score(token) for token in tokens])
    writer.add_token_types([next(kind for test, kind in kinds if test(token)) for token in tokens])
    writer.add_bos_token_id(model.bos_id())
    writer.add_eos_token_id(model.eos_id())


def _quantize(source: Path, target: Path, name: str) -> None:
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{name}")
    if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params)):
        raise RuntimeError(f"llama.cpp could not quantise {source} as {name}")
