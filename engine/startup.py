"""From an EngineConfig to an engine that is ready: find, check, plan, compile, load, warm up.

Everything that can be refused is refused before memory is taken.
"""

import hashlib
import json
import os
import secrets
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from ..layers.checkpoint import (
    Checkpoint,
    CheckpointError,
    check_names,
    dummy_weights,
    load_weights,
    weight_bytes,
)
from ..layers.context import Context
from ..layers.kv_pages import KVLayout, page_bytes, plan_layout
from ..layers.mesh import MODEL, make_mesh
from ..layers.models.config_reader import ConfigError as ModelConfigError
from ..layers.models.registry import ModelInfo, read_model
from ..layers.programs import Programs
from ..layers.quantization.plain import Plain
from ..pallas_kernels import registry
from ..pallas_kernels.attention_jnp import KEYS_PER_CHUNK
from . import memory
from .buckets import plan_buckets
from .compiler import default_cache_dir, open_cache
from .config import EngineConfig
from .core import EngineCore
from .errors import ConfigError, MemoryPlanError, ModelError, UnsupportedModel
from .model_source import ModelSource, find_model
from .runner import Runner
from .scheduler import Scheduler, SchedulerConfig
from .text.tokenizer import Tokenizer

_MAX_NUM_SEQS = {"cpu": 64, "cuda": 256}
_MAX_BATCHED_TOKENS = {"cpu": 1024, "cuda": 8192}
_PAGE_SIZE = {"cpu": 16, "cuda": 64}

Say = Callable[[str], None]


@dataclass(frozen=True)
class Engine:
    """A ready engine and what was found out on the way."""

    core: EngineCore
    tokenizer: Tokenizer
    source: ModelSource
    logits_width: int
    max_model_len: int
    default_sampling: dict[str, Any]  # of generation_config.json, in SamplingParams' names
    plan: memory.MemoryPlan


@dataclass(frozen=True)
class _Sizes:
    """The options that depend on the platform, resolved."""

    max_num_seqs: int
    max_num_batched_tokens: int
    page_size: int


def start_engine(config: EngineConfig, say: Say, *, depth: int = 1) -> Engine:
    """A warm engine. `say` is called with one line per phase. Raises UsageError."""
    started = time.perf_counter()
    if config.tensor_parallel_size != 1:
        raise ConfigError(
            f"tensor_parallel_size = {config.tensor_parallel_size} is not available: tensor "
            "parallelism is not "
            "implemented yet; use 1"
        )
    cache = open_cache(
        Path(config.cache_dir).expanduser() if config.cache_dir else default_cache_dir()
    )
    source = find_model(config.model, revision=config.revision, download_dir=config.download_dir)
    info = _read_model(source.folder, config)
    tokenizer = _load_tokenizer(source, config)
    defaults, eos_ids = _generation_defaults(source.folder, config, tokenizer, info)
    say(
        f"model {source.name}{f' at {source.revision[:12]}' if source.revision else ''} "
        f"({info.model_type}), {_shown(defaults)}"
    )
    platform = jax.default_backend()
    platform = "cuda" if platform == "gpu" else platform
    sizes = _Sizes(
        config.max_num_seqs or _MAX_NUM_SEQS[platform],
        config.max_num_batched_tokens or _MAX_BATCHED_TOKENS[platform],
        config.page_size or _PAGE_SIZE[platform],
    )
    dtype = _dtype(config, info)
    weight_format = Plain(dtype)
    checkpoint = None
    if config.load_format != "dummy":
        checkpoint = _model_errors(lambda: Checkpoint(source.folder))
        _model_errors(lambda: check_names(checkpoint, info.model.params(), info.model.is_unused))

    layout = plan_layout(info.model.kv_specs())
    num_pages, max_model_len = _plan_kv(config, info, layout, sizes, dtype, cache, say)
    ops = registry.choose(platform)
    mesh = make_mesh(config.tensor_parallel_size)
    programs = Programs(info.model, layout, sizes.page_size, Context(ops, MODEL))
    buckets = plan_buckets(
        platform,
        max_num_seqs=sizes.max_num_seqs,
        max_num_batched_tokens=sizes.max_num_batched_tokens,
        token_buckets=config.token_buckets,
        pages_per_row=_table_width(max_model_len, sizes.page_size),
        num_groups=layout.num_groups,
    )
    vocab = info.model.vocab_size
    num_logprobs = vocab if config.max_logprobs == -1 else min(config.max_logprobs, vocab)
    runner = Runner(
        programs, buckets, mesh, weight_format, num_pages=num_pages, num_logprobs=num_logprobs
    )
    # Without the programs' own needs, which compiling will tell: enough to refuse what cannot fit.
    memory.check_total(_memory_plan(runner, info, layout, sizes, weight_format))
    say(f"ops: {', '.join(f'{op} by {name}' for op, name in ops.names().items())}")

    with ThreadPoolExecutor(1, thread_name_prefix="weights") as pool:
        # Reading files and compiling need different things; they go side by side.
        loading = pool.submit(_weights, checkpoint, info, weight_format, mesh, config.seed)
        if not config.lazy_compile:
            report = runner.compile()
            say(report.line())
            _warn_of_useless_cache(cache, report.loaded, report.compiled, say)
        plan = _memory_plan(runner, info, layout, sizes, weight_format)
        for line in plan.lines(sizes.page_size):
            say(line)
        memory.check_total(plan)
        runner.set_weights(_model_errors(loading.result))
    runner.allocate()
    if not config.lazy_compile:
        runner.warm_up()
    scheduler = Scheduler(
        SchedulerConfig(
            page_size=sizes.page_size,
            num_pages=num_pages,
            num_slots=sizes.max_num_seqs,
            max_num_batched_tokens=sizes.max_num_batched_tokens,
            max_model_len=max_model_len,
            windows=layout.windows,
            enable_prefix_caching=config.enable_prefix_caching,
            secret=secrets.token_bytes(32),
        )
    )
    core = EngineCore(runner, scheduler, eos_ids=eos_ids, depth=depth)
    say(f"ready in {time.perf_counter() - started:.1f} s")
    return Engine(core, tokenizer, source, vocab, max_model_len, defaults, plan)


def _read_model(folder: Path, config: EngineConfig) -> ModelInfo:
    try:
        return read_model(folder, config.ignore_config_keys)
    except ModelConfigError as error:
        raise UnsupportedModel(str(error)) from error


def _model_errors(action: Callable[[], Any]) -> Any:
    """Run an action of the checkpoint reader; its errors become ours."""
    try:
        return action()
    except CheckpointError as error:
        raise ModelError(str(error)) from error


def _load_tokenizer(source: ModelSource, config: EngineConfig) -> Tokenizer:
    folder = source.folder
    if config.tokenizer is not None:
        folder = find_model(
            config.tokenizer, revision=config.tokenizer_revision, download_dir=config.download_dir
        ).folder
    template = config.chat_template
    if template is not None and "{" not in template:
        path = Path(template).expanduser()
        if not path.is_file():
            raise ConfigError(
                f"chat_template {template!r} is neither a file nor a Jinja template; give one of "
                "them"
            )
        template = path.read_text(encoding="utf-8")
    return Tokenizer.from_folder(folder, chat_template=template)


_SAMPLING_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def _generation_defaults(
    folder: Path, config: EngineConfig, tokenizer: Tokenizer, info: ModelInfo
) -> tuple[dict[str, Any], frozenset[int]]:
    """Sampling defaults in SamplingParams' names, and the end-of-sequence ids of all the model's
    files.
    """
    eos = set() if tokenizer.eos_token_id is None else {tokenizer.eos_token_id}
    generation: dict[str, Any] = {}
    for name in ("config.json", "generation_config.json"):
        path = folder / name
        if not path.is_file():
            continue
        try:
            generation = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ModelError(f"{path} is not valid JSON ({error}); download it again") from error
        ids = generation.get("eos_token_id")
        eos |= set(ids if isinstance(ids, list) else [] if ids is None else [ids])
    bad = [i for i in eos if not isinstance(i, int) or isinstance(i, bool)]
    if bad:
        raise ModelError(f"{folder}: eos_token_id must be token ids, got {bad}")
    defaults = {}
    if config.generation_config == "auto" and (folder / "generation_config.json").is_file():
        defaults = {k: generation[k] for k in _SAMPLING_DEFAULTS if generation.get(k) is not None}
        if generation.get("do_sample") is False:
            defaults["temperature"] = 0.0
        if generation.get("max_new_tokens") is not None:
            defaults["max_tokens"] = generation["max_new_tokens"]
    return defaults, frozenset(i for i in eos if 0 <= i < info.model.vocab_size)


def _shown(defaults: dict[str, Any]) -> str:
    if not defaults:
        return "no sampling defaults of its own"
    return "its sampling defaults: " + ", ".join(f"{k}={v}" for k, v in defaults.items())


_DTYPE_BY_NAME: dict[str, np.dtype[Any]] = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
}


def _dtype(config: EngineConfig, info: ModelInfo) -> np.dtype[Any]:
    name = config.dtype if config.dtype != "auto" else (info.dtype or "bfloat16")
    if name not in _DTYPE_BY_NAME:
        raise UnsupportedModel(
            f"the config's dtype {name!r} is not one of {', '.join(_DTYPE_BY_NAME)}; set dtype"
        )
    return _DTYPE_BY_NAME[name]


def _table_width(max_model_len: int, page_size: int) -> int:
    """Pages of one row's table: a multiple of what attention reads at once."""
    pages = -(-max_model_len // page_size)
    step = max(1, KEYS_PER_CHUNK // page_size)
    return -(-pages // step) * step


def _plan_kv(
    config: EngineConfig,
    info: ModelInfo,
    layout: KVLayout,
    sizes: _Sizes,
    dtype: np.dtype[Any],
    cache: Path,
    say: Say,
) -> tuple[int, int]:
    """The page count and the context length, lowered to what fits unless it was asked for."""
    asked = config.max_model_len if isinstance(config.max_model_len, int) else None
    if asked is not None and asked > info.max_position:
        raise ConfigError(
            f"max_model_len = {asked} is over the model's {info.max_position} "
            f"({info.max_position_reason}); "
            f"set it to at most {info.max_position}"
        )
    max_model_len = asked or info.max_position
    one_page = page_bytes(layout, sizes.page_size, dtype)
    budget = config.kv_cache_memory_bytes
    if budget is None:
        budget = memory.cpu_kv_budget(memory.host_memory())
    needed = -(-max_model_len // sizes.page_size) * layout.num_groups
    memo = memory.PageCountMemo(cache, _memo_key(config, info, sizes, dtype, max_model_len))
    wanted = memory.KVRequest(budget, one_page, needed, sizes.max_num_seqs)
    num_pages = memory.choose_num_pages(wanted, memo.read())
    fitting = memory.context_that_fits(num_pages, sizes.page_size, layout.num_groups)
    if asked is not None:
        memory.require_room(num_pages, needed, asked, fitting)
    elif fitting < max_model_len:
        if fitting < sizes.page_size:
            raise MemoryPlanError(
                f"not even one KV page of {memory.format_bytes(one_page)} per group fits in "
                f"{memory.format_bytes(budget)}; raise kv_cache_memory_bytes"
            )
        say(
            f"max_model_len lowered from {max_model_len} to {fitting}: that is what the KV cache "
            "holds; "
            "kv_cache_memory_bytes changes it"
        )
        max_model_len = fitting
    memo.write(num_pages)
    return num_pages, max_model_len


def _memo_key(
    config: EngineConfig, info: ModelInfo, sizes: _Sizes, dtype: np.dtype[Any], max_model_len: int
) -> str:
    facts = (
        repr(info.model.spec), sizes, dtype.name, max_model_len, config.kv_cache_memory_bytes,
        jax.__version__, jax.devices()[0].device_kind,
    )  # fmt: skip
    return hashlib.blake2b(repr(facts).encode(), digest_size=12).hexdigest()


def _memory_plan(
    runner: Runner, info: ModelInfo, layout: KVLayout, sizes: _Sizes, weight_format: Plain
) -> memory.MemoryPlan:
    return memory.MemoryPlan(
        weights=weight_bytes(info.model.params(), weight_format),
        rows=runner.row_bytes(),
        workspace=runner.workspace_bytes(),
        executables=runner.code_bytes(),
        num_pages=runner.num_pages,
        page_bytes=page_bytes(layout, sizes.page_size, weight_format.dtype),
        limit=memory.host_memory().total,
    )


def _weights(
    checkpoint: Checkpoint | None, info: ModelInfo, weight_format: Plain, mesh: Any, seed: int
) -> Any:
    params = info.model.params()
    if checkpoint is None:
        return dummy_weights(params, weight_format, mesh, seed)
    return load_weights(checkpoint, params, weight_format, mesh, info.model.is_unused)


def _warn_of_useless_cache(cache: Path, loaded: int, compiled: int, say: Say) -> None:
    """A cache that was filled by an equal start and gave nothing is worth a line."""
    marker = cache / "last_start"
    if compiled and not loaded and marker.is_file() and os.access(marker, os.R_OK):
        say(
            f"no program came from the compile cache {cache}: another configuration, version or "
            "processor"
        )
    marker.touch()
