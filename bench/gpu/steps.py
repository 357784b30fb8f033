"""Whole steps of published shapes with dummy weights: decoding, prompts, offline throughput, the
host's share, and compilation.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ...engine.batch_builder import BatchBuilder
from ...engine.buckets import Buckets
from ...engine.compiler import open_cache
from ...engine.core import EngineCore
from ...engine.core_io import Submission
from ...engine.notices import say
from ...engine.request import Request
from ...engine.row_packer import pack_row, row_needs
from ...engine.runner import ROWS_PER_UPDATE, Runner
from ...engine.sampling_params import SamplingParams
from ...engine.startup import Builder, NoBar
from ...engine.step_plan import Chunk, StepPlan
from ...layers import rows as row_state
from ...layers.batch import TOKEN_ON_DEVICE
from ...layers.kv_pages import page_bytes
from ...layers.mesh import make_mesh
from ...layers.programs import Variant
from .ceilings import Ceilings
from .deviceless import compile_program
from .model import kv_plan, make_builder
from .results import Results

BATCHES, CONTEXTS = (1, 8, 32, 64, 128, 256), (1024, 8192)
MAX_MODEL_LEN = 8192 + 512
NUM_STEPS, WARM_STEPS = 60, 10
PROMPTS = ((1, 2048), (4, 2048), (1, 8192))
THROUGHPUT = ((128, 128, 512), (1000, 1000, 128))  # prompt, output, requests
BATCH_1_MS, HOST_MS = 4.6, 1.0
_GREEDY = SamplingParams(temperature=0, max_tokens=100_000, ignore_eos=True)


@dataclass(frozen=True)
class Setup:
    """size: of bench/shapes. limit_bytes: of a device's memory, for weights and pages."""

    size: str
    devices: list[Any]
    limit_bytes: int
    measured: bool
    num_layers: int | None = None
    max_batched_tokens: int = 8192


class Model:
    """The engine's own parts over dummy weights."""

    def __init__(self, setup: Setup) -> None:
        mesh = make_mesh(1, setup.devices)
        self.setup = setup
        self.builder: Builder = make_builder(
            setup.size, mesh, num_layers=setup.num_layers, decode_steps=8,
            max_num_batched_tokens=setup.max_batched_tokens,
        )  # fmt: skip
        build = self.builder
        one = page_bytes(build.layout, build.sizes.page_size, build.files.kv_dtype)
        room = setup.limit_bytes - build.weight_bytes() - (3 << 30) * setup.measured
        most = 1 + MAX_BATCH_PAGES
        self.plan = kv_plan(max(2, min(room // one, most)), MAX_MODEL_LEN, build.sizes.page_size)
        self.runner: Runner = build.runner(self.plan)

    @property
    def buckets(self) -> Buckets:
        return self.runner.buckets

    @property
    def num_free_pages(self) -> int:
        return self.plan.num_pages - 1

    def start(self, results: Results) -> None:
        """Compile everything, twice for the cache's sake, and take the memory."""
        with tempfile.TemporaryDirectory() as folder:
            open_cache(Path(folder))
            cold = self.runner.compile()
            again = self.builder.runner(self.plan)
            warm = again.compile()
            jax.config.update("jax_compilation_cache_dir", None)
        self.runner = again
        for name, report in (("cold", cold), ("warm", warm)):
            results.add(
                f"{self.setup.size} compile {name}", report.total_s, "s",
                loaded=report.loaded, compiled=report.compiled, tracing_s=report.lower_s,
            )  # fmt: skip
        self.runner.set_weights(self.builder.weights(NoBar, None, say).tree)
        self.runner.allocate()
        began = time.perf_counter()
        self.runner.warm_up()
        results.add(f"{self.setup.size} warm-up", time.perf_counter() - began, "s")
        stats = self.runner.lowering.mesh.devices.flat[0].memory_stats()
        if stats:
            planned = self.builder.memory_plan(self.runner).used
            results.add(
                f"{self.setup.size} memory", stats["peak_bytes_in_use"] / planned, "of the plan",
                in_use=stats["bytes_in_use"], peak=stats["peak_bytes_in_use"], planned=planned,
            )  # fmt: skip


# Pages for 64 sequences of the longest context; more is not tried.
MAX_BATCH_PAGES = 64 * -(-MAX_MODEL_LEN // 64)


def decode_steps(model: Model, results: Results, ceilings: Ceilings) -> None:
    """Steps that follow each other as the engine dispatches them, for each batch and context."""
    for batch in BATCHES:
        for context in CONTEXTS:
            name = f"{model.setup.size} decode[{batch}x{context}]"
            pages = batch * _pages_per_row(model, context)
            if pages > model.num_free_pages or batch > model.buckets.slots:
                results.say(f"{name}: its {pages} pages do not fit")
                continue
            results.section(name, partial(_decode, model, results, ceilings, batch, context))


def _decode(model: Model, results: Results, ceilings: Ceilings, batch: int, context: int) -> None:
    requests = running_requests(model, batch, context)
    step_s = _seconds(_stepper(model, requests), NUM_STEPS)
    build = model.builder
    one = page_bytes(build.layout, build.sizes.page_size, build.files.kv_dtype)
    read = build.weight_bytes() + batch * context * one // build.sizes.page_size
    floor_ms = read / ceilings.copy_bytes_per_s * 1e3
    is_target = model.setup.size == "8b" and (batch, context) == (1, 1024)
    results.add(
        f"{model.setup.size} decode[{batch}x{context}]", step_s * 1e3, "ms",
        most=BATCH_1_MS if is_target else None, floor_ms=floor_ms, tokens_per_s=batch / step_s,
    )  # fmt: skip


def _pages_per_row(model: Model, context: int) -> int:
    """With room for all the steps that are taken from there."""
    return -(-(context + 4 * NUM_STEPS) // model.builder.sizes.page_size)


def running_requests(model: Model, batch: int, context: int) -> list[Request]:
    """Requests whose first `context` tokens count as computed, in pages of their own."""
    per_row = _pages_per_row(model, context)
    vocab = model.runner.lowering.vocab
    requests = []
    packed = np.zeros((batch, row_state.NUM_COLUMNS), np.int32)
    for slot in range(batch):
        request = Request(f"r{slot}", [5] * (context + 1), _GREEDY, slot)
        request.slot, request.num_computed = slot, context
        request.pages = [[1 + slot * per_row + i for i in range(per_row)]]
        packed[slot] = pack_row(request, context, vocab)
        requests.append(request)
    for at in range(0, batch, ROWS_PER_UPDATE):
        some = np.zeros((ROWS_PER_UPDATE, row_state.NUM_COLUMNS), np.int32)
        some[:, 0] = model.buckets.slots
        some[: batch - at] = packed[at : at + ROWS_PER_UPDATE]
        model.runner.update_rows(some)
    return requests


def _stepper(model: Model, requests: list[Request]) -> Callable[[], Any]:
    """Dispatches a step of one token each; where each row is, the device knows."""
    chunks = tuple(Chunk(r, r.slot or 0, r.num_computed, 1, samples=True) for r in requests)
    needs = [row_needs(r, (), model.runner.lowering.vocab) for r in requests]
    plan = StepPlan(chunks, tuple(requests), (), len(chunks))
    step = BatchBuilder(model.buckets).build(plan, needs)
    first, (count,) = step.layout.parts["token_ids"]
    step.packed[first : first + count] = TOKEN_ON_DEVICE

    def run() -> Any:
        hidden = model.runner.forward(step.packed, step.layout)
        return model.runner.sample(hidden, Variant.GREEDY).token_and_flag

    return run


def _seconds(run: Callable[[], Any], count: int) -> float:
    """Of one run, when the host is not waited for."""
    made = None
    for _ in range(WARM_STEPS):
        made = run()
    jax.block_until_ready(made)
    began = time.perf_counter()
    for _ in range(count):
        made = run()
    jax.block_until_ready(made)
    return (time.perf_counter() - began) / count


def prompts(model: Model, results: Results) -> None:
    """Prompt tokens a second, through the engine."""
    for count, length in PROMPTS:
        if length > model.setup.max_batched_tokens * 4 or length > MAX_MODEL_LEN:
            continue
        results.section(
            f"{model.setup.size} prompt[{count}x{length}]",
            partial(_prompt, model, results, count, length),
        )


def _prompt(model: Model, results: Results, count: int, length: int) -> None:
    params = replace(_GREEDY, max_tokens=1)
    times = []
    for number in range(4):
        core = new_core(model)
        for i in range(count):
            ids = np.random.default_rng(100 * number + i).integers(3, 1000, length)
            core.submit(Submission(f"{number}.{i}", tuple(ids.tolist()), params, seed=0))
        began = time.perf_counter()
        while core.has_work:
            core.step()
        times.append(time.perf_counter() - began)
    tokens_per_s = count * length / statistics.median(times[1:])
    results.add(f"{model.setup.size} prompt[{count}x{length}]", tokens_per_s, "tokens/s")


def new_core(model: Model) -> EngineCore:
    """An engine without requests, over the same arrays."""
    scheduler = model.builder.scheduler(model.plan, b"s" * 32)
    return EngineCore(model.runner, scheduler, eos_ids=frozenset())


def throughput(model: Model, results: Results) -> None:
    for length, outputs, count in THROUGHPUT:
        name = f"{model.setup.size} offline[{length}/{outputs}]"
        results.section(name, partial(_throughput, model, results, (length, outputs, count)))


def _throughput(model: Model, results: Results, load: tuple[int, int, int]) -> None:
    length, outputs, count = load
    core = new_core(model)
    rng = np.random.default_rng(length)
    for i in range(count):
        ids = tuple(rng.integers(3, 1000, length).tolist())
        params = replace(_GREEDY, max_tokens=outputs)
        core.submit(Submission(f"r{i}", ids, params, seed=0))
    began, num_tokens = time.perf_counter(), 0
    while core.has_work:
        num_tokens += sum(len(o.token_ids) for o in core.step())
    seconds = time.perf_counter() - began
    if num_tokens != count * outputs:
        raise RuntimeError(f"{num_tokens} tokens came of {count * outputs}: the run does not count")
    results.add(
        f"{model.setup.size} offline[{length}/{outputs}]", num_tokens / seconds, "tokens/s",
        requests=count, seconds=seconds,
    )  # fmt: skip


def host_time(model: Model, results: Results, batch: int = 64) -> None:
    """Of one step of the loop with `batch` running: thread time, so waiting does not count."""
    core = new_core(model)
    params = replace(_GREEDY, max_tokens=200)
    for i in range(batch):
        core.submit(Submission(f"r{i}", (5, 6, 7 + i), params, seed=0))
    while len(core.scheduler.running) < batch or core.scheduler.running[-1].num_output < 5:
        core.step()
    times = []
    for _ in range(NUM_STEPS):
        before = time.thread_time()
        core.step()
        times.append((time.thread_time() - before) * 1e3)
    for request in list(core.scheduler.running):
        core.abort(request.request_id)
    core.step()
    name = f"{model.setup.size} host time of a step at {batch}"
    results.add(name, statistics.median(times), "ms", most=HOST_MS if batch == 64 else None)


def several_steps(model: Model, results: Results, batch: int = 1, context: int = 1024) -> None:
    """Eight steps in one program, for each of them."""
    requests = running_requests(model, batch, context)
    steps = model.buckets.decode_steps
    layout = model.buckets.layout_for(batch, is_decode=True, num_steps=steps)
    chunks = tuple(
        Chunk(r, r.slot or 0, r.num_computed, 1, samples=True, num_steps=steps) for r in requests
    )
    needs = [row_needs(r, (), model.runner.lowering.vocab) for r in requests]
    plan = StepPlan(chunks, tuple(requests), (), len(chunks))
    packed = BatchBuilder(model.buckets).build(plan, needs).packed
    run = partial(model.runner.decode, packed, layout, Variant.GREEDY)
    step_s = _seconds(run, NUM_STEPS // steps) / steps
    results.add(f"{model.setup.size} {steps} steps in one[{batch}x{context}]", step_s * 1e3, "ms")


def without_graphs(model: Model, results: Results, batch: int = 1, context: int = 1024) -> None:
    """The same steps, each kernel launched by itself."""
    layout = model.buckets.layout_for(batch, is_decode=True, num_steps=1)
    [spec] = [s for s in model.runner.program_specs() if s.name == layout.name]
    requests = running_requests(model, batch, context)
    options = dict(model.runner.lowering.options or {})
    ours = model.runner.replace_program(
        layout.name, spec.lower().compile(compiler_options=options | _NO_GRAPHS)
    )
    try:
        step_s = _seconds(_stepper(model, requests), NUM_STEPS)
    finally:
        model.runner.replace_program(layout.name, ours)
    results.add(f"{model.setup.size} without graphs[{batch}x{context}]", step_s * 1e3, "ms")


_NO_GRAPHS = {"xla_gpu_graph_min_graph_size": "1000000"}


def compile_only(setup: Setup, results: Results) -> None:
    """Every program of the shape for a device that is not there."""
    model = Model(setup)
    lowering = model.runner.lowering
    for spec in model.runner.program_specs():
        began = time.perf_counter()
        program = compile_program(spec.lower(), lowering.options)
        results.add(
            f"{setup.size} {spec.name}", None, "ms",
            compile_s=time.perf_counter() - began, kernels=len(program.kernels),
            graphs=len(program.graphs), outside_graphs=len(program.outside_graphs),
            temp_bytes=program.temp_bytes, alias_bytes=program.alias_bytes,
        )  # fmt: skip
