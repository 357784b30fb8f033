"""What a request may say: every field at its worst, and what the text and fact rpcs answer."""

import asyncio
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import Descriptor
from grpc_health.v1 import health_pb2, health_pb2_grpc
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from quire.engine.core_io import StepOutput
from quire.engine.request import FinishReason
from quire.engine.text.chat_template import RESERVED_VARIABLES
from quire.protos.quire.v1 import inference_pb2 as pb

from ..core.cores import OPTIONS
from .gateways import (
    ScriptedCore,
    Served,
    SessionClient,
    Use,
    hear,
    real_core,
    serve,
    stage,
    started_engine,
    status_of,
)

INVALID_ARGUMENT = grpc.StatusCode.INVALID_ARGUMENT
SERVICE = pb.DESCRIPTOR.services_by_name["Inference"]


async def fixed(g: Served) -> tuple[list[int], int]:
    """An answer that must not change, and the health."""
    params = pb.SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    answer = await g.stub.Generate(pb.GenerateRequest(text="Hello", sampling_params=params))
    check = health_pb2_grpc.HealthStub(g.channel).Check(health_pb2.HealthCheckRequest())
    return list(answer.outputs[0].token_ids), (await check).status


@pytest.fixture(scope="module")
def attack() -> Iterator[Callable[[Use], None]]:
    """Runs what may do harm; after it the server serves, and answers as before."""
    with started_engine() as engine, stage(real_core(engine)) as run:
        before = run(fixed)
        assert before[1] == health_pb2.HealthCheckResponse.SERVING

        def harmless(use: Use) -> None:
            run(use)
            assert run(fixed) == before

        yield harmless


# Every field of every message that a client sends


@dataclass(frozen=True)
class Values:
    """Of one field. named: how a refusal calls it, if not by its own name."""

    refused: list[Any]
    taken: list[Any]
    named: str | None = None


NAN, INF, U32, I64, U64 = math.nan, math.inf, 2**32 - 1, 2**63 - 1, 2**64 - 1
BIG = "a" * (1 << 20)
DEEP = "[" * 200 + "]" * 200
NOT_JSON = ["{", BIG, "NaN", DEEP, '{"a": 1, "a": 2}', "9" * 5000]
NO_NUMBER = [NAN, INF, -INF, 1e308, -1e308]
TOO_LONG = ["a" * 129, "é" * 65, BIG]
LOGPROBS = Values([-2, -(2**31)], [-1, 0, 600, 2**31 - 1])
PENALTY = Values([*NO_NUMBER, 2.01, -2.01], [2.0, -2.0, 5e-324])
FLAG = Values([], [True, False])
USER = pb.ChatMessage(role="user", content="Hello")
ASSISTANT = pb.ChatMessage(role="assistant", content="I am")
GOOD = pb.GenerateRequest(text="Hello", sampling_params=pb.SamplingParams(max_tokens=2))
OF_BOTH = {  # GenerateRequest and ChatRequest
    "request_id": Values(TOO_LONG, ["a" * 128, "\n\0\u202e"]),
    "model": Values(["other", BIG, "\n"], [OPTIONS["model"]]),
    "sampling_params": Values([pb.SamplingParams(n=0)], [], "sampling_params.n"),
    "priority": Values([1, -1, 2**31 - 1, -(2**31)], [0]),
    "cache_salt": Values(TOO_LONG, ["a" * 128, "\0"]),
    "add_special_tokens": FLAG,
    "truncate_prompt_tokens": Values([0, -2, -(2**31)], [1, -1, 2**31 - 1]),
}
TABLE: dict[str, dict[str, Values]] = {
    "SamplingParams": {
        "n": Values([0, 65, U32], [64]),
        "temperature": Values([*NO_NUMBER, -0.1, 2.01], [0.0, -0.0, 5e-324, 2.0]),
        "top_p": Values([*NO_NUMBER, 0.0, -0.1, 1.01], [5e-324, 1.0]),
        "top_k": Values([], [0, 1, 2**31, U32]),
        "min_p": Values([*NO_NUMBER, -0.1, 1.01], [0.0, 5e-324, 1.0]),
        "presence_penalty": PENALTY,
        "frequency_penalty": PENALTY,
        "repetition_penalty": Values([NAN, INF, -INF, 0.0, -1.0], [5e-324, 2.0]),
        "seed": Values([], [-(2**63), I64, -1, 0]),
        "stop": Values(
            [[""], ["a"] * 5, ["a"] * 10_000, ["a" * 1025], ["é" * 513], [BIG]],
            [["a" * 1024] * 4, ["\0"]],
        ),
        "stop_token_ids": Values([[512], [U32], [1] * 129], [[511] * 128]),
        "include_stop_str_in_output": FLAG,
        "ignore_eos": FLAG,
        "min_tokens": Values([3, U32], [0, 2]),
        "max_tokens": Values([0], [1]),
        "logprobs": LOGPROBS,
        "prompt_logprobs": LOGPROBS,
        "logit_bias": Values(
            [*({5: x} for x in (*NO_NUMBER, 100.1)), {512: 1.0}, {U32: 1.0},
             dict.fromkeys(range(301), 1.0)],
            [{511: 100.0, 0: -100.0}, dict.fromkeys(range(300), -100.0)],
        ),
        "allowed_token_ids": Values([[512], [U32]], [[5], [5] * 10_000]),
        "bad_words": Values([[""], ["a"] * 129, ["a" * 10_000]], [["zz"] * 128, ["\0"]]),
        "detokenize": FLAG,
        "skip_special_tokens": FLAG,
        "spaces_between_special_tokens": Values([False], [True]),
    },
    "GenerateRequest": OF_BOTH | {
        "text": Values(["", BIG, "a" * 3000], ["\0", "\ufffd", "<s></s>"]),
        "token_ids": Values([pb.TokenIds()], [pb.TokenIds(ids=[0])]),
    },
    "TokenIds": {
        "ids": Values(
            [[512], [U32], [5] * 2048, [5] * (1 << 20)], [[0], [511], [5] * 2046], "token_ids"
        ),
    },
    "ChatRequest": OF_BOTH | {
        "messages": Values([[], [USER] * 4097, [USER] * 4096], [[USER], [USER] * 200]),
        "tools_json": Values([*NOT_JSON, "1", "{}", "[1]", "[{}]"], ["[]"]),
        "chat_template_kwargs_json": Values(
            [*NOT_JSON, "1", "[]", *(json.dumps({name: 1}) for name in RESERVED_VARIABLES)],
            ["{}", '{"x": [{}]}'],
        ),
        "add_generation_prompt": FLAG,
        "continue_final_message": Values([], [False]),
    },
    "ChatMessage": {
        "role": Values([BIG], ["", "\0", "nobody"], "messages"),
        "content": Values([BIG, "a" * 3000], ["", "\0"], "messages"),
        "name": Values([], ["", BIG]),
        "tool_calls_json": Values(
            [*NOT_JSON, "1", "{}", '"a"'], ["[]", '[{"x": 1}]'], "messages[0].tool_calls_json"
        ),
        "tool_call_id": Values([], ["", BIG]),
    },
    "TokenizeRequest": {
        "model": Values(["other", BIG], [OPTIONS["model"]]),
        "text": Values([BIG], ["", "\0", "<s>"]),
        "chat": Values(
            [pb.ChatRequest(messages=[pb.ChatMessage(role="user", content=BIG)])],
            [pb.ChatRequest(messages=[USER], model="other", request_id=BIG, priority=1)],
        ),
        "add_special_tokens": FLAG,
    },
    "DetokenizeRequest": {
        "model": Values(["other", BIG], [OPTIONS["model"]]),
        "token_ids": Values([[512], [U32], [5] * 2049], [[], [511] * 2048]),
        "skip_special_tokens": FLAG,
    },
    "SessionRequest": {
        "submit": Values([], [pb.SessionSubmit(id=1, generate=GOOD)]),
        "cancel": Values([], [pb.SessionCancel()]),
    },
    "SessionSubmit": {
        "id": Values([0], [1, U64]),
        "bearer_key": Values([], ["", "any", BIG]),
        "generate": Values([pb.GenerateRequest()], [GOOD], "prompt"),
        "chat": Values([pb.ChatRequest()], [pb.ChatRequest(messages=[USER])], "messages"),
        "timeout_ns": Values([-1, -(2**63)], [0, I64]),
    },
    "SessionCancel": {"id": Values([], [0, 1, U64])},
    "AbortRequest": {"request_ids": Values([["a"] * 1025], [[], [""], [BIG], ["a"] * 1024])},
}  # fmt: skip


def messages_of(kind: Descriptor, found: dict[str, set[str]]) -> None:
    """Collect the message and those in it, by name: their fields."""
    if kind.fields and not kind.GetOptions().map_entry and kind.name not in found:
        found[kind.name] = {field.name for field in kind.fields}
        for field in kind.fields:
            if field.message_type is not None:
                messages_of(field.message_type, found)


def test_table_has_every_field_of_every_message_that_a_client_sends() -> None:
    found: dict[str, set[str]] = {}
    for method in SERVICE.methods:
        messages_of(method.input_type, found)
    assert {name: set(fields) for name, fields in TABLE.items()} == found


SHORT = pb.SamplingParams(max_tokens=2)
BASES: dict[str, Any] = {
    "SamplingParams": SHORT,
    "GenerateRequest": GOOD,
    "ChatRequest": pb.ChatRequest(messages=[USER], sampling_params=SHORT),
    "ChatMessage": ASSISTANT,
    "TokenizeRequest": pb.TokenizeRequest(text="Hello"),
    "SessionSubmit": pb.SessionSubmit(id=1, generate=GOOD),
}
WRAPPED: dict[str, Callable[[Any], Any]] = {
    "SamplingParams": lambda params: pb.GenerateRequest(text="Hello", sampling_params=params),
    "TokenIds": lambda ids: pb.GenerateRequest(token_ids=ids, sampling_params=SHORT),
    "ChatMessage": lambda one: pb.ChatRequest(messages=[one], sampling_params=SHORT),
    "SessionSubmit": lambda submit: pb.SessionRequest(submit=submit),
    "SessionCancel": lambda cancel: pb.SessionRequest(cancel=cancel),
}


def with_value(kind: str, field: str, value: Any) -> Any:
    """A message of an rpc that is good but for one value."""
    message = getattr(pb, kind)()
    message.CopyFrom(BASES.get(kind, message))
    message.ClearField(field)
    message.MergeFrom(type(message)(**{field: value}))
    return WRAPPED.get(kind, lambda one: one)(message)


def rpc_of(g: Served, message: Any) -> Any:
    name = type(message).__name__.removesuffix("Request")
    return getattr(g.stub, name)


async def session_end(g: Served, message: Any) -> pb.SessionEvent:
    """Of a request in a session, which goes on after it."""
    if not isinstance(message, pb.SessionRequest):
        kind = "chat" if isinstance(message, pb.ChatRequest) else "generate"
        message = pb.SessionRequest(submit=pb.SessionSubmit(id=1, **{kind: message}))
    async with SessionClient(g.stub) as client:
        await client.call.write(message)
        await client.submit(7, GOOD)
        assert not (await client.ended(7)).HasField("error")
        return (
            await client.ended(message.submit.id)
            if message.HasField("submit")
            else client.events[-1]
        )


FIELDS = [(kind, field) for kind, fields in TABLE.items() for field in fields]


@pytest.mark.parametrize(("kind", "field"), FIELDS)
def test_field_at_its_worst_is_refused_by_name_or_harmless(
    attack: Callable[[Use], None], kind: str, field: str
) -> None:
    values = TABLE[kind][field]
    prefix = "sampling_params." if kind == "SamplingParams" else ""
    named = values.named or f"{prefix}{field}"
    code = grpc.StatusCode.NOT_FOUND if field == "model" else INVALID_ARGUMENT

    async def use(g: Served) -> None:
        for value in values.refused:
            message = with_value(kind, field, value)
            if not isinstance(message, pb.SessionRequest):
                status = await status_of(rpc_of(g, message)(message))
                assert (status.code, status.fields) == (code, (named,)), status.message
                assert len(status.message) <= 1000
            if isinstance(message, pb.GenerateRequest | pb.ChatRequest | pb.SessionRequest):
                error = (await session_end(g, message)).error
                assert (error.code, error.field) == (code.value[0], named), error.message
        for value in values.taken:
            message = with_value(kind, field, value)
            if isinstance(message, pb.SessionRequest):
                assert not (await session_end(g, message)).HasField("error")
                continue
            answer = await rpc_of(g, message)(message)
            for output in getattr(answer, "outputs", ()):
                assert output.finish_reason in (pb.FINISH_REASON_LENGTH, pb.FINISH_REASON_STOP)

    attack(use)


def sampled(**fields: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(text="Hello", sampling_params=pb.SamplingParams(**fields))


def continued(*messages: pb.ChatMessage, **fields: Any) -> pb.ChatRequest:
    return pb.ChatRequest(messages=messages, continue_final_message=True, **fields)


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (sampled(stop=["a"], detokenize=False), "sampling_params.stop"),
        (sampled(n=2, temperature=0.0), "sampling_params.n"),
        (sampled(min_tokens=3, max_tokens=2), "sampling_params.min_tokens"),
        (sampled(min_tokens=2047, max_tokens=U32), "sampling_params.min_tokens"),
        (continued(USER), "continue_final_message"),
        (continued(ASSISTANT, add_generation_prompt=True), "continue_final_message"),
        (pb.GenerateRequest(), "prompt"),
        (pb.TokenizeRequest(), "input"),
    ],
)
def test_request_that_contradicts_itself_is_refused(
    attack: Callable[[Use], None], message: Any, field: str
) -> None:
    async def use(g: Served) -> None:
        status = await status_of(rpc_of(g, message)(message))
        assert (status.code, status.fields) == (INVALID_ARGUMENT, (field,))

    attack(use)


def test_options_of_the_engine_bound_what_is_asked() -> None:
    core = ScriptedCore()

    async def use(g: Served) -> None:
        for name in ("logprobs", "prompt_logprobs"):
            for value in (6, -1):
                one = with_value("SamplingParams", name, value)
                status = await status_of(g.stub.Generate(one))
                assert status.fields == (f"sampling_params.{name}",)
                assert "at most 5" in status.message
        for priority in (-(2**31), 2**31 - 1):
            call = g.stub.Generate(with_value("GenerateRequest", "priority", priority))
            *_, core_id = await core.submitted(len(core.submits) + 1)
            assert core.submits[-1].priority == priority
            await core.send(StepOutput(core_id, (40,), finish_reason=FinishReason.LENGTH))
            await call

    serve(core.opened, use, engine={"max_logprobs": 5, "scheduling_policy": "priority"})


# Messages that are none

CHANGES = st.lists(st.tuples(st.integers(0, 80), st.integers(0, 255)), max_size=4)


@settings(max_examples=100, suppress_health_check=list(HealthCheck))
@given(
    st.sampled_from([m.name for m in SERVICE.methods if m.input_type.fields]),
    st.binary(max_size=60) | CHANGES,
)
def test_bytes_that_are_no_message_are_refused(
    attack: Callable[[Use], None], rpc: str, data: Any
) -> None:
    """Drawn freely, or a good message with some bytes changed."""
    if isinstance(data, list):
        good = bytearray(GOOD.SerializeToString() * 3)
        for at, byte in data:
            good[at % len(good)] = byte
        data = bytes(good)

    async def use(g: Served) -> None:
        call = g.channel.stream_stream(f"/{SERVICE.full_name}/{rpc}")(iter([data]))
        reading = asyncio.ensure_future(call.read())
        await asyncio.wait([reading])
        if reading.exception() is not None:
            code = await call.code()
            assert code in (INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND), await call.details()
        call.cancel()

    attack(use)


def test_message_beyond_the_bound_ends_its_call_only(attack: Callable[[Use], None]) -> None:
    async def use(g: Served) -> None:
        params = pb.SamplingParams(max_tokens=300, ignore_eos=True)
        open_call = g.stub.GenerateStream(pb.GenerateRequest(text="Hello", sampling_params=params))
        await open_call.read()
        huge = pb.GenerateRequest(text="a" * (33 << 20))
        status = await status_of(g.stub.Generate(huge))
        assert status.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "larger than max" in status.message
        heard = await hear(open_call)
        assert heard.messages[-1].summary.usage.completion_tokens == 300

    attack(use)


def test_session_ends_with_a_message_that_cannot_be_read(attack: Callable[[Use], None]) -> None:
    """None after it is safe; what was open goes on to its end."""

    async def use(g: Served) -> None:
        submit = pb.SessionSubmit(id=1, generate=GOOD)
        good = pb.SessionRequest(submit=submit).SerializeToString()
        call = g.channel.stream_stream(
            f"/{SERVICE.full_name}/Session", response_deserializer=pb.SessionResponse.FromString
        )(iter([good, b"\xff\xff", good]))
        heard = await hear(call)
        assert heard.status is None
        errors = [event for event in heard.events if event.HasField("error")]
        assert [(event.id, event.error.code) for event in errors] == [
            (0, INVALID_ARGUMENT.value[0])
        ]
        assert [e.id for e in heard.events if e.delta.HasField("summary")] == [1]

    attack(use)
