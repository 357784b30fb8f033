"""A long prompt in front takes what the requests behind it leave, not what they need."""

import dataclasses

from quire.engine.policies import by_priority
from quire.engine.request import Request
from quire.engine.scheduler import Scheduler

from .test_scheduler import add, make_request, make_scheduler, schedule, step


def make_busy(num_decodes: int, budget: int, prompts: list[int]) -> tuple[Scheduler, list[Request]]:
    """Requests that go on token by token, and prompts that came later and go before them."""
    scheduler = make_scheduler(
        num_pages=500,
        page_size=64,
        num_slots=64,
        max_num_batched_tokens=budget,
        max_model_len=10_000,
        policy=by_priority,
    )
    decodes = add(scheduler, *[1] * num_decodes, priority=1, max_tokens=9_000)
    while not all(request.num_output for request in decodes):
        step(scheduler)
    for arrival, prompt in enumerate(prompts, num_decodes):
        scheduler.add(make_request(arrival, prompt, max_tokens=5))
    return scheduler, decodes


def test_a_long_prompt_leaves_each_decode_behind_it_a_token():
    scheduler, decodes = make_busy(30, 64, [8000])
    num_steps = 0
    while sum(request.num_prompt for request in scheduler.running) < 8000:
        step(scheduler)
    prompt = scheduler.running[0]
    while not prompt.num_output:
        before = [request.num_output for request in decodes]
        num_steps += 1
        step(scheduler)
        assert [request.num_output for request in decodes] == [n + 1 for n in before]
    assert 8000 // (64 - 30) - 1 <= num_steps <= 8000 // (64 - 30) + 1, "it took all that was left"


def test_several_prompts_leave_each_decode_behind_them_a_token():
    scheduler, decodes = make_busy(5, 8, [100, 100])
    for request in list(scheduler.waiting):
        # Both are in the middle of their prompts at once, as after a cap on the chunk.
        scheduler._max_count = 1
        schedule(scheduler)
        assert request.slot is not None
    scheduler._max_count = 8
    assert [request.num_prompt for request in scheduler.running[:2]] == [100, 100]
    plan = schedule(scheduler)
    assert plan.num_tokens == 8
    assert {chunk.request for chunk in plan.chunks} == {*decodes, scheduler.running[0]}


def test_a_prompt_leaves_nothing_to_the_decodes_in_front_of_it():
    scheduler = make_scheduler(policy=by_priority, max_num_batched_tokens=8, max_chunk=4)
    for arrival, (prompt, priority) in enumerate([(1, 1), (1, 3), (40, 0), (40, 2)]):
        scheduler.add(make_request(arrival, prompt, priority=priority, max_tokens=9))
        step(scheduler)
    assert step(scheduler) == "r0[4:5]! r1[3:4]! r2[8:12] r3[2:4]"


def test_a_prompt_comes_on_though_the_decodes_could_take_the_whole_step():
    scheduler, _ = make_busy(4, 8, [50])
    step(scheduler)
    scheduler.config = dataclasses.replace(scheduler.config, max_num_batched_tokens=4)
    assert step(scheduler) == "r4[4:5] r0[2:3]! r1[2:3]! r2[2:3]!"


def test_a_prompt_leaves_nothing_to_those_who_have_nothing_to_compute():
    scheduler, decodes = make_busy(3, 8, [50])
    step(scheduler)
    for request in decodes:
        request.max_tokens = request.num_output  # the last token of each is known
    assert schedule(scheduler).chunks[0].count == 8
