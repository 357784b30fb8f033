"""Tables of (requests, budget, free pages) -> plan. A page is four tokens unless a test says so."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
from quire.engine.errors import ConfigError, RequestError
from quire.engine.policies import Policy, by_priority, fcfs
from quire.engine.request import FinishReason, Request, RequestStatus
from quire.engine.sampling_params import SamplingParams
from quire.engine.scheduler import Scheduler, SchedulerConfig
from quire.engine.step_plan import StepPlan

TOKEN = 7


def make_scheduler(**changes: Any) -> Scheduler:
    config = SchedulerConfig(
        page_size=4,
        num_pages=101,
        num_slots=4,
        max_num_batched_tokens=32,
        max_model_len=64,
        windows=(None,),
        enable_prefix_caching=False,
        secret=b"secret",
    )
    return Scheduler(dataclasses.replace(config, **changes))


def make_request(
    arrival: int,
    prompt: int | Sequence[int],
    *,
    max_tokens: int = 8,
    prompt_logprobs: int | None = None,
    **fields: Any,
) -> Request:
    """A number as prompt makes so many tokens that no other arrival has."""
    token_ids = (
        range(1000 * arrival, 1000 * arrival + prompt) if isinstance(prompt, int) else prompt
    )
    params = SamplingParams(max_tokens=max_tokens, prompt_logprobs=prompt_logprobs)
    return Request(f"r{arrival}", list(token_ids), params, arrival, **fields)


def add(scheduler: Scheduler, *prompts: int, **fields: Any) -> list[Request]:
    requests = [make_request(arrival, prompt, **fields) for arrival, prompt in enumerate(prompts)]
    for request in requests:
        scheduler.add(request)
    return requests


def schedule(scheduler: Scheduler) -> StepPlan:
    plan = scheduler.schedule(0.0)
    scheduler.audit()
    return plan


def read(scheduler: Scheduler, plan: StepPlan) -> None:
    for chunk in plan.chunks:
        if chunk.samples and chunk.request.finish_reason is None:
            scheduler.on_token(chunk.request, TOKEN)
    scheduler.audit()


def step(scheduler: Scheduler) -> str:
    """One step whose tokens are read at once."""
    plan = schedule(scheduler)
    read(scheduler, plan)
    return text(plan)


def text(plan: StepPlan) -> str:
    """The chunks, `r0[3:5]!`: tokens 3 and 4 of request r0, and a token is sampled."""
    return " ".join(
        f"{chunk.request.request_id}[{chunk.first}:{chunk.first + chunk.count}]"
        + "!" * chunk.samples
        for chunk in plan.chunks
    )


@pytest.mark.parametrize(
    ("prompts", "budget", "max_chunk", "steps"),
    [
        ([5], 32, None, ["r0[0:5]!", "r0[5:6]!"]),
        ([1], 32, None, ["r0[0:1]!", "r0[1:2]!"]),
        # Chunks when the budget is short.
        ([10], 4, None, ["r0[0:4]", "r0[4:8]", "r0[8:10]!", "r0[10:11]!"]),
        # Decode and a prompt in one step.
        ([3, 6], 5, None, ["r0[0:3]! r1[0:2]", "r0[3:4]! r1[2:6]!", "r0[4:5]! r1[6:7]!"]),
        # Two prompts share a step.
        ([6, 6], 32, 4, ["r0[0:4] r1[0:4]", "r0[4:6]! r1[4:6]!", "r0[6:7]! r1[6:7]!"]),
        # Running before waiting.
        ([2, 2, 2], 2, None, ["r0[0:2]!", "r0[2:3]! r1[0:1]", "r0[3:4]! r1[1:2]!"]),
        # Chunks of one token first.
        ([9, 1, 9, 1], 32, None, ["r1[0:1]! r3[0:1]! r0[0:9]! r2[0:9]!"]),
    ],
)
def test_scheduler_shares_the_budget(
    prompts: list[int], budget: int, max_chunk: int | None, steps: list[str]
):
    scheduler = make_scheduler(max_num_batched_tokens=budget, max_chunk=max_chunk)
    add(scheduler, *prompts)
    assert [step(scheduler) for _ in steps] == steps


def test_scheduler_plan_counts_tokens_and_names_admitted_requests_once():
    scheduler = make_scheduler()
    first, second = add(scheduler, 5, 3)
    plan = schedule(scheduler)
    assert (plan.num_tokens, plan.admitted, plan.preempted) == (8, (first, second), ())
    assert schedule(scheduler).admitted == ()


def test_scheduler_plan_is_empty_without_work():
    assert schedule(make_scheduler()) == StepPlan((), (), (), 0)


def test_scheduler_plans_a_token_that_is_still_on_the_device():
    scheduler = make_scheduler()
    [request] = add(scheduler, 5)
    plans = [schedule(scheduler), schedule(scheduler)]
    assert text(plans[1]) == "r0[5:6]!"
    assert (request.num_output, request.num_in_flight, request.num_known) == (0, 2, 7)
    for plan in plans:
        read(scheduler, plan)
    assert (request.num_output, request.num_in_flight) == (2, 0)
    assert request.output_token_ids == [TOKEN, TOKEN]
    assert request.prompt_token_ids == [0, 1, 2, 3, 4]
    assert request.token_ids(4, 2) == [4, TOKEN]
    assert request.token_ids(6, 2) == [TOKEN]


@pytest.mark.parametrize(("max_tokens", "max_model_len"), [(2, 64), (50, 7)])
def test_scheduler_stops_planning_when_the_last_token_is_in_flight(
    max_tokens: int, max_model_len: int
):
    scheduler = make_scheduler(max_model_len=max_model_len)
    [request] = add(scheduler, 5, max_tokens=max_tokens)
    plans = [schedule(scheduler), schedule(scheduler)]
    assert text(schedule(scheduler)) == ""
    for plan in plans:
        read(scheduler, plan)
    assert text(schedule(scheduler)) == ""
    assert request.num_output == 2
    assert scheduler.has_work


def test_scheduler_gives_each_running_request_its_own_slot_and_reuses_it():
    scheduler = make_scheduler(num_slots=2)
    first, second, third = add(scheduler, 3, 3, 3)
    step(scheduler)
    assert {first.slot, second.slot} == {0, 1}
    assert third.status is RequestStatus.WAITING
    slot = first.slot
    scheduler.finish(first, FinishReason.STOP, stop_reason=TOKEN)
    plan = schedule(scheduler)
    assert plan.admitted == (third,)
    assert third.slot == slot
    assert [chunk.slot for chunk in plan.chunks] == [second.slot, third.slot]


@pytest.mark.parametrize("is_running", [True, False])
def test_scheduler_finish_frees_pages_and_slot_from_any_state(is_running: bool):
    scheduler = make_scheduler()
    [request] = add(scheduler, 5)
    if is_running:
        schedule(scheduler)
    scheduler.finish(request, FinishReason.STOP, stop_reason="END")
    scheduler.audit()
    assert request.status is RequestStatus.FINISHED
    assert (request.finish_reason, request.stop_reason) == ("stop", "END")
    assert request.num_in_flight == 0
    assert (scheduler.has_work, scheduler.pool.num_free) == (False, 100)


def test_scheduler_refuses_to_finish_twice():
    scheduler = make_scheduler()
    [request] = add(scheduler, 5)
    schedule(scheduler)
    scheduler.finish(request, FinishReason.ABORT)
    with pytest.raises(RuntimeError, match="has already finished: abort"):
        scheduler.finish(request, FinishReason.STOP)
    with pytest.raises(RuntimeError, match="no token is in flight"):
        scheduler.on_token(request, TOKEN)


def test_scheduler_refuses_what_it_was_never_given():
    scheduler = make_scheduler()
    [request, _] = add(scheduler, 5, 5)
    with pytest.raises(RuntimeError, match="is not queued here"):
        scheduler.finish(make_request(0, 5), FinishReason.ABORT)
    with pytest.raises(RuntimeError, match="no token is in flight"):
        scheduler.on_token(request, TOKEN)


# A prompt of 7 tokens is two pages; to be admitted it must find a third one free.
@pytest.mark.parametrize(
    ("prompts", "num_usable", "num_admitted"),
    [([7, 7], 5, 2), ([7, 7], 4, 1), ([8, 7], 5, 2), ([9, 7], 5, 1), ([7, 7, 1], 4, 1)],
)
def test_scheduler_admits_when_the_prompt_and_a_page_more_fit(
    prompts: list[int], num_usable: int, num_admitted: int
):
    scheduler = make_scheduler(num_pages=num_usable + 1)
    requests = add(scheduler, *prompts)
    plan = schedule(scheduler)
    assert plan.admitted == tuple(requests[:num_admitted])


def test_scheduler_admits_alone_what_fits_without_the_page_more():
    scheduler = make_scheduler(num_pages=4, max_model_len=12)
    [request] = add(scheduler, 11)
    assert step(scheduler) == "r0[0:11]!"
    assert len(request.pages[0]) == 3


def test_scheduler_reserves_the_rest_of_a_prompt_before_it_admits_another():
    scheduler = make_scheduler(num_pages=7, max_chunk=4)
    first, _ = add(scheduler, 16, 5, max_tokens=4)
    assert schedule(scheduler).admitted == (first,)


def make_tight() -> tuple[Scheduler, Request, Request]:
    """Two requests that both fit at first; the second must make room as the first grows."""
    scheduler = make_scheduler(num_pages=6)
    first, second = add(scheduler, 8, 4, max_tokens=12)
    return scheduler, first, second


def grow_until_preempted(scheduler: Scheduler) -> StepPlan:
    while not (plan := schedule(scheduler)).preempted:
        assert plan.chunks, "nothing was preempted"
        read(scheduler, plan)
    return plan


def test_scheduler_preempts_newest_when_pages_run_out():
    scheduler, first, second = make_tight()
    plan = grow_until_preempted(scheduler)
    assert plan.preempted == (second,)
    assert [chunk.request for chunk in plan.chunks] == [first]
    assert (second.status, second.num_computed, second.pages) == (RequestStatus.WAITING, 0, [])
    assert (second.num_preemptions, scheduler.num_preemptions) == (1, 1)


def test_scheduler_may_preempt_the_request_that_needs_the_page():
    scheduler = make_scheduler(num_pages=6)
    first, second = add(scheduler, 7, 8, max_tokens=8)
    plan = grow_until_preempted(scheduler)
    assert plan.preempted == (second,)
    assert [chunk.request for chunk in plan.chunks] == [first]


def test_scheduler_recomputes_a_preempted_request_with_its_output():
    scheduler, first, second = make_tight()
    read(scheduler, grow_until_preempted(scheduler))
    num_known = second.num_known
    assert num_known > 4
    scheduler.finish(first, FinishReason.LENGTH)
    assert step(scheduler) == f"r1[0:{num_known}]!"


def test_scheduler_admits_nobody_in_a_step_that_preempts():
    scheduler, _, second = make_tight()
    step(scheduler)
    third = make_request(2, 1)
    scheduler.add(third)
    plan = grow_until_preempted(scheduler)
    assert plan.admitted == ()
    assert scheduler.waiting == [second, third]  # and the preempted one keeps its place


def test_scheduler_readmits_a_preempted_request_only_after_its_token_was_read():
    scheduler, first, second = make_tight()
    unread, plan = schedule(scheduler), schedule(scheduler)
    while not plan.preempted:
        read(scheduler, unread)
        unread, plan = plan, schedule(scheduler)
    assert second.num_in_flight == 1
    scheduler.finish(first, FinishReason.ABORT)
    assert schedule(scheduler).chunks == ()
    read(scheduler, unread)
    assert schedule(scheduler).admitted == (second,)


@pytest.mark.parametrize(
    ("windows", "num_tokens", "budget", "num_pages"),
    [
        ((None,), 8, 32, 2),
        ((None,), 9, 32, 3),
        ((None, None), 9, 32, 6),
        ((5,), 64, 1, 2),  # five keys are in two pages wherever they begin
        ((6,), 64, 1, 3),  # six may begin with the last token of a page
        ((6,), 8, 1, 2),
        ((1,), 64, 1, 1),
        ((1,), 64, 32, 9),
        ((5, None), 64, 1, 18),
    ],
)
def test_scheduler_pages_for_is_the_most_a_request_holds(
    windows: tuple[int | None, ...], num_tokens: int, budget: int, num_pages: int
):
    scheduler = make_scheduler(windows=windows, max_num_batched_tokens=budget)
    assert scheduler.pages_for(num_tokens) == num_pages


def test_scheduler_frees_pages_below_the_window():
    scheduler = make_scheduler(windows=(None, 5), max_num_batched_tokens=4)
    [request] = add(scheduler, 17)
    while request.num_output < 4:
        step(scheduler)
    # 20 tokens are computed, the last page was taken at 16, when a query saw keys from 12 on.
    assert [page == 0 for page in request.pages[0]] == [False] * 5
    assert [page == 0 for page in request.pages[1]] == [True, True, True, False, False]
    assert scheduler.pool.num_free == 100 - 7


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "message"),
    [
        (0, 8, "has an empty prompt"),
        (64, 8, "has 64 tokens and may have 64: there is none to sample"),
        (40, 24, r"may need 16 KV pages and there are 10; .* lower max_tokens"),
    ],
)
def test_scheduler_refuses_a_request_that_could_never_end(
    prompt: int, max_tokens: int, message: str
):
    scheduler = make_scheduler(num_pages=11)
    with pytest.raises(RequestError, match=message):
        scheduler.add(make_request(0, prompt, max_tokens=max_tokens))
    assert not scheduler.has_work


def test_scheduler_can_ever_fit_counts_the_longest_output():
    scheduler = make_scheduler(num_pages=11)
    assert scheduler.can_ever_fit(make_request(0, 30, max_tokens=11))
    assert not scheduler.can_ever_fit(make_request(0, 30, max_tokens=12))


def test_scheduler_resumes_a_request_that_already_has_output():
    scheduler = make_scheduler()
    request = make_request(0, 5, max_tokens=3)
    request.append_token(TOKEN)
    request.append_token(TOKEN)
    scheduler.add(request)
    assert step(scheduler) == "r0[0:7]!"
    assert step(scheduler) == ""


def test_scheduler_recompute_all_starts_over():
    scheduler = make_scheduler(enable_prefix_caching=True, num_slots=2)
    first, second, third = add(scheduler, 9, 9, 9)
    step(scheduler)
    schedule(scheduler)
    assert scheduler.recompute_all() == [first, second]
    scheduler.audit()
    assert scheduler.waiting == [first, second, third]
    assert [request.num_in_flight for request in scheduler.waiting] == [0, 0, 0]
    assert scheduler.pool.num_free == 100
    assert schedule(scheduler).admitted == (first, second)
    assert (first.num_computed, first.num_output) == (10, 1)


def test_scheduler_recompute_all_drops_the_lost_token_of_a_preempted_request():
    scheduler, _, second = make_tight()
    while not schedule(scheduler).preempted:
        pass
    assert second.num_in_flight > 0
    scheduler.recompute_all()
    scheduler.audit()
    assert second.num_in_flight == 0


@pytest.mark.parametrize(("policy", "order"), [(fcfs, "2103"), (by_priority, "1203")])
def test_scheduler_policy_orders_the_queue(policy: Policy, order: str):
    scheduler = make_scheduler(policy=policy)
    for name, arrival, choice, priority in ["0101", "1010", "2001", "3201"]:
        request = make_request(int(arrival), 2, choice=int(choice), priority=int(priority))
        request.request_id = name
        scheduler.add(request)
    plan = schedule(scheduler)
    assert "".join(chunk.request.request_id for chunk in plan.chunks) == order


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"page_size": 0}, "page_size must be at least 1, got 0"),
        ({"max_chunk": 0}, "max_chunk must be at least 1, got 0"),
        ({"windows": ()}, "windows needs a positive size or None a group"),
        ({"windows": (None, 0)}, r"got \(None, 0\)"),
    ],
)
def test_scheduler_config_refuses_what_cannot_run(changes: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        make_scheduler(**changes)
