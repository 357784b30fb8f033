"""One core process, many requests over its socket."""

import asyncio
import itertools
import re
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from quire import LLM, SamplingParams
from quire.engine.core_io import StepOutput, Submission
from quire.engine.request import FinishReason
from quire.protos.quire.core.v1 import core_pb2
from quire.protos.quire.v1 import inference_pb2
from quire.serving.core_client.client import CoreClient, CoreStream
from quire.serving.core_client.wire import submission_to_proto

from ...llm.engines import start
from .cores import core_process, ended_because, finish, is_idle, read, token_ids, until

LONG = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)
PROMPT = tuple(range(3, 30))
numbers = itertools.count()


@pytest.fixture(scope="module")
def path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "core.sock"
        with core_process(made):
            yield made


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with start("llama32_tied") as engine:
        yield engine


def over(path: Path, use: Any) -> Any:
    """Run `use(client)` on a loop of its own."""

    async def run() -> Any:
        client = CoreClient(path)
        try:
            return await use(client)
        finally:
            await client.close()

    return asyncio.run(run())


def submission(**fields: Any) -> Submission:
    given = {"prompt_token_ids": PROMPT, "params": LONG, "seed": 1} | fields
    return Submission(f"request-{next(numbers)}", **given)


def test_socket_is_private(path: Path) -> None:
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


# Drawn within what the small model can tell apart; the wire test draws everything.
DRAWN = st.fixed_dictionaries(
    {"max_tokens": st.integers(1, 12), "seed": st.integers(-(2**63), 2**63 - 1)},
    optional={
        "n": st.integers(1, 3),
        "temperature": st.floats(0.05, 2),
        "top_p": st.floats(0.1, 1),
        "top_k": st.integers(0, 2**32 - 1),
        "min_p": st.floats(0, 1),
        "presence_penalty": st.floats(-2, 2),
        "frequency_penalty": st.floats(-2, 2),
        "repetition_penalty": st.floats(0.1, 3),
        "stop_token_ids": st.lists(st.integers(0, 90), max_size=3),
        "ignore_eos": st.booleans(),
        "logprobs": st.integers(-1, 3),
        "prompt_logprobs": st.integers(-1, 3),
        "logit_bias": st.dictionaries(st.integers(0, 90), st.floats(-100, 100), max_size=3),
        "allowed_token_ids": st.lists(st.integers(0, 90), min_size=1, max_size=9),
    },
)


@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(prompt=st.lists(st.integers(0, 90), min_size=1, max_size=40), drawn=DRAWN)
def test_outputs_are_those_of_an_engine_in_this_process(
    path: Path, llm: LLM, prompt: list[int], drawn: dict[str, Any]
) -> None:
    params = SamplingParams(**drawn)
    expected = llm.generate(prompt, params, use_tqdm=False)[0]
    checked = llm.check(prompt, params)
    seed = params.seed if params.seed is not None else llm.seed_of(int(expected.request_id))
    choices = [
        submission(
            prompt_token_ids=checked.prompt_token_ids,
            params=checked.params,
            seed=seed,
            bad_words=checked.bad_word_ids,
            choice=choice,
        )
        for choice in range(params.n)
    ]
    outputs = over(path, lambda client: finish(client.open_stream(), choices))
    for one, answer in zip(choices, expected.outputs, strict=True):
        got: list[StepOutput] = outputs[one.request_id]
        assert token_ids(got) == answer.token_ids
        assert got[-1].finish_reason == answer.finish_reason
        assert got[-1].stop_reason == answer.stop_reason
        assert got[0].queue_ns > 0
        assert not any(o.queue_ns for o in got[1:])
        if answer.logprobs is not None:
            logprobs = [p.logprob for o in got for p in o.logprobs]
            found = zip(answer.token_ids, answer.logprobs, strict=True)
            assert logprobs == [at[token_id].logprob for token_id, at in found]
        if expected.prompt_logprobs is not None:
            positions = got[0].prompt_logprobs
            assert positions is not None
            for position, at in zip(positions, expected.prompt_logprobs[1:], strict=True):
                assert at is not None
                assert position.logprob == at[position.token_id].logprob


def test_request_goes_on_after_the_tokens_of_another_core(path: Path) -> None:
    whole = submission(params=SamplingParams(temperature=1.2, max_tokens=24, ignore_eos=True))

    async def use(client: CoreClient) -> tuple[list[int], list[int]]:
        stream = client.open_stream()
        first = token_ids((await finish(stream, [whole]))[whole.request_id])
        rest = replace(whole, request_id=f"{whole.request_id}-rest", output_token_ids=first[:7])
        return first, token_ids((await finish(stream, [rest]))[rest.request_id])

    first, rest = over(path, use)
    assert len(first) == 24
    assert first[7:] == rest


async def num_made(client: CoreClient) -> float:
    return (await client.status(5)).counters["num_output_tokens"]


async def running(client: CoreClient, count: int) -> tuple[CoreStream, list[Submission]]:
    """A stream with requests that are in the middle of their answers."""
    stream = client.open_stream()
    submissions = [submission() for _ in range(count)]
    stream.submit(submissions)
    await until(client, lambda s: s.num_running == count and s.num_free_pages < s.num_pages)
    return stream, submissions


def test_abort_ends_one_request_and_frees_its_pages(path: Path) -> None:
    async def use(client: CoreClient) -> None:
        before = await num_made(client)
        stream, (first, second) = await running(client, 2)
        stream.abort([first.request_id, "unknown"])
        outputs = await read(stream, {second.request_id})
        assert len(token_ids(outputs[second.request_id])) == 400
        assert not any(o.finish_reason for o in outputs.get(first.request_id, []))
        await until(client, is_idle)
        assert await num_made(client) - before < 2 * 400, "it went on to its end"

    over(path, use)


@pytest.mark.parametrize("how", ["stream", "connection", "replaced"])
def test_end_of_the_stream_aborts_its_requests(path: Path, how: str) -> None:
    async def use(client: CoreClient) -> None:
        before = await num_made(client)
        other = CoreClient(path)
        stream, _ = await running(other, 3)
        if how == "stream":
            stream.close()
        elif how == "connection":
            await other.close()
        else:
            short = submission(params=replace(LONG, max_tokens=3))
            outputs = await finish(client.open_stream(), [short])
            assert len(outputs) == 1, "outputs of the older stream came over the newer one"
            assert "a newer stream took the place" in await ended_because(stream)
        await until(client, is_idle)
        assert await num_made(client) - before < 3 * 400, "they went on to their ends"
        await other.close()

    over(path, use)


def proto(**fields: Any) -> core_pb2.Submit:
    message = submission_to_proto(submission())
    params = fields.pop("params", {})
    for name, value in params.items():
        if isinstance(value, list):
            getattr(message.params, name).extend(value)
        else:
            setattr(message.params, name, value)
    for name, value in fields.items():
        if isinstance(value, list):
            del getattr(message, name)[:]
            getattr(message, name).extend(value)
        else:
            setattr(message, name, value)
    return message


BAD = {
    "token id": (proto(prompt_token_ids=[5, 70000]), r"prompt_token_ids\[1\] is 70000"),
    "long prompt": (proto(prompt_token_ids=[1] * 100_000), "the prompt has 100000 tokens"),
    "no prompt": (proto(prompt_token_ids=[]), "the prompt has no tokens"),
    "nan": (proto(params={"temperature": float("nan")}), "temperature must be"),
    "infinite bias": (proto(params={"repetition_penalty": float("inf")}), "repetition_penalty"),
    "stop id": (proto(params={"stop_token_ids": [70000]}), "stop_token_ids has the token id"),
    "made tokens": (proto(output_token_ids=[70000]), "output_token_ids has the token id"),
    "all made": (proto(output_token_ids=[5] * 400), "there is none to sample"),
    "bad word": (
        proto(bad_words=[inference_pb2.TokenIds(ids=[70000])]),
        "bad_words has the token id",
    ),
    "empty bad word": (proto(bad_words=[inference_pb2.TokenIds()]), "a bad word has no tokens"),
    "no id": (proto(request_id=""), "request_id is empty"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_submit_ends_alone(path: Path, kind: str) -> None:
    message, why = BAD[kind]
    good = submission(params=SamplingParams(temperature=0, max_tokens=9, ignore_eos=True))

    async def use(client: CoreClient) -> dict[str, list[StepOutput]]:
        stream = client.open_stream()
        stream.submit([good])
        stream._pending.submits.append(message)
        return await read(stream, {good.request_id, message.request_id})

    outputs = over(path, use)
    assert len(token_ids(outputs[good.request_id])) == 9
    (refused,) = outputs[message.request_id]
    assert refused.finish_reason is FinishReason.ERROR
    assert refused.token_ids == ()
    assert isinstance(refused.stop_reason, str)
    assert re.search(why, refused.stop_reason)


def test_request_id_in_use_is_refused_and_the_first_goes_on(path: Path) -> None:
    async def use(client: CoreClient) -> None:
        stream, (first,) = await running(client, 1)
        stream.submit([first])
        outputs: list[StepOutput] = []
        async for step in stream:
            outputs += step
            if any(o.finish_reason is FinishReason.LENGTH for o in step):
                break
        refused = [o for o in outputs if o.finish_reason is FinishReason.ERROR]
        assert [o.stop_reason for o in refused] == [
            f"the request id {first.request_id!r} is in use; give each request its own"
        ]
        assert len(token_ids(outputs)) == 400
        await until(client, is_idle)

    over(path, use)


def test_status_counts(path: Path) -> None:
    async def use(client: CoreClient) -> None:
        before = await until(client, is_idle)
        assert before.step_age_ns == 0
        await finish(client.open_stream(), [submission()])
        after = await until(client, is_idle)
        made = after.counters["num_output_tokens"] - before.counters["num_output_tokens"]
        assert made == 400
        assert after.counters["num_failed_steps"] == 0
        assert after.counters["num_prefix_queried_tokens"] > 0
        assert after.num_compiles == 0
        assert after.max_model_len > 400
        assert 90 < after.vocab_size < 70000

    over(path, use)


def test_sigterm_ends_a_core_at_once() -> None:
    with (
        tempfile.TemporaryDirectory() as folder,
        core_process(Path(folder) / "core.sock") as process,
    ):
        process.send_signal(signal.SIGTERM)
        assert process.wait(2) == 0


def test_core_without_a_supervisor_says_how_to_start_it() -> None:
    command = [sys.executable, "-m", "quire.serving.core"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "use the quire command" in done.stderr
