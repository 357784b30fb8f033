"""Who may call, whom they are taken for, and over what connection."""

import asyncio
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2
from quire.engine.core_io import StepOutput
from quire.engine.errors import AuthenticationError, ConfigError
from quire.engine.request import FinishReason
from quire.engine.startup import Engine
from quire.protos.quire.v1 import inference_pb2 as pb
from quire.protos.quire.v1 import inference_pb2_grpc
from quire.serving.gateway.callers import Callers
from quire.serving.gateway.gateway import Gateway, GatewayOptions

from ..core.cores import OPTIONS
from .gateways import (
    SECRET,
    ScriptedCore,
    Served,
    SessionClient,
    Status,
    client,
    hear,
    real_core,
    serve,
    started_engine,
    status_of,
    until,
)

KEYS = ("key-one", "key-two")
OK, UNAVAILABLE = grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE
UNAUTHENTICATED = grpc.StatusCode.UNAUTHENTICATED
ONE = (("authorization", "Bearer key-one"),)
TWO = (("authorization", "Bearer key-two"),)


def request(request_id: str = "", **fields: Any) -> pb.GenerateRequest:
    params = pb.SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
    prompt = {"text": "Hello"} | fields
    return pb.GenerateRequest(request_id=request_id, sampling_params=params, **prompt)


def last(core_id: str) -> StepOutput:
    return StepOutput(core_id, (40,), finish_reason=FinishReason.LENGTH)


# Keys


@pytest.mark.parametrize(
    ("values", "is_let_in"),
    [
        ([], False),
        (["Bearer key-one"], True),
        (["bearer key-two"], True),
        (["BEARER key-one"], True),
        (["Bearer   key-one "], True),
        (["Bearer key-on"], False),
        (["Bearer key-one1"], False),
        (["Bearer key-one,key-two"], False),
        (["Bearer KEY-ONE"], False),
        (["Bearer"], False),
        (["Bearer "], False),
        (["key-one"], False),
        (["Basic key-one"], False),
        ([""], False),
        (["Bearer key-one", "Bearer key-one"], False),
        (["Bearer key-one", "Basic x"], False),
        (["Bearer " + "k" * 8000], False),
    ],
)
def test_key_is_let_in_or_not(values: list[str], is_let_in: bool) -> None:
    async def use(g: Served) -> None:
        metadata = tuple(("authorization", value) for value in values)
        call = g.stub.GetMetrics(pb.GetMetricsRequest(), metadata=metadata)
        if is_let_in:
            assert (await call).text
            return
        assert await status_of(call) == Status(
            UNAUTHENTICATED,
            "the key is missing or wrong; send the metadata `authorization: Bearer KEY` with one "
            "of the server's keys",
        )
        assert g.gateway.metrics.rejected_by_reason["unauthenticated"] == 1

    serve(ScriptedCore().opened, use, api_key=KEYS)


@pytest.mark.parametrize(
    "metadata",
    [
        (("authorization", b"Bearer \xff\xfe"),),
        (("authorization", "Bearer \udcff"),),
        (("authorization", b"\xff"),),
        (("authorization", b"Bearer key-one"), ("Authorization", "Bearer key-one")),
    ],
)
def test_bytes_that_are_no_text_are_a_wrong_key(metadata: Any) -> None:
    """gRPC's own client does not send them; another one may."""
    with pytest.raises(AuthenticationError):
        Callers(KEYS, SECRET).of_metadata(metadata)


def test_key_of_bytes_is_the_same_caller() -> None:
    callers = Callers(KEYS, SECRET)
    assert callers.of_metadata((("authorization", b"Bearer key-one"),)) == callers.of_metadata(ONE)


def paths(services: Any) -> list[str]:
    return [
        f"/{service.full_name}/{method.name}"
        for service in services.values()
        for method in service.methods
    ]


def test_every_rpc_needs_a_key_but_those_of_health() -> None:
    inference = paths(pb.DESCRIPTOR.services_by_name)
    assert len(inference) == 11
    reflected = paths(reflection_pb2.DESCRIPTOR.services_by_name)

    async def code_of(g: Served, path: str, metadata: Any = ()) -> grpc.StatusCode:
        """Of a call with one empty message; on the wire every kind of rpc begins like that."""
        call = g.channel.stream_stream(path)(iter([b""]), metadata=metadata)
        status = (await hear(call)).status
        return OK if status is None else status.code

    async def use(g: Served) -> None:
        for path in [*inference, *reflected, "/quire.v1.Inference/Other", "/other.Service/X"]:
            assert await code_of(g, path) is UNAUTHENTICATED, path
            assert await code_of(g, path, ONE) is not UNAUTHENTICATED, path
        check = "/grpc.health.v1.Health/Check"
        assert await code_of(g, check) is OK
        watching = health_pb2_grpc.HealthStub(g.channel).Watch(health_pb2.HealthCheckRequest())
        await watching.read()
        watching.cancel()

    serve(ScriptedCore().opened, use, api_key=KEYS)


def test_reflection_tells_of_the_service() -> None:
    async def use(g: Served) -> None:
        (path,) = paths(reflection_pb2.DESCRIPTOR.services_by_name)
        call = g.channel.stream_stream(
            path,
            request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
            response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
        )(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
        (answer,) = (await hear(call)).messages
        names = {service.name for service in answer.list_services_response.service}
        assert {"quire.v1.Inference", "grpc.health.v1.Health"} < names

    serve(ScriptedCore().opened, use)


def test_without_keys_everybody_is_let_in() -> None:
    async def use(g: Served) -> None:
        for metadata in ((), ONE, (("authorization", "x"),)):
            answer = await g.stub.GetMetrics(pb.GetMetricsRequest(), metadata=metadata)
            assert "quire_serving 1" in answer.text

    serve(ScriptedCore().opened, use)


# Tenants


def test_sessions_requests_have_callers_of_their_own() -> None:
    core = ScriptedCore()

    async def use(g: Served) -> None:
        async with SessionClient(g.stub, metadata=ONE) as session:
            for session_id, key in enumerate(
                ("", "key-one", "key-two", "wrong", "Bearer key-one"), 1
            ):
                await session.submit(session_id, request(), bearer_key=key)
            for session_id in (4, 5):
                error = (await session.ended(session_id)).error
                assert error.code == UNAUTHENTICATED.value[0]
            core_ids = await core.submitted(3)
            await core.send(*map(last, core_ids))
            for session_id in (1, 2, 3):
                assert not (await session.ended(session_id)).HasField("error")
        tenants = [submit.tenant for submit in core.submits]
        assert len(set(tenants)) == 2
        assert sorted(tenants.count(tenant) for tenant in set(tenants)) == [1, 2]
        assert len({submit.cache_salt for submit in core.submits}) == 2
        sent = b"".join(submit.SerializeToString() for submit in core.submits)
        assert b"key-one" not in sent
        assert g.gateway.metrics.rejected_by_reason["unauthenticated"] == 2

    serve(core.opened, use, api_key=KEYS)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with started_engine() as engine:
        yield engine


def test_tenants_do_not_share_cached_prefixes(engine: Engine) -> None:
    """Nor do salts of one tenant: who hits the cache could tell what others have asked."""

    async def use(g: Served) -> None:
        prompt = pb.TokenIds(ids=range(10, 74))

        async def cached(metadata: Any, salt: str = "") -> int:
            one = request(text=None, token_ids=prompt, cache_salt=salt)
            response = await g.stub.Generate(one, metadata=metadata)
            return response.summary.usage.cached_tokens

        for metadata, salt in ((ONE, ""), (TWO, ""), (ONE, "x"), (TWO, "x"), (ONE, "y")):
            assert await cached(metadata, salt) == 0
            assert await cached(metadata, salt) == 48  # the last token is computed, with its page
        async with SessionClient(g.stub, metadata=TWO) as session:
            await session.submit(1, request(text=None, token_ids=prompt), bearer_key="key-one")
            end = await session.ended(1)
            assert end.delta.summary.usage.cached_tokens == 48

    serve(real_core(engine), use, api_key=KEYS)


def test_without_keys_all_share_cached_prefixes(engine: Engine) -> None:
    async def use(g: Served) -> None:
        one = request(text=None, token_ids=pb.TokenIds(ids=range(100, 164)))
        cached = []
        for metadata in ((), ONE, TWO):
            response = await g.stub.Generate(one, metadata=metadata)
            cached.append(response.summary.usage.cached_tokens)
        assert cached == [0, 48, 48]

    serve(real_core(engine), use)


def test_request_ids_are_each_tenants_own() -> None:
    core = ScriptedCore()

    async def use(g: Served) -> None:
        calls = [g.stub.GenerateStream(request("same"), metadata=key) for key in (ONE, TWO)]
        core_ids = await core.submitted(2)
        assert len(set(core_ids)) == 2
        status = await status_of(g.stub.Generate(request("same"), metadata=ONE))
        assert status.code is grpc.StatusCode.ALREADY_EXISTS
        assert status.fields == ("request_id",)
        assert status.message.startswith("the request id 'same' is that of an open request")
        async with SessionClient(g.stub, metadata=ONE) as session:
            await session.submit(1, request("same"))
            await session.submit(2, request("same"), bearer_key="key-two")
            for session_id in (1, 2):
                error = (await session.ended(session_id)).error
                assert error.code == grpc.StatusCode.ALREADY_EXISTS.value[0]
                assert error.field == "request_id"
        await core.send(*map(last, core_ids))
        for call in calls:
            assert (await hear(call)).messages[0].request_id == "same"
        call = g.stub.Generate(request("same"), metadata=ONE)  # it has ended
        *_, core_id = await core.submitted(3)
        await core.send(last(core_id))
        assert (await call).request_id == "same"

    serve(core.opened, use, api_key=KEYS)


def test_abort_ends_only_ones_own_requests() -> None:
    core = ScriptedCore()

    async def use(g: Served) -> None:
        ids = ["a", "b", "unknown", "a", ""]
        calls = [
            g.stub.GenerateStream(request(name), metadata=key)
            for key in (ONE, TWO)
            for name in ("a", "b", "c")
        ]
        await core.submitted(6)
        await g.stub.Abort(pb.AbortRequest(request_ids=ids), metadata=ONE)
        for call in calls[:2]:
            (delta,) = (await hear(call)).messages
            assert delta.finish_reason == pb.FINISH_REASON_ABORT
            assert delta.HasField("summary")
        await until(lambda: len(core.aborts) == 2)
        left = [s.request_id for s in core.submits if s.request_id not in core.aborts]
        await core.send(*map(last, left))
        for call in calls[2:]:
            assert (await hear(call)).messages[-1].finish_reason == pb.FINISH_REASON_LENGTH

    serve(core.opened, use, api_key=KEYS)


# TLS


@pytest.fixture(scope="module")
def pems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two authorities, and of each a certificate of this address with its key."""
    folder = tmp_path_factory.mktemp("pems")

    def openssl(*words: str) -> None:
        subprocess.run(["openssl", *words], cwd=folder, check=True, capture_output=True)

    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    (folder / "san").write_text("subjectAltName=IP:127.0.0.1")
    for ca in ("ours", "others"):
        openssl(
            "req", "-x509", *key, "-keyout", f"{ca}.key", "-out", f"{ca}.pem", "-subj", f"/CN={ca}"
        )
        openssl("req", *key, "-keyout", f"{ca}-one.key", "-out", "csr", "-subj", "/CN=one")
        signed = ("-CA", f"{ca}.pem", "-CAkey", f"{ca}.key", "-CAcreateserial", "-extfile", "san")
        openssl("x509", "-req", "-in", "csr", *signed, "-out", f"{ca}-one.pem")
    openssl("ec", "-in", "ours-one.key", "-aes128", "-passout", "pass:x", "-out", "locked.key")
    (folder / "garbage.pem").write_bytes(bytes(range(256)))
    return folder


def tls(
    pems: Path, cert: str = "ours-one.pem", key: str = "ours-one.key", ca: str | None = None
) -> dict[str, Any]:
    """Options of a server."""
    options = {"ssl_certfile": str(pems / cert), "ssl_keyfile": str(pems / key)}
    return options if ca is None else options | {"ssl_ca_certs": str(pems / ca)}


def credentials(pems: Path, ca: str, own: str | None = None) -> grpc.ChannelCredentials:
    """Of a client. own: whose certificate it shows."""
    pair = [None, None]
    if own is not None:
        pair = [(pems / f"{own}-one.{kind}").read_bytes() for kind in ("key", "pem")]
    return grpc.ssl_channel_credentials((pems / f"{ca}.pem").read_bytes(), *pair)


async def code_with(g: Served, given: grpc.ChannelCredentials | None) -> grpc.StatusCode:
    """What a call over a connection of its own ends with."""
    async with client(g.address, given) as channel:
        stub: Any = inference_pb2_grpc.InferenceStub(channel)
        call = stub.GetMetrics(pb.GetMetricsRequest(), timeout=10)
        return await call.code()


def test_tls_shows_a_certificate_that_the_authority_knows(pems: Path) -> None:
    async def use(g: Served) -> None:
        assert await code_with(g, credentials(pems, "ours")) is OK
        assert await code_with(g, credentials(pems, "others")) is UNAVAILABLE
        assert await code_with(g, None) is UNAVAILABLE

    serve(ScriptedCore().opened, use, **tls(pems))


def test_mtls_wants_a_certificate_of_the_client(pems: Path) -> None:
    async def use(g: Served) -> None:
        assert await code_with(g, credentials(pems, "ours", "ours")) is OK
        assert await code_with(g, credentials(pems, "ours")) is UNAVAILABLE
        assert await code_with(g, credentials(pems, "ours", "others")) is UNAVAILABLE
        assert await code_with(g, None) is UNAVAILABLE

    serve(ScriptedCore().opened, use, **tls(pems, ca="ours.pem"))


@pytest.mark.parametrize(
    ("cert", "key", "ca"),
    [
        ("missing.pem", "ours-one.key", None),
        ("ours-one.pem", "missing.key", None),
        (".", "ours-one.key", None),
        ("garbage.pem", "ours-one.key", None),
        ("ours-one.pem", "garbage.pem", None),
        ("ours-one.pem", "others-one.key", None),
        ("ours-one.pem", "locked.key", None),
        ("ours-one.pem", "ours-one.key", "missing.pem"),
        ("ours-one.pem", "ours-one.key", "garbage.pem"),
    ],
)
def test_files_of_tls_that_cannot_be_used_are_refused_in_one_line(
    pems: Path, tmp_path: Path, cert: str, key: str, ca: str | None
) -> None:
    options = {"grpc_port": 0} | tls(pems, cert, key, ca)

    async def start() -> None:
        gateway = Gateway(GatewayOptions(OPTIONS, options, tmp_path / "core.sock", SECRET))
        try:
            with pytest.raises(ConfigError) as caught:
                await gateway.start()
        finally:
            await gateway.close()
        message = str(caught.value)
        assert message.startswith("ssl_certfile, ssl_keyfile or ssl_ca_certs cannot be used (")
        assert message.endswith("; give PEM files, the key without a password")
        assert "\n" not in message

    asyncio.run(start())
