"""Whole lives of requests on a simulated device that remembers what every page holds.

The device keeps, for each place of each page, a digest of the tokens up to it and of the request's
salt: what the KV there depends on. Each query of each chunk then finds its own history in every
page it can see, or a page was shared wrongly, freed too early or evicted under its owner.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import assume, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from quire.engine.policies import by_priority, fair, fcfs
from quire.engine.request import FinishReason, Request
from quire.engine.sampling_params import SamplingParams
from quire.engine.scheduler import Scheduler, SchedulerConfig
from quire.engine.step_plan import Chunk, StepPlan

MAX_MODEL_LEN = 24
STOP_TOKEN = 0
SHARED_PREFIXES = ((1, 1, 1, 1), (1, 2, 1, 2, 1, 2, 1), (2,) * 8)


def digests(salt: bytes, token_ids: Sequence[int]) -> list[int]:
    """For each token, a number that stands for it and everything before it."""
    history = [int.from_bytes(salt)]  # not hash(): that of bytes differs in every process
    for token_id in token_ids:
        history.append(hash((history[-1], token_id)))
    return history[1:]


def next_token(salt: bytes, seed: int, token_ids: Sequence[int]) -> int:
    """The model: a token that depends on the whole history and on nothing else."""
    return hash((digests(salt, token_ids)[-1], seed)) % 8


def expected_output(request: Request) -> list[int]:
    tokens = request.prompt_token_ids
    while len(tokens) < min(request.num_prompt + request.max_tokens, MAX_MODEL_LEN):
        tokens.append(next_token(request.cache_salt, request.seed, tokens))
        if tokens[-1] == STOP_TOKEN:
            break
    return tokens[request.num_prompt :]


class SimulatedDevice:
    """Runs plans in order, with the tokens of each row and the content of each page."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.rows: dict[int, list[int]] = {}
        self.content: dict[tuple[int, int], int] = {}  # (page, place) -> digest
        self.ended: set[int] = set()  # slots of rows that sampled a stop before their last step

    def run(self, plan: StepPlan) -> list[tuple[Request, int]]:
        """The sampled tokens. Every write comes before the first read, as in each layer."""
        for request in plan.admitted:
            assert request.slot is not None
            self.rows[request.slot] = request.token_ids(0, request.num_tokens)
            self.ended.discard(request.slot)
        sampled: list[tuple[Request, int]] = []
        # A row that ended by itself goes on with tokens that the host will drop.
        chunks = [chunk for chunk in plan.chunks if chunk.slot not in self.ended]
        while chunks:
            for chunk in chunks:
                self.write(chunk)
            for chunk in chunks:
                self.check_reads(chunk)
            tokens = [(chunk, self.sample(chunk)) for chunk in chunks if chunk.samples]
            sampled += [(chunk.request, token) for chunk, token in tokens]
            self.ended |= {c.slot for c, token in tokens if token == STOP_TOKEN and c.num_steps > 1}
            chunks = [
                replace(chunk, first=chunk.first + 1, num_steps=chunk.num_steps - 1)
                for chunk, token in tokens
                if chunk.num_steps > 1 and token != STOP_TOKEN
            ]
        return sampled

    def write(self, chunk: Chunk) -> None:
        history = digests(chunk.request.cache_salt, self.rows[chunk.slot])
        for table in chunk.request.pages:
            for position in range(chunk.first, chunk.first + chunk.count):
                page, place = self.place(table, position)
                self.content[page, place] = history[position]

    def check_reads(self, chunk: Chunk) -> None:
        history = digests(chunk.request.cache_salt, self.rows[chunk.slot])
        for table, window in zip(chunk.request.pages, self.config.windows, strict=True):
            # The keys of all queries of a chunk are those of its first one and the chunk itself.
            first = 0 if window is None else max(0, chunk.first - window + 1)
            for position in range(first, chunk.first + chunk.count):
                page, place = self.place(table, position)
                assert self.content.get((page, place)) == history[position], (
                    f"{chunk}: page {page} does not hold token {position}"
                )

    def sample(self, chunk: Chunk) -> int:
        row = self.rows[chunk.slot]
        assert chunk.first + chunk.count == len(row)
        row.append(next_token(chunk.request.cache_salt, chunk.request.seed, row))
        return row[-1]

    def place(self, table: list[int], position: int) -> tuple[int, int]:
        page = table[position // self.config.page_size]
        assert page != 0, "the null page is used"
        return page, position % self.config.page_size


@dataclass
class Engine:
    """The step loop, with `depth` steps whose tokens are still unread when the next is planned."""

    scheduler: Scheduler
    depth: int

    def __post_init__(self) -> None:
        self.device = SimulatedDevice(self.scheduler.config)
        self.unread: deque[list[tuple[Request, int]]] = deque()

    def step(self, most_steps: int = 1) -> StepPlan:
        plan = self.scheduler.schedule(0.0, most_steps=most_steps)
        assert plan.num_steps <= most_steps
        if plan.num_steps > 1:
            assert all(chunk.count == 1 and chunk.samples for chunk in plan.chunks)
            assert not self.scheduler.waiting
        assert all(chunk.count > 0 for chunk in plan.chunks)
        assert plan.num_tokens == sum(chunk.count for chunk in plan.chunks)
        assert plan.num_tokens <= self.scheduler.config.max_num_batched_tokens
        assert not (plan.preempted and plan.admitted)
        self.unread.append(self.device.run(plan))
        while self.unread and (len(self.unread) > self.depth or not plan.chunks):
            self.read_oldest()
        return plan

    def read_oldest(self) -> None:
        for request, token_id in self.unread.popleft():
            if request.finish_reason is not None:
                continue
            self.scheduler.on_token(request, token_id)
            if token_id == STOP_TOKEN:
                self.scheduler.finish(request, FinishReason.STOP, token_id)
            elif request.num_output == request.max_tokens or request.num_tokens == MAX_MODEL_LEN:
                self.scheduler.finish(request, FinishReason.LENGTH)

    def fail(self) -> None:
        """A step failed: what the device held is gone, rows and pages and tokens."""
        self.unread.clear()
        self.device = SimulatedDevice(self.scheduler.config)
        self.scheduler.recompute_all()


windows = st.lists(st.none() | st.integers(1, 9), min_size=1, max_size=3)


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        page_size=st.integers(1, 4),
        num_spare_pages=st.integers(0, 8),
        num_slots=st.integers(2, 5),
        budget=st.integers(2, 24),
        max_chunk=st.none() | st.integers(2, 8),
        windows=windows.map(tuple),
        enable_prefix_caching=st.sampled_from([True, True, False]),
        policy=st.sampled_from([fcfs, by_priority, fair]),
        fill=st.sampled_from([lambda wanted: wanted, lambda wanted: wanted * 3 // 4]),
        depth=st.integers(0, 2),
    )
    def start(self, budget: int, num_spare_pages: int, depth: int, **fields: Any) -> None:
        def make_scheduler(num_pages: int) -> Scheduler:
            return Scheduler(
                SchedulerConfig(
                    num_pages=num_pages,
                    max_num_batched_tokens=budget,
                    max_model_len=MAX_MODEL_LEN,
                    secret=b"secret",
                    **fields,
                )
            )

        # Just enough for one request of the greatest length, so that others are often preempted.
        num_pages = make_scheduler(2).pages_for(MAX_MODEL_LEN) + 1 + num_spare_pages
        self.engine = Engine(make_scheduler(num_pages), depth)
        self.scheduler = self.engine.scheduler
        self.requests: list[Request] = []

    @rule(
        prefix=st.sampled_from(SHARED_PREFIXES),
        suffix=st.lists(st.integers(1, 2), min_size=1, max_size=3),
        salt=st.sampled_from([b"", b"", b"", b"other"]),
        tenant=st.sampled_from([b"", b"one", b"two"]),
        max_tokens=st.integers(1, 16),
        priority=st.integers(0, 1),
        seed=st.integers(0, 1),
        prompt_logprobs=st.sampled_from([None] * 5 + [1]),
    )
    def submit(
        self,
        prefix: tuple[int, ...],
        suffix: list[int],
        salt: bytes,
        max_tokens: int,
        prompt_logprobs: int | None,
        **fields: Any,
    ) -> None:
        arrival = len(self.requests)
        request = Request(
            f"r{arrival}",
            [*prefix, *suffix],
            SamplingParams(max_tokens=max_tokens, prompt_logprobs=prompt_logprobs),
            arrival,
            cache_salt=salt,
            **fields,
        )
        self.scheduler.add(request)
        self.requests.append(request)

    @precondition(lambda self: self.scheduler.has_work)
    @rule(num_steps=st.integers(1, 4), most_steps=st.sampled_from([1, 1, 2, 5]))
    def step(self, num_steps: int, most_steps: int) -> None:
        for _ in range(num_steps):
            self.engine.step(most_steps)
            self.scheduler.audit()

    @precondition(lambda self: len(self.scheduler.running) + len(self.scheduler.waiting) > 2)
    @rule(data=st.data(), reason=st.sampled_from([FinishReason.ABORT] * 3 + [FinishReason.ERROR]))
    def abort(self, data: st.DataObject, reason: FinishReason) -> None:
        queued = [*self.scheduler.running, *self.scheduler.waiting]
        self.scheduler.finish(data.draw(st.sampled_from(queued)), reason)

    @precondition(lambda self: self.scheduler.running)
    @rule(chance=st.integers(0, 5))
    def fail(self, chance: int) -> None:
        assume(chance == 0)  # failures clear the cache, so rare ones leave more to find
        self.engine.fail()

    @invariant()
    def audit(self) -> None:
        if hasattr(self, "scheduler"):
            self.scheduler.audit()

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        # Alone and one token a step is the slowest; preemption can make each request start over.
        num_steps_left = 200 + 2 * MAX_MODEL_LEN * (len(self.requests) + 1) ** 2
        while self.scheduler.has_work:
            num_steps_left -= 1
            assert num_steps_left, f"no end in sight: {self.scheduler.running}"
            self.engine.step()
            self.scheduler.audit()
        assert self.scheduler.pool.num_free == self.scheduler.pool.num_usable
        for request in self.requests:
            expected = expected_output(request)
            if request.finish_reason in (FinishReason.STOP, FinishReason.LENGTH):
                assert request.output_token_ids == expected
            else:
                assert request.output_token_ids == expected[: request.num_output]


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(
    max_examples=250, stateful_step_count=50, deadline=None, derandomize=True, database=None
)


def make_scheduler(**fields: Any) -> Scheduler:
    return Scheduler(SchedulerConfig(secret=b"", **fields))


def make_request(arrival: int, num_prompt: int, *, max_tokens: int) -> Request:
    token_ids = range(1000 * arrival, 1000 * arrival + num_prompt)
    return Request(f"r{arrival}", token_ids, SamplingParams(max_tokens=max_tokens), arrival)


@pytest.mark.parametrize("windows", [(None,), (9, None), (1, 6)])
def test_scheduler_one_request_of_the_longest_length_is_never_preempted(
    windows: tuple[int | None, ...],
):
    fields = {
        "page_size": 4,
        "num_slots": 4,
        "max_num_batched_tokens": 7,
        "max_model_len": 64,
        "windows": windows,
        "enable_prefix_caching": True,
    }
    num_pages = make_scheduler(num_pages=2, **fields).pages_for(64) + 1
    scheduler = make_scheduler(num_pages=num_pages, **fields)
    request = make_request(0, 30, max_tokens=1000)
    scheduler.add(request)
    while request.num_known < 64:
        [chunk] = scheduler.schedule(0.0).chunks
        scheduler.audit()
        if chunk.samples:
            scheduler.on_token(request, 7)
    assert request.num_preemptions == 0


@pytest.mark.parametrize("corrupt", ["owner", "slot", "computed", "window"])
def test_scheduler_audit_finds_corruption(corrupt: str):
    scheduler = make_scheduler(
        page_size=4,
        num_pages=20,
        num_slots=4,
        max_num_batched_tokens=32,
        max_model_len=64,
        windows=(5,),
        enable_prefix_caching=False,
    )
    first, second = make_request(0, 5, max_tokens=8), make_request(1, 5, max_tokens=8)
    scheduler.add(first)
    scheduler.add(second)
    scheduler.schedule(0.0)
    scheduler.audit()
    if corrupt == "owner":
        first.pages[0][1] = second.pages[0][1]
    elif corrupt == "slot":
        first.slot = second.slot
    elif corrupt == "computed":
        first.num_computed += 1
    else:
        scheduler.pool.free([first.pages[0][0]])
        first.pages[0][0] = 0
    with pytest.raises(AssertionError):
        scheduler.audit()
