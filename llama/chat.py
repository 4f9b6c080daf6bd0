"""Llama-2's chat format: a dialog → the prompt that the chat models were trained on.

Source: Meta's reference (facebookresearch/llama) and section 3.3 of https://arxiv.org/abs/2307.09288.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol, TypedDict

from typing_extensions import NotRequired

from llama.errors import PromptError
from llama.tokenizer import BaseTokenizer

Role = Literal["system", "user", "assistant"]


class Message(TypedDict):
    role: Role
    content: str
    destination: NotRequired[str]  # for formats that have one


Dialog = Sequence[Message]

B_INST, E_INST = "[INST]", "[/INST]"
B_SYS, E_SYS = "<<SYS>>\n", "\n<</SYS>>\n\n"
SPECIAL_TAGS = (B_INST, E_INST, B_SYS.strip(), E_SYS.strip())
REFUSAL = "Error: special tags are not allowed as part of the prompt."
_ORDER = "a dialog is an optional system message, then user and assistant in turn, ending with the user"


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """What the model reads for a dialog; in `text` the begin and end tokens are written <s> and </s>."""

    text: str
    tokens: list[int]


class ChatFormat(Protocol):
    """How a model wants dialogs to be written."""

    @property
    def identity(self) -> str:
        """What tells it from others: equal where all prompts are."""

    @property
    def end_ids(self) -> frozenset[int]:
        """The tokens that end an answer, beside those that end a text."""

    def check(self, dialog: Dialog, name: str) -> None:
        """Raise PromptError, which calls the dialog `name`, where the format cannot write it."""

    def refuses(self, dialog: Dialog) -> bool:
        """Whether a message could pass for the format itself, so that the dialog is answered by `REFUSAL`."""

    def prompt(self, dialog: Dialog) -> ChatPrompt:
        """The exact prompt of a dialog that `check` accepts."""


@dataclass(frozen=True, slots=True)
class Llama2Chat:
    """Llama-2's format, with its tokenizer."""

    tokenizer: BaseTokenizer
    identity: ClassVar[str] = "llama2"
    end_ids: ClassVar[frozenset[int]] = frozenset()

    def check(self, dialog: Dialog, name: str) -> None:
        check_dialog(dialog, name)

    def refuses(self, dialog: Dialog) -> bool:
        return has_special_tags(dialog)

    def prompt(self, dialog: Dialog) -> ChatPrompt:
        return format_dialog(dialog, self.tokenizer)


@dataclass(frozen=True, slots=True)
class NoChat:
    """What a checkpoint has that says nothing of dialogs; `why` ends with what to do."""

    why: str
    identity: ClassVar[str] = "none"
    end_ids: ClassVar[frozenset[int]] = frozenset()

    def check(self, dialog: Dialog, name: str) -> None:
        raise PromptError(f"{name} cannot be written as a prompt: {self.why}")

    def refuses(self, dialog: Dialog) -> bool:
        return False

    def prompt(self, dialog: Dialog) -> ChatPrompt:
        raise PromptError(self.why)


def check_messages(dialog: Dialog, name: str) -> None:
    """Raise PromptError, which calls the dialog `name`, unless it is a list of messages with texts."""
    if not isinstance(dialog, Sequence) or isinstance(dialog, str):
        raise PromptError(f"{name} is {type(dialog).__name__}, not a list of messages: {_ORDER}")
    if not dialog:
        raise PromptError(f"{name} is empty: {_ORDER}")
    for place, message in enumerate(dialog):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise PromptError(f"{name}, message {place} is not {{'role': …, 'content': …}}: {message!r:.60}")
        if not isinstance(message["content"], str):
            kind = type(message["content"]).__name__
            raise PromptError(f"{name}, message {place}: content is {kind}, not text")


def check_dialog(dialog: Dialog, name: str) -> None:
    """Raise PromptError, which calls the dialog `name`, unless it has Llama-2's shape."""
    check_messages(dialog, name)
    roles = [message["role"] for message in dialog]
    begin = 1 if roles[0] == "system" else 0
    if len(roles) == begin:
        raise PromptError(f"{name} is a system message alone: {_ORDER}")
    for place, role in enumerate(roles[begin:]):
        expected = "assistant" if place % 2 else "user"
        if role != expected:
            raise PromptError(f"{name}, message {begin + place} has role {role!r} instead of {expected!r}: {_ORDER}")
    if roles[-1] != "user":
        raise PromptError(f"{name} ends with {roles[-1]!r}: {_ORDER}")


def has_special_tags(dialog: Dialog) -> bool:
    """Whether a message holds a tag of the format itself, with which a user could end the instruction early."""
    return any(tag in message["content"] for message in dialog for tag in SPECIAL_TAGS)


def format_dialog(dialog: Dialog, tokenizer: BaseTokenizer) -> ChatPrompt:
    """The exact prompt of a dialog that `check_dialog` accepts.

    Each finished exchange is its own text between begin and end tokens; the last user message stays open:
    <s>[INST] user [/INST] answer </s><s>[INST] user [/INST]. The system message goes into the first user message.
    """
    contents = [message["content"] for message in dialog]
    if dialog[0]["role"] == "system":
        contents[:2] = [B_SYS + contents[0] + E_SYS + contents[1]]
    contents = [content.strip() for content in contents]
    text, tokens = "", []
    for user, answer in zip(contents[:-1:2], contents[1::2], strict=True):
        exchange = f"{B_INST} {user} {E_INST} {answer} "
        text += f"<s>{exchange}</s>"
        tokens += tokenizer.encode(exchange, bos=True, eos=True)
    open_end = f"{B_INST} {contents[-1]} {E_INST}"
    return ChatPrompt(f"{text}<s>{open_end}", tokens + tokenizer.encode(open_end, bos=True, eos=False))
