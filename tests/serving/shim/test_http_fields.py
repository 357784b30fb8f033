"""Every field of every body at its worst: refused by name, or harmless.

Fields are those that the models of the bodies have, so a new one is tested by being there.
"""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from quire.serving.shim.openai.requests import (
    ChatBody,
    CompletionBody,
    Message,
    Sampling,
    StreamOptions,
)

from .servers import CHAT, COMPLETIONS
from .shims import SUM, Front

Run = Callable[..., Any]
BIG = "a" * (1 << 20)
# As JSON, in which some of them are no values.
NUMBERS = [
    "NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1e308", "-1e308", "-1.5", "1e-320", "0.5",
    "-0.0", "0", "-1", "-2147483649", "2147483648", "4294967295", "4294967296",
    "9223372036854775807", "-9223372036854775809", "18446744073709551616", "1" + "0" * 400,
    "9" * 5000, "true", "false", "null",
]  # fmt: skip
TEXTS = [json.dumps(one) for one in ("", "a", BIG, "\ud800", "\0", "\u202e\n", "日" * 3000, "NaN")]
LISTS = [
    json.dumps(one)
    for one in (
        [], [""], ["a"], ["a"] * 10_000, [BIG], ["\ud800"], [None], [None] * 100_000, [[]], [{}],
        [1], [-1], [2**40], [1] * 100_000, [1.5], [1e308], [True], [[[1]]], ["a", 1], [[1], "a"],
    )
]  # fmt: skip
OBJECTS = [
    json.dumps(one)
    for one in (
        {}, {"a": 1}, {"1": 1e308}, {"-1": 1}, {"9" * 30: 1}, {"5": None}, {"5": {}}, {"": ""},
        {str(number): 1 for number in range(10_000)}, {"a": BIG}, {"\ud800": 1}, {"type": "text"},
    )
]  # fmt: skip
WORST = [*NUMBERS, *TEXTS, *LISTS, *OBJECTS, "[NaN]", '{"a": [NaN]}', "[" * 100 + "]" * 100]
# An answer of few tokens, whatever one field says.
SHORT = {"max_tokens": 2, "stop": [" ", "a", "e", "i"], "temperature": 0.5, "seed": 1}
BASES: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"prompt": "Hello"} | SHORT,
    CHAT: {"messages": SUM} | SHORT,
    "/tokenize": {"prompt": "Hello"},
    "/detokenize": {"tokens": [5]},
}


def own(kind: type[Sampling]) -> list[str]:
    return [name for name in kind.model_fields if name not in Sampling.model_fields]


# Route, field, and in which field it stands if not in the body.
FIELDS = [
    *((COMPLETIONS, name, None) for name in (*Sampling.model_fields, *own(CompletionBody))),
    *((CHAT, name, None) for name in own(ChatBody)),
    *((CHAT, name, "messages") for name in Message.model_fields),
    *((COMPLETIONS, name, "stream_options") for name in StreamOptions.model_fields),
    *(("/tokenize", name, None) for name in ("model", "prompt", "messages", "return_token_strs")),
    *(("/tokenize", name, None) for name in ("add_special_tokens", "add_generation_prompt")),
    *(("/detokenize", name, None) for name in ("model", "tokens")),
    (COMPLETIONS, "nobody_knows_this", None),
]


def content_of(route: str, name: str, inside: str | None, value: str) -> bytes:
    """A body that is good but for one value."""
    mark = "the worst"
    fields = dict(BASES[route])
    if inside == "messages":
        fields["messages"] = [{"role": "user", "content": "Hello"} | {name: mark}]
    elif inside is not None:
        fields |= {"stream": True, inside: {name: mark}}
    else:
        fields[name] = mark
        if name == "messages":
            fields.pop("prompt", None)
    return json.dumps(fields).replace(json.dumps(mark), value).encode()


@pytest.mark.parametrize(("route", "name", "inside"), FIELDS)
def test_field_at_its_worst_is_refused_by_name_or_harmless(
    front: Run, route: str, name: str, inside: str | None
) -> None:
    named = {inside or name}
    if (route, name) == ("/tokenize", "messages"):
        named.add("prompt")  # one of them
    kind = {"content-type": "application/json"}

    async def use(front: Front) -> None:
        before = await fixed(front)
        gate = asyncio.Semaphore(8)

        async def send(value: str) -> httpx.Response:
            async with gate:
                content = content_of(route, name, inside, value)
                return await front.http.post(route, content=content, headers=kind)

        found = await asyncio.gather(*map(send, WORST))
        for value, answer in zip(WORST, found, strict=True):
            shown = f"{value:.80}: {answer.status_code} {answer.text[:500]}"
            if answer.status_code == 200:
                assert not answer.text.startswith('{"error"'), shown
                assert 'data: {"error"' not in answer.text, shown
                continue
            is_unknown_model = name == "model" and inside is None
            assert answer.status_code == 400 or (is_unknown_model and answer.status_code == 404), (
                shown
            )
            error = answer.json()["error"]
            assert error["type"] in ("invalid_request_error", "not_found_error"), shown
            param = (error["param"] or "").replace("[", ".").partition(".")[0]
            assert param in named, shown
            assert len(answer.content) < 2000, shown
        assert any(answer.status_code == 400 for answer in found)
        assert await fixed(front) == before

    front(use)


async def fixed(front: Front) -> str:
    """An answer that must not change; the server is well."""
    assert (await front.http.get("/health")).status_code == 200
    answer = await front.complete(temperature=1.2, seed=7, max_tokens=12)
    text: str = answer.json()["choices"][0]["text"]
    return text
