"""Damage to each kind of file of a checkpoint: which and where, a seed decides."""

import contextlib
import io
import json
import os
import shutil
import struct
import warnings
import zipfile
from collections.abc import Callable
from hashlib import md5
from pathlib import Path
from random import Random

FILES = {"weights": "consolidated.*.pth", "params": "params.json", "tokenizer": "tokenizer.model",
         "checklist": "checklist.chk", "tensors": "*.safetensors", "config": "*config.json",
         "index": "*.index.json", "gguf": "*.gguf"}  # fmt: skip


# ------------------------------------------------------------------------------------------------------ runs of bytes


def flip_bits(r: Random, data: bytes) -> bytes:
    damaged = bytearray(data)
    for _ in range(r.choice((1, 1, 2, 8))):
        damaged[r.randrange(len(data))] ^= 1 << r.randrange(8)
    return bytes(damaged)


def flip_at_an_end(r: Random, data: bytes) -> bytes:
    """The table of contents of an archive, and what a tokenizer is trained to, stand at the end."""
    near = min(len(data), r.choice((32, 512, 4096)))
    at = r.randrange(near) if r.random() < 0.3 else len(data) - 1 - r.randrange(near)
    return data[:at] + bytes([data[at] ^ 1 << r.randrange(8)]) + data[at + 1 :]


def cut_short(r: Random, data: bytes) -> bytes:
    return data[: r.randrange(len(data))]


def run_of(r: Random, data: bytes) -> tuple[int, int]:
    start = r.randrange(len(data))
    return start, min(len(data), start + r.choice((1, 2, 8, 64, 4096)))


def zero_a_run(r: Random, data: bytes) -> bytes:
    start, stop = run_of(r, data)
    return data[:start] + bytes(stop - start) + data[stop:]


def remove_a_run(r: Random, data: bytes) -> bytes:
    start, stop = run_of(r, data)
    return data[:start] + data[stop:]


def insert_a_run(r: Random, data: bytes) -> bytes:
    at = r.randrange(len(data) + 1)
    return data[:at] + r.randbytes(r.choice((1, 2, 8, 64))) + data[at:]


def swap_two_runs(r: Random, data: bytes) -> bytes:
    size = min(r.choice((1, 8, 64)), len(data) // 2)
    first = r.randrange(len(data) - 2 * size + 1)
    second = r.randrange(first + size, len(data) - size + 1)
    a, b = data[first : first + size], data[second : second + size]
    return data[:first] + b + data[first + size : second] + a + data[second + size :]


def empty(r: Random, data: bytes) -> bytes:
    return b""


RUNS = (flip_bits, flip_bits, flip_at_an_end, cut_short, zero_a_run, remove_a_run, insert_a_run, swap_two_runs, empty)


# ------------------------------------------------------------------------------------------------------------ weights


def as_other_tensors() -> dict[str, Callable]:
    """What a tensor may turn into; those that a version of PyTorch cannot make or save are left as they are."""
    import torch

    dtypes = (
        "float64", "float16", "bfloat16", "bool", "int8", "uint8", "int16", "int32", "int64", "uint16", "uint32",
        "uint64", "complex64", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz",
    )  # fmt: skip
    return {
        **{name: (lambda t, name=name: t.to(getattr(torch, name))) for name in dtypes},
        "meta": lambda t: t.to("meta"),
        "sparse": lambda t: t.to_sparse(),
        "sparse rows": lambda t: t.to_sparse_csr(),
        "nested": lambda t: torch.nested.nested_tensor([t, t]),
        "jagged": lambda t: torch.nested.nested_tensor([t, t], layout=torch.jagged),
        "quantised": lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
        "of four bits": lambda t: t.contiguous().view(torch.uint8).view(torch.float4_e2m1fn_x2),
        "of eight bits": lambda t: t.contiguous().view(torch.uint8).view(torch.float8_e8m0fnu),
        "with attributes": lambda t: setattr(t, "numel", 1) or t,
        "negated": torch._neg_view,
        "conjugate": lambda t: torch.complex(t.float(), t.float()).conj(),
        "parameter": torch.nn.Parameter,
        "with gradient": lambda t: t.clone().requires_grad_(),
        "transposed": lambda t: t.mT if t.dim() > 1 else t.flip(0),
        "laid out across": lambda t: t.mT.contiguous().mT if t.dim() > 1 else t,
        "repeated": lambda t: t[:1].clone().expand(t.shape),
        "flat": lambda t: t.flatten(),
        "deep": lambda t: t[None, None],
        "empty": lambda t: t[:0],
        "scalar": lambda t: t.flatten()[0].clone(),
        "longer": lambda t: torch.cat((t, t)),
        "shorter": lambda t: t[1:],
        "a part of more": lambda t: torch.cat((t, t))[: len(t)],
        "not numbers": lambda t: t * float("nan") if t.is_floating_point() else t,
        "infinite": lambda t: t / 0 if t.is_floating_point() else t,
        "huge": lambda t: t * 1e30 if t.is_floating_point() else t,
        "no tensor": lambda t: t.tolist(),
    }


NAMES = ("", "x", "layers.0", "layers.99.attention.wq.weight", "layers..weight", "norm.weight.", "rope.freqs",
         "\x1b[2J", "two\nlines", "é\u202e", "\ud800", "n" * 5000)  # fmt: skip


def other_tensors(r: Random, data: bytes) -> bytes:
    """Another table of tensors in a sound file: names, kinds, shapes and places are not what they were."""
    import torch

    warnings.simplefilter("ignore")  # PyTorch's about some kinds
    tensors = torch.load(io.BytesIO(data), weights_only=True)
    for _ in range(r.choice((1, 1, 1, 3))):
        name, other = r.choice(list(tensors)), r.choice(list(tensors))
        what = r.choice(("kind", "kind", "kind", "kind", "swap", "remove", "rename", "tie", "add"))
        if what == "kind":
            with contextlib.suppress(Exception):  # not every kind can be made of every tensor
                tensors[name] = r.choice(list(as_other_tensors().values()))(tensors[name])
        elif what == "swap":
            tensors[name], tensors[other] = tensors[other], tensors[name]
        elif what == "tie":
            tensors[name] = tensors[other]
        elif what == "add":
            tensors[r.choice(NAMES)] = torch.ones(2)
        elif len(tensors) > 1:
            tensor = tensors.pop(name)
            if what == "rename":
                tensors[r.choice(NAMES)] = tensor
    buffer = io.BytesIO()
    try:
        torch.save(tensors, buffer, _use_new_zipfile_serialization=r.random() > 0.02)
    except Exception:  # nor can every kind be saved
        return data
    return buffer.getvalue()


def pickle_damaged(r: Random, data: bytes) -> bytes:
    """The table of tensors within the archive is damaged, and the archive itself sound (its sums are right)."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w", r.choice((0, 0, 0, 8))) as new:
        for record in old.namelist():
            content = old.read(record)
            if record.endswith("data.pkl") or (content and r.random() < 0.02):
                content = r.choice(RUNS)(r, content)
            new.writestr(record, content)
    return buffer.getvalue()


# ------------------------------------------------------------------------------------------------- params.json, pieces

VALUES = (
    "0", "1", "-1", "2", "3", "7", "64", "65", "128", "1e400", "-1e400", "1e308", "1e38", "1e-320", "NaN", "Infinity",
    "-Infinity", "1.5", "64.0", "10000000000000000000", "2147483647", "2147483648", "true", "false", "null", '""',
    '"64"', '"int8"', '"int4"', '"\\ud800"', '"\\u001b[2J"', "[]", "[1]", "{}", '{"a": {"b": [1]}}',
)  # fmt: skip
DEEP = ("[" * 990 + "]" * 990, "[" * 50000, '{"a":' * 1200 + "1" + "}" * 1200, "9" * 400, "9" * 5000)
KEYS = ("use_scaled_rope", "moe", "lora_args", "max_seq_len", "kv_dtype", "name", "quantize", "rope_theta",
        "n_kv_heads", "ffn_dim_multiplier", "norm_eps", "vocab_size", "", "two words", "\u00e9", "own_head_dim",
        "rope_scaling", "qkv_bias", "model_type", "head_dim", "num_key_value_heads", "attention_bias",
        "rope_parameters", "quantization_config", "sliding_window", "tie_word_embeddings", "eos_token_id")  # fmt: skip


def other_params(r: Random, data: bytes) -> bytes:
    """Values retyped and out of all bounds, keys added, removed and given twice, other encodings."""
    pairs = [(json.dumps(key), json.dumps(value)) for key, value in json.loads(data).items()]
    for _ in range(r.choice((1, 1, 2))):
        place, value = r.randrange(len(pairs)), r.choice(VALUES if r.random() < 0.9 else DEEP)
        what = r.choice(("change", "change", "change", "change", "add", "add", "remove", "twice"))
        if what == "change":
            pairs[place] = (pairs[place][0], value)
        elif what == "add":
            pairs.append((json.dumps(r.choice(KEYS)), value))
        elif what == "twice":
            pairs.append((pairs[place][0], value))
        elif len(pairs) > 1:
            del pairs[place]
    text = "{" + ", ".join(f"{key}: {value}" for key, value in pairs) + "}"
    return text.encode(r.choice(("utf-8", "utf-8", "utf-8", "utf-8", "utf-8-sig", "utf-16", "utf-32")))


def other_header(r: Random, data: bytes) -> bytes:
    """The table of a safetensors file says something else of its tensors, and fits its own length."""
    size = struct.unpack("<Q", data[:8])[0]
    header, rest = json.loads(data[8 : 8 + size]), data[8 + size :]
    for _ in range(r.choice((1, 1, 3))):
        name = r.choice(list(header))
        entry = header[name]
        what = r.choice(("dtype", "shape", "data_offsets", "rename", "remove", "whole"))
        if what == "dtype":
            entry["dtype"] = r.choice(("F32", "F16", "BF16", "I8", "U8", "BOOL", "F8_E4M3", "F64", "X", 1, None))
        elif what in ("shape", "data_offsets"):
            entry[what] = [r.choice((0, 1, -1, 2**31, 2**63, 2**70, 1.5, "1", entry["data_offsets"][1])) for _ in "ab"]
        elif what == "rename":
            header[r.choice(NAMES[:-2])] = header.pop(name)
        elif what == "remove" and len(header) > 1:
            del header[name]
        else:
            header[name] = json.loads(r.choice(VALUES[10:20]).replace("1e400", "1"))
            break
    text = json.dumps(header).encode()
    length = len(text) if r.random() < 0.9 else r.choice((0, 1, 2**20, 2**40, 2**64 - 1))
    return struct.pack("<Q", length) + text + rest


def other_numbers(r: Random, data: bytes) -> bytes:
    """Counts, lengths, kinds and values in the header of a GGUF file, whose metadata stand first."""
    changed = bytearray(data)
    for _ in range(r.choice((1, 1, 3))):
        at = r.randrange(r.choice((24, 1500, 40000)))
        value = r.choice((0, 1, 2, 3, 9, 12, 31, 64, 2**31 - 1, 2**32 - 1))
        large = r.choice((0, 1, 2**20, 2**40, 2**63 - 1, 2**64 - 1))
        made = struct.pack("<I", value) if r.random() < 0.6 else struct.pack("<Q", large)
        changed[at : at + len(made)] = made
    return bytes(changed)


def number(data: bytes, at: int) -> tuple[int, int]:
    """A varint of a protobuf message, and where it ends."""
    value = shift = 0
    while True:
        byte = data[at]
        value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
        if byte < 128:
            return value, at


def varint(value: int) -> bytes:
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes([*found, value])


def fields(data: bytes) -> list[bytes]:
    """The fields of a SentencePiece model that are messages, whole: its pieces, then what it was trained with."""
    found, at = [], 0
    while at < len(data):
        _, inside = number(data, at)
        length, inside = number(data, inside)
        found.append(data[at : inside + length])
        at = inside + length
    return found


def piece(text: bytes, score: float, kind: int) -> bytes:
    """A piece of a SentencePiece model: its kind is 1 (a text), 2 (unknown), 3 (control), 4, 5 or 6 (a byte)."""
    message = b"\x0a" + varint(len(text)) + text + b"\x15" + struct.pack("<f", score) + b"\x18" + bytes([kind])
    return b"\x0a" + varint(len(message)) + message


TEXTS = (b"", b"a", b"\xff", b"\xe2\x96", b"\xe2\x96\x81", b"<0x41>", b"<0xZZ>", b"<0x0041>", b"<s>", b"\x1b[2J", b"\n",
         b"\xed\xa0\x80", b"a\0b", "é".encode(), b"x" * 5000)  # fmt: skip


def other_pieces(r: Random, data: bytes) -> bytes:
    """Pieces of a sound message with other texts, scores and types, swapped, repeated or gone."""
    parts = fields(data)
    count = sum(part[0] == 0x0A for part in parts)
    for _ in range(r.choice((1, 1, 2, 5))):
        place = r.randrange(min(count, r.choice((4, 260, count))))
        score = r.choice((0.0, -1.0, float("nan"), float("inf"), -float("inf"), 3e38))
        made = piece(r.choice(TEXTS) if r.random() < 0.8 else r.randbytes(3), score, r.randrange(9))
        what = r.choice(("change", "change", "change", "swap", "remove", "repeat", "retype"))
        if what == "change":
            parts[place] = made
        elif what == "swap":
            other = r.randrange(count)
            parts[place], parts[other] = parts[other], parts[place]
        elif what == "repeat":
            parts[place] = parts[r.randrange(count)]
        elif what == "retype":  # the last value of a field counts
            old = parts[place][number(parts[place], 1)[1] :] + b"\x18" + bytes([r.randrange(9)])
            parts[place] = b"\x0a" + varint(len(old)) + old
        else:
            del parts[place]
            count -= 1
    return b"".join(parts)


# (Part, field) of a model: numbers of trainer_spec (2), normalizer_spec (3) and denormalizer_spec (5), then texts.
NUMBERS = ((2, 3), (2, 24), (2, 35), (2, 40), (2, 41), (2, 42), (3, 3), (3, 4), (3, 5), (5, 3), (5, 4), (5, 5))
STRINGS = ((2, 44), (2, 45), (2, 46), (2, 47), (3, 1), (3, 2), (3, 6), (4, 1), (5, 2), (5, 6))


def setting(part: int, field: int, value: int | bytes) -> bytes:
    """A field of one of a model's parts, to be put behind the model: the last value of a field counts."""
    text = isinstance(value, bytes)
    message = varint(field << 3 | 2 * text) + (varint(len(value)) + value if text else varint(value))
    return varint(part << 3 | 2) + varint(len(message)) + message


def other_settings(r: Random, data: bytes) -> bytes:
    """What a model was trained with, how it normalises and what it tests itself with."""
    for _ in range(r.choice((1, 1, 3))):
        if r.random() < 0.5:
            data += setting(*r.choice(NUMBERS), r.choice((0, 1, 2, 3, 4, 5, 700, 2**31, 2**64 - 1)))
        else:
            text = r.choice(TEXTS) if r.random() < 0.7 else r.randbytes(r.choice((4, 1028, 5000)))
            data += setting(*r.choice(STRINGS), text)
    return data


def other_lines(r: Random, data: bytes) -> bytes:
    """Sums, names and their order."""
    lines = data.splitlines()
    place = r.randrange(len(lines))
    name = r.choice(
        (b"..", b".", b"../x", b"a" * 300, b"\0", b"\xff\xfe", b"\x1b[2J", b"consolidated.07.pth", b"params.json")
    )
    lines[place] = r.choice((lines[place][:-3], lines[place].upper(), lines[0], lines[place][:34] + name, name))
    return r.choice((b"\n", b"\r\n", b"")).join(lines) + b"\n"


OWN = {"weights": (other_tensors, other_tensors, pickle_damaged), "params": (other_params, other_params),
       "tokenizer": (other_pieces, other_pieces, other_settings), "checklist": (other_lines,),
       "tensors": (other_header, other_header), "config": (other_params, other_params),
       "index": (other_params,), "gguf": (other_numbers,)}  # fmt: skip


# -------------------------------------------------------------------------------------------------------- whole files


def of_another_checkpoint(r: Random, path: Path, sounds: Path) -> None:
    others = sorted(sounds.glob(f"*/{path.name}"))
    shutil.copyfile(r.choice(others), path)


def shards_exchanged(r: Random, path: Path, sounds: Path) -> None:
    """Each is sound, and not where it belongs; a lone file comes twice."""
    other = path.with_name(r.choice(("consolidated.01.pth", "consolidated.00.pth", "consolidated.02.pth")))
    kept = other.read_bytes() if other.exists() else None
    shutil.copyfile(path, other) if other != path else None
    if kept and r.random() < 0.5:
        path.write_bytes(kept)


def no_file(r: Random, path: Path, sounds: Path) -> None:
    """Nothing, a folder, a link to nothing or to another file, a pipe that nobody writes to, an endless device."""
    path.unlink()
    what = r.choice(("nothing", "folder", "link", "link", "pipe", "device"))
    if what == "folder":
        path.mkdir()
    elif what == "link":
        path.symlink_to(r.choice(("nowhere", path.name, "params.json", "tokenizer.model")))
    elif what == "pipe":
        os.mkfifo(path)
    elif what == "device":
        path.symlink_to(r.choice(("/dev/zero", "/dev/null")))


WHOLE = (of_another_checkpoint, no_file)


# ----------------------------------------------------------------------------------------------------------- examples


def sound(folder: Path) -> Path:
    """The checkpoints that are damaged: plain, in int8, in int4, in two shards, as a Hugging Face folder, as GGUF."""
    import torch
    from checkpoints import SMALL, random_weights, save

    from llama.checkpoint import writer
    from llama.checkpoint.checklist import format_checklist, read_checklist
    from llama.checkpoint.convert import convert

    params = {**SMALL, "vocab_size": 1024, "n_heads": 4, "n_kv_heads": 2}
    first = save(folder / "first", params, random_weights(params, torch.bfloat16))
    demo = Path(__file__).parent.parent / "llama" / "demo"
    shutil.copy(demo / "tokenizer.model", first)
    writer.reshard(first, folder / "plain", 1)
    writer.reshard(first, folder / "two", 2)
    for form in ("int8", "int4"):
        writer.quantize(first, folder / form, form)
    save(folder / "plain", params, random_weights(params, torch.bfloat16))  # as torch.save writes it, not as we do
    sums = {name: md5((folder / "plain" / name).read_bytes()).hexdigest() for name in read_checklist(folder / "plain")}
    (folder / "plain" / "checklist.chk").write_text(format_checklist(sums))
    huggingface_folder(folder / "huggingface", params, random_weights(params, torch.bfloat16))
    shutil.copy(demo / "tokenizer.model", folder / "huggingface")
    for base, name in (("plain", "gguf"), ("int4", "gguf4")):
        (folder / name).mkdir()
        convert(folder / base, folder / name / "model.gguf", "gguf")
    shutil.rmtree(first)
    return folder


def huggingface_folder(folder: Path, params: dict, weights: dict) -> None:
    """The same in a Hugging Face folder: two files with their index."""
    from safetensors.torch import save_file

    from llama import ModelArgs
    from llama.checkpoint.huggingface import their_name, to_halves, turns_in_halves

    args = ModelArgs(**params)
    folder.mkdir()
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": args.dim,
        "intermediate_size": args.hidden_dim, "num_hidden_layers": args.n_layers, "num_attention_heads": args.n_heads,
        "num_key_value_heads": args.kv_heads, "rms_norm_eps": args.norm_eps, "vocab_size": args.vocab_size,
        "rope_theta": args.rope_theta, "hidden_act": "silu", "eos_token_id": 2, "tie_word_embeddings": False,
        "rope_scaling": {"rope_type": "linear", "factor": 2.0}, "max_position_embeddings": 64,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7], "temperature": 0.6}))
    renamed = {
        their_name(name): to_halves(t, args.head_dim).contiguous() if turns_in_halves(name) else t
        for name, t in weights.items()
    }
    index, names = {}, sorted(renamed)
    for number, some in enumerate((names[::2], names[1::2]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: renamed[name] for name in some}, folder / file)
        index |= dict.fromkeys(some, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def damage(seed: int, sounds: Path, folder: Path) -> tuple[str, str]:
    """Write the damaged checkpoint of a seed into `folder`; returns which kind of file was damaged, and how."""
    r = Random(seed)
    base = r.choice(("plain", "plain", "int8", "int4", "two", "huggingface", "huggingface", "gguf", "gguf4"))
    shutil.copytree(sounds / base, folder)
    metas = ("weights", "weights", "weights", "params", "params", "tokenizer", "tokenizer", "checklist")
    theirs = {"huggingface": ("tensors", "tensors", "tensors", "config", "config", "index"), "gguf": ("gguf",)}
    kind = r.choice(theirs.get("gguf" if base == "gguf4" else base, metas))
    path = r.choice(sorted(folder.glob(FILES[kind])))
    drawn = r.random()
    if drawn < 0.1:
        change = r.choice((*WHOLE, shards_exchanged) if kind == "weights" else WHOLE)
        change(r, path, sounds)
    else:
        change = r.choice(OWN[kind] if drawn < 0.6 else RUNS)
        path.write_bytes(change(r, path.read_bytes()))
    return kind, change.__name__.replace("_", " ")
