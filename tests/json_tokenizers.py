"""Small tokenizer.json files of the two kinds, trained on a few words, and folders that hold them."""

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

WORDS = ["The quick brown fox jumps over the lazy dog. ", "once upon a time a little bear said: hello! ",
         "Übergröße 12345 naïve café 你好 世界 \U0001f600\n\n\t  spaces   of  many kinds"] * 3  # fmt: skip
SPECIALS = ["<|begin|>", "<|end|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>"]


def byte_level() -> Any:
    """As GPT-2's, Llama-3's and Qwen's: a token spells bytes."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    made.train_from_iterator(WORDS, trainer)
    made.add_tokens(["<think>"])  # an ordinary word that was added
    made.add_special_tokens(SPECIALS)
    begin = made.token_to_id("<|begin|>")
    made.post_processor = processors.TemplateProcessing("<|begin|> $A", special_tokens=[("<|begin|>", begin)])
    return made


def spelled_spaces() -> Any:
    """As Llama-2's when it was converted: U+2581 for a space, bytes for what has no token."""
    made = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.train_from_iterator(WORDS, trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"]))
    described = json.loads(made.to_str())
    vocabulary = described["model"]["vocab"]
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    described["model"] |= {"byte_fallback": True, "fuse_unk": True}
    made = tokenizers.Tokenizer.from_str(json.dumps(described))
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", made.token_to_id("<s>"))])
    return made


def save(made: Any, folder: Path, **settings: Any) -> Path:
    folder.mkdir(exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder
