"""An answer is the same over every rpc, whatever runs beside it, and the same that LLM gives."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from quire import LLM, RequestOutput, SamplingParams
from quire.engine.core_io import StepOutput
from quire.engine.model_source import find_model
from quire.engine.request import FinishReason
from quire.engine.text.tokenizer import Tokenizer
from quire.protos.quire.v1 import inference_pb2 as pb
from quire.serving.gateway import outbox

from ..core.cores import OPTIONS
from .gateways import (
    ScriptedCore,
    Served,
    Use,
    hear,
    real_core,
    serve,
    stage,
    started_engine,
    submits,
)

VOCAB = 512


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(**OPTIONS) as llm:
        yield llm


@pytest.fixture(scope="module")
def run() -> Iterator[Callable[[Use], Any]]:
    """Without a bound: all logprobs of a few steps are more than a slow reader may leave unread."""
    with pytest.MonkeyPatch.context() as patch, started_engine() as engine:
        patch.setattr(outbox, "MAX_WAITING_BYTES", 1 << 30)
        with stage(real_core(engine)) as run:
            yield run


# Requests

Fields = dict[str, Any]
IDS = st.integers(0, VOCAB - 1)
TEXT = st.text(st.sampled_from("ab e.t\n0éß€日😀"), max_size=40).filter(len)
# Letters and pieces that the model says often enough, and ends of characters of several bytes.
STOP = st.sampled_from(
    ["e", "t", "s", "on", " th", "in", "or", "\x05", ";", "1", "\ufffd", "tion "]
)
# Bytes that are no text on their own: without them nothing would have to be held back.
RAW_BYTES = st.lists(st.integers(100, 190), min_size=1, max_size=8)


@st.composite
def sampling(draw: st.DrawFn) -> Fields:
    """Sampling parameters that are valid together, by name."""
    fields: dict[str, st.SearchStrategy[Any]] = {
        "temperature": st.sampled_from([0.0, 0.3, 1.0, 2.0]),
        "top_p": st.floats(0.1, 1),
        "top_k": st.sampled_from([0, 1, 5, 40, 1000]),
        "min_p": st.floats(0, 0.5),
        "presence_penalty": st.floats(-2, 2),
        "frequency_penalty": st.floats(-2, 2),
        "repetition_penalty": st.floats(0.5, 2),
        "stop": st.lists(STOP, min_size=1, max_size=4, unique=True),
        "stop_token_ids": st.lists(IDS, max_size=100, unique=True),
        "include_stop_str_in_output": st.booleans(),
        "ignore_eos": st.booleans(),
        "logprobs": st.sampled_from([0, 1, 5, -1]),
        "prompt_logprobs": st.sampled_from([0, 2, -1]),
        "logit_bias": st.dictionaries(IDS, st.floats(-100, 100), min_size=1, max_size=9),
        "allowed_token_ids": st.lists(IDS, min_size=20, max_size=60, unique=True) | RAW_BYTES,
        "bad_words": st.lists(st.sampled_from(["e", "the", " License", "é"]), max_size=3),
        "skip_special_tokens": st.booleans(),
    }
    given = {name: draw(st.none() | strategy) for name, strategy in fields.items()}
    given = {name: value for name, value in given.items() if value is not None}
    if given.get("temperature") != 0:
        given["n"] = draw(st.integers(1, 3))
    if "stop" not in given:
        given["detokenize"] = draw(st.sampled_from([True, True, False]))
    given["max_tokens"] = draw(st.integers(1, 20))
    given["min_tokens"] = draw(st.just(0) | st.integers(0, given["max_tokens"]))
    given["seed"] = draw(st.integers(-(2**63), 2**63 - 1).filter(lambda seed: seed != -1))
    return given


@dataclass(frozen=True)
class Asked:
    """A request for both sides. prompt: a text, ids, or (role, content) of a conversation."""

    prompt: str | tuple[int, ...] | tuple[tuple[str, str], ...]
    params: Fields

    def message(self, request_id: str) -> pb.GenerateRequest | pb.ChatRequest:
        both: Any = {"request_id": request_id, "sampling_params": pb.SamplingParams(**self.params)}
        if isinstance(self.prompt, str):
            return pb.GenerateRequest(text=self.prompt, **both)
        if isinstance(self.prompt[0], int):
            return pb.GenerateRequest(token_ids=pb.TokenIds(ids=self.prompt), **both)
        messages = [pb.ChatMessage(role=role, content=text) for role, text in self.prompt]
        return pb.ChatRequest(messages=messages, **both)

    def checked(self, llm: LLM) -> Any:
        params = SamplingParams(**self.params)
        if isinstance(self.prompt, str):
            return llm.check(self.prompt, params)
        if isinstance(self.prompt[0], int):
            return llm.check(list(self.prompt), params)
        messages = [{"role": role, "content": text} for role, text in self.prompt]
        return llm.check_chat(messages, params)


PROMPT = (
    TEXT
    | st.lists(IDS, min_size=1, max_size=40).map(tuple)
    | RAW_BYTES.map(tuple)
    | st.lists(st.tuples(st.sampled_from(["user", "assistant"]), TEXT), min_size=1, max_size=3).map(
        tuple
    )
)
ASKED = st.builds(Asked, PROMPT, sampling())


@dataclass
class Answer:
    """One answer in a form that every side has. logprobs: (id, logprob, rank, text) by position."""

    text: str
    token_ids: list[int]
    finish_reason: str
    stop_reason: int | str | None
    logprobs: list[list[tuple[int, float, int, str]]]
    cumulative_logprob: float | None


@dataclass
class Whole:
    answers: list[Answer]
    prompt_logprobs: list[list[tuple[int, float, int, str]]] | None
    prompt_tokens: int
    completion_tokens: int


def of_llm(output: RequestOutput) -> Whole:
    def positions(found: Iterable[Any]) -> list[Any]:
        return [
            [(i, one.logprob, one.rank, one.decoded_token) for i, one in (position or {}).items()]
            for position in found
        ]

    answers = [
        Answer(
            o.text,
            o.token_ids,
            str(o.finish_reason),
            o.stop_reason,
            positions(o.logprobs or ()),
            o.cumulative_logprob,
        )
        for o in output.outputs
    ]
    prompt = None if output.prompt_logprobs is None else positions(output.prompt_logprobs)
    num_tokens = sum(len(a.token_ids) for a in answers)
    return Whole(answers, prompt, len(output.prompt_token_ids), num_tokens)


def positions_of(found: Iterable[pb.PositionLogprobs]) -> list[Any]:
    return [[(t.token_id, t.logprob, t.rank, t.text) for t in p.tokens] for p in found]


def reason_of(message: pb.Completion | pb.GenerateDelta) -> str:
    return pb.FinishReason.Name(message.finish_reason).removeprefix("FINISH_REASON_").lower()


def stop_reason_of(message: pb.Completion | pb.GenerateDelta) -> int | str | None:
    kind = message.stop_reason.WhichOneof("reason")
    return getattr(message.stop_reason, kind) if kind else None


def of_response(response: pb.GenerateResponse) -> Whole:
    answers = [
        Answer(
            o.text,
            list(o.token_ids),
            reason_of(o),
            stop_reason_of(o),
            positions_of(o.logprobs),
            o.cumulative_logprob if o.HasField("cumulative_logprob") else None,
        )
        for o in response.outputs
    ]
    assert [o.index for o in response.outputs] == list(range(len(answers)))
    prompt = None
    if response.HasField("prompt_logprobs"):
        prompt = positions_of(response.prompt_logprobs.positions)
    usage = response.summary.usage
    assert usage.prompt_tokens == len(response.prompt_token_ids)
    return Whole(answers, prompt, usage.prompt_tokens, usage.completion_tokens)


def of_deltas(deltas: list[pb.GenerateDelta], asked: Asked, request_id: str) -> Whole:
    """Put together as the .proto says that it may be done."""
    answers = []
    for index in range(asked.params.get("n", 1)):
        own = [delta for delta in deltas if delta.index == index]
        assert [delta.request_id for delta in own] == [request_id, *[""] * (len(own) - 1)]
        assert [bool(delta.finish_reason) for delta in own] == [False] * (len(own) - 1) + [True]
        positions = positions_of(p for delta in own for p in delta.logprobs)
        answers.append(
            Answer(
                "".join(delta.text for delta in own),
                [token_id for delta in own for token_id in delta.token_ids],
                reason_of(own[-1]),
                stop_reason_of(own[-1]),
                positions,
                sum(p[0][1] for p in positions) if "logprobs" in asked.params else None,
            )
        )
    assert [d.HasField("summary") for d in deltas] == [False] * (len(deltas) - 1) + [True]
    # They come with the first token: what drawn parameters leave nothing to choose from has none.
    is_told = "prompt_logprobs" in asked.params and any(delta.token_ids for delta in deltas)
    has_prompt = [delta.HasField("prompt_logprobs") for delta in deltas]
    assert has_prompt == [is_told] + [False] * (len(deltas) - 1)
    prompt = positions_of(deltas[0].prompt_logprobs.positions) if is_told else None
    summary = deltas[-1].summary
    assert summary.seed == asked.params["seed"]
    assert not summary.resumed
    return Whole(answers, prompt, summary.usage.prompt_tokens, summary.usage.completion_tokens)


# Rpcs


async def generated(g: Served, asked: Asked, request_id: str) -> Whole:
    message = asked.message(request_id)
    rpc = g.stub.Chat if isinstance(message, pb.ChatRequest) else g.stub.Generate
    response = await rpc(message)
    assert response.request_id == request_id
    assert response.model == OPTIONS["model"]
    return of_response(response)


async def streamed(g: Served, asked: Asked, request_id: str) -> Whole:
    message = asked.message(request_id)
    rpc = g.stub.ChatStream if isinstance(message, pb.ChatRequest) else g.stub.GenerateStream
    return of_deltas([delta async for delta in rpc(message)], asked, request_id)


async def in_session(g: Served, all_asked: list[Asked], tag: str) -> list[Whole]:
    """All requests over one stream, which ends when the last one has."""

    async def submits() -> AsyncIterator[pb.SessionRequest]:
        for number, asked in enumerate(all_asked, 1):
            message = asked.message(f"{tag}{number}")
            kind = "chat" if isinstance(message, pb.ChatRequest) else "generate"
            submit = pb.SessionSubmit(id=number, **{kind: message})
            yield pb.SessionRequest(submit=submit)
            await asyncio.sleep(0)

    deltas: dict[int, list[pb.GenerateDelta]] = {}
    async for response in g.stub.Session(submits()):
        assert response.events
        for event in response.events:
            assert not event.HasField("error"), event.error
            deltas.setdefault(event.id, []).append(event.delta)
    return [
        of_deltas(deltas[number], asked, f"{tag}{number}")
        for number, asked in enumerate(all_asked, 1)
    ]


@settings(max_examples=30, suppress_health_check=list(HealthCheck))
@given(st.lists(ASKED, min_size=1, max_size=8))
def test_answer_is_the_same_over_every_rpc(
    run: Callable[[Use], Any], llm: LLM, all_asked: list[Asked]
) -> None:
    outputs = llm._run([asked.checked(llm) for asked in all_asked], False)

    async def use(g: Served) -> list[list[Whole]]:
        each = list(enumerate(all_asked))
        return await asyncio.gather(
            asyncio.gather(*(generated(g, asked, f"g{i}") for i, asked in each)),
            asyncio.gather(*(streamed(g, asked, f"s{i}") for i, asked in each)),
            in_session(g, all_asked, "a"),
            in_session(g, all_asked, "b"),
        )

    for one_way in run(use):
        for got, output in zip(one_way, outputs, strict=True):
            assert got == of_llm(output)


def test_seed_is_reported_and_repeats_the_answer(run: Callable[[Use], Any]) -> None:
    async def use(g: Served) -> None:
        async def drawn(rpc: str, **fields: Any) -> tuple[int, list[int]]:
            params = pb.SamplingParams(max_tokens=8, ignore_eos=True, **fields)
            message = pb.GenerateRequest(text="Hello", sampling_params=params)
            if rpc == "Generate":
                answer = await g.stub.Generate(message)
                return answer.summary.seed, list(answer.outputs[0].token_ids)
            if rpc == "Session":
                heard = await hear(
                    g.stub.Session(submits(pb.SessionSubmit(id=1, generate=message)))
                )
                deltas = [event.delta for event in heard.events]
            else:
                deltas = (await hear(g.stub.GenerateStream(message))).messages
            return deltas[-1].summary.seed, [i for delta in deltas for i in delta.token_ids]

        rpcs = ("Generate", "GenerateStream", "Session")
        first = [await drawn(rpc, **fields) for rpc in rpcs for fields in ({}, {"seed": -1})]
        assert len({seed for seed, _ in first}) == 6
        assert len({tuple(token_ids) for _, token_ids in first}) == 6
        for seed, token_ids in first:
            for rpc in rpcs:
                assert await drawn(rpc, seed=seed) == (seed, token_ids)

    run(use)


@given(TEXT | st.just("<s> </s>"), st.booleans())
def test_tokenize_and_detokenize_are_those_of_llm(
    run: Callable[[Use], Any], llm: LLM, text: str, adds: bool
) -> None:
    async def use(g: Served) -> None:
        asked = pb.TokenizeRequest(text=text, add_special_tokens=adds)
        answer = await g.stub.Tokenize(asked)
        assert answer.token_ids == llm.tokenize(text, add_special_tokens=adds)
        assert answer.max_model_len == llm.max_model_len
        for skips in (True, False):
            given: Fields = {
                "token_ids": [*answer.token_ids, 0, 1, 200],
                "skip_special_tokens": skips,
            }
            back = await g.stub.Detokenize(pb.DetokenizeRequest(**given))
            assert back.text == llm.detokenize(**given)

    run(use)


FUNCTION = {"name": "add", "parameters": {"x": "é"}}
CALLS = [{"type": "function", "function": {"name": "add", "arguments": {"x": 1}}}]
USER = {"role": "user", "content": "Hi"}
TURNS = [USER, {"role": "assistant", "tool_calls": CALLS}, {"role": "tool", "content": "3"}]


@pytest.mark.parametrize(
    ("messages", "given"),
    [
        ([{"role": "system", "content": "Be brief."}, USER], {}),
        ([USER], {"add_generation_prompt": False}),
        ([USER, {"role": "assistant", "content": "I "}], {"continue_final_message": True}),
        ([USER], {"tools": [{"type": "function", "function": FUNCTION}]}),
        (TURNS, {"tools": [{"type": "function", "function": FUNCTION}]}),
        ([USER], {"bos_token": "[[", "x": {"y": [1, None]}}),
    ],
)
def test_conversation_becomes_the_prompt_that_the_template_makes(
    messages: list[Fields], given: Fields
) -> None:
    """Of the model that is built in, whose template writes tools."""
    core = ScriptedCore()
    core.status.vocab_size = 1536
    tokenizer = Tokenizer.from_folder(find_model(None).folder)
    opens = {"add_generation_prompt": not given.get("continue_final_message")}
    expected = tokenizer.encode(tokenizer.apply_chat_template(messages, **opens | given), False)
    chat = pb.ChatRequest(sampling_params=pb.SamplingParams(max_tokens=1))
    for one in messages:
        as_json = {f"{k}_json": json.dumps(v) for k, v in one.items() if k == "tool_calls"}
        chat.messages.add(**{k: v for k, v in one.items() if k != "tool_calls"}, **as_json)
    for name in ("add_generation_prompt", "continue_final_message"):
        if name in given:
            setattr(chat, name, given[name])
    chat.tools_json = json.dumps(given["tools"]) if "tools" in given else ""
    variables = {k: v for k, v in given.items() if k in ("bos_token", "x")}
    chat.chat_template_kwargs_json = json.dumps(variables) if variables else ""

    async def use(g: Served) -> None:
        assert (await g.stub.Tokenize(pb.TokenizeRequest(chat=chat))).token_ids == expected
        for number, rpc in enumerate((g.stub.Chat, lambda m: hear(g.stub.ChatStream(m))), 1):
            call = asyncio.ensure_future(rpc(chat))
            *_, core_id = await core.submitted(number)
            assert core.submits[-1].prompt_token_ids == expected
            await core.send(StepOutput(core_id, (40,), finish_reason=FinishReason.LENGTH))
            await call

    serve(core.opened, use, engine={"model": None})
