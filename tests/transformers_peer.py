"""The same weights in Hugging Face transformers, which rotates halves where Meta rotates pairs."""

import torch
from reference import hidden_dim
from torch import Tensor

NAMES = {
    "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj", "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj", "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj", "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}  # fmt: skip


def halves(weight: Tensor, heads: int) -> Tensor:
    """Rows of each head from pairs (0, 1), (2, 3) … to first and second halves."""
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def transformers_model(weights: dict[str, Tensor], params: dict) -> torch.nn.Module:
    """A `LlamaForCausalLM` with these weights, in their dtype."""
    from transformers import LlamaConfig, LlamaForCausalLM

    heads, kv_heads = params["n_heads"], params.get("n_kv_heads") or params["n_heads"]
    config = LlamaConfig(
        hidden_size=params["dim"], intermediate_size=hidden_dim(params), num_hidden_layers=params["n_layers"],
        num_attention_heads=heads, num_key_value_heads=kv_heads, vocab_size=params["vocab_size"],
        rms_norm_eps=params["norm_eps"], max_position_embeddings=4096, tie_word_embeddings=False, bos_token_id=1,
        eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    state = {
        "model.embed_tokens.weight": weights["tok_embeddings.weight"], "model.norm.weight": weights["norm.weight"],
        "lm_head.weight": weights["output.weight"],
    }  # fmt: skip
    for i in range(params["n_layers"]):
        for ours, theirs in NAMES.items():
            weight = weights[f"layers.{i}.{ours}.weight"]
            if ours in ("attention.wq", "attention.wk"):
                weight = halves(weight, heads if ours.endswith("q") else kv_heads)
            state[f"model.layers.{i}.{theirs}.weight"] = weight
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.load_state_dict(state, assign=True, strict=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its frequencies are no weights: made anew off meta
    return model.eval()
