"""What goes over the wire comes out the same on the other side."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from quire.engine.core_io import PositionLogprobs, StepOutput, Submission
from quire.engine.errors import RequestError
from quire.engine.request import FinishReason
from quire.engine.sampling_params import MAX_INT, SamplingParams
from quire.protos.quire.core.v1 import core_pb2
from quire.protos.quire.v1 import inference_pb2
from quire.serving.core_client.params import params_from_proto, params_to_proto
from quire.serving.core_client.wire import (
    outputs_from_proto,
    outputs_to_proto,
    submission_from_proto,
    submission_to_proto,
)

U32 = st.integers(0, 2**32 - 1)
IDS = st.lists(U32, max_size=5).map(tuple)
TEXT = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=8)
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "n": st.integers(1, 64),
    "temperature": st.floats(0.01, 2),
    "top_p": st.floats(0, 1, exclude_min=True),
    "top_k": U32,
    "min_p": st.floats(0, 1),
    "presence_penalty": st.floats(-2, 2),
    "frequency_penalty": st.floats(-2, 2),
    "repetition_penalty": st.floats(0, 1e300, exclude_min=True),
    "seed": st.none() | st.integers(-(2**63), MAX_INT),
    "stop": st.lists(TEXT, max_size=4).map(tuple),
    "stop_token_ids": IDS,
    "include_stop_str_in_output": st.booleans(),
    "ignore_eos": st.booleans(),
    "min_tokens": st.just(0) | st.integers(0, 5),
    "max_tokens": st.none() | st.integers(5, 2**32 - 1),
    "logprobs": st.none() | st.integers(-1, 2**31 - 1),
    "prompt_logprobs": st.none() | st.integers(-1, 2**31 - 1),
    "logit_bias": st.none() | st.dictionaries(U32, st.floats(-100, 100), min_size=1, max_size=5),
    "allowed_token_ids": st.none() | st.lists(U32, min_size=1, max_size=5).map(tuple),
    "bad_words": st.lists(TEXT, max_size=4).map(tuple),
    "detokenize": st.booleans(),
    "skip_special_tokens": st.booleans(),
    "spaces_between_special_tokens": st.just(True),
}
PARAMS = st.fixed_dictionaries({}, optional=FIELDS).map(lambda given: SamplingParams(**given))


def test_every_field_is_drawn_and_carried() -> None:
    names = {field.name for field in dataclasses.fields(SamplingParams)}
    assert set(FIELDS) == names
    assert {field.name for field in inference_pb2.SamplingParams.DESCRIPTOR.fields} == names


@given(PARAMS)
def test_params_come_back_the_same(params: SamplingParams) -> None:
    message = params_to_proto(params)
    read = inference_pb2.SamplingParams.FromString(message.SerializeToString())
    # The sender's values, not the receiver's defaults.
    defaults = {"temperature": 0.3, "top_k": 7, "ignore_eos": True}
    assert params_from_proto(read, defaults) == params


def test_unset_fields_take_the_models_defaults_then_those_of_the_proto() -> None:
    message = inference_pb2.SamplingParams(top_p=0.5)
    params = params_from_proto(message, {"temperature": 0.3, "top_p": 0.9})
    assert params == SamplingParams(temperature=0.3, top_p=0.5, max_tokens=None)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("top_k", 2**32),
        ("max_tokens", 2**32),
        ("logprobs", 2**31),
        ("stop_token_ids", (2**32,)),
        ("logit_bias", {2**40: 1.0}),
        ("stop", ("\ud800",)),
    ],
)
def test_what_cannot_be_carried_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(RequestError, match=f"{field} must be .* got ") as caught:
        params_to_proto(SamplingParams(**{field: value}))
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("field", "value"),
    [("temperature", float("nan")), ("top_p", 0.0), ("n", 0), ("min_p", 2.0)],
)
def test_params_out_of_range_are_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(RequestError) as caught:
        params_from_proto(inference_pb2.SamplingParams(**{field: value}))
    assert caught.value.field == field


SUBMISSIONS = st.builds(
    Submission,
    request_id=TEXT,
    prompt_token_ids=IDS,
    params=PARAMS,
    seed=st.integers(-(2**63), MAX_INT),
    bad_words=st.lists(IDS, max_size=3).map(tuple),
    choice=U32,
    priority=st.integers(-(2**31), 2**31 - 1),
    cache_salt=st.binary(max_size=8),
    output_token_ids=IDS,
    tenant=st.binary(max_size=8),
)


def test_every_field_of_a_submission_is_carried() -> None:
    carried = {field.name for field in core_pb2.Submit.DESCRIPTOR.fields}
    assert {field.name for field in dataclasses.fields(Submission)} - {"submitted_ns"} == carried


@given(SUBMISSIONS)
def test_submission_comes_back_the_same(submission: Submission) -> None:
    message = submission_to_proto(submission)
    read = core_pb2.Submit.FromString(message.SerializeToString())
    assert submission_from_proto(read) == submission


def test_submission_that_cannot_be_carried_is_refused() -> None:
    with pytest.raises(RequestError, match="32 bits"):
        submission_to_proto(Submission("a", (-1,), SamplingParams(), 0))


F32 = st.floats(width=32, allow_nan=False)


@st.composite
def positions(draw: st.DrawFn) -> PositionLogprobs:
    top = draw(st.lists(st.tuples(st.integers(0, 2**31 - 1), F32), max_size=3))
    ids, values = [t for t, _ in top], [v for _, v in top]
    return PositionLogprobs(
        draw(U32), draw(F32), draw(U32), np.array(ids, np.int32), np.array(values, np.float32)
    )


POSITIONS = st.lists(positions(), max_size=3).map(tuple)
ENDINGS = (
    (None, None),
    (FinishReason.STOP, None),
    (FinishReason.STOP, 0),
    (FinishReason.STOP, 7),
    (FinishReason.LENGTH, None),
    (FinishReason.ABORT, None),
    (FinishReason.ERROR, "why"),
)


@given(
    st.lists(
        st.builds(
            lambda ending, **fields: StepOutput(
                finish_reason=ending[0], stop_reason=ending[1], **fields
            ),
            st.sampled_from(ENDINGS),
            request_id=TEXT,
            token_ids=IDS,
            logprobs=POSITIONS,
            prompt_logprobs=st.none() | POSITIONS,
            num_cached=U32,
            queue_ns=st.integers(0, MAX_INT),
        ),
        max_size=3,
    )
)
def test_outputs_come_back_the_same(outputs: list[StepOutput]) -> None:
    message = outputs_to_proto(outputs).SerializeToString()
    read = outputs_from_proto(core_pb2.StepOutputs.FromString(message))
    assert [_plain(o) for o in read] == [_plain(o) for o in outputs]


def _plain(output: StepOutput) -> dict[str, Any]:
    """With lists in place of arrays, which have no equality."""

    def listed(found: tuple[PositionLogprobs, ...] | None) -> Any:
        if found is None:
            return None
        return [
            (p.token_id, p.logprob, p.rank, p.top_ids.tolist(), p.top.tolist(), p.top_ids.dtype)
            for p in found
        ]

    plain = {f.name: getattr(output, f.name) for f in dataclasses.fields(output)}
    plain["logprobs"] = listed(output.logprobs)
    plain["prompt_logprobs"] = listed(output.prompt_logprobs)
    return plain
