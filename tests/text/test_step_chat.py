"""Code Llama 70B's chat format, to the token, and which models have it."""

from pathlib import Path

import pytest
from code_llama import STEP, checkpoint
from code_llama import tokenizer as with_pieces

from llama import Llama, SamplingParams, Tokenizer
from llama.errors import PromptError
from llama.text.chat_files import chat_format
from llama.text.step_chat import StepChat

USER, ANSWER = {"role": "user", "content": " Hi? "}, {"role": "assistant", "content": "Ho!"}
SYSTEM = {"role": "system", "content": "Be cute"}
OPEN = [" Source: assistant\nDestination: user", "\n\n "]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(str(with_pieces(tmp_path_factory.mktemp("step") / "tokenizer.model", [STEP])))


@pytest.mark.parametrize(
    ("dialog", "turns"),
    [
        ([USER], [[" Source: system"], [" Source: user", "\n\n Hi?"]]),
        ([SYSTEM, USER], [[" Source: system", "\n\n Be cute"], [" Source: user", "\n\n Hi?"]]),
        ([USER, ANSWER, USER], [[" Source: system"], [" Source: user", "\n\n Hi?"], [" Source: assistant", "\n\n Ho!"],
                                [" Source: user", "\n\n Hi?"]]),
        ([USER, {**ANSWER, "destination": "user"}, USER],
         [[" Source: system"], [" Source: user", "\n\n Hi?"], [" Source: assistant\nDestination: user", "\n\n Ho!"],
          [" Source: user", "\n\n Hi?"]]),
    ],
)  # fmt: skip
def test_what_is_encoded(tokenizer: Tokenizer, dialog: list[dict], turns: list[list[str]]) -> None:
    """Heads and bodies apart, a <step> behind each turn, and the head of an answer to the user."""
    chat = StepChat(tokenizer, tokenizer.id_of(STEP))
    chat.check(dialog, "it")
    expected = [tokenizer.bos_id]
    for parts in turns:
        expected += [t for part in parts for t in tokenizer.encode(part, bos=False, eos=False)] + [1024]
    expected += [t for part in OPEN for t in tokenizer.encode(part, bos=False, eos=False)]
    prompt = chat.prompt(dialog)
    assert prompt.tokens == expected
    assert prompt.text == "<s>" + "".join("".join(parts) + STEP for parts in turns) + "".join(OPEN)


def test_the_piece_decides(tmp_path: Path) -> None:
    """Not a size, nor a name; an answer ends at it, a text does not; chat_template overrules."""
    folder = checkpoint(tmp_path / "model", [STEP])
    llama = Llama.build(str(folder), None, 256, 1, device="cpu")
    assert isinstance(llama.chat, StepChat)
    params = SamplingParams(temperature=0, max_gen_len=4, logit_bias={1024: 1e9})
    (answer,) = llama.chat_completion([[USER]], params=params)
    assert (answer["finish_reason"], answer["completion_tokens"]) == ("stop", 0)
    assert llama.text_completion(["a"], params=params)[0]["finish_reason"] == "length"
    assert chat_format(folder, "llama2", llama.tokenizer).identity == "llama2"


def test_what_could_pass_for_the_format_is_refused(tokenizer: Tokenizer) -> None:
    chat = StepChat(tokenizer, 1024)
    assert chat.refuses([{"role": "user", "content": "a <step> b"}]) and chat.refuses(
        [{"role": "user", "content": "[INST]"}]
    )
    assert not chat.refuses([USER])
    with pytest.raises(PromptError, match="it, message 1: destination is 3, not text"):
        chat.check([USER, {**ANSWER, "destination": 3}, USER], "it")
