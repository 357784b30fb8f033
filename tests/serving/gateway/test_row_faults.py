"""A fault of ours that one request shows, in the core or in the gateway, ends that request alone.

Its neighbours in the batch and in the session get what they get without it.
"""

from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import grpc
import pytest
from quire.engine.answer_reader import AnswerReader, Piece
from quire.engine.core_io import StepOutput
from quire.engine.startup import Engine
from quire.protos.quire.v1 import inference_pb2 as pb
from quire.serving.gateway import outbox

from .engines import Result
from .gateways import Served, real_core, serve, started_engine, status_of

# The request that shows the fault, by what the core knows of it and by what the gateway does.
BAD_PROMPT, BAD_ID = (11, 12, 13), "bad"
PROMPTS = [(3, 4, 5), BAD_PROMPT, tuple(range(20, 60)), (6,)]
NUM_TOKENS, NUM_BEFORE = 30, 5
INTERNAL = "the server failed at this request, and at no other; its log says why"

Fault = Callable[[Served], None]


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with started_engine() as engine:
        yield engine


def asked(prompt: tuple[int, ...]) -> pb.GenerateRequest:
    request_id = BAD_ID if prompt == BAD_PROMPT else f"good{prompt[0]}"
    params = pb.SamplingParams(
        seed=prompt[0], temperature=1.2, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=1
    )
    params.prompt_logprobs = 1
    token_ids = pb.TokenIds(ids=prompt)
    return pb.GenerateRequest(request_id=request_id, token_ids=token_ids, sampling_params=params)


async def answers(served: Served) -> tuple[list[Result], list[pb.SessionError]]:
    """All of the prompts in one session: what came of each, and the errors among it."""
    call = served.stub.Session()
    for number, prompt in enumerate(PROMPTS, 1):
        submit = pb.SessionSubmit(id=number, generate=asked(prompt))
        await call.write(pb.SessionRequest(submit=submit))
    await call.done_writing()
    results, errors = [Result() for _ in PROMPTS], []
    while (response := await call.read()) is not grpc.aio.EOF:
        for event in response.events:
            if event.HasField("error"):
                errors.append(event.error)
            else:
                results[event.id - 1].add(event.delta)
    return results, errors


def with_fault(
    engine: Engine,
    monkeypatch: pytest.MonkeyPatch,
    break_it: Fault,
    look: Callable[[Served, Result, list[pb.SessionError]], Awaitable[None]],
) -> None:
    """look: at the bad request; the others are as before, and so is the bad one once mended."""

    async def use(served: Served) -> None:
        undisturbed, errors = await answers(served)
        assert not errors
        break_it(served)
        (first, bad, *others), errors = await answers(served)
        assert [first, *others] == [undisturbed[0], *undisturbed[2:]]
        await look(served, bad, errors)
        monkeypatch.undo()
        assert await answers(served) == (undisturbed, [])

    serve(real_core(engine), use)


@pytest.mark.parametrize("failing", ["_pack", "_keep_scores", "_on_token"])
def test_fault_of_a_row_in_the_core_ends_that_request_alone(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    real = getattr(engine.core, failing)
    num_before = NUM_BEFORE if failing == "_on_token" else 0

    def fail_for_one(of: Any, *given: Any) -> Any:
        request = of.request
        if tuple(request.prompt_token_ids) == BAD_PROMPT and request.num_output == num_before:
            raise ZeroDivisionError("a fault of ours")
        return real(of, *given)

    async def look(_: Served, bad: Result, errors: list[pb.SessionError]) -> None:
        assert not errors
        answer = bad.answers[0]
        assert answer.finish_reason == pb.FINISH_REASON_ERROR
        assert answer.stop_reason.endswith("its log says why")
        assert len(answer.token_ids) == num_before

    with_fault(
        engine, monkeypatch, lambda _: monkeypatch.setattr(engine.core, failing, fail_for_one), look
    )


def test_fault_of_an_answer_in_the_gateway_ends_that_request_alone(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, count = AnswerReader.read, {"bad": 0}

    def break_it(served: Served) -> None:
        def fail_for_one(self: AnswerReader, output: StepOutput) -> Piece:
            for request in served.gateway.link.open_requests():
                is_bad = request.terms.request_id == BAD_ID
                if is_bad and request.choices[0].core_id == output.request_id:
                    count["bad"] += 1
                    if count["bad"] > NUM_BEFORE:
                        raise ZeroDivisionError("a fault of ours")
            return real(self, output)

        monkeypatch.setattr(AnswerReader, "read", fail_for_one)

    with_fault(engine, monkeypatch, break_it, require_internal_error)
    assert count["bad"] == NUM_BEFORE + 2


def test_fault_of_a_message_in_the_gateway_ends_that_request_alone(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = outbox.add_piece

    def fail_for_one(delta: pb.GenerateDelta, choice: Any, piece: Piece) -> None:
        if choice.request.terms.request_id == BAD_ID and len(choice.token_ids) > NUM_BEFORE:
            raise ZeroDivisionError("a fault of ours")
        real(delta, choice, piece)

    with_fault(
        engine,
        monkeypatch,
        lambda _: monkeypatch.setattr(outbox, "add_piece", fail_for_one),
        require_internal_error,
    )


async def require_internal_error(
    served: Served, bad: Result, errors: list[pb.SessionError]
) -> None:
    """In the session, and in a call of its own; the core has forgotten the request."""
    (error,) = errors
    assert error.code == grpc.StatusCode.INTERNAL.value[0]
    assert error.message == INTERNAL
    assert bad.num_tokens == NUM_BEFORE
    status = await status_of(read_all(served.stub.GenerateStream(asked(BAD_PROMPT))))
    assert status.code is grpc.StatusCode.INTERNAL
    assert status.message == INTERNAL
    await served.until_idle()


async def read_all(call: Any) -> None:
    async for _ in call:
        pass
