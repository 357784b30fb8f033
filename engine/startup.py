"""From an EngineConfig to an engine that is ready: find, check, plan, compile, load, warm up.

Everything that can be refused is refused before memory is taken.
"""

import os
import secrets
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from ..layers.context import Context
from ..layers.kv_pages import KVLayout, page_bytes, plan_layout
from ..layers.mesh import MODEL
from ..layers.programs import Programs
from ..layers.quantization.registry import choose_format
from ..layers.weight_cache import WeightCache
from ..layers.weights import weight_bytes
from ..pallas_kernels import registry
from ..pallas_kernels.checks import AttentionShape
from . import gpu_memory, memory
from .buckets import Buckets, plan_buckets
from .compiler import CompileReport, default_cache_dir, open_cache, return_freed_memory
from .config import EngineConfig
from .core import EngineCore
from .errors import ConfigError
from .kv_plan import KVPlan, Sizes, gpu_kv_budget, plan_kv, table_width, wanted_context
from .lowering import Lowering
from .model_files import ModelFiles, open_model
from .parallel import open_mesh, require_divisible
from .policies import POLICIES
from .processors import describe_kernels
from .runner import Runner
from .scheduler import Scheduler, SchedulerConfig
from .weight_loading import LoadedWeights, WeightLoading, open_weight_cache

Say = Callable[[str], None]
# What is under way, how much of it is done, and how much there is: programs, or bytes of weights.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Engine:
    """A ready engine and what was found out on the way."""

    core: EngineCore
    files: ModelFiles
    max_model_len: int
    plan: memory.MemoryPlan
    compiling: CompileReport

    @property
    def logits_width(self) -> int:
        return self.files.info.model.vocab_size


def start_engine(
    config: EngineConfig,
    say: Say,
    *,
    depth: int = 1,
    secret: bytes | None = None,
    progress: Progress | None = None,
) -> Engine:
    """A warm engine. `say` is called with one line per phase. Raises UsageError.

    secret: 32 bytes, the key of the prefix cache's hashes; drawn when not given. progress: called
    from several threads, instead of bars on the terminal.
    """
    given = config.cache_dir
    cache = open_cache(Path(os.path.expanduser(given)) if given else default_cache_dir())
    for line in gpu_memory.reserve(config.gpu_memory_utilization, config.tensor_parallel_size):
        say(line)
    mesh = open_mesh(config.tensor_parallel_size)
    files = open_model(config)
    require_divisible(files.info.model, config.tensor_parallel_size)
    say(files.line())
    sizes = Sizes.resolve(config)
    if sizes.platform == "cuda" and (note := gpu_memory.note(config.gpu_memory_utilization)):
        say(note)
    bar = _bar if progress is None else partial(_Told, progress)
    build = Builder(config, files, sizes, mesh)
    kv_plan = plan_kv(config, files, build.layout, sizes, cache, build.kv_budget)
    if kv_plan.note:
        say(kv_plan.note)
    runner = build.runner(kv_plan)
    # Without the programs' own needs, which compiling will tell: enough to refuse what cannot fit.
    memory.check_total(build.memory_plan(runner))
    say(f"ops: {', '.join(f'{op} by {name}' for op, name in build.ops.names().items())}")
    if mesh.size > 1:
        say(
            f"{mesh.size} devices share the model; sizes below are those of each"
            + (", and the C++ kernels, which serve one, are idle" * (sizes.platform == "cpu"))
        )
    elif sizes.platform == "cpu":
        kernels = describe_kernels(registry.cpu_library(), config.cpu_threads)
        kernels.use()
        say(f"cpu kernels: {kernels.line}")
    with ThreadPoolExecutor(1, thread_name_prefix="weights") as pool:
        # Reading files and compiling need different things; they go side by side.
        loading = pool.submit(build.weights, bar, open_weight_cache(config, cache), say)
        report = CompileReport(loaded=0, compiled=0, lower_s=0.0, total_s=0.0)
        if not config.lazy_compile:
            with bar("programs", len(runner.program_specs()), unit="program") as programs:
                report = runner.compile(lambda _: programs.update())
            say(report.line())
            _note_useless_cache(cache, report, say)
        plan = build.memory_plan(runner)
        for line in plan.lines(sizes.page_size):
            say(line)
        memory.check_total(plan)
        loaded = loading.result()
        for line in loaded.lines:
            say(line)
        runner.set_weights(loaded.tree)
    runner.allocate()
    if not config.lazy_compile:
        runner.warm_up()
    if sizes.platform == "cuda":
        say(gpu_memory.in_use(plan.used))
    return_freed_memory()
    scheduler = build.scheduler(kv_plan, secret or secrets.token_bytes(32))
    core = EngineCore(runner, scheduler, eos_ids=files.eos_ids, depth=depth)
    return Engine(core, files, kv_plan.max_model_len, plan, report)


class Builder:
    """Makes the parts of one engine from what was asked and what the files say."""

    def __init__(self, config: EngineConfig, files: ModelFiles, sizes: Sizes, mesh: Mesh) -> None:
        self.config = config
        self.files = files
        self.sizes = sizes
        self.mesh = mesh
        self.layout: KVLayout = plan_layout(files.info.model.kv_specs(), mesh.size)
        # The C++ kernels serve one device.
        is_divided_cpu = sizes.platform == "cpu" and mesh.size > 1
        try:
            self.ops = registry.choose(
                sizes.platform,
                attention="jnp" if is_divided_cpu else None,
                linear="xla" if is_divided_cpu else None,
                dtype=files.dtype,
                shape=self._attention_shape(),
            )
        except LookupError as error:
            raise ConfigError(str(error)) from error
        self.format = choose_format(files.dtype, self.ops)

    def _attention_shape(self) -> AttentionShape:
        """Of each device."""
        arrays = self.layout.arrays[0]
        return AttentionShape(
            heads=self.files.info.model.spec.num_heads // self.mesh.size,
            kv_heads=arrays.num_kv_heads // self.mesh.size,
            head_dim=arrays.head_dim,
            value_dim=arrays.value_dim,
            page_size=self.sizes.page_size,
            kv_dtype=self.files.kv_dtype,
        )

    def runner(self, kv_plan: KVPlan) -> Runner:
        model, sizes = self.files.info.model, self.sizes
        wanted, vocab = self.config.max_logprobs, model.vocab_size
        lowering = Lowering(
            Programs(
                model,
                self.layout,
                sizes.page_size,
                Context(self.ops, MODEL if self.mesh.size > 1 else None),
            ),
            self.buckets(kv_plan),
            self.mesh,
            self.format,
            num_pages=kv_plan.num_pages,
            kv_dtype=self.files.kv_dtype,
            num_logprobs=vocab if wanted == -1 else min(wanted, vocab),
        )
        return Runner(lowering)

    def buckets(self, kv_plan: KVPlan) -> Buckets:
        return plan_buckets(
            self.sizes.platform,
            max_num_seqs=self.sizes.max_num_seqs,
            max_num_batched_tokens=self.sizes.max_num_batched_tokens,
            token_buckets=self.config.token_buckets,
            pages_per_row=kv_plan.table_width,
            num_groups=self.layout.num_groups,
            is_padding_free=self.ops.is_padding_free,
            decode_steps=self.config.decode_steps,
            queries_per_item=self.ops.queries_per_item,
        )

    def scheduler(self, kv_plan: KVPlan, secret: bytes) -> Scheduler:
        return Scheduler(
            SchedulerConfig(
                page_size=self.sizes.page_size,
                num_pages=kv_plan.num_pages,
                num_slots=self.sizes.max_num_seqs,
                max_num_batched_tokens=self.sizes.max_num_batched_tokens,
                max_model_len=kv_plan.max_model_len,
                windows=self.layout.windows,
                enable_prefix_caching=self.config.enable_prefix_caching,
                secret=secret,
                policy=POLICIES[self.config.scheduling_policy],
                fill=self.buckets(kv_plan).fill,
            )
        )

    def weights(
        self, bar: Callable[..., Any], cache: WeightCache | None, say: Say
    ) -> LoadedWeights:
        """The weights on the device."""
        loading = WeightLoading(self.files, self.format, self.mesh, cache)
        with bar("weights", self.weight_bytes(), unit="B", unit_scale=True, position=1) as loaded:
            return loading.load(self.config.seed, loaded.update, say)

    def weight_bytes(self) -> int:
        """On each device."""
        return weight_bytes(self.files.info.model.params(), self.format, self.mesh.size)

    def kv_budget(self) -> int:
        """Bytes of each device for the KV cache when the option does not say it."""
        if self.sizes.platform == "cpu":
            return memory.cpu_kv_budget(memory.host_memory()) // self.mesh.size
        max_model_len, _ = wanted_context(self.config, self.files)
        provisional = KVPlan(2, max_model_len, table_width(max_model_len, self.sizes.page_size))
        runner = self.runner(provisional)
        workspace, rows = runner.largest_workspace_bytes(), runner.lowering.row_bytes()
        return gpu_kv_budget(self.limit(), self.weight_bytes(), rows, workspace)

    def limit(self) -> int:
        """Bytes that may be used in all, on each device."""
        if self.sizes.platform == "cpu":
            return memory.host_memory().total // self.mesh.size
        return gpu_memory.pool_bytes()

    def memory_plan(self, runner: Runner) -> memory.MemoryPlan:
        return memory.MemoryPlan(
            weights=self.weight_bytes(),
            rows=runner.lowering.row_bytes(),
            workspace=runner.workspace_bytes(),
            executables=runner.code_bytes(),
            num_pages=runner.num_pages,
            page_bytes=page_bytes(self.layout, self.sizes.page_size, self.files.kv_dtype),
            limit=self.limit(),
        )


class NoBar:
    """Where nobody looks."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __enter__(self) -> "NoBar":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, _: int = 1) -> None:
        pass


class _Told:
    """A bar that someone else draws."""

    def __init__(self, progress: Progress, name: str, total: int, **_: Any) -> None:
        self._progress, self._name, self._total = progress, name, total
        self._lock = threading.Lock()
        self._done = 0

    def __enter__(self) -> "_Told":
        self.update(0)
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, count: int = 1) -> None:
        with self._lock:
            self._done += count
            self._progress(self._name, self._done, self._total)


def _bar(name: str, total: int, **options: Any) -> Any:
    """A progress bar, on a terminal only."""
    if sys.stderr is None or not sys.stderr.isatty():
        return NoBar()
    from tqdm.auto import tqdm

    return tqdm(total=total, desc=name, leave=False, **options)


def _note_useless_cache(cache: Path, report: CompileReport, say: Say) -> None:
    """A cache that an earlier start filled and that gave nothing is worth a line."""
    marker = cache / "last_start"
    if report.compiled and not report.loaded and marker.is_file():
        say(
            f"no program came from the compile cache {cache}: the configuration, a version or the "
            "processor is another one than last time"
        )
    marker.touch()
