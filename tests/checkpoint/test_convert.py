"""From any format to any: to the bit, all or nothing, and what other programs read."""

import shutil
from pathlib import Path

import pytest
import torch
from conftest import DEMO
from near_ties import logits_of

from llama import Llama
from llama.checkpoint.convert import FORMATS, convert
from llama.checkpoint.source import open_source
from llama.checkpoint.writer import quantize
from llama.errors import CheckpointError, ParameterError

TOKENS = torch.randint(3, 1024, (60,), generator=torch.Generator().manual_seed(0)).tolist()


def target(folder: Path, to: str) -> Path:
    return folder / (f"{to}.gguf" if to == "gguf" else to)


def build(path: Path) -> Llama:
    return Llama.build(str(path), None, 64, 1, device="cpu", dtype="float32")


@pytest.mark.parametrize("there", FORMATS)
def test_there_and_back_is_the_same_to_the_bit(there: str, tmp_path: Path) -> None:
    """Tensors, dtypes and the tokenizer."""
    convert(DEMO, target(tmp_path, there), there)
    convert(target(tmp_path, there), tmp_path / "back", "meta")
    found, expected = open_source(tmp_path / "back"), open_source(DEMO)
    assert set(found.names) == set(expected.names)
    for name in expected.names:
        (ours,), (theirs,) = found.slices(name, 1, 0), expected.slices(name, 1, 0)
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), name
    text = "Ben wanted a red kite."
    assert build(tmp_path / "back").tokenizer.encode(text, True, True) == build(DEMO).tokenizer.encode(text, True, True)


def test_from_a_hugging_face_folder_through_gguf(tmp_path: Path) -> None:
    convert(DEMO, tmp_path / "hf", "hf")
    convert(tmp_path / "hf", tmp_path / "a.gguf", "gguf")
    convert(tmp_path / "a.gguf", tmp_path / "again", "hf")
    ours, theirs = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("again", "hf"))
    assert ours == theirs


def test_quantised_checkpoints_are_ggufs_blocks(tmp_path: Path) -> None:
    """int4 → q4_0 → int4; no Hugging Face folder holds them."""
    quantize(DEMO, tmp_path / "int4", "int4")
    convert(tmp_path / "int4", tmp_path / "a.gguf", "gguf")
    convert(tmp_path / "a.gguf", tmp_path / "back", "meta")
    assert torch.equal(logits_of(build(tmp_path / "back"))(TOKENS), logits_of(build(tmp_path / "int4"))(TOKENS))
    with pytest.raises(CheckpointError, match="is quantised as int4, which no Hugging Face folder holds"):
        convert(tmp_path / "int4", tmp_path / "hf", "hf")


def test_large_ones_have_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llama.checkpoint.huggingface_writer.LARGEST", 500_000)
    written = convert(DEMO, tmp_path / "hf", "hf")
    assert sum(path.suffix == ".safetensors" for path in written) > 2
    assert torch.equal(logits_of(build(tmp_path / "hf"))(TOKENS), logits_of(build(DEMO))(TOKENS))


def test_transformers_reads_what_is_written(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install transformers")
    convert(DEMO, tmp_path / "hf", "hf")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    with torch.inference_mode():
        expected = model(torch.tensor([TOKENS])).logits[0]
    torch.testing.assert_close(logits_of(build(DEMO))(TOKENS), expected, atol=1e-3, rtol=0)


def test_llama_cpp_reads_what_is_written(tmp_path: Path) -> None:
    """And finds the same words most probable; its products round activations."""
    pytest.importorskip("llama_cpp", reason="needs llama.cpp: pip install llama-cpp-python")
    import sys

    sys.path.insert(0, str(DEMO.parent.parent / "benchmarks"))
    from peers import LlamaCpp

    for own_format, same in ((None, 0.95), ("int8", 0.9)):
        source = DEMO
        if own_format:
            source = tmp_path / own_format
            quantize(DEMO, source, own_format)
        convert(source, tmp_path / f"{own_format}.gguf", "gguf")
        peer = LlamaCpp(tmp_path / f"{own_format}.gguf", 1, 128, 1)
        logits = logits_of(build(source))(TOKENS)
        found = [peer.generate([TOKENS[:n]], 1)[0][0] for n in range(4, 60)]
        agree = sum(int(logits[n - 1].argmax()) == token for n, token in zip(range(4, 60), found, strict=True))
        assert agree / len(found) >= same


@pytest.mark.parametrize(
    ("out", "to", "said"),
    [
        ("a.gguf", "gguff", "to='gguff' is no format: expected meta, hf, gguf"),
        ("a.bin", "gguf", "does not end with .gguf"),
        ("there.gguf", "gguf", "is there already, a file"),
        ("full", "hf", "is not empty, it holds x"),
    ],
)
def test_what_cannot_be_written_is_said_first(out: str, to: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "there.gguf").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises((CheckpointError, ParameterError), match=said):
        convert(DEMO, tmp_path / out, to)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("to", ["hf", "gguf"])
def test_nothing_is_left_of_what_fails(to: str, tmp_path: Path) -> None:
    """A source whose last tensor cannot be read."""
    folder = tmp_path / "in"
    shutil.copytree(DEMO, folder)
    with pytest.MonkeyPatch.context() as patch:
        from llama.checkpoint import gguf_writer, huggingface_writer

        def fails(source: object, name: str) -> torch.Tensor:
            raise OSError(28, "No space left on device")

        patch.setattr(gguf_writer, "whole_tensor", fails)
        patch.setattr(huggingface_writer, "whole_tensor", fails)
        with pytest.raises(CheckpointError, match="No space left on device"):
            convert(folder, target(tmp_path / "out", to), to)
    assert not (tmp_path / "out").exists()
