"""The fair policy: who waits for whom when several tenants want more than there is."""

from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from quire.engine.config import SchedulingPolicy
from quire.engine.policies import POLICIES, fair, fcfs
from quire.engine.request import FinishReason, Request
from quire.engine.scheduler import Scheduler

from .test_scheduler import make_request, make_scheduler, read, schedule, text


class Load:
    """A scheduler, and requests whose answers end with their last token."""

    def __init__(self, **changes: Any) -> None:
        self.scheduler: Scheduler = make_scheduler(**{"policy": fair, "num_slots": 1} | changes)
        self.num_arrived = 0

    def add(self, tenant: bytes, *, prompt: int = 4, max_tokens: int = 2, output: int = 0):
        request = make_request(self.num_arrived, prompt, max_tokens=max_tokens, tenant=tenant)
        for token_id in range(output):
            request.append_token(token_id)
        self.num_arrived += 1
        self.scheduler.add(request)
        return request

    def step(self) -> str:
        plan = schedule(self.scheduler)
        read(self.scheduler, plan)
        for chunk in plan.chunks:
            if chunk.request.num_output == chunk.request.max_tokens:
                self.scheduler.finish(chunk.request, FinishReason.LENGTH)
        return text(plan)

    def admit_next(self) -> Request:
        """The next request that gets to run; for a scheduler of one slot."""
        before = {id(request) for request in self.scheduler.waiting}
        while True:
            self.step()
            left = before - {id(request) for request in self.scheduler.waiting}
            if left:
                [running] = self.scheduler.running
                assert id(running) in left
                return running


def test_every_policy_can_be_asked_for():
    assert set(get_args(SchedulingPolicy)) == set(POLICIES)


@pytest.mark.parametrize("num_served", [0, 1, 30])
def test_fair_does_not_let_a_tenant_wait_behind_the_queue_of_another(num_served: int):
    load = Load()
    for _ in range(500):
        load.add(b"many")
    for _ in range(num_served):
        load.admit_next()
    one = load.add(b"one")
    admitted = [load.admit_next() for _ in range(2)]
    assert one in admitted  # at once, or after one turn of the other


def test_fair_gives_equal_shares_of_tokens_whatever_the_size_of_the_requests():
    load = Load(max_model_len=64)
    sizes = {b"small": (2, 3), b"large": (20, 11)}  # prompt, max_tokens
    for tenant, (prompt, max_tokens) in sizes.items():
        for _ in range(300 // (prompt + max_tokens) + 2):
            load.add(tenant, prompt=prompt, max_tokens=max_tokens)
    served = dict.fromkeys(sizes, 0)
    while min(served.values()) < 300:
        tenant = load.admit_next().tenant
        served[tenant] += sum(sizes[tenant])
        assert abs(served[b"small"] - served[b"large"]) <= max(map(sum, sizes.values())), served


def test_fair_lets_nobody_save_up():
    load = Load()
    for _ in range(100):
        load.add(b"busy")
    for _ in range(50):
        load.admit_next()
    for _ in range(20):
        load.add(b"late")
    tenants = [load.admit_next().tenant for _ in range(20)]
    assert 9 <= tenants.count(b"late") <= 11


SIZES = st.tuples(st.integers(1, 20), st.integers(1, 20))


@given(st.lists(st.none() | SIZES, max_size=40))
def test_fair_to_one_tenant_alone_is_first_come_first_served(events: list[tuple[int, int] | None]):
    """None is a step. Few pages, so that requests are preempted too."""
    plans = []
    for policy in (fcfs, fair):
        load = Load(policy=policy, num_slots=3, num_pages=14)
        steps = []
        for event in (*events, *[None] * 100):
            if event is None:
                steps.append(load.step())
            else:
                load.add(b"", prompt=event[0], max_tokens=event[1])
        plans.append(steps)
    assert plans[0] == plans[1]


def test_fair_takes_nothing_for_requests_that_were_cancelled_in_the_queue():
    load = Load()
    for _ in range(20):
        load.add(b"steady")
    cancelled = [load.add(b"hasty") for _ in range(500)]
    first = load.admit_next()
    for request in cancelled:
        load.scheduler.finish(request, FinishReason.ABORT)
    again = load.add(b"hasty")
    assert first.tenant == b"steady"
    assert load.admit_next() is again


def test_fair_takes_what_ran_before_it_was_cancelled():
    load = Load()
    for _ in range(3):
        load.add(b"hasty")
    load.add(b"other")
    running = load.admit_next()
    assert running.tenant == b"hasty"
    load.scheduler.finish(running, FinishReason.ABORT)
    assert load.admit_next().tenant == b"other"


def test_fair_takes_for_a_resumed_request_what_is_left_of_it():
    load = Load(num_slots=4)
    resumed = load.add(b"a", prompt=4, max_tokens=20, output=15)
    behind, capped = load.add(b"a", prompt=4, max_tokens=100), load.add(b"a")
    assert (resumed.start_tag, behind.start_tag) == (0, 4 + 5)
    assert capped.start_tag == 4 + 5 + 64  # no more than the context


def test_fair_keeps_the_place_of_a_preempted_request():
    load = Load(num_slots=2, num_pages=6)
    load.add(b"a", prompt=8, max_tokens=12)
    second = load.add(b"b", prompt=4, max_tokens=12)
    later = load.add(b"a")
    while not second.num_preemptions:
        load.step()
    assert (second.start_tag, later.start_tag) == (0, 8 + 12)
    assert list(load.scheduler.waiting) == [second, later]
    load.scheduler.finish(second, FinishReason.ABORT)
    assert load.add(b"b").start_tag == 4 + 12, "it had run, so it had its turn"


def test_fair_forgets_tenants_that_came_once_while_others_wait():
    load = Load()
    busy = load.add(b"busy")
    for number in range(2000):
        load.add(b"%d" % number)
        while len(load.scheduler.waiting) < 3:
            tag, busy = busy.start_tag, load.add(b"busy")
            assert busy.start_tag == tag + 6, "its queue was forgotten"
        load.admit_next()
        load.admit_next()
    assert num_remembered(load) < 200


def test_fair_forgets_tenants_that_came_once_and_never_waited():
    load = Load(num_slots=2, page_size=64, num_pages=200, max_model_len=10_000)
    load.add(b"never done", max_tokens=9_000)
    for number in range(1000):
        load.add(b"%d" % number)
        while len(load.scheduler.running) > 1 or load.scheduler.waiting:
            load.step()
    assert num_remembered(load) < 200


def num_remembered(load: Load) -> int:
    return len(load.scheduler._start_tags._finish_by_tenant)
