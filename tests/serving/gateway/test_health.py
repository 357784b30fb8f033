"""What the server says of itself: whether it serves, in every state of its core, and what."""

import asyncio
import time
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families
from quire import __version__
from quire.engine.core_io import StepOutput
from quire.engine.request import FinishReason
from quire.protos.quire.v1 import inference_pb2 as pb
from quire.serving.gateway import outbox

from ..core.cores import OPTIONS
from .gateways import ScriptedCore, Served, SessionClient, hear, serve, status_of, until

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
UNAVAILABLE = grpc.StatusCode.UNAVAILABLE
# So that what lasts too long is seen soon.
STEP_TIMEOUT_S = 0.4


def request(**params: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(text="Hello", sampling_params=pb.SamplingParams(**params))


def token(core_id: str, token_id: int = 40, **fields: Any) -> StepOutput:
    return StepOutput(core_id, (token_id,), **fields)


def last(core_id: str) -> StepOutput:
    return token(core_id, finish_reason=FinishReason.LENGTH)


async def has_health(g: Served, status: Any) -> bool:
    """The server as a whole, the service, and the metric."""
    stub = health_pb2_grpc.HealthStub(g.channel)
    names = ("", "quire.v1.Inference")
    answers = [await stub.Check(health_pb2.HealthCheckRequest(service=name)) for name in names]
    is_serving = g.gateway.metrics.is_serving == (status == SERVING)
    return is_serving and all(answer.status == status for answer in answers)


async def until_health(g: Served, status: Any) -> None:
    while not await has_health(g, status):
        await asyncio.sleep(0.005)


def test_nothing_is_served_before_the_core_answers() -> None:
    core = ScriptedCore()

    async def use(g: Served) -> None:
        assert await has_health(g, NOT_SERVING)
        calls = [
            g.stub.Generate(request()),
            g.stub.GenerateStream(request()).read(),
            g.stub.Chat(pb.ChatRequest()),
            g.stub.Tokenize(pb.TokenizeRequest(text="a")),
            g.stub.Detokenize(pb.DetokenizeRequest()),
            g.stub.ListModels(pb.ListModelsRequest()),
            g.stub.GetServerInfo(pb.GetServerInfoRequest()),
        ]
        for call in calls:
            status = await status_of(call)
            assert status.code is UNAVAILABLE
            assert status.message == "the engine is starting; try again in 1 s"
            assert status.retry_after_s == 1
        async with SessionClient(g.stub) as client:
            await client.submit(1, request())
            error = (await client.ended(1)).error
            assert (error.code, error.retry_after_ns) == (UNAVAILABLE.value[0], 10**9)
            await core.listen(g.socket)
            await until_health(g, SERVING)
            await client.submit(2, request())
            await core.submitted()
        assert (await g.stub.ListModels(pb.ListModelsRequest())).models
        assert g.gateway.metrics.rejected_by_reason["unavailable"] == 4

    serve(core.absent, use, has_served=False, step_timeout=STEP_TIMEOUT_S)


async def stuck(g: Served, core: ScriptedCore) -> None:
    core.status.has_work, core.status.step_age_ns = True, int(STEP_TIMEOUT_S * 1e9) + 1


async def moving(g: Served, core: ScriptedCore) -> None:
    core.status.step_age_ns = int(STEP_TIMEOUT_S * 1e9) - 1


async def silent(g: Served, core: ScriptedCore) -> None:
    core.is_silent = True


async def talking(g: Served, core: ScriptedCore) -> None:
    core.is_silent = False


async def gone(g: Served, core: ScriptedCore) -> None:
    await core.lose()


async def back(g: Served, core: ScriptedCore) -> None:
    await core.listen(g.socket)


@pytest.mark.parametrize(("goes", "comes"), [(stuck, moving), (silent, talking), (gone, back)])
def test_health_follows_the_core_and_watch_streams_it(goes: Any, comes: Any) -> None:
    core = ScriptedCore()

    async def use(g: Served) -> None:
        stub = health_pb2_grpc.HealthStub(g.channel)
        watching = stub.Watch(health_pb2.HealthCheckRequest(service="quire.v1.Inference"))
        assert (await watching.read()).status == SERVING
        for _ in range(2):
            for change, status in ((goes, NOT_SERVING), (comes, SERVING)):
                await change(g, core)
                async with asyncio.timeout(10):
                    assert (await watching.read()).status == status
                await until_health(g, status)
        watching.cancel()
        with pytest.raises(asyncio.CancelledError):
            await watching.read()

    serve(core.opened, use, step_timeout=STEP_TIMEOUT_S)


def test_core_that_waits_for_work_is_not_stuck() -> None:
    core = ScriptedCore()
    core.status.step_age_ns = 10**15

    async def use(g: Served) -> None:
        assert await has_health(g, SERVING)

    serve(core.opened, use, step_timeout=STEP_TIMEOUT_S)


def test_health_of_an_unknown_service_is_not_found() -> None:
    async def use(g: Served) -> None:
        stub = health_pb2_grpc.HealthStub(g.channel)
        status = await status_of(stub.Check(health_pb2.HealthCheckRequest(service="other")))
        assert status.code is grpc.StatusCode.NOT_FOUND

    serve(ScriptedCore().opened, use)


def test_open_request_goes_on_in_the_next_core() -> None:
    """With the tokens that it had, in the middle of a character, and as if nothing had happened."""
    core = ScriptedCore()

    async def use(g: Served) -> None:
        assert g.gateway.intake.served is not None
        tokenizer = g.gateway.intake.served.files.tokenizer
        euro = tokenizer.encode("€", add_special_tokens=False)
        call = g.stub.GenerateStream(request())
        (first,) = await core.submitted()
        await core.send(token(first), token(first, euro[0]))
        delta = await call.read()
        assert (delta.text, list(delta.token_ids)) == ("C", [40, euro[0]])
        await core.lose()
        await until_health(g, NOT_SERVING)
        await core.listen(g.socket)
        await core.submitted(2)
        again = core.submits[1]
        assert list(again.output_token_ids) == [40, euro[0]]
        again.output_token_ids.clear()
        assert again == core.submits[0]
        rest = [token(first, token_id) for token_id in euro[1:]]
        await core.send(*rest, last(first))
        heard = await hear(call)
        assert "".join(delta.text for delta in heard.messages) == "€C"
        assert heard.messages[-1].summary.resumed

    serve(core.opened, use)


def test_request_under_which_cores_are_lost_again_and_again_ends() -> None:
    """It may be what they die of."""
    core = ScriptedCore()

    async def use(g: Served) -> None:
        call = g.stub.GenerateStream(request())
        for num_submits in range(1, 5):
            await core.submitted(num_submits)
            await core.lose()
            await core.listen(g.socket)
        status = (await hear(call)).status
        assert status is not None
        assert status.code is UNAVAILABLE
        assert "the engine was lost 4 times while this request was under way" in status.message

    serve(core.opened, use)


# Drains


async def open_both(g: Served, core: ScriptedCore, client: SessionClient) -> tuple[Any, list[str]]:
    """A call and a request of a session, each with a token, and their ids in the core."""
    call = g.stub.GenerateStream(request())
    await core.submitted()
    await client.submit(1, request())
    core_ids = await core.submitted(2)
    await core.send(*map(token, core_ids))
    await call.read()
    await until(lambda: client.events)
    return call, core_ids


def test_drain_lets_open_requests_finish_and_takes_no_new_ones() -> None:
    core = ScriptedCore()

    async def use(g: Served) -> None:
        async with SessionClient(g.stub) as client:
            call, core_ids = await open_both(g, core, client)
            draining = asyncio.create_task(g.gateway.drain())
            await until(lambda: g.gateway.intake.is_draining)
            await until_health(g, NOT_SERVING)
            for rpc in (g.stub.Generate, lambda m: g.stub.GenerateStream(m).read()):
                status = await status_of(rpc(request()))
                assert status.code is UNAVAILABLE
                assert status.message == "the server is shutting down; use another one"
            assert (
                await status_of(g.stub.Tokenize(pb.TokenizeRequest(text="a")))
            ).code is UNAVAILABLE
            await client.submit(2, request())
            assert (await client.ended(2)).error.code == UNAVAILABLE.value[0]
            assert not draining.done()
            await core.send(*map(last, core_ids))
            heard = await hear(call)
            assert heard.status is None
            assert heard.messages[-1].finish_reason == pb.FINISH_REASON_LENGTH
            assert (await client.ended(1)).delta.finish_reason == pb.FINISH_REASON_LENGTH
            await until(lambda: client.status)
            assert client.status is not None
            assert client.status.code is UNAVAILABLE
            await draining
        assert core.aborts == []

    serve(core.opened, use)


def test_drain_without_time_ends_what_is_open_with_abort() -> None:
    core = ScriptedCore()

    async def use(g: Served) -> None:
        async with SessionClient(g.stub) as client, SessionClient(g.stub) as idle:
            await idle.submit(1, request(temperature=9))
            await idle.ended(1)
            call, _ = await open_both(g, core, client)
            whole = g.stub.Generate(request(n=2))
            await core.submitted(4)
            await g.gateway.drain()
            heard = await hear(call)
            assert heard.status is None
            assert heard.messages[-1].finish_reason == pb.FINISH_REASON_ABORT
            assert heard.messages[-1].summary.usage.completion_tokens == 1
            assert {o.finish_reason for o in (await whole).outputs} == {pb.FINISH_REASON_ABORT}
            assert (await client.ended(1)).delta.finish_reason == pb.FINISH_REASON_ABORT
            for session in (client, idle):
                await until(lambda session=session: session.status)
                assert session.status is not None
                assert session.status.code is UNAVAILABLE

    serve(core.opened, use, drain_timeout=0.1)


def test_drain_does_not_wait_for_a_reader_that_was_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """His status waits behind a message that he does not read."""
    monkeypatch.setattr(outbox, "MAX_WAITING_BYTES", 1 << 30)
    monkeypatch.setattr(outbox, "WRITE_TIMEOUT_S", 0.2)
    core = ScriptedCore()

    async def use(g: Served) -> None:
        call = g.stub.GenerateStream(request())
        (core_id,) = await core.submitted()
        while not core.aborts:
            await core.send(StepOutput(core_id, (40,) * 2000))
            await asyncio.sleep(0.01)
        async with asyncio.timeout(10):
            await g.gateway.drain()
        call.cancel()

    serve(core.opened, use, drain_timeout=30)


# Facts


def test_models_are_listed_under_every_name_and_answer_to_each() -> None:
    core = ScriptedCore()

    async def use(g: Served) -> None:
        models = (await g.stub.ListModels(pb.ListModelsRequest())).models
        assert [model.name for model in models] == ["first", "second"]
        assert {model.max_model_len for model in models} == {2048}
        assert all(abs(model.created_unix_ns - time.time_ns()) < 600e9 for model in models)
        for number, (asked, told) in enumerate((("", "first"), ("second", "second")), 1):
            one = request()
            one.model = asked
            call = g.stub.Generate(one)
            *_, core_id = await core.submitted(number)
            await core.send(last(core_id))
            assert (await call).model == told
        one.model = OPTIONS["model"]
        status = await status_of(g.stub.Generate(one))
        assert status.code is grpc.StatusCode.NOT_FOUND
        assert status.fields == ("model",)
        assert status.message.endswith("is not served here; this server has first, second")

    serve(core.opened, use, served_model_name=("first", "second"))


def test_server_info_has_limits_and_options_and_no_key(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("secret-of-the-file")

    async def use(g: Served) -> None:
        g.gateway.note_restarts(3)
        metadata = (("authorization", "Bearer secret-of-the-flag"),)
        info = await g.stub.GetServerInfo(pb.GetServerInfoRequest(), metadata=metadata)
        assert (info.version, info.core_restarts) == (__version__, 3)
        assert (info.max_model_len, info.vocab_size, info.max_logprobs) == (2048, 512, 512)
        assert info.model == info.options["model"] == OPTIONS["model"]
        assert info.options["token-buckets"] == "8,64"
        assert info.options["max-num-queued-reqs"] == "7"
        assert "seed" not in info.options  # at its default
        assert not {"api-key", "api-key-file"} & set(info.options)
        assert "secret" not in str(info)
        assert str(tmp_path) not in str(info)

    keys = {"api_key": ("secret-of-the-flag",), "api_key_file": str(tmp_path / "keys")}
    serve(ScriptedCore().opened, use, max_num_queued_reqs=7, **keys)


def test_metrics_are_prometheus_text() -> None:
    core = ScriptedCore()

    async def use(g: Served) -> None:
        call = g.stub.Generate(request())
        (core_id,) = await core.submitted()
        await core.send(token(core_id), last(core_id))
        await call
        text = (await g.stub.GetMetrics(pb.GetMetricsRequest())).text
        families = text_string_to_metric_families(text)
        values = {sample.name: sample.value for family in families for sample in family.samples}
        assert values["quire_generation_tokens_total"] == 2
        assert values["quire_serving"] == 1
        assert values["quire_requests_open"] == 0
        assert values["quire_kv_pages_free"] == 9

    serve(core.opened, use)


def test_unset_fields_take_the_models_defaults_and_the_rest_of_the_context() -> None:
    core = ScriptedCore()
    core.status.vocab_size = 1536

    async def params_in_core(g: Served, **given: Any) -> pb.SamplingParams:
        one = pb.GenerateRequest(text="Hello", sampling_params=pb.SamplingParams(**given))
        call = g.stub.Generate(one)
        *_, core_id = await core.submitted(len(core.submits) + 1)
        await core.send(StepOutput(core_id, (40,), finish_reason=FinishReason.LENGTH))
        assert (await call).summary.seed == core.submits[-1].seed
        return core.submits[-1].params

    async def use(g: Served) -> None:
        unset = await params_in_core(g)
        room = 2048 - len(core.submits[-1].prompt_token_ids)
        assert (unset.temperature, unset.max_tokens, unset.top_p, unset.n) == (0.3, room, 1, 1)
        assert (await params_in_core(g, temperature=0.0)).temperature == 0
        assert (await params_in_core(g, max_tokens=2**32 - 1)).max_tokens == room
        assert (await params_in_core(g, max_tokens=7)).max_tokens == 7
        drawn = {submit.seed for submit in core.submits}
        await params_in_core(g, seed=-1)
        await params_in_core(g, seed=-5)
        assert core.submits[-2].seed not in drawn
        assert core.submits[-1].seed == -5

    serve(core.opened, use, engine={"model": None})
