"""Nobody waits forever and nothing stays behind, however an engine, a stream or a process ends."""

import asyncio
import gc
import queue
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import jax
import pytest
from quire import LLM, SamplingParams
from quire.engine.core import StepOutput, Submission
from quire.engine.errors import EngineStopped, StepFailed
from quire.engine.request import FinishReason

from .engines import REFERENCE, start

LONG = SamplingParams(max_tokens=400, ignore_eos=True)
WAIT_S = 30


def in_thread(action: Callable[[], object]) -> queue.SimpleQueue[Any]:
    """Run an action; what it returns or raises comes through the queue."""
    result: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def run() -> None:
        try:
            result.put(action())
        except Exception as error:
            result.put(error)

    threading.Thread(target=run, daemon=True).start()
    return result


def submission(request_id: str, first: int = 1, **params: Any) -> Submission:
    given = {"max_tokens": 400, "ignore_eos": True} | params
    return Submission(request_id, tuple(range(first, first + 20)), SamplingParams(**given), 0)


def test_request_submitted_just_before_close_is_told() -> None:
    """The loop had taken it out of the inbox and dropped it: generate() never returned."""
    llm = start("llama32_tied", max_num_seqs=8)
    busy = [llm.stream([1, 2, 3], LONG) for _ in range(4)]
    late = [llm.stream([4, 5], LONG) for _ in range(3)]
    llm.close()
    for stream in (*busy, *late):
        got = in_thread(lambda s=stream: list(s)).get(timeout=WAIT_S)
        assert isinstance(got, EngineStopped)


def test_request_id_in_use_is_refused_and_the_first_goes_on() -> None:
    """It killed the step loop for everybody."""
    with start("llama32_tied") as llm:
        first: queue.SimpleQueue[StepOutput] = queue.SimpleQueue()
        second: queue.SimpleQueue[StepOutput] = queue.SimpleQueue()
        llm._loop.submit([submission("x", max_tokens=30)], first.put)
        llm._loop.submit([submission("x")], second.put)
        told = second.get(timeout=WAIT_S)
        assert told.finish_reason is FinishReason.ERROR
        assert told.stop_reason == "the request id 'x' is in use; give each request its own"
        outputs = [first.get(timeout=WAIT_S) for _ in range(30)]
        assert outputs[-1].finish_reason is FinishReason.LENGTH


def test_cancelled_async_stream_lets_the_program_end() -> None:
    """The executor's thread waited for a delta that never came, and asyncio.run for the thread."""
    with start("llama32_tied", max_num_seqs=1) as llm:
        busy = llm.stream([1, 2, 3], LONG)

        async def consume() -> None:
            async for _ in llm.stream([5, 6, 7], LONG):
                pass

        async def main() -> str:
            try:
                await asyncio.wait_for(consume(), 0.01)
            except TimeoutError:
                return "timed out"
            return "ended"

        assert in_thread(lambda: asyncio.run(main())).get(timeout=WAIT_S) == "timed out"
        busy.close()


def test_stream_closed_from_another_thread_ends_its_reader() -> None:
    with start("llama32_tied", max_num_seqs=1) as llm:
        busy = llm.stream([1, 2, 3], LONG)
        waiting = llm.stream([4, 5], LONG)
        reader = in_thread(lambda: list(waiting))
        waiting.close()
        assert isinstance(reader.get(timeout=WAIT_S), list)
        busy.close()


def device_bytes() -> int:
    gc.collect()
    return sum(a.nbytes for a in jax.live_arrays())


def test_closing_or_dropping_an_engine_frees_its_memory() -> None:
    before = device_bytes()
    llm = start("llama32_tied")
    assert device_bytes() > before + (4 << 20)
    llm.close()
    assert device_bytes() <= before
    llm.close()  # again is no error
    dropped = start("llama32_tied")
    thread = dropped._loop._thread
    del dropped
    assert device_bytes() <= before
    assert not thread.is_alive()


def test_stream_keeps_its_engine() -> None:
    deltas = list(start("llama32_tied").stream([1, 2, 3], SamplingParams(max_tokens=5)))
    assert sum(len(d.token_ids) for d in deltas) == 5


def test_process_that_ends_with_requests_running_ends_cleanly() -> None:
    """The interpreter was aborted: its daemon thread was inside XLA."""
    code = (
        "from tests.llm.engines import start\n"
        "from quire import SamplingParams\n"
        "llm = start('llama32_tied')\n"
        "p = SamplingParams(max_tokens=400, ignore_eos=True)\n"
        "streams = [llm.stream([1, 2, 3], p) for _ in range(6)]\n"
        "next(iter(streams[0]))\n"
    )
    root = REFERENCE.parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_reused_request_id_gets_its_own_prompt_logprobs() -> None:
    """Scores under way were matched by id: the new request got the old one's."""
    llm = start("llama32_tied", enable_prefix_caching=False)
    core = llm._engine.core
    params = {"max_tokens": 2, "prompt_logprobs": 0}
    with llm, llm._loop._wake:  # the loop sleeps while this thread drives the core
        core.submit(submission("x", 10, **params))
        core.step()
        core.abort("x")
        core.submit(submission("x", 50, **params))
        outputs = []
        while core.has_work:
            outputs += core.step()
    scored = [p.token_id for o in outputs for p in o.prompt_logprobs or ()]
    assert scored == list(range(51, 70))


def test_tokens_read_before_a_failed_recovery_are_delivered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    llm: LLM = start("llama32_tied")
    core = llm._engine.core
    outputs: queue.SimpleQueue[StepOutput] = queue.SimpleQueue()
    read = core._read

    def read_then_fail(flight: Any) -> None:
        read(flight)
        raise StepFailed("made to fail")

    def no_memory() -> None:
        raise MemoryError("made to fail")

    monkeypatch.setattr(core, "_read", read_then_fail)
    monkeypatch.setattr(core.runner, "allocate", no_memory)
    llm._loop.submit([submission("x")], outputs.put)
    assert len(outputs.get(timeout=WAIT_S).token_ids) == 1
    assert outputs.get(timeout=WAIT_S).finish_reason is FinishReason.ERROR
    with pytest.raises(EngineStopped, match="the engine has failed"):
        llm.generate([[1]])
    llm.close()


def test_start_without_a_stderr(monkeypatch: pytest.MonkeyPatch) -> None:
    """As under `2>&-`; and print(file=None) would go to stdout."""
    monkeypatch.setattr(sys, "stderr", None)
    with start("llama32_tied") as llm:
        assert llm.generate("a", SamplingParams(max_tokens=1), use_tqdm=False)
