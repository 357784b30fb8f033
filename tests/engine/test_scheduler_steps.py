"""Plans of several steps: who may go on without the host, and for how long."""

from quire.engine.request import Request
from quire.engine.sampling_params import SamplingParams
from quire.engine.scheduler import Scheduler, SchedulerConfig
from quire.engine.step_plan import StepPlan


def make_scheduler(num_pages: int = 40, windows: tuple[int | None, ...] = (None,)) -> Scheduler:
    return Scheduler(
        SchedulerConfig(
            page_size=4, num_pages=num_pages, num_slots=2, max_num_batched_tokens=32,
            max_model_len=64, windows=windows, enable_prefix_caching=False, secret=b"",
        )
    )  # fmt: skip


def add(scheduler: Scheduler, name: str, num_prompt: int, max_tokens: int) -> Request:
    request = Request(name, range(num_prompt), SamplingParams(max_tokens=max_tokens), 0)
    scheduler.add(request)
    return request


def step(scheduler: Scheduler, most_steps: int = 8) -> StepPlan:
    plan = scheduler.schedule(0.0, most_steps=most_steps)
    scheduler.audit()
    return plan


def steps(plan: StepPlan) -> list[int]:
    return [chunk.num_steps for chunk in plan.chunks]


def test_a_prompt_takes_one_step_and_then_decoding_goes_on() -> None:
    scheduler = make_scheduler()
    request = add(scheduler, "a", 6, max_tokens=30)
    assert steps(step(scheduler)) == [1]
    plan = step(scheduler)
    assert (steps(plan), plan.num_tokens, plan.num_steps) == ([8], 1, 8)
    assert (request.num_computed, request.num_in_flight) == (14, 9)


def test_a_row_goes_on_no_longer_than_what_it_may_sample() -> None:
    scheduler = make_scheduler()
    add(scheduler, "short", 6, max_tokens=4)
    add(scheduler, "long", 6, max_tokens=40)
    step(scheduler)
    plan = step(scheduler)
    assert (steps(plan), plan.num_tokens, plan.total_tokens) == ([3, 8], 2, 11)
    assert steps(step(scheduler)) == [8]  # the first has nothing left to sample


def test_nobody_goes_on_while_another_waits_or_reads_its_prompt() -> None:
    scheduler = make_scheduler()
    for name in "abc":
        add(scheduler, name, 6, max_tokens=30)
    step(scheduler)
    assert [r.request_id for r in scheduler.waiting] == ["c"]
    assert steps(step(scheduler)) == [1, 1]
    scheduler = make_scheduler()
    add(scheduler, "a", 3, max_tokens=30)
    step(scheduler)
    add(scheduler, "b", 50, max_tokens=2)
    assert steps(step(scheduler)) == [1, 1]  # 31 of its 50 tokens fit


def test_one_step_is_all_there_is_without_asking_for_more() -> None:
    scheduler = make_scheduler()
    add(scheduler, "a", 6, max_tokens=30)
    step(scheduler)
    assert steps(scheduler.schedule(0.0)) == [1]


def test_where_pages_are_short_a_row_fills_the_page_it_has_and_preempts_nobody() -> None:
    # 2 usable pages each: positions 4 to 7 of both fill their second one.
    scheduler = make_scheduler(num_pages=5)
    requests = [add(scheduler, name, 4, max_tokens=4) for name in "ab"]
    step(scheduler)
    assert steps(step(scheduler, most_steps=3)) == [3, 3]
    assert [r.num_preemptions for r in requests] == [0, 0]
    scheduler = make_scheduler(num_pages=5)
    add(scheduler, "a", 3, max_tokens=13)
    add(scheduler, "b", 3, max_tokens=13)
    step(scheduler)
    # The first takes both pages that are left, the other has place for position 3.
    assert steps(step(scheduler)) == [8, 1]
    assert scheduler.num_preemptions == 0


def test_pages_that_a_window_leaves_are_kept_for_the_first_of_several_steps() -> None:
    scheduler = make_scheduler(windows=(4,))
    request = add(scheduler, "a", 8, max_tokens=40)
    step(scheduler)
    before = [page for page in request.pages[0] if page]
    plan = step(scheduler)
    assert steps(plan) == [8]
    # The query at position 8 sees 5 to 8: the page of 4 to 7 is still its own.
    assert request.pages[0][1] == before[-1] != 0
