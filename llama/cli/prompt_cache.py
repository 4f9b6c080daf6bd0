"""--prompt_cache: the file that keeps a prompt's KV cache from one start of a command to the next, and what is said."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from llama import log
from llama.engine.scheduler import shared_prefix
from llama.errors import ParameterError
from llama.log import is_first
from llama.paths import check_writable
from llama.request import SamplingParams

if TYPE_CHECKING:
    from llama.generation import Llama
    from llama.infilling import Infilling


def check(path: str | None, params: SamplingParams) -> None:
    """Raise ParameterError, before a model is loaded, where the file could be neither read nor made, nor used."""
    if path is None:
        return
    if not os.path.exists(path):
        check_writable(path)
    if params.num_beams > 1:
        raise ParameterError(f"num_beams={params.num_beams} computes its prompt anew: leave --prompt_cache out")


def loaded(llama: "Llama", path: str) -> list[int] | None:
    """The tokens of the file, from which prompts start now; None where it is still to be made.

    Raises LlamaError where it cannot be used, or none can be made for this model.
    """
    if os.path.exists(path):
        return llama.load_prefix(path)
    llama.prefix_made_with()
    return None


@contextmanager
def used(path: str | None, llama: "Llama", prompts: "Sequence[str | Infilling]") -> Iterator[None]:
    """Run prompts with the file; where there is none, it is made of their common beginning after they have run."""
    if path is None:
        yield
        return
    tokens = [llama.prompt_tokens(prompt) for prompt in prompts]
    found = loaded(llama, path)
    which = "the prompt" if len(prompts) == 1 else f"all {len(prompts)} prompts"
    if found is not None:
        log.say(f"prompt cache {path}: {_common([found, *tokens])} of its {len(found)} tokens begin {which}")
    yield
    if found is not None or not is_first():
        return
    common = tokens[0][: _common(tokens)]
    if len(common) > llama.engine.max_seq_len:  # the prompt did not run either
        return
    if len(common) < 2:
        log.say(f"prompt cache {path}: not made, {which} begin with nothing in common")
        return
    llama.save_prefix(common, path)
    log.say(f"prompt cache {path}: made, {len(common)} tokens begin {which}")


def _common(listed: list[list[int]]) -> int:
    """How many tokens all have in common at their beginning."""
    return min(shared_prefix(listed[0], other, len(listed[0])) for other in listed)
