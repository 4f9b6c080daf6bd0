"""Hugging Face folders: their tensors as Meta has them, what config.json says, and what is refused."""

import json
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DEMO
from hypothesis import given
from hypothesis import strategies as st
from near_ties import assert_follows, logits_of

from llama import Llama
from llama.checkpoint import info
from llama.checkpoint.config import read_config
from llama.checkpoint.huggingface import HuggingFaceFolder, their_name, to_halves, to_pairs
from llama.checkpoint.source import open_source
from llama.checkpoint.verify import verify
from llama.checkpoint.writer import quantize, reshard
from llama.errors import CheckpointError, LlamaError

transformers = pytest.importorskip("transformers", reason="needs transformers: pip install transformers")
import huggingface_models  # noqa: E402  # it needs transformers

LENGTH = 160  # tokens, where the models were made for 64
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 32}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("Llama", {}),
    "a kv head for each head": ("Llama", {"num_key_value_heads": 6}),
    "one kv head": ("Llama", {"num_key_value_heads": 1, "rope_theta": 500000.0}),
    "tied": ("Llama", {"tie_word_embeddings": True}),
    "biased": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "heads of their own size": ("Llama", {"head_dim": 16}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 10000.0}}),
    "dynamic": ("Llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}}),
    "yarn": ("Llama", {"rope_parameters": YARN}),
    "yarn as told": ("Llama", {"rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.5, "beta_fast": 8.0}}),
    "yarn in fractions": ("Llama", {"rope_parameters": {**YARN, "attention_factor": 1.3, "truncate": False}}),
    "llama3": (
        "Llama",
        {"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "rope_theta": 10000.0, "low_freq_factor": 1.0,
                             "high_freq_factor": 4.0, "original_max_position_embeddings": 32}},
    ),
}  # fmt: skip


def build(folder: Path, **options: Any) -> Llama:
    return Llama.build(str(folder), None, LENGTH, 2, **{"device": "cpu", "dtype": "float32", **options})


def theirs(model: Any) -> Callable[[list[int]], torch.Tensor]:
    @torch.inference_mode()
    def logits(tokens: list[int]) -> torch.Tensor:
        return model(torch.tensor([tokens])).logits[0]

    return logits


def random_tokens(n: int) -> list[int]:
    return torch.randint(3, 1024, (n,), generator=torch.Generator().manual_seed(1)).tolist()


# ------------------------------------------------------------------------------------------------- beside transformers


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    """Over more positions than the model was made for; then text, token by token."""
    kind, config = MODELS[name]
    model = huggingface_models.make(kind, **config)
    llama, tokens = build(huggingface_models.save(model, tmp_path / "model")), random_tokens(LENGTH)
    expected = theirs(model)(tokens)
    torch.testing.assert_close(logits_of_length(llama, tokens), expected, atol=1e-4, rtol=0)
    if name == "dynamic":
        return  # transformers computes a text's earlier keys as a shorter text's
    llama.end_ids.clear()
    made, logprobs = llama.generate([tokens[:9], tokens[:30]], 64, 0, logprobs=True)
    assert_follows(made, logprobs, [tokens[:9], tokens[:30]], theirs(model), 64, 1e-3)


def logits_of_length(llama: Llama, tokens: list[int]) -> torch.Tensor:
    """In a cache of LENGTH tokens, for which the table of angles was made."""
    assert len(tokens) == LENGTH
    return logits_of(llama)(tokens)


@pytest.mark.parametrize("name", ["plain", "biased"])
def test_rows_in_another_order_would_be_seen(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that is read without putting rows in their order gives other logits: the test above can fail."""
    kind, config = MODELS[name]
    model = huggingface_models.make(kind, **config)
    folder, tokens = huggingface_models.save(model, tmp_path / "model"), random_tokens(LENGTH)
    monkeypatch.setattr("llama.checkpoint.huggingface.to_pairs", lambda rows, head_dim: rows)
    assert (logits_of(build(folder))(tokens) - theirs(model)(tokens)).abs().max() > 0.1


@pytest.mark.parametrize("options", [{"max_shard_size": "80KB"}, {"safe_serialization": False}])
def test_several_files_and_pytorchs_are_one_folder(options: dict[str, Any], tmp_path: Path) -> None:
    model = huggingface_models.make()
    if "safe_serialization" in options:
        folder = huggingface_models.save(model, tmp_path / "model")
        (folder / "model.safetensors").unlink()
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    else:
        folder = huggingface_models.save(model, tmp_path / "model", **options)
        assert len(open_source(folder).files) > 2
    tokens = random_tokens(LENGTH)
    torch.testing.assert_close(logits_of(build(folder))(tokens), theirs(model)(tokens), atol=1e-4, rtol=0)


def test_a_tied_table_is_held_once(tmp_path: Path) -> None:
    """In full precision; quantised, the output layer is a matrix of its own."""
    folder = huggingface_models.save(huggingface_models.make(tie_word_embeddings=True), tmp_path / "model")
    model = build(folder).model
    assert model.output.weight is model.tok_embeddings.weight
    assert build(folder, quantize="int8").model.output.weight is not model.tok_embeddings.weight


def test_the_old_form_of_rope_is_read(tmp_path: Path) -> None:
    """As transformers 4 wrote it: rope_theta and rope_scaling beside each other, "type" for "rope_type"."""
    model = huggingface_models.make(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0})
    folder = huggingface_models.save(model, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    del config["rope_parameters"]
    config |= {"rope_theta": 5000.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
    (folder / "config.json").write_text(json.dumps(config))
    tokens = random_tokens(LENGTH)
    torch.testing.assert_close(logits_of(build(folder))(tokens), theirs(model)(tokens), atol=1e-4, rtol=0)


@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 3))
def test_rows_come_back_from_either_order(heads: int, pairs: int, columns: int) -> None:
    rows = torch.arange(heads * 2 * pairs * max(columns, 1)).view(heads * 2 * pairs, *([columns] if columns else []))
    halves = to_halves(rows, 2 * pairs)
    assert to_pairs(halves, 2 * pairs).equal(rows)
    assert halves[:pairs].equal(rows[: 2 * pairs : 2])  # a head's first numbers of all pairs


def test_names_are_theirs() -> None:
    assert their_name("layers.3.attention.wq.bias") == "model.layers.3.self_attn.q_proj.bias"
    assert their_name("output.weight") == "lm_head.weight"


# ------------------------------------------------------------------------------------------------ what is made of them


@pytest.mark.parametrize("name", ["biased", "yarn", "heads of their own size", "tied"])
def test_a_folder_is_written_in_metas_layout(name: str, tmp_path: Path) -> None:
    """In shards, and quantised: params.json says what config.json said."""
    kind, config = MODELS[name]
    folder = huggingface_models.save(huggingface_models.make(kind, eos_token_id=[2, 5], **config), tmp_path / "model")
    tokens = random_tokens(LENGTH)
    reshard(folder, tmp_path / "meta", 2)
    torch.testing.assert_close(logits_of(build(tmp_path / "meta"))(tokens), logits_of(build(folder))(tokens))
    assert build(tmp_path / "meta").end_ids == {2, 5}
    quantize(folder, tmp_path / "int8", "int8")
    own, stored = build(folder, quantize="int8"), build(tmp_path / "int8")
    torch.testing.assert_close(logits_of(stored)(tokens), logits_of(own)(tokens))


def test_end_tokens_are_those_of_both_files(tmp_path: Path) -> None:
    folder = huggingface_models.save(huggingface_models.make(eos_token_id=7), tmp_path / "model")
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 9], "temperature": 0.6}')
    llama = build(folder)
    assert llama.end_ids == {llama.tokenizer.eos_id, 7, 9}
    first = llama.generate([[1, 5, 8]], 1, 0)[0][0]
    llama.end_ids.add(first[0])
    assert llama.generate([[1, 5, 8]], 5, 0)[0] == [[]]


def test_info_says_what_people_want_to_know(tmp_path: Path) -> None:
    folder = huggingface_models.save(huggingface_models.make(rope_parameters=YARN), tmp_path / "model")
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 9], "temperature": 0.6, "top_p": 0.9}')
    text = info.text(info.describe(folder, 64, 1))
    for line in ("format        Hugging Face, LlamaForCausalLM", "RoPE          yarn, factor 4", "positions     64",
                 "end tokens    2, 9", "suggested     temperature 0.6, top_p 0.9"):  # fmt: skip
        assert line in text.splitlines()


def test_a_text_longer_than_the_model_was_made_for_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build(huggingface_models.save(huggingface_models.make(), tmp_path / "model"))
    assert f"max_seq_len={LENGTH} is more than the 64 positions that this model was made for" in capsys.readouterr().err


def test_files_are_verified_by_their_sums(tmp_path: Path) -> None:
    """Those of sha256sum, those that the hub's downloads leave, or none."""
    folder = huggingface_models.save(huggingface_models.make(), tmp_path / "model")
    assert verify(folder).endswith("by their names, shapes and sizes; there are no sums to compare")
    digest = sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    left = folder / ".cache" / "huggingface" / "download"
    left.mkdir(parents=True)
    (left / "model.safetensors.metadata").write_text(f"commit\n{digest}\n1.0\n")
    (left / "config.json.metadata").write_text("commit\nabc\n1.0\n")
    assert "1 of them match their SHA-256 sums" in verify(folder)
    (folder / "SHA256SUMS").write_text(f"{'0' * 64}  config.json\n")
    with pytest.raises(CheckpointError, match=r"does not match its SHA-256 sums: config.json differ; download again"):
        verify(folder)


# ------------------------------------------------------------------------------------------------------ what is refused


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return huggingface_models.save(huggingface_models.make(), tmp_path_factory.mktemp("sound") / "model")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "gpt2"}, "of model_type 'gpt2'; what can be run here is llama, mistral, qwen2"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "expected LlamaForCausalLM, which completes text"),
        ({"quantization_config": {"quant_method": "gptq"}}, "sets quantization_config ('gptq'), which is not followed"),
        ({"hidden_act": "gelu"}, "sets hidden_act='gelu': only silu is computed here"),
        ({"rope_parameters": {"rope_type": "longrope", "factor": 2.0}}, "'longrope' is none of linear, dynamic, yarn"),
        ({"rope_parameters": {"rope_type": "linear"}}, "factor=None: expected a positive number"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "spin": 1}}, "sets 'spin' of its RoPE scaling"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "turns only a part of each head"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types other than full_attention"),
        ({"num_attention_heads": 5}, "n_heads=5 is not a multiple of n_kv_heads=2"),
        ({"num_key_value_heads": 4}, "n_heads=6 is not a multiple of n_kv_heads=4"),
        ({"num_hidden_layers": 10**9}, "but there are only"),
        ({"num_hidden_layers": 3}, "model.layers.2.self_attn.q_proj.weight is missing"),
        ({"intermediate_size": 79}, "where config.json makes it (79, 96)"),
        ({"hidden_size": None}, "sets dim=None: expected a positive integer"),
        ({"eos_token_id": "end"}, "sets eos_token_id='end': expected a token"),
        ({"tie_word_embeddings": "yes"}, "sets tie_word_embeddings='yes': expected true or false"),
        ({"model_type": "mistral", "architectures": None, "sliding_window": 100}, "choose max_seq_len up to 100"),
        ({"max_position_embeddings": -1}, "sets max_position_embeddings=-1: expected a number of tokens"),
    ],
)  # fmt: skip
def test_what_cannot_be_followed_is_refused(changes: dict[str, Any], said: str, sound: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(sound, folder)
    config = {**json.loads((folder / "config.json").read_text()), **changes}
    config = {
        key: value for key, value in config.items() if key not in changes or value is not None or key == "hidden_size"
    }
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(LlamaError) as error:
        build(folder)
    assert said in str(error.value) and "\n" not in str(error.value), error.value


def test_a_window_that_is_not_reached_makes_no_difference(tmp_path: Path) -> None:
    model = huggingface_models.make("Mistral", sliding_window=LENGTH)
    llama, tokens = build(huggingface_models.save(model, tmp_path / "model")), random_tokens(LENGTH)
    torch.testing.assert_close(logits_of(llama)(tokens), theirs(model)(tokens), atol=1e-4, rtol=0)


INDEX = "model.safetensors.index.json"


def opened(folder: Path) -> None:
    source = open_source(folder)
    source.check(source.args)


def split(folder: Path) -> Path:
    """A folder of several files."""
    huggingface_models.make().save_pretrained(folder, max_shard_size="80KB")
    return folder


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda f: (f / INDEX).unlink(), "but no model.safetensors.index.json: download it too"),
        (lambda f: next(f.glob("model-00002*")).unlink(), "lacks model-00002"),
        (lambda f: shutil.copy(*sorted(f.glob("model-0000[12]*"))), "which the index"),
        (lambda f: next(f.glob("model-00001*")).write_text("<html>"), "is an HTML page"),
        (lambda f: next(f.glob("model-00001*")).write_bytes(b""), "is empty (0 bytes)"),
        (lambda f: next(f.glob("model-00001*")).write_bytes(b"\x08" * 100), "cannot be read as a safetensors file"),
        (lambda f: (f / INDEX).write_text("{}"), "has no weight_map"),
        (lambda f: (f / INDEX).write_text('{"weight_map": {"x": "../y"}}'), "'../y', which is no file of this folder"),
        (lambda f: (f / "config.json").write_text("[]"), "holds a JSON list"),
    ],
)  # fmt: skip
def test_files_that_are_not_whole_are_named(harm: Callable[[Path], object], said: str, tmp_path: Path) -> None:
    folder = split(tmp_path / "model")
    harm(folder)
    with pytest.raises(CheckpointError) as error:
        opened(folder)
    assert said in str(error.value) and "\n" not in str(error.value), error.value


def test_metas_files_count_where_both_are_there(sound: Path, tmp_path: Path) -> None:
    shutil.copytree(DEMO, tmp_path / "both")
    shutil.copy(sound / "config.json", tmp_path / "both")
    assert not isinstance(open_source(tmp_path / "both"), HuggingFaceFolder)


def test_settings_of_the_other_class_are_defaults(tmp_path: Path) -> None:
    """What a file leaves out is what transformers takes for it."""
    config = {"model_type": "qwen2", "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 1,
              "num_attention_heads": 32, "vocab_size": 9}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    args, expected = read_config(tmp_path).args, transformers.Qwen2Config(**config)
    assert (args.kv_heads, args.norm_eps) == (expected.num_key_value_heads, expected.rms_norm_eps)
    assert (
        args.qkv_bias and not args.o_bias and read_config(tmp_path).trained_length == expected.max_position_embeddings
    )
