"""LLM: offline generation in the caller's process, in the words that vLLM's users type."""

import asyncio
import hashlib
import queue
import threading
import time
import weakref
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from typing import Any

from .collector import Collector
from .config import EngineConfig
from .core_io import StepOutput, Submission
from .errors import RequestError
from .loop import EngineLoop
from .notices import say
from .open_requests import OpenRequests
from .outputs import RequestOutput, StreamDelta
from .runner import Runner
from .sampling_params import SamplingParams
from .startup import Engine, start_engine
from .text.tokenizer import Tokenizer
from .text.validate import TextRequest, check_text_request
from .token_checks import TokenLimits, check_token_request
from .vllm_options import translate

Prompt = str | Sequence[int] | Mapping[str, Any]
Message = Mapping[str, Any]


class LLM:
    """A model in this process.

    `LLM(model="path or hub id", dtype=…, max_model_len=…, …)` takes the options of EngineConfig
    (`quire generate --help` lists them); without a model it loads the small embedded one. Methods
    may be called from any thread, also inside a running event loop. Close it, or use it as a
    context manager, to free its memory.
    """

    def __init__(self, model: str | None = None, **options: Any) -> None:
        keywords = translate(options)
        started = time.perf_counter()
        self._engine: Engine = start_engine(EngineConfig(model=model, **keywords), say)
        say(f"ready in {time.perf_counter() - started:.1f} s")
        self._seed = keywords.get("seed", 0)
        self._loop = EngineLoop(self._engine.core)
        # Also when it is dropped, and at exit: a thread inside XLA would abort the interpreter.
        self._finalizer = weakref.finalize(self, _shut_down, self._loop, self._engine.core.runner)
        self._lock = threading.Lock()
        self._num_requests = 0
        self._limits = TokenLimits(
            self._engine.logits_width, self._engine.max_model_len, keywords.get("max_logprobs", 20)
        )

    # Generation

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """One RequestOutput per prompt, in order.

        A prompt is a string, a list of token ids, {"prompt": …} or {"prompt_token_ids": […]};
        params are one for all or one per prompt, by default those of the model's
        generation_config.json. Every prompt is checked before any runs. Raises RequestError.
        """
        listed = _as_list(prompts)
        each = self._params_for(listed, sampling_params)
        return self._run([self.check(p, s) for p, s in zip(listed, each, strict=True)], use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answers to one conversation, or to each of many, through the model's chat template."""
        is_one = not messages or isinstance(messages[0], Mapping)
        conversations = [messages] if is_one else list(messages)
        each = self._params_for(conversations, sampling_params)
        checked = [
            self.check_chat(
                conversation,  # type: ignore[arg-type]
                s,
                tools=tools,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                chat_template=chat_template,
                **(chat_template_kwargs or {}),
            )
            for conversation, s in zip(conversations, each, strict=True)
        ]
        return self._run(checked, use_tqdm)

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> "Stream":
        """The answer as it is made: iterate with `for` or `async for`. Leaving the loop ends the
        request.
        """
        return self._stream(
            self.check(prompt, sampling_params or self.get_default_sampling_params())
        )

    def stream_chat(
        self,
        messages: Sequence[Message],
        sampling_params: SamplingParams | None = None,
        **chat_template_kwargs: Any,
    ) -> "Stream":
        """Like stream, for one conversation."""
        params = sampling_params or self.get_default_sampling_params()
        return self._stream(self.check_chat(messages, params, **chat_template_kwargs))

    # One request at a time, for callers that read them as they go

    def open_requests(self) -> OpenRequests:
        """What is submitted to it runs; use it in a `with`."""
        return OpenRequests(self._loop, self.get_tokenizer(), self._submissions)

    def check(
        self, prompt: Prompt, params: SamplingParams, *, add_special_tokens: bool = True
    ) -> TextRequest:
        """The request, ready to be submitted. Raises RequestError."""
        if not isinstance(params, SamplingParams):
            raise RequestError(
                f"sampling_params must be SamplingParams, got {type(params).__name__}",
                field="sampling_params",
            )
        checked = check_text_request(
            prompt,
            params,
            self.get_tokenizer(),
            max_model_len=self.max_model_len,
            add_special_tokens=add_special_tokens,
        )
        resolved = check_token_request(checked.prompt_token_ids, checked.params, self._limits)
        return TextRequest(checked.prompt, checked.prompt_token_ids, resolved, checked.bad_word_ids)

    def check_chat(
        self, messages: Sequence[Message], params: SamplingParams, /, **template_options: Any
    ) -> TextRequest:
        """The same for a conversation; options are those of Tokenizer.apply_chat_template."""
        text = self.get_tokenizer().apply_chat_template(messages, **template_options)
        return self.check(text, params, add_special_tokens=False)

    def seed_of(self, number: int) -> int:
        """The seed of request `number` if it brings none: the engine's seed and the number decide
        it alone. generate() counts requests from 0 on.
        """
        return _derived_seed(self._seed, number)

    # Text and facts

    def tokenize(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return self.get_tokenizer().encode(text, add_special_tokens)

    def detokenize(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return self.get_tokenizer().decode(token_ids, skip_special_tokens)

    def get_tokenizer(self) -> Tokenizer:
        return self._engine.files.text.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What applies when no params are given: vLLM's defaults under the model's
        generation_config.json.
        """
        return SamplingParams(**self._engine.files.text.default_sampling)

    @property
    def default_sampling(self) -> dict[str, Any]:
        """What the model's generation_config.json says, in SamplingParams' names."""
        return dict(self._engine.files.text.default_sampling)

    @property
    def max_model_len(self) -> int:
        return self._limits.max_model_len

    @property
    def logits_width(self) -> int:
        """Token ids that the model reads and gives; a tokenizer may have more or fewer."""
        return self._limits.logits_width

    @property
    def max_num_seqs(self) -> int:
        """Requests that run at once; more wait."""
        return self._engine.core.scheduler.config.num_slots

    # Life

    def close(self) -> None:
        """Stop the engine and free its memory. Requests under way end with EngineStopped."""
        self._finalizer()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Inside

    def _params_for(
        self, prompts: Sequence[Any], params: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[SamplingParams]:
        if params is None:
            params = self.get_default_sampling_params()
        if isinstance(params, SamplingParams):
            return [params] * len(prompts)
        if not isinstance(params, (list, tuple)):
            raise RequestError(
                "sampling_params must be SamplingParams or a list of them, got "
                f"{type(params).__name__}",
                field="sampling_params",
            )
        if len(params) != len(prompts):
            raise RequestError(
                f"there are {len(prompts)} prompts and {len(params)} sampling_params; give one "
                "for all or one for each",
                field="sampling_params",
            )
        return list(params)

    def _submissions(self, request: TextRequest) -> tuple[int, list[Submission]]:
        with self._lock:
            number = self._num_requests
            self._num_requests += 1
        seed = request.params.seed
        if seed is None:
            seed = self.seed_of(number)
        return number, [
            Submission(
                f"{number}-{choice}",
                request.prompt_token_ids,
                request.params,
                seed,
                request.bad_word_ids,
                choice,
            )
            for choice in range(request.params.n)
        ]

    def _run(self, requests: list[TextRequest], use_tqdm: bool) -> list[RequestOutput]:
        from tqdm.auto import tqdm

        output_by_id: dict[str, RequestOutput] = {}
        with (
            tqdm(total=len(requests), desc="prompts", disable=not use_tqdm) as bar,
            self.open_requests() as under_way,
        ):
            request_ids = under_way.submit(requests)
            while (output := under_way.take()) is not None:
                output_by_id[output.request_id] = output
                rate = bar.format_dict["rate"] or 0
                bar.update()
                bar.set_postfix(tokens=under_way.num_tokens, refresh=False, rate=f"{rate:.1f}/s")
        return [output_by_id[request_id] for request_id in request_ids]

    def _stream(self, request: TextRequest) -> "Stream":
        outputs: queue.SimpleQueue[StepOutput | None] = queue.SimpleQueue()
        number, submissions = self._submissions(request)
        collector = Collector(number, request, self.get_tokenizer())
        self._loop.submit(submissions, outputs.put)
        return Stream(self, outputs, collector, [s.request_id for s in submissions])


class Stream:
    """Deltas of one request, for `for` and for `async for`. Closing it, or dropping it, ends the
    request.
    """

    def __init__(
        self,
        llm: LLM,
        outputs: "queue.SimpleQueue[StepOutput | None]",
        collector: "Collector",
        request_ids: list[str],
    ) -> None:
        self._llm = llm  # kept: an engine that nobody holds is closed
        self._loop = llm._loop
        self._outputs = outputs
        self._collector = collector
        self._choice_by_id = {request_id: i for i, request_id in enumerate(request_ids)}

    def __iter__(self) -> Iterator[StreamDelta]:
        try:
            while self._choice_by_id:
                delta = self._take(self._outputs.get())
                if delta is not None:
                    yield delta
        finally:
            self.close()

    async def __aiter__(self) -> AsyncIterator[StreamDelta]:
        loop = asyncio.get_running_loop()
        try:
            while self._choice_by_id:
                delta = self._take(await loop.run_in_executor(None, self._outputs.get))
                if delta is not None:
                    yield delta
        finally:
            self.close()

    @property
    def output(self) -> RequestOutput:
        """What has been read so far."""
        return self._collector.result()

    def close(self) -> None:
        """End the request if it still runs."""
        if self._choice_by_id:
            self._loop.abort(list(self._choice_by_id))
            self._choice_by_id.clear()
            self._outputs.put(None)  # wakes whoever waits for the next delta

    def __del__(self) -> None:
        self.close()

    def _take(self, output: StepOutput | None) -> StreamDelta | None:
        choice = None if output is None else self._choice_by_id.get(output.request_id)
        if output is None or choice is None:
            return None
        before = self._collector.mark(choice)
        is_done, must_abort = self._collector.add(output, choice)
        if must_abort:
            self._loop.abort([output.request_id])
        if is_done:
            self._choice_by_id.pop(output.request_id, None)
        return self._collector.delta_since(before, choice)


def _shut_down(loop: EngineLoop, runner: Runner) -> None:
    loop.close()
    runner.release()


def _as_list(prompts: Any) -> list[Prompt]:
    """One prompt or many: a list of ints is one, a list of anything else is many."""
    if hasattr(prompts, "tolist"):
        prompts = prompts.tolist()
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    if not isinstance(prompts, Iterable):
        raise RequestError(
            f"prompts must be a prompt or a list of prompts, got {type(prompts).__name__}",
            field="prompts",
        )
    listed = list(prompts)
    return [listed] if listed and all(type(p) is int for p in listed) else listed


def _derived_seed(engine_seed: int, number: int) -> int:
    """The seed of a request that brought none: 63 bits of (engine seed, request number)."""
    digest = hashlib.blake2b(f"{engine_seed},{number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
