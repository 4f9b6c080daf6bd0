"""Which chat format a checkpoint has: its own template, Llama-2's format, or none."""

from pathlib import Path
from typing import Any

from llama.chat import ChatFormat, Llama2Chat, NoChat
from llama.errors import ParameterError, PromptError
from llama.paths import expanded, read
from llama.text.json_tokenizer import text_of
from llama.text.step_chat import STEP, StepChat
from llama.text.template import TemplateChat
from llama.text.tokenizer_files import read_settings
from llama.tokenizer import BaseTokenizer, Tokenizer

LLAMA2, NONE = "llama2", "none"
_MOST_BYTES = 1 << 20  # of a template
_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token")


def chat_format(folder: Path, asked: str | None, tokenizer: BaseTokenizer) -> ChatFormat:
    """That of `--chat_template` (a file, llama2 or none), else that of the folder, else Meta's for its tokenizer."""
    settings = read_settings(folder)
    if asked == LLAMA2:
        return Llama2Chat(tokenizer)
    if asked == NONE:
        return NoChat("chat_template=none was asked for: leave it out, or name a template")
    template = _of_file(asked) if asked is not None else _of_folder(folder, settings)
    if template is not None:
        return TemplateChat(template, _names(settings, tokenizer), tokenizer)
    if (step := tokenizer.id_of(STEP)) is not None:
        return StepChat(tokenizer, step)
    if isinstance(tokenizer, Tokenizer):
        return Llama2Chat(tokenizer)
    return NoChat(f"{folder} has no chat template: name one with chat_template (a file of Jinja, or llama2)")


def template_of(folder: Path) -> str | None:
    """The template that a checkpoint itself has."""
    return _of_folder(folder, read_settings(folder))


def _of_file(asked: str) -> str:
    path = expanded(asked, "chat_template")
    try:
        return read(path, _MOST_BYTES).decode()
    except OSError as error:
        raise ParameterError(
            f"chat_template={asked!r:.80} cannot be read ({error.strerror}): name a file, {LLAMA2} or {NONE}"
        ) from None
    except UnicodeDecodeError:
        raise ParameterError(f"chat_template={asked!r:.80} is not UTF-8 text: convert it first") from None


def _of_folder(folder: Path, settings: dict[str, Any]) -> str | None:
    """chat_template.jinja, or "chat_template" in tokenizer_config.json: a text, or several by name."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return _of_file(str(path))
    found = settings.get("chat_template")
    if isinstance(found, list):
        named = [one for one in found if isinstance(one, dict) and one.get("name") == "default"]
        found = named[0].get("template") if named else None
    if found is not None and not isinstance(found, str):
        raise PromptError(f"{folder / 'tokenizer_config.json'} has a chat_template that is no text: name another one")
    return found


def _names(settings: dict[str, Any], tokenizer: BaseTokenizer) -> dict[str, str]:
    """The special tokens by the names that templates use."""
    by_id = {token: name for name, token in tokenizer.specials.items()}
    own = {"bos_token": by_id.get(tokenizer.bos_id), "eos_token": by_id.get(tokenizer.eos_id)}
    told = {name: text_of(settings.get(name)) for name in _NAMES}
    return {name: text for name in _NAMES if (text := told[name] or own.get(name))}
