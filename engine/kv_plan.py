"""How many KV pages there are, how long a context may be, and what depends on the platform."""

import hashlib
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax

from ..layers.kv_pages import KVLayout, page_bytes
from ..pallas_kernels.attention_jnp import KEYS_PER_CHUNK
from . import memory
from .config import EngineConfig
from .errors import ConfigError, MemoryPlanError
from .model_files import ModelFiles
from .page_pool import pages_held

_MAX_NUM_SEQS = {"cpu": 64, "cuda": 256}
_MAX_BATCHED_TOKENS = {"cpu": 1024, "cuda": 8192}
_PAGE_SIZE = {"cpu": 16, "cuda": 64}


@dataclass(frozen=True)
class Sizes:
    """The options whose default depends on the platform, resolved."""

    platform: str  # cpu or cuda
    max_num_seqs: int
    max_num_batched_tokens: int
    page_size: int

    @classmethod
    def resolve(cls, config: EngineConfig) -> "Sizes":
        backend = jax.default_backend()
        platform = "cuda" if backend == "gpu" else backend
        return cls(
            platform,
            config.max_num_seqs or _MAX_NUM_SEQS[platform],
            config.max_num_batched_tokens or _MAX_BATCHED_TOKENS[platform],
            config.page_size or _PAGE_SIZE[platform],
        )


@dataclass(frozen=True)
class KVPlan:
    """num_pages: of the pool, the null page included; table_width: pages of one row's table."""

    num_pages: int
    max_model_len: int
    table_width: int
    note: str | None = None  # what was lowered, for the start display


def table_width(max_model_len: int, page_size: int) -> int:
    """Pages of one row's table: a multiple of what attention reads at once."""
    pages = -(-max_model_len // page_size)
    step = max(1, KEYS_PER_CHUNK // page_size)
    return -(-pages // step) * step


def wanted_context(config: EngineConfig, files: ModelFiles) -> tuple[int, bool]:
    """The context length to plan for, and whether it was asked for. Raises ConfigError."""
    info = files.info
    if not isinstance(config.max_model_len, int):
        return info.max_position, False
    if config.max_model_len > info.max_position:
        raise ConfigError(
            f"max_model_len = {config.max_model_len} is over the model's {info.max_position} "
            f"({info.max_position_reason}); set it to at most {info.max_position}"
        )
    return config.max_model_len, True


def plan_kv(
    config: EngineConfig,
    files: ModelFiles,
    layout: KVLayout,
    sizes: Sizes,
    cache: Path,
    budget_bytes: Callable[[], int],
) -> KVPlan:
    """The page count and the context length, lowered to what fits unless it was asked for.

    budget_bytes: called when the option does not say it. Raises UsageError with the way out.
    """
    max_model_len, is_asked = wanted_context(config, files)
    one_page = page_bytes(layout, sizes.page_size, files.kv_dtype)
    budget = config.kv_cache_memory_bytes or budget_bytes()

    def pages_for(num_tokens: int) -> int:
        return pages_held(num_tokens, layout.windows, sizes.page_size, sizes.max_num_batched_tokens)

    needed = pages_for(max_model_len)
    memo = memory.PageCountMemo(cache, _memo_key(config, files, sizes, max_model_len))
    wanted = memory.KVRequest(budget, one_page, needed, sizes.max_num_seqs)
    num_pages = memory.choose_num_pages(wanted, memo.read())
    fitting = longest_context(num_pages, max_model_len, sizes.page_size, pages_for)
    note = None
    if is_asked:
        memory.require_room(num_pages, needed, max_model_len, fitting)
    elif fitting < max_model_len:
        if fitting < sizes.page_size:
            raise MemoryPlanError(
                f"not even one KV page of {memory.format_bytes(one_page)} per group fits in "
                f"{memory.format_bytes(budget)}; raise kv_cache_memory_bytes"
            )
        note = (
            f"max_model_len lowered from {max_model_len} to {fitting}, which is what the KV cache "
            "holds; kv_cache_memory_bytes changes it"
        )
        max_model_len = fitting
    memo.write(num_pages)
    return KVPlan(num_pages, max_model_len, table_width(max_model_len, sizes.page_size), note)


def longest_context(
    num_pages: int, max_model_len: int, page_size: int, pages_for: Callable[[int], int]
) -> int:
    """The longest sequence, in whole pages, that fits the pool alone; at most max_model_len."""
    if pages_for(max_model_len) < num_pages:
        return max_model_len
    lengths = range(0, max_model_len, page_size)
    num_fitting = bisect_right(lengths, num_pages - 1, key=pages_for)
    return lengths[num_fitting - 1] if num_fitting else 0


def gpu_kv_budget(limit: int, weights: int, rows: int, workspace: int) -> int:
    """What the rest leaves of the bytes that may be used on each GPU."""
    budget = limit - weights - rows - workspace
    if budget <= 0:
        raise MemoryPlanError(
            f"weights ({memory.format_bytes(weights)}), rows ({memory.format_bytes(rows)}) and "
            f"workspace ({memory.format_bytes(workspace)}) leave nothing of "
            f"{memory.format_bytes(limit)} for the KV cache; raise gpu_memory_utilization or "
            "tensor_parallel_size, or lower max_num_batched_tokens"
        )
    return budget


def _memo_key(config: EngineConfig, files: ModelFiles, sizes: Sizes, max_model_len: int) -> str:
    facts = (
        repr(files.info.model.spec), sizes, files.dtype.name, max_model_len,
        config.kv_cache_memory_bytes, config.gpu_memory_utilization, config.tensor_parallel_size,
        jax.__version__,
        jax.devices()[0].device_kind,
    )  # fmt: skip
    return hashlib.blake2b(repr(facts).encode(), digest_size=12).hexdigest()
