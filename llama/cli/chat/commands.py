"""What can be done in a talk beside talking: its /commands, without a terminal and without a model."""

import json
import os
from collections.abc import Callable
from dataclasses import astuple, dataclass, field, fields, replace
from typing import Any

from llama.batch.lines import check_names
from llama.chat import ChatFormat
from llama.cli.chat.conversation import Ask, Conversation, check_text, excerpt, load, save
from llama.errors import PromptError
from llama.gate import one_line
from llama.paths import check_writable, expanded
from llama.request import Counts, SamplingParams
from llama.wording import nearest

KEYS = r"""
Enter sends. Alt-Enter (or Esc, then Enter) begins a new line, and so does Enter after a \ at the end; pasted lines stay
together. Arrow up brings back what was typed before. Ctrl-C stops an answer; what was said so far is kept.
A message that begins with / is typed with two: //like this."""
_WORDS = {"none": None, "true": True, "false": False}


@dataclass(frozen=True, slots=True)
class Turn:
    """What one answer took; times are in seconds. `computed`: tokens of prompt and answer that were not known yet.

    `drafts` are those of a build that speculates, which has 0 steps elsewhere.
    """

    prompt_tokens: int
    completion_tokens: int
    computed_tokens: int
    time_to_first_token: float | None
    time: float
    drafts: Counts = field(default_factory=Counts)


@dataclass(slots=True, kw_only=True)
class Talk:
    """All that commands show and change. `check` raises ParameterError for parameters that the build cannot run."""

    params: SamplingParams
    chat: ChatFormat
    max_seq_len: int
    check: Callable[[SamplingParams], None]
    ask: Ask
    conversation: Conversation
    turns: list[Turn] = field(default_factory=list)
    keep: Callable[[], str] = str  # writes the prompt cache, if there is to be one, and says so


@dataclass(frozen=True, slots=True)
class Reply:
    """What a line of the user's comes to: words for the user, a message for the model, or the end of the talk."""

    say: str = ""
    send: str | None = None
    leave: bool = False


@dataclass(frozen=True, slots=True)
class Command:
    argument: str  # as /help shows it: in brackets one that may be left out
    help: str
    run: Callable[[Talk, str], Reply]


def respond(talk: Talk, line: str) -> Reply:
    """Do what a line asks for. Raises LlamaError, with nothing changed, where that cannot be done."""
    if not line.startswith("/"):
        return Reply(send=line)
    if line.startswith("//"):
        return Reply(send=line[1:])
    name, argument = (*line[1:].split(maxsplit=1), "", "")[:2]
    command = COMMANDS.get(name)
    if command is None:
        near = nearest(name, COMMANDS)
        hint = f"did you mean /{near}?" if near else "/help lists what there is"
        raise PromptError(f"there is no command /{excerpt(name)}: {hint} (a message may begin with //)")
    if argument and not command.argument:
        raise PromptError(f"/{name} takes nothing, but {excerpt(argument)!r} follows: type /{name} alone")
    if not argument and command.argument and not command.argument.startswith("["):
        raise PromptError(f"/{name} lacks its {command.argument}: type /{name} {command.argument}")
    return command.run(talk, argument)


def _system(talk: Talk, text: str) -> Reply:
    conversation = talk.conversation
    if not text:
        return Reply(conversation.system or "There is no system prompt; /system TEXT sets one.")
    if text.lower() == "none":
        conversation.system = None
        return Reply("The system prompt is removed.")
    check_text(text, "the system prompt", talk.chat)
    conversation.system = text
    return Reply("The system prompt is set.")


def _reset(talk: Talk, _: str) -> Reply:
    talk.conversation.exchanges.clear()
    return Reply("The dialog is forgotten; the system prompt stays." if talk.conversation.system else "Forgotten.")


def _undo(talk: Talk, _: str) -> Reply:
    _need_exchange(talk, "take back")
    return Reply(f"Taken back: {excerpt(talk.conversation.exchanges.pop()[0])}")


def _retry(talk: Talk, _: str) -> Reply:
    _need_exchange(talk, "answer again")
    user, _ = talk.conversation.exchanges.pop()
    fixed = talk.params.temperature == 0 or talk.params.num_beams > 1 or talk.params.seed is not None
    return Reply("With these parameters (see /set) the answer will be the same." if fixed else "", send=user)


def _need_exchange(talk: Talk, purpose: str) -> None:
    if not talk.conversation.exchanges:
        raise PromptError(f"there is nothing to {purpose} yet: the dialog is empty")


def _save(talk: Talk, file: str) -> Reply:
    if not talk.conversation.messages():
        raise PromptError("there is nothing to save yet: the dialog is empty")
    path = expanded(file, "FILE")
    check_writable(path, "name another")
    exists = os.path.lexists(path)
    if exists and not talk.ask(f"{path} exists. Overwrite it?"):
        return Reply("Not saved.")
    save(talk.conversation, path, "w" if exists else "x")
    kept = talk.keep()
    return Reply(f"Saved {_exchanges(talk.conversation)} to {one_line(path)}" + (f"\n{kept}" if kept else ""))


def _load(talk: Talk, file: str) -> Reply:
    path = expanded(file, "FILE")
    talk.conversation = load(path, talk.chat)
    shown = "".join(f"> {user}\n{answer}\n" for user, answer in talk.conversation.exchanges)
    system = f"System prompt: {talk.conversation.system}\n" if talk.conversation.system else ""
    return Reply(f"{system}{shown}Loaded {_exchanges(talk.conversation)} from {one_line(path)}")


def _exchanges(conversation: Conversation) -> str:
    count = len(conversation.exchanges)
    return "1 exchange" if count == 1 else f"{count} exchanges"


def _set(talk: Talk, argument: str) -> Reply:
    name, text = (*argument.split(maxsplit=1), "", "")[:2]
    if not name:
        return Reply("\n".join(_shown(talk.params, one.name) for one in fields(talk.params)))
    check_names([name])
    if text:
        params = replace(talk.params, **{name: _value(name, text)})
        talk.check(params)
        talk.params = params
    return Reply(_shown(talk.params, name))


def _value(name: str, text: str) -> Any:
    """A value as it is typed: JSON, or none, true, false in any case; what takes texts takes one without quotes."""
    if text.lower() in _WORDS and name != "stop":
        return _WORDS[text.lower()]
    if name in ("stop", "choices") and not text.startswith(("[", '"')):
        return text
    if name in ("regex", "grammar") and not text.startswith('"'):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _shown(params: SamplingParams, name: str) -> str:
    """One parameter, as /set would take it."""
    value = getattr(params, name)
    return f"{name} {'none' if value is None else json.dumps(value, ensure_ascii=False)}"


def _stats(talk: Talk, _: str) -> Reply:
    begins = talk.conversation.prompt_tokens("", talk.chat)
    context = f"context used       {begins} of {talk.max_seq_len} tokens, before the next message"
    if not talk.turns:
        return Reply(f"Nothing was answered yet.\n{context}")
    rows = zip(("", *_NUMBERS), _column("last answer", talk.turns[-1:]), _column("talk", talk.turns), strict=True)
    speculates = any(turn.drafts.steps for turn in talk.turns)
    shown = [row for row in rows if speculates or row[0] not in _OF_DRAFTS]
    return Reply("\n".join([f"{name:<17}{last:>13}{whole:>13}" for name, last, whole in shown] + [context]))


_OF_DRAFTS = ("drafted", "of these right", "tokens a step")
_NUMBERS = ("tokens in", "tokens out", "computed of these", "first token (s)", "tokens/s out", *_OF_DRAFTS)


def _column(heading: str, turns: list[Turn]) -> list[str]:
    tokens, seconds = sum(turn.completion_tokens for turn in turns), sum(turn.time for turn in turns)
    first = [turn.time_to_first_token for turn in turns if turn.time_to_first_token is not None]
    steps, drafted, accepted = (sum(column) for column in zip(*(astuple(turn.drafts) for turn in turns), strict=True))
    return [
        heading,
        str(sum(turn.prompt_tokens for turn in turns)),
        str(tokens),
        str(sum(turn.computed_tokens for turn in turns)),
        f"{sum(first) / len(first):.2f}" if first else "-",
        f"{tokens / seconds:.1f}" if seconds else "-",
        str(drafted),
        str(accepted),
        f"{Counts(steps, drafted, accepted).tokens_per_step:.2f}",
    ]


def _help(talk: Talk, _: str) -> Reply:
    rows = [(f"/{name} {command.argument}", command.help) for name, command in COMMANDS.items()]
    return Reply("\n".join(f"{usage:<20} {text}" for usage, text in rows) + KEYS)


def _exit(talk: Talk, _: str) -> Reply:
    return Reply(leave=True)


COMMANDS = {
    "system": Command("[TEXT]", "set the system prompt, or show it; /system none removes it", _system),
    "reset": Command("", "forget the dialog, but not the system prompt", _reset),
    "undo": Command("", "take back the last message and its answer", _undo),
    "retry": Command("", "answer the last message again", _retry),
    "save": Command("FILE", "write the dialog to a file, as one line of JSON", _save),
    "load": Command("FILE", "go on with the dialog of such a file", _load),
    "set": Command("[NAME [VALUE]]", "show the sampling parameters, or set one: /set temperature 0.2", _set),
    "stats": Command("", "show tokens, times, and how full the context is", _stats),
    "help": Command("", "show this", _help),
    "exit": Command("", "leave; so does Ctrl-D", _exit),
}
