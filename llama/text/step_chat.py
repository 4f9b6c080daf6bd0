"""The chat format of Code Llama 70B: turns with a source, each of which ends with the token <step>.

Source: Meta's reference (facebookresearch/codellama).
"""

from dataclasses import dataclass
from typing import ClassVar

from llama.chat import SPECIAL_TAGS, ChatPrompt, Dialog, check_dialog
from llama.errors import PromptError
from llama.tokenizer import BaseTokenizer

STEP = "<step>"
_ANSWER = (" Source: assistant\nDestination: user", "\n\n ")


@dataclass(frozen=True, slots=True)
class StepChat:
    """For a tokenizer that has the piece <step>, whose number is `step`."""

    tokenizer: BaseTokenizer
    step: int
    identity: ClassVar[str] = "step"

    @property
    def end_ids(self) -> frozenset[int]:
        return frozenset({self.step})

    def check(self, dialog: Dialog, name: str) -> None:
        check_dialog(dialog, name)
        for place, message in enumerate(dialog):
            if not isinstance(message.get("destination", ""), str):
                raise PromptError(f"{name}, message {place}: destination is {message['destination']!r:.60}, not text")

    def refuses(self, dialog: Dialog) -> bool:
        return any(tag in message["content"] for message in dialog for tag in (*SPECIAL_TAGS, STEP))

    def prompt(self, dialog: Dialog) -> ChatPrompt:
        """A turn is a head and a body, which are encoded apart; the first turn is the system's, be it empty."""
        if dialog[0]["role"] != "system":
            dialog = [{"role": "system", "content": ""}, *dialog]
        text, tokens = "<s>", self.tokenizer.encode("", bos=True, eos=False)
        for message in dialog:
            head = f" Source: {message['role']}"
            if destination := message.get("destination"):
                head += f"\nDestination: {destination.strip()}"
            parts = [head, f"\n\n {message['content'].strip()}"] if message["content"] else [head]
            text += "".join(parts) + STEP
            tokens += [*self._encode(parts), self.step]
        return ChatPrompt(text + "".join(_ANSWER), tokens + self._encode(_ANSWER))

    def _encode(self, parts: "list[str] | tuple[str, ...]") -> list[int]:
        return [token for part in parts for token in self.tokenizer.encode(part, bos=False, eos=False)]
