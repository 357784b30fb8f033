"""OpenAI's own client against the shim, as its users write it."""

import asyncio
from collections.abc import Callable
from typing import Any

import openai
import pytest

from ..gateway.gateways import until
from .shims import KEY, MODEL, SUM, Front

Run = Callable[..., Any]


def sdk(front: Front, **options: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{front.url}/v1", **{"api_key": "EMPTY"} | options)


def on_thread(run: Run, use: Callable[[openai.OpenAI], Any], **options: Any) -> Any:
    """The synchronous client, on a thread: the server is on this one."""

    async def used(front: Front) -> Any:
        def with_client() -> Any:
            with sdk(front, **options) as client:
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

    on_thread(front, use)


def test_stream_helper_brings_events_and_the_whole(front: Run) -> None:
    asked: Any = {"model": MODEL, "messages": SUM, "temperature": 0}

    def check(events: list[Any], final: Any) -> None:
        deltas = [event for event in events if event.type == "content.delta"]
        assert "".join(event.delta for event in deltas) == "23 + 58 = 81."
        assert deltas[-1].snapshot == "23 + 58 = 81."
        (done,) = [event for event in events if event.type == "content.done"]
        assert done.content == final.choices[0].message.content == "23 + 58 = 81."
        assert final.choices[0].finish_reason == "stop"

    def use(client: openai.OpenAI) -> None:
        with client.chat.completions.stream(**asked) as stream:
            check(list(stream), stream.get_final_completion())

    async def use_async(front: Front) -> None:
        async with openai.AsyncOpenAI(base_url=f"{front.url}/v1", api_key="x") as client:
            usage: Any = {"include_usage": True}
            async with client.chat.completions.stream(**asked, stream_options=usage) as stream:
                events = [event async for event in stream]
                final = await stream.get_final_completion()
            check(events, final)
            assert final.usage is not None
            assert final.usage.total_tokens > final.usage.completion_tokens > 0

    on_thread(front, use)
    front(use_async)


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


def test_streamed_logprobs_equal_the_whole_ones(front: Run) -> None:
    def use(client: openai.OpenAI) -> None:
        asked: Any = {"model": MODEL, "messages": SUM, "temperature": 0}
        asked |= {"logprobs": True, "top_logprobs": 5}
        whole = client.chat.completions.create(**asked).choices[0]
        assert whole.logprobs is not None
        tokens = []
        for chunk in client.chat.completions.create(**asked, stream=True):
            choice = chunk.choices[0]
            if choice.logprobs is not None:
                said = "".join(token.token for token in choice.logprobs.content)
                assert said.startswith(choice.delta.content or "")
                tokens += choice.logprobs.content
        assert tokens == whole.logprobs.content
        texts = [token.token for token in tokens]
        assert "".join(texts[:-1]) == whole.message.content  # the last one ends the answer

    on_thread(front, use)


def test_top_k_in_the_extra_body_bounds_what_is_drawn(front: Run) -> None:
    def use(client: openai.OpenAI) -> None:
        asked: Any = {"model": MODEL, "messages": SUM, "temperature": 2, "seed": 1}
        asked |= {"logprobs": True, "top_logprobs": 5, "max_tokens": 200}
        asked["extra_body"] = {"ignore_eos": True, "top_k": 5}
        logprobs = client.chat.completions.create(**asked).choices[0].logprobs
        assert logprobs is not None
        assert logprobs.content is not None
        drawn = [(t.token, {one.token for one in t.top_logprobs}) for t in logprobs.content]
        assert len(drawn) == 200
        assert all(token in top for token, top in drawn)
        asked["extra_body"] = {"ignore_eos": True, "top_k": 40}
        logprobs = client.chat.completions.create(**asked).choices[0].logprobs
        assert logprobs is not None
        assert logprobs.content is not None
        drawn = [(t.token, {one.token for one in t.top_logprobs}) for t in logprobs.content]
        assert not all(token in top for token, top in drawn)

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

            async def ask(number: int, *, is_streamed: bool) -> str:
                content = f"What is {number} + 58?"
                asked: Any = {"model": MODEL, "temperature": 0}
                asked["messages"] = [{"role": "user", "content": content}]
                if not is_streamed:
                    answer = await client.chat.completions.create(**asked)
                    return str(answer.choices[0].message.content)
                stream = await client.chat.completions.create(**asked, stream=True)
                return "".join([c.choices[0].delta.content or "" async for c in stream])

            numbers = range(20, 60)
            answers = await asyncio.gather(*(ask(n, is_streamed=n % 2 == 0) for n in numbers))
            assert answers == [f"{n} + 58 = {n + 58}." for n in numbers]

    front(use)


def test_request_id_goes_in_and_comes_out(front: Run) -> None:
    def use(client: openai.OpenAI) -> None:
        asked: Any = {"model": MODEL, "messages": SUM, "max_tokens": 1}
        asked["extra_headers"] = {"X-Request-ID": "mine-1"}
        answer = client.chat.completions.create(**asked)
        assert (answer._request_id, answer.id) == ("mine-1", "chatcmpl-mine-1")
        raw = client.chat.completions.with_raw_response.create(**asked, stream=True)
        assert raw.headers["x-request-id"] == "mine-1"
        assert {chunk.id for chunk in raw.parse()} == {"chatcmpl-mine-1"}
        bad: Any = asked | {"temperature": 7}
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(**bad)
        assert caught.value.request_id == "mine-1"

    on_thread(front, use)


def test_left_stream_and_timeout_end_the_request(front: Run) -> None:
    """until_idle(), after every test, sees that nothing is left of them."""
    long: Any = {"model": MODEL, "prompt": "a", "max_tokens": 900}
    long["extra_body"] = {"ignore_eos": True}

    async def use(front: Front) -> None:
        aborted = front.served.gateway.metrics.finished_by_reason
        before = aborted["abort"]
        async with openai.AsyncOpenAI(
            base_url=f"{front.url}/v1", api_key="x", max_retries=0
        ) as client:
            async with await client.completions.create(**long, stream=True) as stream:
                async for _ in stream:
                    break
            await until(lambda: aborted["abort"] == before + 1)
            with pytest.raises(openai.APITimeoutError):
                await client.completions.create(**long, timeout=0.05)
            await until(lambda: aborted["abort"] == before + 2)

    front(use)


def test_request_id_of_an_open_request_is_a_conflict(front: Run) -> None:
    async def use(front: Front) -> None:
        asked: Any = {"model": MODEL, "prompt": "a", "max_tokens": 900}
        asked["extra_body"] = {"ignore_eos": True, "request_id": "twice"}
        async with openai.AsyncOpenAI(
            base_url=f"{front.url}/v1", api_key="x", max_retries=0
        ) as client:
            async with await client.completions.create(**asked, stream=True) as stream:
                await anext(aiter(stream))
                with pytest.raises(openai.ConflictError) as caught:
                    await client.completions.create(**asked)
            assert caught.value.code == "duplicate_request_id"

    front(use)


def test_wrong_key_is_an_authentication_error(keyed: Run) -> None:
    def use(client: openai.OpenAI) -> None:
        for call in (
            lambda: client.models.list(),
            lambda: client.chat.completions.create(model=MODEL, messages=[]),
            lambda: client.chat.completions.create(model=MODEL, messages=[], stream=True),
        ):
            with pytest.raises(openai.AuthenticationError) as caught:
                call()
            assert caught.value.code == "invalid_api_key"
            assert "header Authorization: Bearer KEY" in caught.value.message

    on_thread(keyed, use, api_key="wrong")
    on_thread(keyed, lambda client: client.models.list(), api_key=KEY)


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
            "prompt is too long",
            "messages",
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
