"""What `llama demo` shows: what the bundled checkpoint can do, and the commands to try next."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from llama.chat import Message
from llama.request import SamplingParams

if TYPE_CHECKING:
    from llama.generation import Llama

BEGINNINGS = ("Once upon a time there was a small fox named Tom.", "Ben wanted a red kite.")
QUESTION = "What sound does a dog make?"
SYSTEMS = (None, "Answer with one word.", "Answer in capital letters.")
NEXT = """Try next:
  llama complete "One morning Mia went to the lake." --temperature 0.8 --n 3
  llama complete "Ben wanted a red kite." --top_logprobs 4
  llama chat --system "Answer with one word."
  llama info
With weights of your own: the same commands with --ckpt_dir FOLDER."""


def scenes(llama: "Llama") -> Iterator[str]:
    """Two stories completed and a question answered under three system prompts, greedily; then what to try next."""
    greedy = SamplingParams(temperature=0)
    for story in llama.text_completion(BEGINNINGS, params=greedy, echo=True):
        yield story["generation"]
    answers = llama.chat_completion([_dialog(system) for system in SYSTEMS], params=greedy)
    for system, answer in zip(SYSTEMS, answers, strict=True):
        text = answer["generation"]["content"].strip()
        yield f"System: {system or '(none)'}\nUser: {QUESTION}\nAssistant: {text}"
    yield NEXT


def _dialog(system: str | None) -> list[Message]:
    before: list[Message] = [{"role": "system", "content": system}] if system else []
    return [*before, {"role": "user", "content": QUESTION}]
