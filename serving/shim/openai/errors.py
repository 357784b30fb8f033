"""Errors of the OpenAI dialect: the one table from gRPC codes to statuses, types and codes."""

from collections.abc import Mapping
from typing import Any, Self

import grpc
from google.rpc import error_details_pb2, status_pb2

from ....protos.quire.v1 import inference_pb2 as pb

_BAD, _AUTH, _LIMIT, _SERVER = (
    "invalid_request_error",
    "authentication_error",
    "rate_limit_error",
    "server_error",
)
# gRPC code -> status, type, code
_BY_CODE: dict[grpc.StatusCode, tuple[int, str, str | None]] = {
    grpc.StatusCode.INVALID_ARGUMENT: (400, _BAD, "invalid_value"),
    grpc.StatusCode.UNAUTHENTICATED: (401, _AUTH, "invalid_api_key"),
    grpc.StatusCode.NOT_FOUND: (404, "not_found_error", "model_not_found"),
    grpc.StatusCode.ALREADY_EXISTS: (409, _BAD, "duplicate_request_id"),
    grpc.StatusCode.RESOURCE_EXHAUSTED: (429, _LIMIT, "rate_limit_exceeded"),
    grpc.StatusCode.DEADLINE_EXCEEDED: (504, _SERVER, "timeout"),
    grpc.StatusCode.UNAVAILABLE: (503, _SERVER, "service_unavailable"),
}
_RETRY_AFTER_S = 1.0
_CODE_BY_NUMBER = {code.value[0]: code for code in grpc.StatusCode}
_TOO_LONG = "CONTEXT_LENGTH_EXCEEDED"
_CODE_BY_REASON = {_TOO_LONG: "context_length_exceeded"}
_SAMPLING = "sampling_params."
# Names of the .proto -> OpenAI's.
_PARAMS = {
    "text": "prompt",
    "token_ids": "prompt",
    "tools_json": "tools",
    "chat_template_kwargs_json": "chat_template_kwargs",
    "chat_template": "messages",  # which the server's own does not take
}
TOO_SLOW = "the answer was made faster than it was taken; read faster, or ask for less at once"
_DETAILS = "grpc-status-details-bin"


class HttpError(Exception):
    """An answer other than 200."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        # Of a name that somebody made up, there may be halves of characters.
        super().__init__(message.encode("utf-8", "replace").decode())
        self._headers = dict(headers or {})
        if status == 401:
            self._headers["www-authenticate"] = "Bearer"
        self.status = status
        self.type = type
        self.param = param and param.encode("utf-8", "replace").decode()
        self.code = code
        self.retry_after_s = retry_after_s

    @classmethod
    def bad_request(
        cls, message: str, *, param: str | None = None, code: str | None = None
    ) -> Self:
        return cls(400, message, type=_BAD, param=param, code=code)

    @classmethod
    def of_session(cls, error: pb.SessionError) -> Self:
        """What the engine said of one request."""
        code = _CODE_BY_NUMBER.get(error.code, grpc.StatusCode.INTERNAL)
        if code is grpc.StatusCode.RESOURCE_EXHAUSTED and not error.retry_after_ns:
            # No queue is full: what was made was not taken, by this shim or by its client.
            return cls.of_code(grpc.StatusCode.UNAVAILABLE, TOO_SLOW)
        delay_s = error.retry_after_ns / 1e9 or None
        return cls.of_code(code, error.message, error.field, delay_s, reason=error.reason)

    @classmethod
    def of_rpc(cls, error: grpc.aio.AioRpcError) -> Self:
        """What the engine said of a call."""
        field, reason = _details_of(error)
        message = error.details() or error.code().name
        return cls.of_code(error.code(), message, field, reason=reason)

    @classmethod
    def of_code(
        cls,
        grpc_code: grpc.StatusCode,
        message: str,
        field: str = "",
        retry_after_s: float | None = None,
        *,
        reason: str = "",
    ) -> Self:
        """field, reason: as the engine names them; empty if it names none."""
        status, kind, code = _BY_CODE.get(grpc_code, (500, _SERVER, None))
        code = _CODE_BY_REASON.get(reason, code)
        if reason == _TOO_LONG:
            # Clients that look at no code look for these words (LangChain's ContextOverflowError).
            message = f"prompt is too long: {message}"
        if status == 503 and retry_after_s is None:
            retry_after_s = _RETRY_AFTER_S  # also of one that stops: another may be in its place
        name = field.removeprefix(_SAMPLING)
        param = _PARAMS.get(name, name) or None
        return cls(status, message, type=kind, param=param, code=code, retry_after_s=retry_after_s)

    def renamed(self, name: str, to: str) -> "HttpError":
        """Of a field that callers know by another name than the engine."""
        if self.param != name:
            return self
        return HttpError(
            self.status,
            str(self).replace(name, to, 1),
            type=self.type,
            param=to,
            code=self.code,
            retry_after_s=self.retry_after_s,
        )

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        return {
            "error": {
                "message": str(self),
                "type": self.type,
                "param": self.param,
                "code": self.code,
            }
        }

    @property
    def headers(self) -> dict[str, str]:
        """What HTTP wants besides, and what clients read to know when to come again."""
        if self.retry_after_s is None:
            return self._headers
        ms = max(1, round(self.retry_after_s * 1000))
        return self._headers | {"retry-after": str(-(-ms // 1000)), "retry-after-ms": str(ms)}


def field_of(error: grpc.aio.AioRpcError) -> str:
    """The field that the engine named, in the .proto's names; empty if it named none."""
    return _details_of(error)[0]


def _details_of(error: grpc.aio.AioRpcError) -> tuple[str, str]:
    """The field and the reason that the engine named; empty where it named none."""
    bad, info = error_details_pb2.BadRequest(), error_details_pb2.ErrorInfo()
    for name, value in error.trailing_metadata() or ():
        if name == _DETAILS:
            for detail in status_pb2.Status.FromString(value).details:
                if not detail.Unpack(bad):
                    detail.Unpack(info)
    return next((str(one.field) for one in bad.field_violations), ""), str(info.reason)
