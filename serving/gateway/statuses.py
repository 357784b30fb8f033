"""Exceptions as gRPC statuses: the one table, and the details that go with them.

Details are google.rpc's: BadRequest names the field, ErrorInfo the reason where programs want one,
RetryInfo says when to try again.
"""

import logging
from typing import Any, NoReturn

import grpc
from google.rpc import error_details_pb2, status_pb2

from ...engine.errors import (
    AuthenticationError,
    ContextExceeded,
    DeadlinePassed,
    DuplicateRequest,
    EngineError,
    EngineUnavailable,
    Overloaded,
    QuireError,
    RequestError,
    SlowReader,
    UnknownModel,
    UsageError,
)
from ...protos.quire.v1 import inference_pb2

logger = logging.getLogger(__name__)

# The first class that fits decides.
_CODE_BY_ERROR: tuple[tuple[type[QuireError], grpc.StatusCode], ...] = (
    (AuthenticationError, grpc.StatusCode.UNAUTHENTICATED),
    (UnknownModel, grpc.StatusCode.NOT_FOUND),
    (DuplicateRequest, grpc.StatusCode.ALREADY_EXISTS),
    (UsageError, grpc.StatusCode.INVALID_ARGUMENT),
    (Overloaded, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (SlowReader, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (DeadlinePassed, grpc.StatusCode.DEADLINE_EXCEEDED),
    (EngineError, grpc.StatusCode.UNAVAILABLE),
)
_DETAILS = "grpc-status-details-bin"
# Twice in the trailers, percent-encoded: clients take 8 KiB of them in all.
_MAX_MESSAGE = 1000

# What RequestError calls a field -> its name in the .proto, where they differ.
_PROTO_NAMES = {
    "tools": "tools_json",
    "chat_template_kwargs": "chat_template_kwargs_json",
}
_SAMPLING_FIELDS = frozenset(inference_pb2.SamplingParams.DESCRIPTOR.fields_by_name)


def code_of(error: QuireError) -> grpc.StatusCode:
    """Of a class that is not in the table: INTERNAL."""
    for kind, code in _CODE_BY_ERROR:
        if isinstance(error, kind):
            return code
    return grpc.StatusCode.INTERNAL


def field_of(error: QuireError) -> str:
    """The field at fault in the .proto's names; empty if none is."""
    field = error.field if isinstance(error, RequestError) else None
    if not field:
        return ""
    if field in _SAMPLING_FIELDS:
        return f"sampling_params.{field}"
    return _PROTO_NAMES.get(field, field)


def reason_of(error: QuireError) -> str:
    """What the code does not say; empty if there is nothing."""
    return "CONTEXT_LENGTH_EXCEEDED" if isinstance(error, ContextExceeded) else ""


def retry_after_s(error: QuireError) -> float | None:
    if isinstance(error, Overloaded | EngineUnavailable):
        return error.retry_after_s
    return None


def session_error(error: QuireError) -> inference_pb2.SessionError:
    return inference_pb2.SessionError(
        code=code_of(error).value[0],
        message=str(error),
        field=field_of(error),
        retry_after_ns=round((retry_after_s(error) or 0) * 1e9),
        reason=reason_of(error),
    )


def internal_error(error: Exception) -> QuireError:
    """For what nobody foresaw: the log has it, the caller gets no word of it."""
    logger.error("a request failed", exc_info=error)
    return QuireError("the server failed at this request, and at no other; its log says why")


async def abort(context: Any, error: QuireError) -> NoReturn:
    """End the rpc with the error's status and details."""
    code, message = code_of(error), str(error)[:_MAX_MESSAGE]
    status = status_pb2.Status(code=code.value[0], message=message)
    if field := field_of(error):
        violation = error_details_pb2.BadRequest.FieldViolation(field=field, description=message)
        status.details.add().Pack(error_details_pb2.BadRequest(field_violations=[violation]))
    if reason := reason_of(error):
        info = error_details_pb2.ErrorInfo(reason=reason, domain="quire")
        status.details.add().Pack(info)
    retry_s = retry_after_s(error)
    if retry_s is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromNanoseconds(round(retry_s * 1e9))
        status.details.add().Pack(retry)
    trailing = ((_DETAILS, status.SerializeToString()),) if status.details else ()
    await context.abort(code, message, trailing)
    raise AssertionError("abort() does not return")
