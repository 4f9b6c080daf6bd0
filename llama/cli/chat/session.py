"""The talk itself: the terminal in which one types and reads, and the processes that answer together."""

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from llama import grammar, log, parallel
from llama.chat import Dialog, Message
from llama.cli.chat.commands import Talk, Turn, respond
from llama.cli.chat.conversation import Conversation, check_text, excerpt, make_room
from llama.cli.chat.terminal import ask, ctrl_c_typed, lines, notice, prepared, write
from llama.cli.output import has_colour
from llama.cli.prompt_cache import loaded
from llama.cli.token_view import coloured
from llama.errors import LlamaError, PeerError
from llama.gate import to_stderr
from llama.predictions import completion_tokens, samples_of
from llama.request import Counts, Request, SamplingParams

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from llama.generation import Llama
    from llama.predictions import ChatPrediction

CPU = torch.device("cpu")
GREETING = "/help lists what can be done; Ctrl-D leaves"


def talk(
    llama: "Llama", params: SamplingParams, *, system: str | None, show_prompt: bool = False,
    prompt_cache: str | None = None,
) -> None:  # fmt: skip
    """Talk until the user leaves; to be called by every rank, of which the first has the terminal.

    Raises LlamaError where the system prompt or the parameters cannot be run at all.
    """
    check_text(system or "", "the system prompt", llama.chat)
    llama.chat.check([{"role": "user", "content": ""}], "a dialog")  # where there is no format
    _check_params(llama, params)
    if prompt_cache is not None and (tokens := loaded(llama, prompt_cache)) is not None:
        log.say(f"prompt cache {prompt_cache}: {len(tokens)} tokens read")
    group = parallel.patient_group()
    if parallel.rank() > 0:
        _follow(llama, group)
        return
    state = Talk(
        params=params,
        chat=llama.chat,
        max_seq_len=llama.engine.max_seq_len,
        check=lambda given: _check_params(llama, given),
        ask=ask,
        conversation=Conversation(system or None),
    )
    if prompt_cache is not None:
        state.keep = _keeper(llama, state, prompt_cache)
    session = _Session(llama, state, show_prompt, group)
    with prepared(keys_as_bytes=group is not None):
        if log.is_said():
            notice(GREETING)
        for line in lines():
            if not _take(session, line):
                break
        notice(state.keep())
    parallel.broadcast(None, CPU, group)


def _keeper(llama: "Llama", state: Talk, path: str) -> Callable[[], str]:
    """What writes the KV cache of the talk, where that has changed since, and returns what is to be said of it."""
    kept: list[Message] = []

    def keep() -> str:
        messages = state.conversation.messages()
        if not messages or messages == kept:
            return ""
        tokens = llama.format_dialog(state.conversation.dialog("")).tokens[: state.max_seq_len]
        try:
            llama.save_prefix(tokens, path)
        except LlamaError as error:
            return str(error)
        kept[:] = messages
        return f"prompt cache {path}: {len(tokens)} tokens written"

    return keep


def _check_params(llama: "Llama", params: SamplingParams) -> None:
    """Raise ParameterError for parameters with which no message could be answered."""
    llama.engine.check(Request([0], params, 0, frozenset(), name="the talk"))
    if params.form:
        grammar.check(*params.form)


# ----------------------------------------------------------------------------------------------------------- one turn


@dataclass(frozen=True, slots=True)
class _Session:
    """What stays the same from turn to turn, and the talk that changes."""

    llama: "Llama"
    talk: Talk
    show_prompt: bool
    group: "ProcessGroup | None"  # of the processes that answer together


def _take(session: _Session, line: str) -> bool:
    """Do what a line asks for; whether the talk goes on. A message that gets no answer leaves no trace."""
    before = list(session.talk.conversation.exchanges)
    try:
        reply = respond(session.talk, line)
        if reply.say:
            write(f"{reply.say}\n")
        if reply.send is None or _turn(session, reply.send):
            return not reply.leave
    except PeerError:  # without the others no message can be answered
        raise
    except LlamaError as error:
        notice(str(error))
    except KeyboardInterrupt:
        notice("stopped")
    session.talk.conversation.exchanges = before
    return True


def _turn(session: _Session, text: str) -> bool:
    """Answer a message; whether there is an answer to keep."""
    llama, talk = session.llama, session.talk
    if not make_room(talk.conversation, text, talk.chat, talk.max_seq_len, talk.ask):
        notice("not sent; nothing was dropped")
        return False
    dialog = talk.conversation.dialog(text)
    prompt = llama.format_dialog(dialog)
    if session.show_prompt:
        to_stderr(f"llama: prompt {prompt.text!r}, {len(prompt.tokens)} tokens: {prompt.tokens}")
    computed, drafts, answer = llama.engine.computed_tokens, replace(llama.engine.counts), _Answer()
    result = _answered(session, dialog, answer)
    if reason := _lost(llama, dialog, answer, result):
        notice(reason)
        return False
    _show_more(result, talk.params)
    notice(_remark(result, talk))
    talk.conversation.exchanges.append((text, answer.text))
    talk.turns.append(
        Turn(
            prompt_tokens=len(prompt.tokens),
            completion_tokens=completion_tokens(result) if result else _tokens(llama, answer.text),
            computed_tokens=llama.engine.computed_tokens - computed,
            time_to_first_token=result["time_to_first_token"] if result else answer.first,
            time=time.perf_counter() - answer.started,
            drafts=llama.engine.counts - drafts if llama.engine.speculation else Counts(),
        )
    )
    if result and _fills_context(result, talk):
        _offer_more_room(session)
    return True


def _answered(session: _Session, dialog: Dialog, answer: "_Answer") -> "ChatPrediction | None":
    """What all ranks make of a dialog, shown as it comes; None where the user stopped it."""
    params = session.talk.params
    params = replace(params, logprobs=params.logprobs or params.top_logprobs > 0)
    parallel.broadcast((dialog, params), CPU, session.group)
    result = None
    try:
        with contextlib.suppress(KeyboardInterrupt):
            result = _complete(session.llama, dialog, params, answer.add, session.group)
    finally:
        if result is None or answer.text.strip():
            write("\n")
    return result


def _offer_more_room(session: _Session) -> None:
    """Answer the last message again without the oldest exchange, if there is one and the user gives it up."""
    conversation = session.talk.conversation
    exchanges = conversation.exchanges
    question = f"Drop the oldest exchange ({excerpt(exchanges[0][0])!r}) and answer again?"
    if len(exchanges) > 1 and session.talk.ask(question):
        conversation.exchanges = exchanges[1:-1]
        if not _turn(session, exchanges[-1][0]):
            conversation.exchanges = exchanges


class _Answer:
    """An answer while it is made: on the screen at once, but without the space that it may begin with."""

    def __init__(self) -> None:
        self.text = ""
        self.started = time.perf_counter()
        self.first: float | None = None  # seconds until its first piece

    def add(self, piece: str) -> None:
        if self.first is None:
            self.first = time.perf_counter() - self.started
        begun = self.text.strip()
        self.text += piece
        write(piece if begun else piece.lstrip())


def _complete(
    llama: "Llama", dialog: Dialog, params: SamplingParams, show: Callable[[str], None], group: "ProcessGroup | None"
) -> "ChatPrediction":
    """One answer, on every rank alike; raises KeyboardInterrupt on all of them where the user pressed Ctrl-C."""

    def on_text(_: int, piece: str) -> None:
        show(piece)
        if group is not None and parallel.broadcast(parallel.rank() == 0 and ctrl_c_typed(), CPU, group):
            raise KeyboardInterrupt

    return llama.chat_completion([dialog], params=params, on_text=on_text)[0]


def _follow(llama: "Llama", group: "ProcessGroup | None") -> None:
    """Take part in each turn of the first rank, which says what goes wrong in it."""
    while (turn := parallel.broadcast(None, CPU, group)) is not None:
        with contextlib.suppress(LlamaError, KeyboardInterrupt):
            dialog, params = turn
            _complete(llama, dialog, params, show=lambda piece: None, group=group)


def _lost(llama: "Llama", dialog: Dialog, answer: _Answer, result: "ChatPrediction | None") -> str:
    """Why there is no answer to keep; nothing where there is one."""
    if result is None:
        return "" if answer.text.strip() else "stopped before the answer began: your message is taken back"
    if result["finish_reason"] != "refused":
        return ""
    hint = "" if llama.chat.refuses(dialog[-1:]) else " An earlier message has one: /undo takes it back."
    return result["generation"]["content"] + hint


def _show_more(result: "ChatPrediction | None", params: SamplingParams) -> None:
    """What was asked for beside the answer: its tokens with their alternatives, or other samples."""
    if result and params.top_logprobs:
        print(coloured(result, colour=has_colour()), flush=True)
    elif result:
        for number, sample in enumerate(samples_of(result)[1:], 2):
            write(f"--- sample {number}, which the talk does not keep\n{sample['generation']['content']}\n")


def _remark(result: "ChatPrediction | None", talk: Talk) -> str:
    """What is to be said about how an answer ended; nothing where it came to its end."""
    if result is None:
        return "stopped; what was said so far is kept"
    if _fills_context(result, talk):
        return f"cut: the context is full (all max_seq_len={talk.max_seq_len} tokens)"
    if result["finish_reason"] == "length":
        return f"cut at max_gen_len={talk.params.max_gen_len}"
    return "" if result["generation"]["content"].strip() else "the answer is empty; /retry asks again"


def _fills_context(result: "ChatPrediction", talk: Talk) -> bool:
    """Whether the answer was cut where the context ends."""
    used = result["prompt_tokens"] + result["completion_tokens"]
    return result["finish_reason"] == "length" and used >= talk.max_seq_len


def _tokens(llama: "Llama", text: str) -> int:
    return len(llama.tokenizer.encode(text, bos=False, eos=False))
