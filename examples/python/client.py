"""A client of a quire engine, made of nothing but the .proto file: see README.md for the stubs.

python client.py --target 127.0.0.1:50051 [--api-key KEY] [--ca FILE]
"""

import argparse
import asyncio
import os
import sys
from typing import Any

import grpc
import inference_pb2 as pb
import inference_pb2_grpc
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

# Of a whole call. Without a deadline a client waits for as long as the server works.
TIMEOUT_S = 60
GREEDY = pb.SamplingParams(temperature=0)


def main() -> int:
    parser = argparse.ArgumentParser(description="Show what a quire engine can be asked.")
    parser.add_argument("--target", default="127.0.0.1:50051", help="HOST:PORT of the server")
    parser.add_argument("--api-key", default=os.environ.get("QUIRE_API_KEY"), help="bearer key")
    parser.add_argument("--ca", metavar="FILE", help="PEM of the authority; turns TLS on")
    arguments = parser.parse_args()
    try:
        asyncio.run(show(arguments.target, arguments.api_key, arguments.ca))
    except grpc.aio.AioRpcError as error:
        print(explain(error), file=sys.stderr)
        return 1
    return 0


async def show(target: str, api_key: str | None, ca: str | None) -> None:
    async with open_channel(target, ca) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        metadata = (("authorization", f"Bearer {api_key}"),) if api_key else ()
        call = {"metadata": metadata, "timeout": TIMEOUT_S}  # the same for every call

        health = health_pb2_grpc.HealthStub(channel)  # needs no key
        request = health_pb2.HealthCheckRequest(service="quire.v1.Inference")
        status = (await health.Check(request, timeout=5)).status
        print("health:", health_pb2.HealthCheckResponse.ServingStatus.Name(status))

        for model in (await stub.ListModels(pb.ListModelsRequest(), **call)).models:
            print(f"model: {model.name}, {model.max_model_len} tokens")

        await generate(stub, call)
        await chat_stream(stub, call)
        await session(stub, call)
        await errors(stub, call)


def open_channel(target: str, ca: str | None) -> grpc.aio.Channel:
    # An answer may be longer than the 4 MiB that gRPC takes by itself: logprobs are large.
    options = [("grpc.max_receive_message_length", -1)]
    if ca is None:
        return grpc.aio.insecure_channel(target, options)
    with open(ca, "rb") as file:
        credentials = grpc.ssl_channel_credentials(file.read())
    return grpc.aio.secure_channel(target, credentials, options)


async def generate(stub: inference_pb2_grpc.InferenceStub, call: dict[str, Any]) -> None:
    """A text, and the model goes on with it."""
    request = pb.GenerateRequest(text="The capital of France is", sampling_params=GREEDY)
    response = await stub.Generate(request, **call)
    (output,) = response.outputs
    reason = pb.FinishReason.Name(output.finish_reason)
    num_tokens = response.summary.usage.completion_tokens
    print(f"generate: {output.text!r}, {reason}, {num_tokens} tokens")


async def chat_stream(stub: inference_pb2_grpc.InferenceStub, call: dict[str, Any]) -> None:
    """An answer printed as it is made. stream.cancel() ends it early, a mere break does not."""
    stream = stub.ChatStream(question("What is 23 + 58?"), **call)
    print("stream: ", end="")
    async for delta in stream:
        print(delta.text, end="", flush=True)
    print()


async def session(stub: inference_pb2_grpc.InferenceStub, call: dict[str, Any]) -> None:
    """Many requests over one stream; the last one is cancelled after its first words."""
    stream = stub.Session(**call)
    asked = {1: "What is 2 + 3?", 2: "What is the capital of Japan?", 3: "Tell me a story."}
    for number, text in asked.items():
        submit = pb.SessionSubmit(id=number, chat=question(text), timeout_ns=30_000_000_000)
        await stream.write(pb.SessionRequest(submit=submit))
    answers = dict.fromkeys(asked, "")
    is_open = set(asked)
    while is_open:
        response = await stream.read()
        if response is grpc.aio.EOF:
            raise SystemExit("the server ended the session")
        for event in response.events:
            if event.id not in is_open:
                continue  # sent before the server knew of the cancel
            if event.HasField("error"):  # of this request; the others go on
                answers[event.id] = f"error {event.error.code}: {event.error.message}"
                is_open.discard(event.id)
                continue
            answers[event.id] += event.delta.text
            if event.delta.HasField("summary"):
                is_open.discard(event.id)
            elif event.id == 3:
                await stream.write(pb.SessionRequest(cancel=pb.SessionCancel(id=3)))
                is_open.discard(3)  # nothing more is said of it
                answers[3] += " … cancelled"
    await stream.done_writing()
    for number, text in answers.items():
        print(f"session {number}: {text}")


async def errors(stub: inference_pb2_grpc.InferenceStub, call: dict[str, Any]) -> None:
    """A value that is refused, and a deadline that passes."""
    refused = pb.GenerateRequest(text="Hi", sampling_params=pb.SamplingParams(temperature=9))
    endless = question("Hi", pb.SamplingParams(ignore_eos=True))  # to the end of the context
    soon = call | {"timeout": 0.05}
    for answer in (stub.Generate(refused, **call), stub.Chat(endless, **soon)):
        try:
            await answer
        except grpc.aio.AioRpcError as error:
            print("expected error:", explain(error))


def question(text: str, params: pb.SamplingParams = GREEDY) -> pb.ChatRequest:
    messages = [pb.ChatMessage(role="user", content=text)]
    return pb.ChatRequest(messages=messages, sampling_params=params)


def explain(error: grpc.aio.AioRpcError) -> str:
    """The status, the field at fault and when to try again, as far as the server said."""
    lines = [f"{error.code().name}: {error.details()}"]
    status = rpc_status.from_call(error)
    for detail in status.details if status is not None else ():
        bad, retry = error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
        if detail.Unpack(bad):
            lines += [f"  field {violation.field}" for violation in bad.field_violations]
        elif detail.Unpack(retry):
            lines.append(f"  try again in {retry.retry_delay.ToMilliseconds() / 1000:g} s")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
