"""What becomes of a prompt before the model sees it: special tokens, and what is cut."""

from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from quire.protos.quire.v1 import inference_pb2 as pb

from ...llm.engines import REFERENCE
from .gateways import Served, Use, real_core, stage, started_engine

CONTEXT, OUTPUT = 256, 4
LONG = "The quick brown fox jumps over the lazy dog. " * 60
CHAT = [pb.ChatMessage(role="user", content="What is 23 + 58?")]


@pytest.fixture(scope="module")
def run() -> Iterator[Callable[[Use], None]]:
    with (
        started_engine(model=None, max_model_len=CONTEXT) as engine,
        stage(real_core(engine), engine={"model": None}) as run,
    ):
        yield run


async def ask(g: Served, kind: type, **fields: Any) -> pb.GenerateResponse:
    params = pb.SamplingParams(temperature=0, max_tokens=OUTPUT, ignore_eos=True)
    rpc = g.stub.Chat if kind is pb.ChatRequest else g.stub.Generate
    answer: pb.GenerateResponse = await rpc(kind(sampling_params=params, **fields))
    return answer


async def ids_of(g: Served, **fields: Any) -> list[int]:
    return list((await g.stub.Tokenize(pb.TokenizeRequest(**fields))).token_ids)


def test_long_text_keeps_its_last_tokens(run: Callable[[Use], None]) -> None:
    async def use(g: Served) -> None:
        text = "one two three four five six"
        ids = await ids_of(g, text=text)
        for most in (1, 3, len(ids), len(ids) + 1, 2**31 - 1):
            cut = await ask(g, pb.GenerateRequest, text=text, truncate_prompt_tokens=most)
            assert list(cut.prompt_token_ids) == ids[-most:]
            kept = pb.TokenIds(ids=ids[-most:])
            whole = await ask(g, pb.GenerateRequest, token_ids=kept)
            assert cut.outputs == whole.outputs

    run(use)


def test_what_fits_is_kept(run: Callable[[Use], None]) -> None:
    async def use(g: Served) -> None:
        too_many = pb.TokenIds(ids=[5] * 1000 + [7])
        chat = [pb.ChatMessage(role="user", content="word " * 700)]
        for kind, fields in (
            (pb.GenerateRequest, {"text": LONG[: 4 * CONTEXT]}),
            (pb.GenerateRequest, {"token_ids": too_many}),
            (pb.ChatRequest, {"messages": chat}),
        ):
            answer = await ask(g, kind, **fields, truncate_prompt_tokens=-1)
            assert answer.summary.usage.prompt_tokens == CONTEXT - OUTPUT
            assert answer.summary.usage.completion_tokens == OUTPUT
        assert answer.prompt_token_ids

    run(use)


def test_nothing_is_kept_beside_an_answer_as_long_as_the_context(
    run: Callable[[Use], None],
) -> None:
    async def use(g: Served) -> None:
        params = pb.SamplingParams(max_tokens=CONTEXT)
        request = pb.GenerateRequest(
            text="Hello", sampling_params=params, truncate_prompt_tokens=-1
        )
        with pytest.raises(grpc.aio.AioRpcError, match="lower max_tokens"):
            await g.stub.Generate(request)

    run(use)


def test_special_tokens_are_the_callers_choice() -> None:
    """Of a tokenizer that adds one: the embedded model's adds none."""

    async def use(g: Served) -> None:
        ids = {adds: await ids_of(g, text="Hello", add_special_tokens=adds) for adds in (0, 1)}
        assert len(ids[1]) == len(ids[0]) + 1
        for adds in (False, True):
            answer = await ask(g, pb.GenerateRequest, text="Hello", add_special_tokens=adds)
            assert list(answer.prompt_token_ids) == ids[adds]
        plain = await ask(g, pb.GenerateRequest, text="Hello")
        assert list(plain.prompt_token_ids) == ids[True]
        chat = await ask(g, pb.ChatRequest, messages=CHAT)
        more = await ask(g, pb.ChatRequest, messages=CHAT, add_special_tokens=True)
        assert list(more.prompt_token_ids) == [ids[1][0], *chat.prompt_token_ids]
        for adds, answer in ((False, chat), (True, more)):
            asked = pb.ChatRequest(messages=CHAT, add_special_tokens=adds)
            assert await ids_of(g, chat=asked) == list(answer.prompt_token_ids)

    model = {"model": str(REFERENCE / "llama2_mha")}
    with started_engine(**model) as engine, stage(real_core(engine), engine=model) as run:
        run(use)


def test_prompt_that_is_too_long_says_so_to_programs(run: Callable[[Use], None]) -> None:
    async def use(g: Served) -> None:
        too_many = pb.TokenIds(ids=[5] * CONTEXT)
        for fields in ({"text": LONG}, {"text": "a" * (1 << 20)}, {"token_ids": too_many}):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await ask(g, pb.GenerateRequest, **fields)
            info = error_details_pb2.ErrorInfo()
            status = rpc_status.from_call(caught.value)
            assert any(detail.Unpack(info) for detail in status.details)
            assert (info.reason, info.domain) == ("CONTEXT_LENGTH_EXCEEDED", "quire")

    run(use)


def test_first_delta_tells_the_prompts_length(run: Callable[[Use], None]) -> None:
    async def use(g: Served) -> None:
        params = pb.SamplingParams(max_tokens=3, n=2, temperature=1, seed=1, ignore_eos=True)
        request = pb.GenerateRequest(text="Hello there", sampling_params=params)
        told: dict[int, list[int]] = {0: [], 1: []}
        async for delta in g.stub.GenerateStream(request):
            told[delta.index].append(delta.prompt_tokens)
            total = delta.summary.usage.prompt_tokens or None
        assert total
        for first, *rest in told.values():
            assert first == total
            assert not any(rest)

    run(use)
