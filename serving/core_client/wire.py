"""The records of engine/core_io.py as messages of quire.core.v1 and back, for the core and for
whoever talks to it. Nothing is lost on the way but times, which start anew.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from ...engine.core_io import PositionLogprobs, StepOutput, Submission
from ...engine.errors import RequestError
from ...engine.request import FinishReason
from ...protos.quire.core.v1 import core_pb2
from ...protos.quire.v1 import inference_pb2
from .params import params_from_proto, params_to_proto

_WIRE_BY_REASON = {
    FinishReason.STOP: inference_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: inference_pb2.FINISH_REASON_LENGTH,
    FinishReason.ABORT: inference_pb2.FINISH_REASON_ABORT,
    FinishReason.ERROR: inference_pb2.FINISH_REASON_ERROR,
}
_REASON_BY_WIRE = {wire: reason for reason, wire in _WIRE_BY_REASON.items()}


def submission_to_proto(submission: Submission) -> core_pb2.Submit:
    """Raises RequestError when a number or a text cannot be carried."""
    params = params_to_proto(submission.params)
    try:
        return core_pb2.Submit(
            request_id=submission.request_id,
            prompt_token_ids=submission.prompt_token_ids,
            params=params,
            seed=submission.seed,
            bad_words=[inference_pb2.TokenIds(ids=ids) for ids in submission.bad_words],
            choice=submission.choice,
            priority=submission.priority,
            cache_salt=submission.cache_salt,
            output_token_ids=submission.output_token_ids,
            tenant=submission.tenant,
        )
    except ValueError as error:
        raise RequestError(
            "a submission must have token ids and choice of 32 bits, not negative, and a seed of "
            f"64 bits: {error}"
        ) from error


def submission_from_proto(message: core_pb2.Submit) -> Submission:
    """Raises RequestError when the sampling parameters are not valid."""
    return Submission(
        message.request_id,
        tuple(message.prompt_token_ids),
        params_from_proto(message.params),
        message.seed,
        tuple(tuple(word.ids) for word in message.bad_words),
        message.choice,
        message.priority,
        message.cache_salt,
        tuple(message.output_token_ids),
        message.tenant,
    )


def outputs_to_proto(outputs: Iterable[StepOutput]) -> core_pb2.StepOutputs:
    """Cost: a third of a microsecond for an output of one token and nothing else."""
    message = core_pb2.StepOutputs()
    batch = message.batches.add()
    request_ids: list[str] = []
    token_ids: list[int] = []
    for output in outputs:
        if _is_plain(output):
            request_ids.append(output.request_id)
            token_ids.append(output.token_ids[0])
            continue
        if request_ids:  # whose place is before this one
            batch.request_ids.extend(request_ids)
            batch.token_ids.extend(token_ids)
            batch, request_ids, token_ids = message.batches.add(), [], []
        _fill(batch.outputs.add(), output)
    batch.request_ids.extend(request_ids)
    batch.token_ids.extend(token_ids)
    return message


def outputs_from_proto(message: core_pb2.StepOutputs) -> list[StepOutput]:
    outputs = []
    for batch in message.batches:
        outputs += [_output_from_proto(one) for one in batch.outputs]
        outputs += [
            StepOutput(request_id, (token_id,))
            for request_id, token_id in zip(batch.request_ids, batch.token_ids, strict=True)
        ]
    return outputs


def _is_plain(output: StepOutput) -> bool:
    """One more token, and nothing else to say."""
    return (
        len(output.token_ids) == 1
        and output.finish_reason is None
        and not output.queue_ns
        and not output.num_cached
        and not output.logprobs
        and output.prompt_logprobs is None
    )


def _fill(one: core_pb2.RequestOutput, output: StepOutput) -> None:
    one.request_id = output.request_id
    one.token_ids.extend(output.token_ids)
    one.num_cached = output.num_cached
    one.queue_ns = output.queue_ns
    one.logprobs.extend(_position_to_proto(p) for p in output.logprobs)
    if output.prompt_logprobs is not None:
        one.has_prompt_logprobs = True
        one.prompt_logprobs.extend(_position_to_proto(p) for p in output.prompt_logprobs)
    if output.finish_reason is not None:
        one.finish_reason = _WIRE_BY_REASON[output.finish_reason]
        if isinstance(output.stop_reason, int):
            one.stop_token_id = output.stop_reason
        elif output.stop_reason is not None:
            one.error = output.stop_reason


def _output_from_proto(one: core_pb2.RequestOutput) -> StepOutput:
    prompt_logprobs = _Positions(one.prompt_logprobs) if one.has_prompt_logprobs else None
    stop_reason: int | str | None = one.error or None
    if one.HasField("stop_token_id"):
        stop_reason = one.stop_token_id
    return StepOutput(
        one.request_id,
        tuple(one.token_ids),
        tuple(_position_from_proto(p) for p in one.logprobs),
        prompt_logprobs,
        _REASON_BY_WIRE.get(one.finish_reason),
        stop_reason,
        one.num_cached,
        one.queue_ns,
    )


class _Positions(Sequence[PositionLogprobs]):
    """Read when they are used, which may be on a thread: there may be thousands."""

    def __init__(self, messages: Sequence[core_pb2.RawLogprobs]) -> None:
        self._messages = messages

    def __len__(self) -> int:
        return len(self._messages)

    def __getitem__(self, index: Any) -> Any:
        found = self._messages[index]
        if isinstance(index, slice):
            return tuple(map(_position_from_proto, found))
        return _position_from_proto(found)


def _position_to_proto(position: PositionLogprobs) -> core_pb2.RawLogprobs:
    return core_pb2.RawLogprobs(
        token_id=position.token_id,
        logprob=position.logprob,
        rank=position.rank,
        top_ids=position.top_ids.tolist(),
        top=position.top.tolist(),
    )


def _position_from_proto(message: core_pb2.RawLogprobs) -> PositionLogprobs:
    return PositionLogprobs(
        message.token_id,
        message.logprob,
        message.rank,
        np.array(message.top_ids, np.int32),
        np.array(message.top, np.float32),
    )
