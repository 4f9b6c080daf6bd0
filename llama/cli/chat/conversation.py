"""A dialog that grows: what was said, what of it fits into the context, and the file that keeps it."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from llama.batch.lines import read_dialogs
from llama.chat import ChatFormat, Message, check_dialog
from llama.errors import PromptError

Ask = Callable[[str], bool]  # puts a question to the user; whether the answer is yes


@dataclass(slots=True)
class Conversation:
    """The system prompt, and pairs of a user's message and its answer, the oldest first."""

    system: str | None = None
    exchanges: list[tuple[str, str]] = field(default_factory=list)

    def messages(self) -> list[Message]:
        """All that was said, in the form of a dialog that ends with an answer."""
        said: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        for user, answer in self.exchanges:
            said += [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
        return said

    def dialog(self, text: str) -> list[Message]:
        """The dialog that asks for an answer to `text`."""
        return [*self.messages(), {"role": "user", "content": text}]

    def prompt_tokens(self, text: str, chat: ChatFormat) -> int:
        """How many tokens the model reads to answer `text`."""
        return len(chat.prompt(self.dialog(text)).tokens)


def excerpt(text: str) -> str:
    """The beginning of a text, for one line."""
    line = " ".join(text.split())
    return line if len(line) <= 60 else line[:59] + "…"


def check_text(text: str, name: str, chat: ChatFormat) -> None:
    """Raise PromptError, which calls the text `name`, where it has no UTF-8 form or no dialog may hold it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise PromptError(f"{name} holds bytes that are not UTF-8 text: remove them") from None
    if chat.refuses([{"role": "user", "content": text}]):
        raise PromptError(f"{name} holds a special tag of the chat format, which no dialog may: remove it")


def make_room(conversation: Conversation, text: str, chat: ChatFormat, max_seq_len: int, ask: Ask) -> bool:
    """Whether an answer to `text` fits into the context, after the user gave up as many old exchanges as it takes.

    Raises PromptError, before anything is asked, where even the message alone leaves no room.
    """
    alone = Conversation(conversation.system).prompt_tokens(text, chat)
    if alone >= max_seq_len:
        what = "the message and the system prompt have" if conversation.system else "the message has"
        raise PromptError(
            f"{what} {alone} tokens, which leaves no room for an answer within max_seq_len={max_seq_len}: shorten it,"
            " or build with a larger max_seq_len"
        )
    while (used := conversation.prompt_tokens(text, chat)) >= max_seq_len:
        oldest = excerpt(conversation.exchanges[0][0])
        if not ask(
            f"The context is full: the dialog has {used} tokens, and max_seq_len={max_seq_len} is to hold an answer"
            f" too. Drop the oldest exchange ({oldest!r})?"
        ):
            return False
        del conversation.exchanges[0]
    return True


def save(conversation: Conversation, path: str, mode: Literal["x", "w"]) -> None:
    """Write the dialog as a line of JSON, as files of prompts have it; "x" is for a file that must not exist yet."""
    line = json.dumps({"messages": conversation.messages()}, ensure_ascii=False)
    try:
        with open(path, mode, encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError as error:
        raise PromptError(f"{path} cannot be written: {error.strerror}; name another file") from None


def load(path: str, chat: ChatFormat) -> Conversation:
    """The conversation that a file holds, as `save` writes it. Raises PromptError for anything else."""
    dialogs = read_dialogs(os.path.abspath(path))  # "-" is a file here, not standard input
    if len(dialogs) != 1:
        raise PromptError(f"{path} has {len(dialogs)} dialogs: expected a file with one, as /save writes it")
    messages = dialogs[0]
    if messages and isinstance(messages[-1], dict) and messages[-1].get("role") == "user":
        raise PromptError(f"{path} ends with the user: expected a dialog as /save writes it, which ends with an answer")
    check_dialog([*messages, {"role": "user", "content": ""}], path)
    for place, message in enumerate(messages):
        check_text(message["content"], f"{path}, message {place},", chat)
    contents = [message["content"] for message in messages]
    system = contents.pop(0) if messages and messages[0]["role"] == "system" else None
    return Conversation(system, list(zip(contents[::2], contents[1::2], strict=True)))
