"""/openapi.json, and what schemathesis found with it (`make clients` runs that one)."""

from collections.abc import Callable
from typing import Any

import pytest
from quire.serving.shim.openai.examples import CHAT_EXAMPLES, COMPLETION_EXAMPLES
from quire.serving.shim.openapi import document

from ...llm.engines import REFERENCE
from ..gateway.gateways import real_core, started_engine
from .shims import KEY, MODEL, SUM, Front, front_stage
from .test_http import CHAT, error_of

Run = Callable[..., Any]
COMPLETIONS = "/v1/completions"
STRICT = document(refuses_unknown=True)
OPERATIONS = [
    (path, method, about) for path, of in STRICT["paths"].items() for method, about in of.items()
]


def test_key_is_wanted_exactly_where_the_document_says(keyed: Run) -> None:
    async def use(front: Front) -> None:
        assert {about.get("security") == [] for _, _, about in OPERATIONS} == {True, False}
        for path, method, about in OPERATIONS:
            url = path.replace("{name}", MODEL)
            is_open = about.get("security") == []
            assert ("401" in about["responses"]) is not is_open
            answer = await front.http.request(method, url, json={})
            assert answer.status_code == (200 if is_open else 401), path
            answer = await front.http.request(
                method, url, json={}, headers={"authorization": f"Bearer {KEY}"}
            )
            assert answer.status_code == (200 if method == "get" else 400), path

    keyed(use)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        *((CHAT, one) for one in CHAT_EXAMPLES),
        *((COMPLETIONS, one) for one in COMPLETION_EXAMPLES),
    ],
)
def test_examples_of_the_document_are_answered(front: Run, path: str, body: Any) -> None:
    async def use(front: Front) -> None:
        answer = await front.http.post(path, json=body)
        assert answer.status_code == 200, answer.text
        kind = answer.headers["content-type"].partition(";")[0]
        assert kind in STRICT["paths"][path]["post"]["responses"]["200"]["content"]
        assert (kind == "text/event-stream") is body.get("stream", False)

    front(use)


def test_special_tokens_are_added_where_the_document_says() -> None:
    """By a tokenizer that has one: the embedded model's has none."""

    async def use(front: Front) -> None:
        for asked, default in (({"prompt": "Hello"}, True), ({"messages": SUM}, False)):
            tokens = {}
            for adds in (True, False, None):
                body = asked | {"add_special_tokens": adds}
                tokens[adds] = (await front.http.post("/tokenize", json=body)).json()["tokens"]
            assert tokens[True][1:] == tokens[False]
            assert tokens[None] == tokens[default]

    model = {"model": str(REFERENCE / "llama2_mha")}
    with started_engine(**model) as engine, front_stage(real_core(engine), engine=model) as run:
        run(use)


def test_document_is_closed_exactly_when_unknown_fields_are_refused() -> None:
    lax = document(refuses_unknown=False)
    for name in ("ChatBody", "CompletionBody"):
        strict = STRICT["components"]["schemas"][name]
        assert strict["additionalProperties"] is False
        assert lax["components"]["schemas"][name] == strict | {"additionalProperties": True}
        assert strict["properties"]["temperature"]["anyOf"][0]["maximum"] == 2


@pytest.mark.parametrize(
    ("path", "prompt"), [(CHAT, {"messages": SUM}), (COMPLETIONS, {"prompt": "a"})]
)
def test_empty_list_of_allowed_tokens_is_refused(front: Run, path: str, prompt: Any) -> None:
    """It was passed over, so that every token was allowed."""

    async def use(front: Front) -> None:
        answer = await front.http.post(path, json=prompt | {"allowed_token_ids": []})
        assert answer.status_code == 400
        assert error_of(answer)["param"] == "allowed_token_ids"
        assert "no token could be chosen" in error_of(answer)["message"]

    front(use)


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"prompt": "a", "add_generation_prompt": {}}, "add_generation_prompt"),
        ({"messages": SUM, "add_special_tokens": 1}, "add_special_tokens"),
    ],
)
def test_flag_that_is_none_is_refused_where_it_has_no_effect(
    front: Run, body: Any, field: str
) -> None:
    async def use(front: Front) -> None:
        answer = await front.http.post("/tokenize", json=body)
        assert answer.status_code == 400
        assert error_of(answer)["param"] == field
        assert "must be true or false" in error_of(answer)["message"]

    front(use)


def test_every_405_tells_the_method_that_is_allowed(front: Run) -> None:
    """RFC 9110, section 15.5.6. The page at / told none."""

    async def use(front: Front) -> None:
        paths = [(path, method) for path, method, _ in OPERATIONS]
        for path, method in [*paths, ("/", "get"), ("/docs", "get"), ("/openapi.json", "get")]:
            answer = await front.http.delete(path.replace("{name}", MODEL))
            assert answer.status_code == 405
            assert answer.headers["allow"] == method.upper()

    front(use)
