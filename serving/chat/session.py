"""The loop of a conversation: read, answer, remember; lines that begin with / are commands."""

import difflib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ...engine.errors import UsageError
from ...engine.llm import LLM
from ...engine.sampling_params import SamplingParams
from .conversation import Conversation, check_sampling
from .reader import ReadLine, read_message

HELP = """\
  /system TEXT        what the model is told first; /system alone shows it, /system - removes it
  /set NAME VALUE     a sampling parameter (/set temperature 0.2); /set alone shows what is set,
                      /set NAME - takes it back
  /clear              forget the conversation
  /save FILE, /load FILE
  /stats              tokens per second and time to first token of the last answer
  /bye                leave (or Ctrl-D)
Text of several lines: begin and end it with \"\"\", or end a line with \\.
Ctrl-C stops the answer. A message that begins with / is written with //.
"""


@dataclass(frozen=True)
class Stats:
    """The last answer."""

    num_prompt_tokens: int
    num_cached_tokens: int
    num_tokens: int
    first_s: float
    seconds: float

    def line(self) -> str:
        decode_s = self.seconds - self.first_s
        rate = (self.num_tokens - 1) / decode_s if self.num_tokens > 1 and decode_s > 0 else 0.0
        return (
            f"prompt {self.num_prompt_tokens} tokens ({self.num_cached_tokens} cached), answer "
            f"{self.num_tokens} tokens; first after {self.first_s * 1000:.0f} ms, then "
            f"{rate:.1f} tokens/s\n"
        )


class Session:
    """read_line gives None at the end of the input; write takes text as it comes."""

    def __init__(
        self,
        llm: LLM,
        conversation: Conversation,
        read_line: ReadLine,
        write: Callable[[str], None],
    ) -> None:
        self._llm = llm
        self._conversation = conversation
        self._read_line = read_line
        self._write = write
        self._stats: Stats | None = None
        self._commands: dict[str, Callable[[str], None]] = {
            "/system": self._system,
            "/set": self._set,
            "/clear": self._clear,
            "/save": self._save,
            "/load": self._load,
            "/stats": self._show_stats,
            "/help": lambda _: self._write(HELP),
            "/?": lambda _: self._write(HELP),
        }

    def run(self) -> None:
        """Until /bye or the end of the input."""
        while True:
            try:
                text = read_message(self._read_line)
                if text is None or text.strip() in ("/bye", "/exit", "/quit"):
                    return
                self._take(text)
            except KeyboardInterrupt:
                self._write("\n/bye or Ctrl-D leaves\n")
            except UsageError as error:
                self._write(f"{error}\n")

    def _take(self, text: str) -> None:
        if not text.strip():
            return
        if text.startswith("//"):
            self._answer(text[1:])
        elif text.startswith("/"):
            name, _, rest = text.partition(" ")
            if name not in self._commands:
                near = difflib.get_close_matches(name, [*self._commands, "/bye"], 1)
                hint = f"did you mean {near[0]}?" if near else "/help lists them"
                self._write(f"there is no command {name}; {hint}\n")
                return
            self._commands[name](rest.strip())
        else:
            self._answer(text)

    def _answer(self, text: str) -> None:
        """Ask and print; the exchange is remembered as far as it came."""
        talk = self._conversation
        question = {"role": "user", "content": text}
        try:
            params = self._params()
            stream = self._llm.stream_chat([*talk.prompt(), question], params)
        except UsageError as error:
            if "max_model_len" in str(error) and talk.messages:
                raise UsageError(f"{error} (/clear forgets the conversation so far)") from error
            raise
        started = time.perf_counter()
        first_s = 0.0
        try:
            for delta in stream:
                first_s = first_s or time.perf_counter() - started
                self._write(delta.text)
        except KeyboardInterrupt:
            pass  # it stops the answer; what came of it stays
        finally:
            stream.close()
            seconds = time.perf_counter() - started
            output = stream.output
            answer = output.outputs[0]
            if answer.token_ids:
                talk.messages += [question, {"role": "assistant", "content": answer.text}]
        self._stats = Stats(
            len(output.prompt_token_ids),
            output.num_cached_tokens,
            len(answer.token_ids),
            first_s,
            seconds,
        )
        self._write("\n")
        if answer.finish_reason == "error":
            self._write(f"the answer ended with an error: {answer.stop_reason}\n")
        elif answer.finish_reason == "length" and params.max_tokens is None:
            self._write("the answer ended because the context is full; /clear empties it\n")

    def _params(self) -> SamplingParams:
        # Answers go on until the model ends them.
        defaults = {"max_tokens": None} | self._llm.default_sampling
        return SamplingParams(**defaults | self._conversation.sampling)

    # Commands

    def _system(self, text: str) -> None:
        if text:
            self._conversation.system = None if text == "-" else text
        else:
            self._write(f"{self._conversation.system or 'no system message'}\n")

    def _set(self, text: str) -> None:
        sampling = self._conversation.sampling
        name, _, written = text.partition(" ")
        written = written.strip()
        if not name:
            for key in {"max_tokens": None} | self._llm.default_sampling | sampling:
                self._show(key)
            return
        if not written:
            asked: dict[str, Any] = {name: getattr(self._params(), name, None)}
            SamplingParams(**asked)  # raises for what is no parameter
            self._show(name)
            return
        changed = dict(sampling)
        if written == "-":
            changed.pop(name, None)
        else:
            changed[name] = _value(written)
        check_sampling(changed)
        self._conversation.sampling = changed

    def _show(self, name: str) -> None:
        value = getattr(self._params(), name)
        self._write(f"{name} {json.dumps(value, ensure_ascii=False, default=_plain)}\n")

    def _clear(self, _: str) -> None:
        self._conversation.messages.clear()

    def _save(self, path: str) -> None:
        self._require_file("/save", path)
        self._conversation.save(path)
        self._write(f"saved {len(self._conversation.messages)} messages to {path}\n")

    def _load(self, path: str) -> None:
        self._require_file("/load", path)
        self._conversation.load(path)
        self._write(f"loaded {len(self._conversation.messages)} messages from {path}\n")

    def _show_stats(self, _: str) -> None:
        self._write("nothing was answered yet\n" if self._stats is None else self._stats.line())

    def _require_file(self, name: str, path: str) -> None:
        if not path:
            raise UsageError(f"{name} needs a file: {name} talk.json")


def _value(written: str) -> Any:
    """JSON where it is JSON, else the text itself."""
    try:
        return json.loads(written)
    except (ValueError, RecursionError):
        return written


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else list(value)
