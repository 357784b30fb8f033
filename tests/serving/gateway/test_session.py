"""Many requests over one stream: each has its own end, and none leaves anything behind."""

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from quire.engine.core_io import StepOutput
from quire.engine.request import FinishReason
from quire.protos.quire.v1 import inference_pb2 as pb

from .gateways import (
    ScriptedCore,
    Served,
    SessionClient,
    Use,
    is_end,
    real_core,
    serve,
    stage,
    started_engine,
    until,
)

CODES = {code.value[0]: code for code in grpc.StatusCode}


def request(max_tokens: int = 3, **fields: Any) -> pb.GenerateRequest:
    params = pb.SamplingParams(max_tokens=max_tokens, ignore_eos=True, temperature=0)
    return pb.GenerateRequest(text="Hello", sampling_params=params, **fields)


@dataclass(frozen=True)
class Submit:
    """max_tokens None: a request that is not valid."""

    max_tokens: int | None
    timeout_ns: int
    is_aborted: bool  # by its request id, over another rpc


@dataclass(frozen=True)
class Again:
    """Submit the id of an earlier request once more, whether or not it is open."""

    at: int


@dataclass(frozen=True)
class Cancel:
    """Of the request at `at`, which may be open, ended, cancelled or unknown."""

    at: int


@dataclass(frozen=True)
class Hear:
    """Wait for so many more events."""

    num_events: int


AT = st.integers(1, 12)
SHORT, LONG = st.integers(1, 5), st.integers(100, 300)
ACTIONS = st.lists(
    st.builds(
        Submit,
        SHORT | LONG | st.none(),
        # None, at once, while it is prepared, while it runs or waits, and not at all.
        st.sampled_from([0, 0, 0, 1, 2_000_000, 30_000_000, 2**63 - 1]),
        st.sampled_from([False, False, False, True]),
    )
    | st.builds(Again, AT)
    | st.builds(Cancel, AT)
    | st.builds(Hear, st.integers(1, 20)),
    min_size=1,
    max_size=25,
)


@pytest.fixture(scope="module")
def run() -> Iterator[Callable[[Use], Any]]:
    with started_engine() as engine, stage(real_core(engine)) as run:
        yield run


class Player:
    """Plays a schedule over one session, and knows what may come of each id."""

    def __init__(self, g: Served, client: SessionClient, tag: str) -> None:
        """tag: makes request ids its own."""
        self._g = g
        self._tag = tag
        self._client = client
        self._submits: list[Submit] = []
        self._again: set[int] = set()
        self._cancelled: set[int] = set()

    async def play(self, action: Submit | Again | Cancel | Hear) -> None:
        client = self._client
        if isinstance(action, Submit):
            self._submits.append(action)
            session_id = len(self._submits)
            await self._submit(session_id, action)
            if action.is_aborted:
                ids = [f"{self._tag}{session_id}", "unknown"]
                await self._g.stub.Abort(pb.AbortRequest(request_ids=ids))
        elif isinstance(action, Again):
            if action.at <= len(self._submits) and action.at not in self._again | self._cancelled:
                self._again.add(action.at)
                await self._submit(action.at, self._submits[action.at - 1])
        elif isinstance(action, Cancel):
            if action.at <= len(self._submits):
                self._cancelled.add(action.at)
            await client.cancel(action.at)
        else:
            wanted = len(client.events) + action.num_events
            await self._until_heard(wanted)

    async def _submit(self, session_id: int, submit: Submit) -> None:
        made = request(submit.max_tokens or 1, request_id=f"{self._tag}{session_id}")
        if submit.max_tokens is None:
            made.sampling_params.temperature = 9
        await self._client.submit(session_id, made, timeout_ns=submit.timeout_ns)

    async def _until_heard(self, num_events: int) -> None:
        """Or until nothing more is to come."""

        def is_over() -> bool:
            expected = set(range(1, len(self._submits) + 1)) - self._cancelled
            ended = {event.id for event in self._client.events if is_end(event)}
            return len(self._client.events) >= num_events or expected <= ended

        await until(is_over)

    def check(self) -> None:
        """After a half-close and the session's end."""
        for session_id, submit in enumerate(self._submits, 1):
            events = self._client.of(session_id)
            ends = [event for event in events if is_end(event)]
            if session_id in self._cancelled:
                assert len(ends) <= 1 + (session_id in self._again)
            elif session_id in self._again:
                # Both were ended by the second submit, or the first had ended before it came.
                assert len(ends) == 2 or ends[0].error.field == "id"
            else:
                assert len(ends) == 1
            if ends:
                assert is_end(events[-1]), "something came after the end"
            for end in ends:
                check_end(end, submit)


def check_end(end: pb.SessionEvent, submit: Submit) -> None:
    code = CODES[end.error.code]
    if code is grpc.StatusCode.OK:
        reason = pb.FINISH_REASON_ABORT if submit.is_aborted else pb.FINISH_REASON_LENGTH
        assert end.delta.finish_reason in (pb.FINISH_REASON_LENGTH, reason)
        if end.delta.finish_reason == pb.FINISH_REASON_LENGTH:
            assert end.delta.summary.usage.completion_tokens == submit.max_tokens
    elif code is grpc.StatusCode.DEADLINE_EXCEEDED:
        assert submit.timeout_ns
        assert end.error.message == "the request was not done within its timeout_ns"
    else:
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        is_invalid = end.error.field == "sampling_params.temperature"
        assert (submit.max_tokens is None) if is_invalid else end.error.field == "id"


@settings(max_examples=200, suppress_health_check=list(HealthCheck))
@given(st.lists(ACTIONS, min_size=1, max_size=2), st.booleans())
def test_every_id_has_one_end_whatever_the_client_does(
    run: Callable[[Use], Any], schedules: list[list[Any]], does_half_close: bool
) -> None:
    """Over one session, or two at once. After it the gateway and the core are idle: stage()."""

    async def one(g: Served, actions: list[Any], tag: str) -> None:
        async with SessionClient(g.stub) as client:
            player = Player(g, client, tag)
            for action in actions:
                await player.play(action)
            if does_half_close:
                await client.half_close()
                assert client.status is None
                player.check()

    async def use(g: Served) -> None:
        async with asyncio.TaskGroup() as group:
            for tag, actions in zip("ab", schedules, strict=False):
                group.create_task(one(g, actions, tag))

    run(use)


def test_requests_that_wait_for_a_row_end_at_their_time(run: Callable[[Use], Any]) -> None:
    """The engine has 33 rows, which others hold."""

    async def use(g: Served) -> None:
        async with SessionClient(g.stub) as client:
            for number in range(1, 34):
                await client.submit(number, request(1500))
            await until(lambda: len({event.id for event in client.events}) == 33)
            await client.submit(40, request(1500), timeout_ns=20_000_000)
            end = await client.ended(40)
            assert CODES[end.error.code] is grpc.StatusCode.DEADLINE_EXCEEDED
            assert len(client.of(40)) == 1
            assert not any(is_end(event) for event in client.events if event.id != 40)

    run(use)


# One thing at a time, on a core that says what the test wants


def play(use: Callable[[Served, SessionClient, ScriptedCore], Any], **options: Any) -> None:
    core = ScriptedCore()

    async def used(g: Served) -> None:
        async with SessionClient(g.stub) as client:
            await use(g, client, core)

    serve(core.opened, used, **options)


def ended(core_id: str, token_id: int = 40) -> StepOutput:
    return StepOutput(core_id, (token_id,), finish_reason=FinishReason.LENGTH)


def test_outputs_of_one_step_are_one_message() -> None:
    async def use(g: Served, client: SessionClient, core: ScriptedCore) -> None:
        for session_id in range(1, 51):
            await client.submit(session_id, request())
        await core.send(*map(ended, await core.submitted(50)))
        await until(lambda: client.events)
        assert sorted(event.id for event in client.events) == list(range(1, 51))

    play(use)


def test_summary_comes_behind_the_other_answers_of_its_message() -> None:
    """The last piece of answer 0 was merged into a delta that stood before those of answer 1: who
    took the summary for the end lost them.
    """

    async def use(g: Served, client: SessionClient, core: ScriptedCore) -> None:
        two = pb.GenerateRequest(text="Hello", sampling_params=pb.SamplingParams(n=2))
        await client.submit(1, two)
        first, second = await core.submitted(2)
        outputs = [StepOutput(first, (40,)), StepOutput(second, (41,)), ended(second), ended(first)]
        await core.send(*outputs)
        await client.ended(1)
        assert [is_end(event) for event in client.events] == [False, False, True]
        assert {event.delta.index for event in client.events if event.delta.finish_reason} == {0, 1}

    play(use)


def test_stop_text_over_several_tokens_is_held_back_and_ends_the_request_in_the_core() -> None:
    """Read one token at a time: `a`, three bytes of one character, and `bC` before `bCC`."""

    async def use(g: Served, client: SessionClient, core: ScriptedCore) -> None:
        assert g.gateway.intake.served is not None
        encode = g.gateway.intake.served.files.tokenizer.encode
        params = pb.SamplingParams(stop=["bCC", "zz"])
        await client.submit(1, pb.GenerateRequest(text="Hello", sampling_params=params))
        (core_id,) = await core.submitted()
        texts = []
        for number, token_id in enumerate(encode("a€bCbCC", add_special_tokens=False), 1):
            await core.send(StepOutput(core_id, (token_id,)))
            await until(lambda number=number: len(client.events) == number)
            texts.append(client.events[-1].delta.text)
        assert texts == ["a", "", "", "€", "", "", "bC", "", ""]
        end = client.events[-1].delta
        assert (end.finish_reason, end.stop_reason.text) == (pb.FINISH_REASON_STOP, "bCC")
        assert end.summary.usage.completion_tokens == 9
        await until(lambda: core.aborts == [core_id])

    play(use)


def test_id_that_is_submitted_again_ends_both_and_no_other() -> None:
    async def use(g: Served, client: SessionClient, core: ScriptedCore) -> None:
        for session_id in (7, 8, 7):
            await client.submit(session_id, request())
        end = await client.ended(7)
        assert CODES[end.error.code] is grpc.StatusCode.INVALID_ARGUMENT
        assert end.error.field == "id"
        assert end.error.message.startswith("the id 7 was submitted again while it was open")
        await until(lambda: g.gateway.link.num_open == 1)
        (core_id,) = {choice.core_id for choice in g.gateway.link._choices.values()}
        await core.send(ended(core_id))
        await client.ended(8)
        assert len(client.events) == 2
        assert set(await core.submitted()) - set(core.aborts) == {core_id}

    play(use)


def test_request_id_may_be_used_again_once_it_was_cancelled() -> None:
    """At once: the first one's is given back before the second one asks for it."""

    async def use(g: Served, client: SessionClient, core: ScriptedCore) -> None:
        for session_id in range(1, 21):
            await client.submit(session_id, request(request_id="same"))
            await client.cancel(session_id)
        await client.submit(21, request(7, request_id="same"))
        await until(lambda: core.submits and core.submits[-1].params.max_tokens == 7)
        await core.send(ended(core.submits[-1].request_id))
        await client.ended(21)
        assert len(client.events) == 1

    play(use)


def test_cancel_ends_the_request_without_a_word() -> None:
    async def use(g: Served, client: SessionClient, core: ScriptedCore) -> None:
        await client.cancel(99)  # unknown
        await client.submit(1, request())
        (cancelled,) = await core.submitted()
        await client.submit(2, request())
        _, other = await core.submitted(2)
        await core.send(StepOutput(cancelled, (40,)))
        await until(lambda: len(client.events) == 1)
        await client.cancel(1)
        await until(lambda: core.aborts == [cancelled])
        await core.send(StepOutput(cancelled, (41,)), ended(other))
        await client.ended(2)
        await client.cancel(2)  # ended
        await client.half_close()
        assert [event.id for event in client.events] == [1, 2]
        assert client.status is None
        assert g.gateway.metrics.finished_by_reason["abort"] == 1

    play(use)


def test_half_close_lets_what_is_open_end() -> None:
    async def use(g: Served, client: SessionClient, core: ScriptedCore) -> None:
        await client.submit(1, request())
        closing = asyncio.create_task(client.half_close())
        (core_id,) = await core.submitted()
        await core.send(StepOutput(core_id, (40,)))
        await until(lambda: len(client.events) == 1)
        assert not closing.done()
        await core.send(ended(core_id))
        await closing
        assert client.status is None
        assert is_end(client.events[-1])

    play(use)


def test_client_that_goes_ends_all_that_it_has_open() -> None:
    async def use(g: Served, client: SessionClient, core: ScriptedCore) -> None:
        for session_id in range(1, 6):
            await client.submit(session_id, request())
        core_ids = await core.submitted(5)
        client.call.cancel()
        await until(lambda: sorted(core.aborts) == sorted(core_ids))

    play(use)


def test_deadline_ends_a_running_request_with_what_it_had() -> None:
    async def use(g: Served, client: SessionClient, core: ScriptedCore) -> None:
        await client.submit(1, request(), timeout_ns=1_000_000_000)
        (core_id,) = await core.submitted()
        await core.send(StepOutput(core_id, (40,)))
        end = await client.ended(1)
        assert [is_end(event) for event in client.events] == [False, True]
        assert CODES[end.error.code] is grpc.StatusCode.DEADLINE_EXCEEDED
        await until(lambda: core.aborts == [core_id])

    play(use)


def test_message_that_says_nothing_or_the_impossible_is_refused_by_name() -> None:
    async def use(g: Served, client: SessionClient, core: ScriptedCore) -> None:
        await client.call.write(pb.SessionRequest())
        await client.submit(0, request())
        await client.call.write(pb.SessionRequest(submit=pb.SessionSubmit(id=1)))
        await client.submit(2, request(), timeout_ns=-1)
        await until(lambda: len(client.events) == 4)
        refused = sorted((event.id, event.error.field) for event in client.events)
        assert refused == [(0, ""), (0, "id"), (1, "request"), (2, "timeout_ns")]
        assert {CODES[event.error.code] for event in client.events} == {
            grpc.StatusCode.INVALID_ARGUMENT
        }
        await client.submit(3, request())
        (core_id,) = await core.submitted()
        await core.send(ended(core_id))
        await client.ended(3)

    play(use)
