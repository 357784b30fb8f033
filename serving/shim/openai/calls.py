"""One call of /v1/chat/completions or /v1/completions, from its requests to its answer.

Knows deltas of the engine and OpenAI's shapes; sockets, keys and limits are others'.
"""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from ....protos.quire.v1 import inference_pb2 as pb
from ..engine import Answers, Outcome
from . import answers as shapes
from .answers import DONE, Head, JsonObject, Splicer, event
from .echo import Echo
from .errors import HttpError
from .requests import ChatBody, CompletionBody, last_of_assistant

_FAILED = pb.FINISH_REASON_ERROR


@dataclass
class Wants:
    """What the body asks of the answer's shape."""

    num_choices: int = 1  # of each prompt
    has_logprobs: bool = False
    num_top: int = 0
    as_ids: bool = False
    token_ids: bool = False
    usage: bool = False
    running_usage: bool = False
    echoes: list[Echo] = field(default_factory=list)  # of each prompt, if wanted
    prefix: str = ""  # of the answers to a conversation
    only_echo: bool = False  # the answer's own tokens are not wanted

    @property
    def num_logprobs(self) -> int | None:
        """Of each token; None: of the whole vocabulary."""
        if self.num_top < 0:
            return None
        return 1 + self.num_top if self.has_logprobs else 0

    @classmethod
    def of(cls, body: ChatBody | CompletionBody, echoes: list[Echo]) -> "Wants":
        options = body.stream_options
        is_chat = isinstance(body, ChatBody)
        top = body.top_logprobs if isinstance(body, ChatBody) else body.logprobs
        wants_usage = bool(options and options.include_usage)
        return cls(
            num_choices=body.n or 1,
            has_logprobs=bool(body.logprobs) if is_chat else body.logprobs is not None,
            num_top=top or 0,
            as_ids=bool(body.return_tokens_as_token_ids),
            token_ids=bool(body.return_token_ids),
            usage=wants_usage,
            running_usage=wants_usage and bool(options and options.continuous_usage_stats),
            echoes=echoes,
            prefix=last_of_assistant(body) if isinstance(body, ChatBody) and body.echo else "",
            only_echo=bool(echoes) and body.max_tokens == 0,
        )


@dataclass
class _Choice:
    """One answer so far."""

    index: int
    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    positions: list[pb.PositionLogprobs] = field(default_factory=list)
    last: pb.GenerateDelta | None = None
    text_offset: int = 0  # of the next token: where it would be if each were a text of its own
    splicer: Splicer | None = None
    has_begun: bool = False


class Call:
    """The answer to all requests of one call, whole or streamed."""

    def __init__(self, head: Head, wants: Wants, answers: Answers) -> None:
        self._head = head
        self._wants = wants
        self._answers = answers
        self._choices: dict[int, _Choice] = {}
        self._summaries: dict[int, pb.Summary] = {}
        self._prompt_logprobs: dict[int, Any] = {}
        self._prompt_tokens: dict[int, int] = {}

    # Whole

    async def whole(self) -> JsonObject:
        """The body of the answer. Raises HttpError."""
        while self._answers.num_open or self._answers.has_events:
            for number, one in await self._answers.take():
                delta = _delta(one)
                choice = self._choice_of(number, delta)
                self._note(number, choice, delta)
                choice.texts.append(delta.text)
                choice.token_ids += delta.token_ids
                choice.positions += delta.logprobs
        if self._prompt_logprobs:  # thousands of positions: not while others wait
            return await asyncio.to_thread(self._whole)
        return self._whole()

    def _whole(self) -> JsonObject:
        choices = [self._whole_choice(c) for _, c in sorted(self._choices.items())]
        payload = self._head.whole() | {
            "choices": choices,
            "usage": self._usage(),
        }
        if self._head.shape.is_chat and self._prompt_logprobs:
            payload["prompt_logprobs"] = shapes.prompt_logprobs(self._prompt_logprobs[0])
        return payload

    def _whole_choice(self, choice: _Choice) -> JsonObject:
        assert choice.last is not None
        text = "".join(choice.texts)
        logprobs = None
        if self._wants.has_logprobs:
            logprobs = self._logprobs(choice.positions, 0)
        if self._wants.echoes:
            text, logprobs = self._echoed(choice, text, logprobs)
        made: JsonObject = {"index": choice.index}
        if self._head.shape.is_chat:
            made["message"] = {
                "role": self._head.role,
                "content": self._wants.prefix + text,
                "refusal": None,
            }
        else:
            made["text"] = text
            number = choice.index // self._wants.num_choices
            if number in self._prompt_logprobs and not self._wants.echoes:
                made["prompt_logprobs"] = shapes.prompt_logprobs(self._prompt_logprobs[number])
        made |= self._ending(choice.last, logprobs)
        if self._wants.token_ids:
            made["token_ids"] = [] if self._wants.only_echo else choice.token_ids
        return made

    # Streamed

    async def stream(self) -> AsyncIterator[bytes]:
        """Server-sent events, those that come together in one piece. Raises HttpError before the
        first one; later, what went wrong is an event.
        """
        has_begun = False
        try:
            while self._answers.num_open or self._answers.has_events:
                parts = []
                for number, one in await self._answers.take():
                    delta = _delta(one)
                    choice = self._choice_of(number, delta)
                    splicer = choice.splicer
                    if splicer is not None and delta.text and not delta.finish_reason:
                        parts.append(splicer.chunk(delta.text))  # as nearly all are
                    elif delta.HasField("prompt_logprobs"):
                        made = await asyncio.to_thread(self._chunks, number, choice, delta)
                        parts.append(made)
                    else:
                        parts.append(self._chunks(number, choice, delta))
                if body := b"".join(parts):
                    has_begun = True
                    yield body
        except HttpError as error:
            if not has_begun:
                raise
            yield event(error.body) + DONE
            return
        end = DONE
        if self._wants.usage:
            end = event(self._head.chunk() | {"choices": [], "usage": self._usage()}) + DONE
        yield end

    def _chunks(self, number: int, choice: _Choice, delta: pb.GenerateDelta) -> bytes:
        made = b"" if choice.has_begun else self._beginning(number, choice, delta)
        if self._wants.only_echo:
            for name in ("text", "token_ids", "logprobs"):
                delta.ClearField(name)
        choice.token_ids += delta.token_ids
        if delta.text or delta.logprobs or (self._wants.token_ids and delta.token_ids):
            made += self._text_chunk(choice, delta)
        self._note(number, choice, delta)
        if delta.finish_reason:
            said: JsonObject = {"delta": {}} if self._head.shape.is_chat else {"text": ""}
            made += self._chunk(choice, said | self._ending(delta, None))
        return made

    def _beginning(self, number: int, choice: _Choice, delta: pb.GenerateDelta) -> bytes:
        """What comes before the first text of a choice."""
        choice.has_begun = True
        wants = self._wants
        if not (wants.has_logprobs or wants.token_ids or wants.running_usage or wants.only_echo):
            # Nothing but texts will be shown.
            choice.splicer = Splicer(self._head, choice.index, has_usage=wants.usage)
        self._note(number, choice, delta)
        if self._head.shape.is_chat:
            said = {"role": self._head.role, "content": wants.prefix}
            return self._chunk(choice, {"delta": said})
        if not wants.echoes:
            return b""
        text, logprobs = self._echoed(choice, "", None)
        choice.text_offset = len(text)
        return self._chunk(choice, {"text": text, "logprobs": logprobs})

    def _text_chunk(self, choice: _Choice, delta: pb.GenerateDelta) -> bytes:
        is_chat = self._head.shape.is_chat
        said: JsonObject = {"delta": {"content": delta.text}} if is_chat else {"text": delta.text}
        if self._wants.has_logprobs:
            said["logprobs"] = self._logprobs(delta.logprobs, choice.text_offset)
        # Not by the text that is sent: that of a part of a character comes with a later token.
        choice.text_offset += sum(len(p.tokens[0].text) for p in delta.logprobs)
        if self._wants.token_ids:
            said["token_ids"] = list(delta.token_ids)
        return self._chunk(choice, said)

    def _chunk(self, choice: _Choice, said: JsonObject) -> bytes:
        ordinary: JsonObject = {"index": choice.index, "logprobs": None, "finish_reason": None}
        payload = self._head.chunk() | {"choices": [ordinary | said]}
        if self._wants.usage:
            payload["usage"] = None
        if self._wants.running_usage:
            payload["usage"] = shapes.running_usage(
                sum(self._prompt_tokens.values()),
                0
                if self._wants.only_echo
                else sum(len(c.token_ids) for c in self._choices.values()),
            )
        return event(payload)

    # Both

    def _usage(self) -> JsonObject:
        return shapes.usage(self._summaries.values(), only_prompts=self._wants.only_echo)

    def _echoed(
        self, choice: _Choice, text: str, logprobs: JsonObject | None
    ) -> tuple[str, JsonObject | None]:
        """A text and its logprobs behind those of the prompt."""
        number = choice.index // self._wants.num_choices
        echo = self._wants.echoes[number]
        text = echo.text if self._wants.only_echo else echo.text + text
        if not self._wants.has_logprobs:
            return text, None
        positions = self._prompt_logprobs[number].positions
        before = shapes.completion_logprobs(positions, 0, as_ids=self._wants.as_ids)
        first = f"token_id:{echo.token_ids[0]}" if self._wants.as_ids else echo.first_token
        width = len(echo.first_token)
        offsets = [0, *(offset + width for offset in before["text_offset"])]
        after: JsonObject = {name: [] for name in before}
        if logprobs is not None and not self._wants.only_echo:
            after = logprobs | {
                "text_offset": [offset + len(echo.text) for offset in logprobs["text_offset"]]
            }
        return text, {
            "tokens": [first, *before["tokens"], *after["tokens"]],
            "token_logprobs": [None, *before["token_logprobs"], *after["token_logprobs"]],
            "top_logprobs": [None, *before["top_logprobs"], *after["top_logprobs"]],
            "text_offset": [*offsets, *after["text_offset"]],
        }

    def _choice_of(self, number: int, delta: pb.GenerateDelta) -> _Choice:
        index = number * self._wants.num_choices + delta.index
        choice = self._choices.get(index)
        if choice is None:
            choice = self._choices[index] = _Choice(index)
        return choice

    def _note(self, number: int, choice: _Choice, delta: pb.GenerateDelta) -> None:
        if delta.finish_reason == _FAILED:
            why = delta.stop_reason.text or "the engine failed at this request"
            raise HttpError(500, why, type="server_error")
        if delta.finish_reason:
            choice.last = delta
        if delta.prompt_tokens:
            self._prompt_tokens[number] = delta.prompt_tokens
        if delta.HasField("summary"):
            self._summaries[number] = delta.summary
        if delta.HasField("prompt_logprobs"):
            self._prompt_logprobs[number] = delta.prompt_logprobs

    def _logprobs(self, positions: Any, offset: int) -> JsonObject:
        wants = self._wants
        if self._head.shape.is_chat:
            return shapes.chat_logprobs(positions, wants.num_top, as_ids=wants.as_ids)
        return shapes.completion_logprobs(positions, offset, as_ids=wants.as_ids)

    def _ending(self, delta: pb.GenerateDelta, logprobs: JsonObject | None) -> JsonObject:
        return {
            "logprobs": logprobs,
            "finish_reason": shapes.finish_reason(delta),
            "stop_reason": shapes.stop_reason(delta),
        }


def _delta(outcome: Outcome) -> pb.GenerateDelta:
    """Raises HttpError for what is an error."""
    if isinstance(outcome, pb.SessionError):
        raise HttpError.of_session(outcome)
    return outcome
