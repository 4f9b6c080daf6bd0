"""params.json: sizes are read, switched-off and harmless keys are ignored and named, all else is refused."""

import json
from pathlib import Path

import pytest

from llama.checkpoint.params import read_params
from llama.errors import CheckpointError
from llama.model.transformer import ModelArgs

GOOD = {"dim": 64, "n_layers": 2, "n_heads": 8, "multiple_of": 32, "norm_eps": 1e-5, "vocab_size": -1}


def write(folder: Path, **changes: object) -> Path:
    (folder / "params.json").write_text(json.dumps({**GOOD, **changes}))
    return folder


def test_sizes_are_read(tmp_path: Path) -> None:
    args, ignored = read_params(write(tmp_path, n_kv_heads=4, ffn_dim_multiplier=1.3, rope_theta=1e6))
    assert (args.dim, args.kv_heads, args.head_dim, args.rope_theta, args.vocab_size) == (64, 4, 8, 1e6, -1)
    assert ignored == []
    assert read_params(write(tmp_path, n_kv_heads=None))[0].kv_heads == 8


@pytest.mark.parametrize(
    ("sizes", "hidden"),
    [
        ({"dim": 4096, "multiple_of": 256}, 11008),
        ({"dim": 5120, "multiple_of": 256}, 13824),
        ({"dim": 96, "multiple_of": 32}, 256),  # a multiple already
        ({"dim": 8192, "multiple_of": 4096, "ffn_dim_multiplier": 1.3}, 28672),
    ],
)
def test_hidden_dims_are_those_of_7b_13b_70b_and_are_not_rounded_twice(sizes: dict, hidden: int) -> None:
    assert ModelArgs(**sizes).hidden_dim == hidden


def test_harmless_keys_are_named(tmp_path: Path) -> None:
    _, ignored = read_params(write(tmp_path, max_seq_len=99, name="x", use_scaled_rope=False, moe=None))
    assert ignored == ["max_seq_len", "name", "use_scaled_rope", "moe"]
    assert read_params(write(tmp_path, **{"x" * 9999: 0}))[1] == ["x" * 60]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"use_scaled_rope": True}, "sets use_scaled_rope=true, which Llama-2 does not have"),
        ({"lora_args": {"rank": 8}}, "sets lora_args="),
        ({"dim": 0}, "sets dim=0: expected a positive integer"),
        ({"dim": 64.0}, "sets dim=64.0: expected a positive integer"),
        ({"n_layers": "2"}, "sets n_layers='2'"),
        ({"n_heads": True}, "sets n_heads=True"),
        ({"vocab_size": -2}, "sets vocab_size=-2"),
        ({"norm_eps": -1}, "sets norm_eps=-1: expected a positive number"),
        ({"norm_eps": float("nan")}, "sets norm_eps=nan: expected a positive number"),
        ({"ffn_dim_multiplier": float("inf")}, "sets ffn_dim_multiplier=inf: expected a positive number"),
        ({"rope_theta": "x"}, "sets rope_theta='x'"),
        ({"multiple_of": None}, "sets multiple_of=None"),
        ({"n_heads": 7}, "does not split into n_heads=7 heads of even size"),
        ({"n_heads": 64}, "does not split into n_heads=64 heads of even size"),
        ({"dim": 10**400}, "expected a positive integer, at most 2147483647"),
        ({"n_layers": 10**19}, "sets n_layers=10000000000000000000: expected a positive integer, at most 2147483647"),
        ({"ffn_dim_multiplier": 1e308}, "sets ffn_dim_multiplier=1e+308: expected a positive number, at most 1e+38"),
        ({"norm_eps": 10**400}, "expected a positive number"),
        ({"rope_theta": [1]}, "sets rope_theta=[…]: expected a positive number"),
        ({"quantize": []}, "sets quantize=[…]: expected int8 or int4"),
        ({"quantize": {}}, "sets quantize={…}: expected int8 or int4"),
        ({"quantize": 0}, "sets quantize=0: expected int8 or int4"),
        ({"moe": {"experts": 8}}, "sets moe={…}, which Llama-2 does not have"),
        ({"moe": "x" * 10**5}, 'sets moe="xxx'),
        ({"n_kv_heads": 3}, "n_heads=8 is not a multiple of n_kv_heads=3"),
    ],
)
def test_what_cannot_be_followed_is_refused_by_name(tmp_path: Path, changes: dict, said: str) -> None:
    with pytest.raises(CheckpointError) as error:
        read_params(write(tmp_path, **changes))
    assert str(error.value).startswith(str(tmp_path / "params.json"))
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "is missing"), ("{", "is not JSON"), ("<html>", "is not JSON"), ("[1]", "holds a JSON list"),
        ('{"dim": 64}', "lacks n_layers, n_heads"), ("\udcff", "is not JSON, which is text in UTF-8"),
        ('{"dim": 64, "dim": 32}', "is not JSON ('dim' stands in it twice)"),
        ('{"dim": ' + "9" * 5000 + "}", "params.json"), ('{"dim": 1e400}', "lacks n_layers"),
        ("[" * 10**5, "is not JSON (maximum recursion depth"), ("[" * (1 << 20) + "]", "has more than 1048576 bytes"),
    ],
)  # fmt: skip
def test_what_is_no_params_file_is_named(tmp_path: Path, text: str | None, said: str) -> None:
    if text is not None:
        (tmp_path / "params.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(CheckpointError) as error:
        read_params(tmp_path)
    assert said in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 500


@pytest.mark.parametrize("depth", range(100, 2000, 100))
def test_a_value_may_be_nested_as_deep_as_it_will(tmp_path: Path, depth: int) -> None:
    """Where it can be read, it may still be too deep to be written in the error."""
    for key in ("dim", "other"):
        (tmp_path / "params.json").write_text(json.dumps(GOOD)[:-1] + f', "{key}": {"[" * depth}1{"]" * depth}}}')
        with pytest.raises(CheckpointError, match=r"sets other|stands in it twice|maximum recursion"):
            read_params(tmp_path)


def test_a_byte_order_mark_is_read_over(tmp_path: Path) -> None:
    (tmp_path / "params.json").write_text(json.dumps(GOOD), encoding="utf-8-sig")
    assert read_params(tmp_path)[0].dim == 64
    (tmp_path / "params.json").write_text(json.dumps(GOOD), encoding="utf-16")
    with pytest.raises(CheckpointError, match="is not JSON, which is text in UTF-8: save it so"):
        read_params(tmp_path)


def test_a_folder_of_that_name_is_named(tmp_path: Path) -> None:
    (tmp_path / "params.json").mkdir()
    with pytest.raises(CheckpointError, match=r"params\.json"):
        read_params(tmp_path)
