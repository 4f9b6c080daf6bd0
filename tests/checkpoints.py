"""Random checkpoints in Meta's layout, in any number of shards, for tests and benchmarks."""

import json
from pathlib import Path

import torch
from torch import Tensor, nn

SMALL = {
    "dim": 64,
    "n_layers": 2,
    "n_heads": 8,
    "n_kv_heads": 4,
    "vocab_size": 512,
    "multiple_of": 32,
    "norm_eps": 1e-5,
}
SPLIT = {"tok_embeddings": 1, "output": 0, "wq": 0, "wk": 0, "wv": 0, "wo": 1, "w1": 0, "w2": 1, "w3": 0}


def random_weights(params: dict, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
    """Weights by Meta's names, scaled so that logits differ clearly."""
    from reference import hidden_dim

    g = torch.Generator().manual_seed(seed)
    dim, vocab, hidden = params["dim"], params["vocab_size"], hidden_dim(params)
    kv = dim // params["n_heads"] * (params.get("n_kv_heads") or params["n_heads"])

    def matrix(rows: int, columns: int) -> Tensor:
        return (torch.randn(rows, columns, generator=g) * columns**-0.5).to(dtype)

    def vector() -> Tensor:
        return (1 + 0.1 * torch.randn(dim, generator=g)).to(dtype)

    weights = {
        "tok_embeddings.weight": matrix(vocab, dim),
        "norm.weight": vector(),
        "output.weight": 3 * matrix(vocab, dim),
    }
    for i in range(params["n_layers"]):
        layer = {
            "attention.wq": matrix(dim, dim), "attention.wk": matrix(kv, dim), "attention.wv": matrix(kv, dim),
            "attention.wo": matrix(dim, dim), "feed_forward.w1": matrix(hidden, dim),
            "feed_forward.w2": matrix(dim, hidden), "feed_forward.w3": matrix(hidden, dim),
            "attention_norm": vector(), "ffn_norm": vector(),
        }  # fmt: skip
        weights |= {f"layers.{i}.{name}.weight": tensor for name, tensor in layer.items()}
    return weights


def save(folder: Path, params: dict, weights: dict[str, Tensor], shards: int = 1) -> Path:
    """Write params.json and `shards` .pth files, split as Meta's model parallelism splits them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "params.json").write_text(json.dumps(params))
    for number in range(shards):
        part = {}
        for name, tensor in weights.items():
            axis = SPLIT.get(name.split(".")[-2])
            part[name] = tensor if axis is None or axis >= tensor.dim() else tensor.chunk(shards, axis)[number].clone()
        torch.save(part, folder / f"consolidated.{number:02d}.pth")
    return folder


def unpacked(weight: Tensor) -> Tensor:
    """Weights that may be packed for the kernels, as rows again, the padding of the last block included."""
    if weight.dim() == 2:
        return weight
    return weight.unflatten(3, (16, -1)).permute(0, 3, 1, 2, 4).flatten(2).flatten(0, 1)


def held(model: nn.Module) -> dict[str, Tensor]:
    """A model's parameters by name, those that lie in files as several matrices joined."""
    found = {name: parameter for name, parameter in model.named_parameters() if ".parts." not in name}
    for name, layer in model.named_modules():
        if len(getattr(layer, "parts", ())):
            found[f"{name}.weight"] = torch.cat(list(layer.parts))
    return found
