"""The slow oracle: Llama-2 for one sequence in float32, straight from Meta's names; nothing of the package."""

import math

import torch
from torch import Tensor


def hidden_dim(params: dict) -> int:
    hidden = int(2 * (4 * params["dim"]) / 3)
    if params.get("ffn_dim_multiplier"):
        hidden = int(params["ffn_dim_multiplier"] * hidden)
    multiple = params["multiple_of"]
    return multiple * ((hidden + multiple - 1) // multiple)


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def rope(x: Tensor, theta: float) -> Tensor:
    """x (T, heads, D): pair (2i, 2i + 1) as one complex number, turned by t · theta^(−2i/D)."""
    length, _, size = x.shape
    angles = torch.arange(length)[:, None] * theta ** (-torch.arange(0, size, 2) / size)
    turned = torch.complex(x[..., 0::2], x[..., 1::2]) * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.stack((turned.real, turned.imag), -1).flatten(-2)


def forward(weights: dict[str, Tensor], params: dict, tokens: list[int]) -> Tensor:
    """The logits (T, vocab) after each token."""
    w = {name: tensor.float() for name, tensor in weights.items()}
    eps, theta = params["norm_eps"], params.get("rope_theta", 10000.0)
    heads, kv_heads = params["n_heads"], params.get("n_kv_heads") or params["n_heads"]
    length = len(tokens)
    x = w["tok_embeddings.weight"][tokens]
    causal = torch.full((length, length), -math.inf).triu(1)
    for i in range(params["n_layers"]):
        layer = f"layers.{i}."
        h = norm(x, w[layer + "attention_norm.weight"], eps)
        q, k, v = (h @ w[f"{layer}attention.w{name}.weight"].T for name in "qkv")
        q = rope(q.view(length, heads, -1), theta)
        k = rope(k.view(length, kv_heads, -1), theta)
        v = v.view(length, kv_heads, -1)
        mixed = []
        for head in range(heads):
            kv = head // (heads // kv_heads)
            scores = q[:, head] @ k[:, kv].T / math.sqrt(q.shape[-1]) + causal
            mixed.append(scores.softmax(-1) @ v[:, kv])
        x = x + torch.cat(mixed, -1) @ w[layer + "attention.wo.weight"].T
        h = norm(x, w[layer + "ffn_norm.weight"], eps)
        gate, up = (h @ w[f"{layer}feed_forward.w{n}.weight"].T for n in (1, 3))
        x = x + (gate * torch.sigmoid(gate) * up) @ w[layer + "feed_forward.w2.weight"].T
    return norm(x, w["norm.weight"], eps) @ w["output.weight"].T


def greedy(
    weights: dict[str, Tensor], params: dict, prompt: list[int], n: int, eos: int = -1, max_seq_len: int = 10**9
) -> tuple[list[int], list[float]]:
    """Up to n greedy tokens after a prompt, before `eos`, and their log-probabilities."""
    tokens, logprobs = list(prompt), []
    while len(tokens) < min(len(prompt) + n, max_seq_len):
        row = forward(weights, params, tokens)[-1].log_softmax(-1)
        token = int(row.argmax())
        if token == eos:
            break
        tokens.append(token)
        logprobs.append(float(row[token]))
    return tokens[len(prompt) :], logprobs


def prompt_logprobs(weights: dict[str, Tensor], params: dict, tokens: list[int]) -> list[float]:
    """log p(token t | before t) for t = 1, 2, …"""
    rows = forward(weights, params, tokens).log_softmax(-1)
    return [float(rows[t - 1, tokens[t]]) for t in range(1, len(tokens))]


def kept(logits: torch.Tensor, temperature=1.0, top_p=1.0, top_k=0, min_p=0.0) -> dict[int, float]:
    """The definition, slowly: what the filters keep, with renormalised probabilities, by token."""
    probs = torch.softmax(logits / temperature, -1).double().tolist()
    order = sorted(range(len(probs)), key=lambda token: (-probs[token], token))
    order = order[: top_k or None]
    mass = sum(probs[token] for token in order) if top_k else 1.0
    chosen, before, unlimited = [], 0.0, top_p == 1 and not top_k and not min_p  # however the sum is rounded
    for token in order:
        if (unlimited or before <= top_p * mass) and probs[token] >= min_p * probs[order[0]]:
            chosen.append(token)
        before += probs[token]
    total = sum(probs[token] for token in chosen)
    return {token: probs[token] / total for token in sorted(chosen)}


def naive(queries: Tensor, keys: Tensor, values: Tensor, start: int) -> Tensor:
    """Queries (n, H, D) at positions start … over keys and values (length, K, D), one head and query at a time."""
    out = torch.empty_like(queries)
    group = queries.shape[1] // keys.shape[1]
    for i in range(queries.shape[0]):
        for head in range(queries.shape[1]):
            seen = slice(0, start + i + 1)
            scores = keys[seen, head // group] @ queries[i, head] / math.sqrt(queries.shape[2])
            out[i, head] = scores.softmax(0) @ values[seen, head // group]
    return out
