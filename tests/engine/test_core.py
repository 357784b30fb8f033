"""What the step loop counts, and that the policy asked for and a request's tenant reach it."""

import time
from collections.abc import Iterator
from typing import Any

import pytest
from quire import LLM
from quire.engine.core import EngineCore
from quire.engine.core_io import Submission
from quire.engine.policies import POLICIES
from quire.engine.sampling_params import SamplingParams

from ..llm.engines import start

TIMES = ("schedule_ns", "build_ns", "device_ns", "emit_ns")


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with start("llama32_tied", scheduling_policy="fair", max_num_seqs=1) as llm:
        yield llm


def submit(core: EngineCore, request_id: str, tenant: bytes = b"", **params: object) -> None:
    fields = {"max_tokens": 4, "ignore_eos": True} | params
    core.submit(Submission(request_id, (3, 4, 5), SamplingParams(**fields), seed=0, tenant=tenant))


def times_ns(core: EngineCore) -> list[int]:
    counters = core.counters()
    return [counters[name] for name in TIMES]


@pytest.mark.parametrize("bad_words", [(), ((7, 8),)], ids=["plain", "reads while it builds"])
def test_times_of_a_step_are_disjoint_and_leave_little_out(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, bad_words: tuple[tuple[int, ...], ...]
):
    core = llm._engine.core
    forward, slow_ns = core.runner.forward, 5_000_000

    def slow_forward(*args: Any) -> Any:
        time.sleep(slow_ns / 1e9)
        return forward(*args)

    monkeypatch.setattr(core.runner, "forward", slow_forward)
    params = SamplingParams(max_tokens=20, ignore_eos=True, logprobs=2, prompt_logprobs=2)
    with llm._loop._wake:  # the loop sleeps while this thread drives the core
        core.submit(Submission("x", tuple(range(3, 30)), params, seed=0, bad_words=bad_words))
        before, wall_ns = times_ns(core), 0
        while core.has_work:
            began_ns = time.perf_counter_ns()
            core.step()
            wall_ns += time.perf_counter_ns() - began_ns
            time.sleep(0.001)  # between steps; must be in none of them
    spent_ns = [b - a for a, b in zip(before, times_ns(core), strict=True)]
    assert all(type(ns) is int and ns > 0 for ns in spent_ns), spent_ns
    assert 0.5 * wall_ns < sum(spent_ns) <= wall_ns
    assert spent_ns[TIMES.index("build_ns")] >= 20 * slow_ns, "a read took the time before it"


def test_a_fair_engine_serves_another_tenant_before_a_queue(llm: LLM):
    core = llm._engine.core
    ended = []
    with llm._loop._wake:
        for number in range(6):
            submit(core, f"many-{number}", b"many")
        core.step()
        submit(core, "one", b"one")
        while core.has_work:
            ended += [o.request_id for o in core.step() if o.finish_reason is not None]
    assert ended == ["many-0", "one", *(f"many-{number}" for number in range(1, 6))]


@pytest.mark.parametrize("name", POLICIES)
def test_an_engine_schedules_by_the_policy_asked_for(name: str):
    with start("llama32_tied", scheduling_policy=name, lazy_compile=True) as llm:
        assert llm._engine.core.scheduler.config.policy is POLICIES[name]
