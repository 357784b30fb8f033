"""OpenAI's own client against the shim, as its users write it."""

import asyncio
from collections.abc import Callable
from typing import Any

import openai
import pytest

from .shims import MODEL, SUM, Front

Run = Callable[..., Any]


def sdk(front: Front, **options: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{front.url}/v1", api_key="EMPTY", **options)


def on_thread(run: Run, use: Callable[[openai.OpenAI], Any]) -> Any:
    """The synchronous client, on a thread: the server is on this one."""

    async def used(front: Front) -> Any:
        def with_client() -> Any:
            with sdk(front) as client:
                return use(client)

        return await asyncio.to_thread(with_client)

    return run(used)


def test_chat_answers_the_sum(front: Run) -> None:
    def use(client: openai.OpenAI) -> None:
        messages: Any = [{"role": "system", "content": "You are helpful."}, *SUM]
        answer = client.chat.completions.create(model=MODEL, messages=messages, temperature=0)
        (choice,) = answer.choices
        assert "81" in (choice.message.content or "")
        assert choice.finish_reason == "stop"
        assert answer.usage is not None
        assert answer.usage.total_tokens == (
            answer.usage.prompt_tokens + answer.usage.completion_tokens
        )
        assert answer.id.startswith("chatcmpl-")

    on_thread(front, use)


def test_streamed_chat_equals_the_whole_one(front: Run) -> None:
    def use(client: openai.OpenAI) -> None:
        asked: Any = {"model": MODEL, "messages": SUM, "temperature": 0}
        whole = client.chat.completions.create(**asked)
        chunks = list(
            client.chat.completions.create(
                **asked, stream=True, stream_options={"include_usage": True}
            )
        )
        *parts, last = chunks
        assert last.choices == []
        assert last.usage == whole.usage or last.usage.total_tokens == whole.usage.total_tokens
        assert parts[0].choices[0].delta.role == "assistant"
        text = "".join(c.choices[0].delta.content or "" for c in parts)
        assert text == whole.choices[0].message.content
        assert [c.choices[0].finish_reason for c in parts if c.choices[0].finish_reason] == ["stop"]
        assert len({c.id for c in chunks}) == len({c.created for c in chunks}) == 1
        with client.chat.completions.stream(**asked) as stream:
            assert stream.get_final_completion().choices[0].message.content == text

    on_thread(front, use)


def test_chat_logprobs_have_alternatives(front: Run) -> None:
    def use(client: openai.OpenAI) -> None:
        answer = client.chat.completions.create(
            model=MODEL,
            messages=SUM,  # type: ignore[arg-type]
            temperature=0,
            max_tokens=3,
            logprobs=True,
            top_logprobs=5,
        )
        logprobs = answer.choices[0].logprobs
        assert logprobs is not None
        assert logprobs.content is not None
        assert len(logprobs.content) == 3
        for token in logprobs.content:
            assert len(token.top_logprobs) == 5
            assert token.top_logprobs[0].logprob == token.logprob  # greedy
            values = [one.logprob for one in token.top_logprobs]
            assert values == sorted(values, reverse=True)

    on_thread(front, use)


def test_completions_of_many_prompts_come_in_order(front: Run) -> None:
    def use(client: openai.OpenAI) -> None:
        prompts = ["Once upon", "Two plus", "Once upon"]
        answer = client.completions.create(
            model=MODEL, prompt=prompts, n=2, max_tokens=5, seed=3, extra_body={"top_k": 40}
        )
        assert [choice.index for choice in answer.choices] == list(range(6))
        texts = [choice.text for choice in answer.choices]
        assert texts[:2] == texts[4:]
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 30

    on_thread(front, use)


def test_async_client_asks_many_at_once(front: Run) -> None:
    async def use(front: Front) -> None:
        async with openai.AsyncOpenAI(base_url=f"{front.url}/v1", api_key="x") as client:
            asked: Any = {"model": MODEL, "messages": SUM, "temperature": 0}
            answers = await asyncio.gather(
                *(client.chat.completions.create(**asked) for _ in range(20))
            )
            assert len({answer.choices[0].message.content for answer in answers}) == 1
            stream = await client.chat.completions.create(**asked, stream=True)
            texts = [c.choices[0].delta.content or "" async for c in stream]
            assert "".join(texts) == answers[0].choices[0].message.content

    front(use)


@pytest.mark.parametrize(
    ("fields", "kind", "part", "param"),
    [
        ({"model": "nobody"}, openai.NotFoundError, "nobody", "model"),
        ({"temperature": 7}, openai.BadRequestError, "0 (greedy) to 2, got 7.0", "temperature"),
        ({"max_tokens": -1}, openai.BadRequestError, "max_tokens", "max_tokens"),
        ({"seed": 2**63}, openai.BadRequestError, "less_than_equal", "seed"),
        ({"extra_body": {"temprature": 1}}, openai.BadRequestError, "temperature?", "temprature"),
        ({"tools": [{"type": "function"}]}, openai.BadRequestError, "not honoured", "tools"),
        ({"top_logprobs": 3}, openai.BadRequestError, "logprobs: true", "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, openai.BadRequestError, "stream: true", None),
        ({"messages": []}, openai.BadRequestError, "at least 1", "messages"),
        (
            {"messages": [{"role": "user", "content": "a " * 5000}]},
            openai.BadRequestError,
            "",
            None,
        ),
    ],
)
def test_refusal_names_the_field(
    front: Run, fields: Any, kind: type[openai.APIStatusError], part: str, param: str | None
) -> None:
    def use(client: openai.OpenAI) -> None:
        asked = {"model": MODEL, "messages": SUM} | fields
        with pytest.raises(kind) as caught:
            client.chat.completions.create(**asked)
        assert part in caught.value.message
        if param is not None:
            assert caught.value.param == param
        assert isinstance(caught.value.body, dict)
        assert set(caught.value.body) == {"message", "type", "param", "code"}

    on_thread(front, use)


def test_models_are_listed_and_found(front: Run) -> None:
    def use(client: openai.OpenAI) -> None:
        (model,) = client.models.list().data
        assert model.id == MODEL
        assert client.models.retrieve(MODEL).id == MODEL
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("org/none")

    on_thread(front, use)
