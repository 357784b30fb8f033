"""A step that would be mostly padding is made smaller, and nobody waits for ever because of it."""

from .test_scheduler import add, make_request, make_scheduler, step


def test_a_step_computes_what_fills_its_program():
    scheduler = make_scheduler(fill=lambda wanted: 8 if 8 < wanted < 16 else wanted)
    add(scheduler, 12)
    assert [step(scheduler) for _ in range(3)] == ["r0[0:8]", "r0[8:12]!", "r0[12:13]!"]
    add_more = make_request(1, 10)
    scheduler.add(add_more)
    assert step(scheduler) == "r0[13:14]! r1[0:7]"


def test_a_smaller_step_starves_nobody():
    """Two running requests would fill the small step for ever."""
    scheduler = make_scheduler(fill=lambda wanted: min(wanted, 2))
    add(scheduler, 1, 1)
    assert step(scheduler) == "r0[0:1]! r1[0:1]!"
    scheduler.add(make_request(2, 5))
    assert step(scheduler) == "r0[1:2]! r1[1:2]! r2[0:5]!"
